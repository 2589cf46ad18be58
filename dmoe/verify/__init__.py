"""`dmoe verify`: check on the user's config that one process and N ranks train the same model.

verify.py     runs the ranks, makes the report        compare.py    two captures -> table rows
cases.py      worlds, EP sizes, exchanges, modes;     causes.py     a difference -> likely cause
              the small config                        decisions.py  float32: inputs of each choice
capture.py    everything a step produces, as arrays   ties.py       float32: rounding, or an error?
naive/        the layer by loops and dense sums: the reference
"""
