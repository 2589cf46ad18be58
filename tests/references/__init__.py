"""Plain reference implementations, against which the fast ones are tested."""
