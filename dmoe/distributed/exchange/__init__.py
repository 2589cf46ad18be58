"""Options of the exchange of tokens (`parallel.exchange`), and its measurement.

overlap.py          exchanges that run beside other work
chunks.py           exchanges in chunks of local experts
two_level.py        inside the nodes first, then between them
once_per_rank.py    a token is sent once per rank, not once per choice
deep_ep.py          the exchange by a library of the kind of DeepEP
comm_timer.py       time and bytes
"""
