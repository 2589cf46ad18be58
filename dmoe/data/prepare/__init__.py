"""Prepare a corpus: `dmoe data prepare`. Constant memory, several processes, resumable.

run.py        prepare_shards: the whole of it       source.py     documents of data.source
parts.py      what is in which part and split       documents.py  content in blocks, hashes
cutting.py    pieces of a long document             part_file.py  a part, encoded, in one file
workers.py    the processes that encode             worker.py     one of them
collect.py    parts become shards
"""

from __future__ import annotations

from dmoe.data.prepare.run import Progress, prepare_shards

__all__ = ["Progress", "prepare_shards"]
