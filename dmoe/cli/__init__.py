"""Command line: one file per command, and one for the commands on existing runs."""
