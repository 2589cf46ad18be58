"""`dmoe bench`: speed and cost against the bare matrix products and the installed libraries.

Each module has `run(...)`, which measures and returns a plain dict: `machine`, `rows` (one dict per
contender) and what else it found. `dmoe/cli/bench.py` prints it.

layer.py      one layer, forward and backward        measure.py    rounds, quartiles, counters
exchange.py   the layer of two ranks and more        libraries.py  other libraries
step.py       the whole training step
breakdown.py  where a layer's time goes
"""
