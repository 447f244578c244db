"""Proofs that take minutes: resuming after kills, Slurm, memory, damaged files (results in docs/reliability.md)."""
