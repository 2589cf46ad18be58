"""Process groups, expert and data parallelism, launching of ranks."""
