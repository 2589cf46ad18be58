"""Run directories: paths, lock, restart record, metrics file."""
