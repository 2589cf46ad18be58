"""`data.eval_source`: documents that are only evaluated, all of them but those that training sees, itself or a twin (corpus.py).

So a model can be tried on what it was not trained for: a language it has no module for, or two transformations at once. A domain that
training has too keeps its label (more held-out text of it); others get labels after the training's, which therefore stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Document
from dmoe.data.packing import Runs, domain_runs, token_chunks
from dmoe.data.sources import read_corpus
from dmoe.data.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Evaluated:
    """The token stream of these documents, without the separator that opens it; empty if there are none."""

    part: np.ndarray
    runs: Runs
    domains: tuple[str, ...]
    """All that labels number, the training's first."""
    eval_only: tuple[str, ...]
    notes: tuple[str, ...]

    def after(self, parts: Sequence[np.ndarray], runs: Runs) -> tuple[list[np.ndarray], Runs]:
        """A held-out stream and its runs, with this behind it."""
        if not len(self.part):
            return list(parts), runs
        # The last separator of the stream before is the one that opens this one.
        opening = sum(len(part) for part in parts) - 1
        return [*parts, self.part], (
            *runs,
            *((opening + begin, label) for begin, label in self.runs),
        )


def read_evaluated(
    source: str | None,
    trained: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    domains: tuple[str, ...],
) -> Evaluated:
    """Read `data.eval_source`. `trained` and `held_out` are the documents of data.source, `domains` theirs, in order.

    Raises ConfigError on data.eval_source: what read_corpus refuses, or nothing that may be evaluated and was not already.
    """
    if source is None:
        return Evaluated(np.zeros(0, dtype=np.int64), (), domains, (), ())
    corpus = read_corpus(source, "data.eval_source")
    keys, contents = (
        {document.key for document in trained},
        {document.content for document in held_out},
    )
    documents = [
        document
        for document in corpus.documents
        if document.key not in keys and document.content not in contents
    ]
    if not documents:
        raise ConfigError(
            "data.eval_source",
            source,
            "must hold text that data.source has not, nor the like of it",
            "name other text, or leave it out",
        )
    names = [document.domain for document in documents]
    eval_only = tuple(sorted({*names} - {*domains}))
    chunks = list(token_chunks((document.content for document in documents), tokenizer))[1:]
    runs = domain_runs([len(chunk) for chunk in chunks], names, (*domains, *eval_only))
    size = sum(len(document.content) for document in documents) / 1e6
    notes = [f"only evaluated: {source}, {len(documents)} files, {size:.2f} MB", *corpus.notes]
    if left := len(corpus.documents) - len(documents):
        notes.append(
            f"{left} of its files left out, since data.source has them or the like of them"
        )
    return Evaluated(np.concatenate(chunks), runs, (*domains, *eval_only), eval_only, tuple(notes))
