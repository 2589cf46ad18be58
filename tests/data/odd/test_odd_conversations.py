"""Conversations and chat templates that something is wrong with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]


def config_of(folder: Path, rows: list[dict[str, str]], template: str = "chatml") -> DataConfig:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(str(path), format="instruct", chat_template=template, seq_len=128)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ 10**400 * 1.0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_in_python_is_named(tmp_path: Path, source: str) -> None:
    """A division by zero or an endless macro in a template was a traceback, without the line."""
    (tmp_path / "bad.jinja").write_text(source)
    with pytest.raises(ConfigError, match=r"bad\.jinja: cannot write .*chats\.jsonl line 1"):
        open_data(config_of(tmp_path, ROWS, str(tmp_path / "bad.jinja")), 0)


def test_half_of_a_surrogate_pair_is_refused_as_in_text(tmp_path: Path) -> None:
    """It was encoded as three bytes that are no UTF-8, and trained on."""
    rows = [*ROWS, {"prompt": "a", "completion": "b\ud800"}]
    with pytest.raises(ConfigError, match="line 21, message 2 has half of a surrogate pair"):
        open_data(config_of(tmp_path, rows), 0)


def test_nul_bytes_that_are_removed_are_counted(tmp_path: Path) -> None:
    """The tokenizer removes them; text says how many, and conversations said nothing."""
    rows = [*ROWS, {"prompt": "a\0", "completion": "b\0c"}]
    assert "NUL bytes removed (2)" in open_data(config_of(tmp_path, rows), 0).summary
