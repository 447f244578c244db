"""What users run beside the programs: launch scripts and small tools (python -m script.NAME)."""
