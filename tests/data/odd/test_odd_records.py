"""Files of records whose header or labels are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data
from dmoe.data.formats.csv_rows import number_or_none

TEXT = "a document is longer than the name of a column and says what the column holds"


def test_a_csv_without_a_header_does_not_lose_its_first_document(tmp_path: Path) -> None:
    """Its first document became the name of the column, and was not trained on."""
    path = tmp_path / "t.csv"
    path.write_text("".join(f"{n},{n} {TEXT}\n" for n in range(20)))
    with pytest.raises(ConfigError, match="whose first line, the header, reads as text"):
        open_data(DataConfig(str(path), seq_len=16), 0)
    path.write_text("id,body\n" + path.read_text())
    assert "20 documents" in open_data(DataConfig(str(path), seq_len=16), 0).summary


@pytest.mark.parametrize("label", ["b\ud800", "b\nc", "b\x1b[31m"])
@pytest.mark.parametrize("format", ["text", "instruct", "table"])
def test_a_label_can_be_printed(tmp_path: Path, format: str, label: str) -> None:
    """Half of a surrogate pair ended the run where its name was printed; a line break made two
    lines of the summary, and an escape sequence reached the terminal."""
    path = tmp_path / "t.jsonl"
    row = {"text": TEXT, "prompt": TEXT, "completion": TEXT, "kind": label, "n": 1}
    path.write_text(json.dumps(row) + "\n")
    if format == "table":
        from tests.data.odd.test_odd_tables import open_file

        with pytest.raises(ConfigError, match="line 1 has no label in 'kind'"):
            open_file(path, "data.columns=[n]")
        return
    more = {"format": "instruct", "chat_template": "chatml"} if format == "instruct" else {}
    with pytest.raises(ConfigError, match="line 1 has no label in 'kind'"):
        open_data(DataConfig(str(path), label_field="kind", seq_len=16, **more), 0)  # type: ignore[arg-type]


def test_a_name_with_an_underscore_is_no_number() -> None:
    """Python reads `1_2` as 12, so a column of names became a feature."""
    assert number_or_none("1_2") is None
    assert number_or_none(" 1e3 ") == (1000.0,)
