from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data, prepare_shards
from dmoe.data.shards import verify_shards
from dmoe.data.tokenizers import byte_tokenizer

Body = dict[str, Any]  # index.json as read by json


@pytest.fixture
def config(texts: Path) -> DataConfig:
    return DataConfig(source=str(texts), seq_len=16, holdout=0.2)


@pytest.fixture
def shards(config: DataConfig, tmp_path: Path) -> Path:
    prepare_shards(config, tmp_path / "shards", shard_tokens=5000)
    return tmp_path / "shards"


def test_shards_give_exactly_the_data_of_the_text(config: DataConfig, shards: Path) -> None:
    text, mapped = (
        open_data(config, 3),
        open_data(replace(config, source=str(shards), document_mask=False), 3),
    )
    assert len(list(shards.glob("train-*.bin"))) > 3
    assert mapped.fingerprint == text.fingerprint
    assert mapped.train.num_sequences == text.train.num_sequences
    assert np.array_equal(mapped.train.batch(5, 0, 64, 64), text.train.batch(5, 0, 64, 64))
    assert np.array_equal(mapped.held_out.samples(0, 10), text.held_out.samples(0, 10))
    assert "60 files" in mapped.describe()
    assert "holdout 0.2" in mapped.describe()


def test_another_tokenizer_is_refused(config: DataConfig, shards: Path, rank_file: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"data.tokenizer=.*must be the tokenizer of the shards in .*, bytes",
    ):
        open_data(replace(config, source=str(shards), tokenizer=str(rank_file)), 0)


def test_large_vocabularies_are_stored_in_32_bits(config: DataConfig, tmp_path: Path) -> None:
    """A tokenizer of 70,000 entries, of which the text uses those of bytes."""
    given = replace(byte_tokenizer(), pieces=(b"", *(bytes([n % 256]) for n in range(1, 70_000))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmoe.data.prepare.run.open_tokenizer", lambda _: given)
        index = prepare_shards(config, tmp_path / "a")
    assert index.dtype == np.dtype("<u4")
    assert (tmp_path / "a" / "train-00000.bin").read_bytes()[:8] == b"\0\0\0\0t\0\0\0"


def test_shards_of_an_older_version_have_no_boundaries(config: DataConfig, shards: Path) -> None:
    body = json.loads((shards / "index.json").read_text())
    for split in body["splits"].values():
        (shards / split.pop("boundaries")["file"]).unlink()
    (shards / "index.json").write_text(json.dumps(body))
    config = replace(config, source=str(shards))
    assert not open_data(config, 0).document_mask
    verify_shards(shards)
    with pytest.raises(ConfigError, match="needs the boundaries of documents"):
        open_data(replace(config, document_mask=True), 0)


def test_a_directory_in_use_is_refused(config: DataConfig, shards: Path) -> None:
    with pytest.raises(ConfigError, match="holds shards already"):
        prepare_shards(config, shards)
    with pytest.raises(ConfigError, match="must be text to be prepared"):
        prepare_shards(replace(config, source=str(shards)), shards.parent / "again")
    with pytest.raises(ConfigError, match=r"data.format=instruct: is not prepared"):
        prepare_shards(replace(config, format="instruct"), shards.parent / "again")


def first(body: Body) -> Any:
    return body["splits"]["train"]["shards"][0]


def swap_name(name: object) -> Callable[[Body], None]:
    return lambda body: first(body).update(file=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_name("../train-00000.bin"), "must be a plain name"),
        (swap_name("/etc/passwd"), "must be a plain name"),
        (swap_name("a\\b.bin"), "must be a plain name"),
        (swap_name(".bin"), "must be a plain name"),
        (swap_name(7), "must be a plain name"),
        (swap_name("absent.bin"), "absent.bin is missing"),
        (lambda b: first(b).update(tokens=first(b)["tokens"] + 1), "tokens are not"),
        (lambda b: first(b).update(tokens=6000, bytes=12000), "has 10000 bytes instead of 12000"),
        (lambda b: first(b).update(tokens=-1, bytes=-2), "tokens -1"),
        (lambda b: first(b).update(tokens=True), "tokens True"),
        (lambda b: first(b).update(sha256="abc"), "sha256 'abc'"),
        (lambda b: b.update(dtype="float64"), "'float64'"),
        (lambda b: b.update(dtype=["x"]), "is wrong at"),
        (lambda b: b.update(version=2), "must be shards of version 1, but is 2"),
        (lambda b: b.update(format="other"), "not of format dmoe-shards"),
        (lambda b: b.update(holdout=2.0), "holdout"),
        (lambda b: b.update(tokenizer=None), "tokenizer"),
        (lambda b: b["splits"].pop("held_out"), "held_out"),
        (lambda b: b["splits"]["train"]["boundaries"].update(file="../x.bin"), "a plain name"),
        (lambda b: b["splits"]["train"]["boundaries"].update(documents=1), "instead of 8"),
        (lambda b: b.update(splits=[]), "is wrong at"),
    ],
)
def test_a_damaged_index_is_refused(
    config: DataConfig, shards: Path, change: Callable[[Body], None], message: str
) -> None:
    body = json.loads((shards / "index.json").read_text())
    change(body)
    (shards / "index.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match=message) as error:
        open_data(replace(config, source=str(shards)), 0)
    assert error.value.field == "data.source"


def test_an_index_that_is_no_json_is_refused(config: DataConfig, shards: Path) -> None:
    (shards / "index.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_data(replace(config, source=str(shards)), 0)


def test_links_and_short_files_are_refused(config: DataConfig, shards: Path) -> None:
    file = shards / "train-00000.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    with pytest.raises(ConfigError, match="has 9998 bytes instead of 10000"):
        open_data(replace(config, source=str(shards)), 0)
    file.unlink()
    (shards.parent / "real.bin").write_bytes(data)
    file.symlink_to(shards.parent / "real.bin")
    with pytest.raises(ConfigError, match="missing or not a plain file"):
        open_data(replace(config, source=str(shards)), 0)


def test_changed_content_is_found(shards: Path) -> None:
    verify_shards(shards)
    file = shards / "train-00001.bin"
    data = bytearray(file.read_bytes())
    data[17] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"the content of train-00001.bin has changed"):
        verify_shards(shards)


def test_shards_in_another_order_are_found(shards: Path) -> None:
    body = json.loads((shards / "index.json").read_text())
    listed = body["splits"]["train"]["shards"]
    listed[0], listed[1] = listed[1], listed[0]
    (shards / "index.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="SHA-256 of its stream"):
        verify_shards(shards)
