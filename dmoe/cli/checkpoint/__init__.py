"""The commands `dmoe checkpoint ...`."""
