"""The configuration: schema, loading, checks. Imports nothing of dmoe and never torch, so that a typo is refused at once."""
