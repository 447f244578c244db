"""The cases of tests/proofs/attack.py, a module for each kind of target."""
