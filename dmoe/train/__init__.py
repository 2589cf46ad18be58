"""The training run: step, evaluation, checkpoints, metrics."""
