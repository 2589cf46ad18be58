"""`dmoe bench`: speed and cost against the bare matrix products and the installed libraries.

Each module has `run(...)`, which measures and returns a plain dict: `machine`, `rows` (one dict per
contender) and what else it found. `dmoe/cli/bench.py` prints it.

layer.py      one layer, forward and backward        measure.py    rounds, quartiles, counters
exchange.py   the layer of two ranks and more        options.py    options with rules of their own
step.py       the whole training step                libraries.py  other libraries: mixtral_block.py
balance.py    ranks under workloads                                and more_libraries.py build them
breakdown.py  where a layer's time goes              contender.py  what a round times
"""
