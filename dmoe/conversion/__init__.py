"""Runs made from other models and from other runs: upcycled, pruned, imported, exported."""
