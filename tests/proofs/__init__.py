"""Proofs that take minutes: kills, Slurm, memory, damaged files. Their output is in docs/reliability.md."""
