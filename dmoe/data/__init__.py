"""Text in, deterministic batches of tokens out. Imports numpy but not torch; knows no ranks.

dataset.py       open_data: the datasets of a run     order.py        shuffled order, random numbers
sources.py       the documents that data.* names      mixture.py      domains drawn by temperature
formats/         files of text and of records         shards.py       token streams on disk
files.py         which files are read                 shard_index.py  their index.json
corpus.py        documents, duplicates                synthetic.py    endless datasets
splits.py        training and held-out documents      tables/         samples for classification
eval_source.py   text that is only evaluated          packing.py      token stream -> sequences
debian_guide.py  the Debian installation guide        tokenizers/     bytes, .json, tiktoken
instruct/        conversations                        sequences/      datasets and their masks
token_files.py   nanoGPT, Megatron                    token_streams.py shards, files of tokens
prepare/         dmoe data prepare, inspect           domain_weights.py domains drawn by weight
"""

from __future__ import annotations

from dmoe.data.dataset import open_data, open_documents
from dmoe.data.mixture import task_weights, tasks_of_step
from dmoe.data.prepare import prepare_shards
from dmoe.data.sequences.token_dataset import DatasetSplits, TokenDataset
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
