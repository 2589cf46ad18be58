"""Hugging Face datasets by name: `hf:NAME`, `hf:NAME#CONFIG`, `hf:NAME@SPLIT`.

NAME is a dataset of the hub, from the cache where there is no network, or a local directory laid
out as on the hub. The dataset is map-style and read in its stored order: shuffling, mixing and
shards are dmoe's, which do not depend on the number of ranks. A script of the dataset is not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.data.formats.arrow_rows import ArrowRows
from dmoe.data.formats.errors import optional_library, unreadable
from dmoe.data.formats.rows import HUB, Row

_BATCH = 1000


class HubRows:
    """`Rows` of a dataset, which is loaded (and downloaded, if need be) at once."""

    def __init__(self, entry: str, origin: str) -> None:
        library = optional_library("datasets", origin, entry, "a Hugging Face dataset")
        name, config, split = parse_name(entry)
        if not name:
            raise unreadable(origin, entry, "must name a dataset", "use hf:NAME")
        try:
            library.disable_progress_bars()
            builder = library.load_dataset_builder(name, config)
            splits = sorted(builder.info.splits or ())
            if splits and split not in splits:
                reason = f"has no split {split}, but {', '.join(splits)}"
                fix = f"name one of them: {HUB}{name}@{splits[0]}"
                raise unreadable(origin, entry, reason, fix)
            dataset = library.load_dataset(name, config, split=split)
        except ConfigError:
            raise
        except Exception as error:  # of many kinds: network, layout, a config that is missing
            lines = str(error).splitlines() or [""]
            reason = f"cannot be loaded ({type(error).__name__}: {lines[0][:200].rstrip('.')})"
            fix = "check the name; without a network, name a local directory or a saved dataset"
            raise unreadable(origin, entry, reason, fix) from error
        self._rows = ArrowRows(
            entry, origin, dataset.data.schema, lambda names: _batches(dataset, names)
        )

    @property
    def columns(self) -> Mapping[str, str]:
        return self._rows.columns

    def __call__(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        return self._rows(names)


def parse_name(entry: str) -> tuple[str, str | None, str]:
    """Split `hf:NAME#CONFIG@SPLIT` into name, config (None: the only one) and split (train)."""
    rest = entry.removeprefix(HUB)
    rest, _, split = rest.partition("@")
    name, _, config = rest.partition("#")
    return name, config or None, split or "train"


def _batches(dataset: Any, names: Sequence[str] | None) -> Iterator[Any]:
    chosen = dataset if names is None else dataset.select_columns(list(names))
    for table in chosen.with_format("arrow").iter(_BATCH):
        yield from table.to_batches()
