"""Where experts are computed: moves between ranks, and copies for one step."""
