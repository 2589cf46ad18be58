"""Text in, deterministic batches of tokens out. Imports numpy but not torch; knows no ranks.

dataset.py       open_data: the datasets of a run     order.py        shuffled order, random numbers
sources.py       data.source, data.eval_source        mixture.py      domains drawn by temperature
files.py         which files are text                 shards.py       token streams on disk
corpus.py        documents, duplicates, hold-out      shard_index.py  their index.json
debian_guide.py  the Debian installation guide        synthetic.py    endless datasets
packing.py       token stream -> sequences            tables.py       samples for classification
instruct/        conversations                        sequences/      datasets and their masks
splits.py        training and held-out documents      tokenizers/     bytes, .json, tiktoken
formats/         text and records of any file
"""

from __future__ import annotations

from dmoe.data.dataset import open_data, open_documents
from dmoe.data.mixture import task_weights, tasks_of_step
from dmoe.data.sequences.token_dataset import DatasetSplits, TokenDataset
from dmoe.data.shards import prepare_shards
from dmoe.data.tokenizers import Tokenizer, open_tokenizer

__all__ = [
    "DatasetSplits",
    "TokenDataset",
    "Tokenizer",
    "open_data",
    "open_documents",
    "open_tokenizer",
    "prepare_shards",
    "task_weights",
    "tasks_of_step",
]
