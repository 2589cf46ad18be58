"""Text that is only evaluated: `data.eval_source`.

It names documents such as a language without a module, or two transformations at once. Documents
that are in data.source, or share a group key with one that is trained on (corpus.py), are left out.
A domain that training has too keeps its label and gets more held-out text; labels of other domains
come after those of training, which do not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Document, count_documents
from dmoe.data.formats import RecordFields
from dmoe.data.packing import DomainRuns, domain_runs, token_chunks
from dmoe.data.sources import read_corpus
from dmoe.data.tokenizers import Tokenizer, encoding_notes


@dataclasses.dataclass(frozen=True)
class EvalOnlyText:
    """Token stream of the documents that are only evaluated; empty if there are none."""

    token_N: np.ndarray
    """Without the separator that opens a stream."""
    runs: DomainRuns
    domains: tuple[str, ...]
    """All domains by label; those of training come first."""
    eval_only: tuple[str, ...]
    """The domains that training does not have."""
    notes: tuple[str, ...]

    def append_to(
        self, arrays: Sequence[np.ndarray], runs: DomainRuns
    ) -> tuple[list[np.ndarray], DomainRuns]:
        """Append this token stream and its runs to those of a held-out split."""
        if not len(self.token_N):
            return list(arrays), runs
        # The last separator of the stream so far opens this one, so positions count from there.
        offset = sum(len(array) for array in arrays) - 1
        shifted = tuple((offset + start, label) for start, label in self.runs)
        return [*arrays, self.token_N], (*runs, *shifted)


def read_eval_only(
    source: str | None,
    fields: RecordFields,
    train: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    domains: tuple[str, ...],
) -> EvalOnlyText:
    """Read and tokenize `data.eval_source`.

    Args:
        source: data.eval_source; None gives no text.
        fields: data.text_field and data.label_field.
        train: training documents of data.source.
        held_out: held-out documents of data.source.
        tokenizer: of the run.
        domains: domains of data.source, by label.

    Raises:
        ConfigError: on data.eval_source: what `read_corpus` refuses, or no document is left.
    """
    if source is None:
        return EvalOnlyText(np.zeros(0, dtype=np.int64), (), domains, (), ())
    corpus = read_corpus(source, dataclasses.replace(fields, origin="data.eval_source"))
    train_keys = {document.split_key for document in train}
    held_out_contents = {document.content for document in held_out}
    documents = [
        document
        for document in corpus.documents
        if document.split_key not in train_keys and document.content not in held_out_contents
    ]
    if not documents:
        raise ConfigError(
            "data.eval_source",
            source,
            "must hold text that is not in data.source, nor a translation or transform of it",
            "name other text, or leave it out",
        )
    names = [document.domain for document in documents]
    eval_only = tuple(sorted({*names} - {*domains}))
    chunks = list(token_chunks((document.content for document in documents), tokenizer))[1:]
    runs = domain_runs([len(chunk) for chunk in chunks], names, (*domains, *eval_only))
    size = sum(len(document.content) for document in documents) / 1e6
    notes = [
        f"evaluation only: {source}, {count_documents(documents)}, {size:.2f} MB",
        *corpus.notes,
        *encoding_notes((document.content for document in documents), tokenizer),
    ]
    unit = "files" if corpus.num_files == len(corpus.documents) else "documents"
    if excluded := len(corpus.documents) - len(documents):
        notes.append(f"{unit} that data.source has, or a version of them, left out ({excluded})")
    token_N = np.concatenate(chunks)
    return EvalOnlyText(token_N, runs, (*domains, *eval_only), eval_only, tuple(notes))
