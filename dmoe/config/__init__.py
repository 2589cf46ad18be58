"""The config: schema, loading, rules. Imports no torch, so that errors in a config are fast."""
