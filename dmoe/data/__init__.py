"""Text in, deterministic batches of tokens out: corpora, tokenizers, order, shards. Knows numpy, not torch, and no ranks.

sources.py    where documents come from          tokenizer*.py  bytes, tokenizers .json, tiktoken ranks
guide*.py     the installation guide, by language transforms.py a domain from another: capitals
corpus.py     documents, duplicates, hold-out    packing.py     documents -> token stream -> sequences
order.py      which sequence is sample i of s    mix*.py        the same, where domains are drawn by weight
held_out.py   in which order they are evaluated  evaluated.py   documents that are only evaluated
counter.py    random numbers without a state     shards.py      the token stream on disk (index: shard_index.py)
labels.py     which domain a sequence starts in  synthetic.py   endless streams with a known best loss
stream.py     open_data: all of it together      table.py       no text: vectors and classes (features.py, clusters.py)
"""

from __future__ import annotations

from dmoe.data.dataset import DatasetSplits, TokenDataset, open_data, prepare_shards
from dmoe.data.mixture import task_weights, tasks_of_step
from dmoe.data.tokenizers import Tokenizer, open_tokenizer

__all__ = [
    "DatasetSplits",
    "TokenDataset",
    "Tokenizer",
    "open_data",
    "open_tokenizer",
    "prepare_shards",
    "task_weights",
    "tasks_of_step",
]
