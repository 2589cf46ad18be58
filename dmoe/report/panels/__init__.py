"""The panels of the report page, by topic."""
