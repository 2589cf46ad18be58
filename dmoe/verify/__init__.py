"""`dmoe verify`: proof, on the user's own config, that one process and N ranks train the same model.

cases.py    what is compared: worlds, EP sizes, exchanges, modes      shrink.py   the config, small enough for two minutes
naive.py    the layer by loops and dense sums: what everything is      capture.py  everything a step produces, as arrays
            compared with                                              compare.py  two captures -> rows of a table
causes.py   a difference -> its likeliest cause, in words              verify.py   runs the ranks, makes the report
naive_*.py  its experts, routing, queue and losses
decisions.py  float32: what every choice was made from                 ties.py     float32: is another choice rounding, or an error?
"""
