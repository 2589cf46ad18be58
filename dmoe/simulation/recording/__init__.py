"""A step on tensors without memory: its kernels, collectives and live bytes (`dry_run.py`)."""
