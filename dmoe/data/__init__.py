"""Text in, deterministic batches of tokens out: corpora, tokenizers, order, shards. Knows numpy, not torch, and no ranks.

sources.py    where documents come from          tokenizer*.py  bytes, tokenizers .json, tiktoken ranks
corpus.py     documents, duplicates, hold-out    packing.py     documents -> token stream -> sequences
order.py      which sequence is sample i of s    shards.py      the token stream on disk (index: shard_index.py)
counter.py    random numbers without a state     synthetic.py   endless streams with a known best loss
stream.py     open_data: all of it together         labels.py     which domain a sequence starts in
"""

from __future__ import annotations

from dmoe.data.stream import Data, Stream, open_data, prepare_shards
from dmoe.data.tokenizer import Tokenizer, open_tokenizer

__all__ = ["Data", "Stream", "Tokenizer", "open_data", "open_tokenizer", "prepare_shards"]
