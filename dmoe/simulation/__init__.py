"""Simulation: what a config will do on ranks that are not there, by the code that would run."""
