"""The config: schema, loading, rules. Imports neither torch nor the rest of dmoe, so errors are fast."""
