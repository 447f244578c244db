"""The tests, a file a module; tests/proofs holds the longer ones."""
