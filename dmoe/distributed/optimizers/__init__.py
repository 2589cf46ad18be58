"""Optimizers that dmoe brings itself."""
