"""Launch scripts and small tools that users run beside the programs, as python -m script.NAME."""
