"""Answers about a run before it is started: what it needs, what it takes, what it drops."""
