"""Launch scripts and small tools that users run besides the programs, as python -m script.NAME."""
