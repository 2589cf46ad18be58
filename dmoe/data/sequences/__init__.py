"""Sequences of a run: their datasets, the order of evaluation, documents, answers and padding.

token_dataset.py  the datasets of a run, as its trainer sees them
streams.py        token streams of both splits -> datasets
held_out.py       the order in which held-out sequences are evaluated
token_masks.py    documents that do not see each other; answers; padding
"""
