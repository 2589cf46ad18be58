"""Prepared shards hold what the text holds, whatever the sizes of parts and pieces."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.schema import Config, DataConfig
from dmoe.data import open_data, open_tokenizer
from dmoe.data.prepare import Progress, prepare_shards
from dmoe.data.prepare import documents as documents_module
from dmoe.data.prepare.documents import DigestSet
from dmoe.data.shard_index import SPLITS, read_index
from dmoe.data.shards import map_documents, map_shards, verify_shards
from tests.data.conftest import text_of_file

PARTS, SHARDS = 1500, 300


def prepare(config: DataConfig, out: Path, **more: object) -> Path:
    options = {"shard_tokens": SHARDS, "part_bytes": PARTS, "piece_bytes": 64} | more
    prepare_shards(config, out, **options)  # type: ignore[arg-type]
    return out


def files_of(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def check_equal(config: DataConfig, shards: Path) -> None:
    """The shards give the sequences of the text, and their boundaries are at the separators."""
    keep: Any = {"text_field": None, "label_field": None, "validation_source": None}
    mask: Any = {"document_mask": False}
    text = open_data(config, 3)
    mapped = open_data(replace(config, source=str(shards), **keep, **mask), 3)
    assert mapped.fingerprint == text.fingerprint or config.validation_source is not None
    assert mapped.domains == text.domains
    assert mapped.train.num_sequences == text.train.num_sequences
    assert np.array_equal(mapped.train.batch(5, 0, 64, 64), text.train.batch(5, 0, 64, 64))
    assert np.array_equal(mapped.train.labels(5, 0, 64, 64), text.train.labels(5, 0, 64, 64))
    held_out = range(text.held_out.num_sequences or 0)
    assert np.array_equal(
        mapped.held_out.samples(0, len(held_out)), text.held_out.samples(0, len(held_out))
    )
    index, separator = read_index(shards), open_tokenizer(config).separator
    for name in SPLITS:
        tokens = np.concatenate(map_shards(shards, index, name))
        starts = map_documents(shards, index, name)
        # every separator but the last opens a document
        assert np.array_equal(starts, np.flatnonzero(tokens == separator)[:-1])
    verify_shards(shards)


@pytest.mark.parametrize("tokenizer", ["bytes", "rank_file"])
@pytest.mark.parametrize("count", [60, 3])
def test_shards_give_the_data_of_the_text(
    tmp_path: Path, tokenizer: str, count: int, request: pytest.FixtureRequest
) -> None:
    """From 50 documents on whole ones are held out, of fewer the end of each."""
    for number in range(count):
        domain = tmp_path / ("odd" if number % 2 else "even")
        domain.mkdir(exist_ok=True)
        (domain / f"{number:02d}.txt").write_text(text_of_file(number, 60), encoding="utf-8")
    (domain / "copy.txt").write_text(text_of_file(count - 1, 60), encoding="utf-8")
    name = tokenizer if tokenizer == "bytes" else str(request.getfixturevalue(tokenizer))
    source = f"{tmp_path}/odd,{tmp_path}/even"
    config = DataConfig(source=source, seq_len=16, holdout=0.2, tokenizer=name)
    shards = prepare(config, tmp_path / "shards")
    assert len(list(shards.glob("train-*.bin"))) > 2
    check_equal(config, shards)
    notes = read_index(shards).notes
    assert all(note in open_data(config, 0).describe() for note in notes)
    assert any("duplicate or empty files left out (1)" in note for note in notes)


def test_records_labels_and_a_validation_source(tmp_path: Path) -> None:
    records = [{"body": text_of_file(n, 30), "of": f"kind {n % 3}"} for n in range(70)]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "valid.jsonl").write_text("".join(lines[60:]) + lines[60])
    config = DataConfig(
        source=str(tmp_path / "train.jsonl"), seq_len=16, text_field="body", label_field="of"
    )
    check_equal(config, prepare(config, tmp_path / "a"))
    config = replace(config, validation_source=str(tmp_path / "valid.jsonl"))
    check_equal(config, prepare(config, tmp_path / "b"))
    index = read_index(tmp_path / "b")
    assert index.domains == ("kind 0", "kind 1", "kind 2")
    assert [index.splits[name].documents for name in SPLITS] == [60, 10]
    assert "documents of data.validation_source left out of training (10)" in index.notes


CONTENT = st.one_of(
    st.binary(max_size=300),
    st.text(alphabet="ab \n\té\U0001f600'", max_size=300).map(str.encode),
).map(lambda data: data and b"t" + data)  # no magic bytes of another format


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    contents=st.lists(CONTENT, min_size=1, max_size=8),
    part=st.integers(1, 400),
    shard=st.integers(1, 300),
    small=st.sampled_from([0, 1 << 22]),
    with_ranks=st.booleans(),
)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    rank_file: Path,
    contents: list[bytes],
    part: int,
    shard: int,
    small: int,
    with_ranks: bool,
) -> None:
    """Empty and equal documents, NUL, no UTF-8; large files (`small`) are read in blocks."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "text").mkdir()
    for number, content in enumerate([*contents, b"at least one line of text " * 3]):
        (folder / "text" / f"{number}.txt").write_bytes(content)
    config = DataConfig(source=f"{folder}/text/*.txt", seq_len=2, holdout=0.4)
    if with_ranks:
        config = replace(config, tokenizer=str(rank_file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmoe.data.prepare.source.SMALL", small)
        shards = prepare(config, folder / "out", part_bytes=part, shard_tokens=shard, piece_bytes=8)
    text = open_data(replace(config, document_mask=True), 0)
    mapped = open_data(replace(config, source=str(shards)), 0)
    assert text.fingerprint == mapped.fingerprint
    assert all(note in text.describe() for note in read_index(shards).notes)


def test_an_interrupted_preparation_goes_on(tmp_path: Path, texts: Path) -> None:
    """Stopped after every part in turn, the files are those of a run that was not stopped."""
    config = DataConfig(source=str(texts), seq_len=16, holdout=0.2)
    sizes = {"part_bytes": 9000, "shard_tokens": 11_000}
    expected = files_of(prepare(config, tmp_path / "whole", **sizes))
    out, stops = tmp_path / "out", 0

    def stop(progress: Progress) -> None:
        if progress.parts > stops:
            raise KeyboardInterrupt

    while not (out / "index.json").exists():
        try:
            prepare(config, out, on_progress=stop, **sizes)
        except KeyboardInterrupt:
            assert not list(out.glob("*.partial"))
            stops += 1
    assert stops > 5
    assert files_of(out) == expected


def test_an_unfinished_part_is_encoded_again(tmp_path: Path, texts: Path) -> None:
    config = DataConfig(source=str(texts), seq_len=16, holdout=0.2)
    expected = files_of(prepare(config, tmp_path / "whole", shard_tokens=2**20))

    def stop(progress: Progress) -> None:
        if progress.parts == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", on_progress=stop, shard_tokens=2**20)
    parts = sorted((tmp_path / "out" / "parts").glob("*.part"))
    parts[1].write_bytes(parts[1].read_bytes()[:-3])
    parts[2].write_bytes(b"")
    (tmp_path / "out" / "parts" / "0000003.part.99.partial").write_bytes(b"half")
    kept = list[int]()
    prepare(config, tmp_path / "out", shard_tokens=2**20, on_progress=lambda p: kept.append(p.kept))
    assert kept[-1] == len(parts) - 2
    assert files_of(tmp_path / "out") == expected


def test_changed_text_or_settings_are_refused(tmp_path: Path, texts: Path) -> None:
    config = DataConfig(source=str(texts), seq_len=16, holdout=0.2)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", on_progress=stop)
    with pytest.raises(ConfigError, match=r"data.holdout=0.3: is not that of the unfinished"):
        prepare(replace(config, holdout=0.3), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"is unfinished.*run the same dmoe data prepare again"):
        open_data(replace(config, source=str(tmp_path / "out")), 0)
    first = texts / "even" / "00.txt"
    text = first.read_text()
    first.write_text(text.replace("expert", "EXPERT"))
    with pytest.raises(ConfigError, match=r"unfinished preparation of other text: .* has changed"):
        prepare(config, tmp_path / "out")
    first.write_text(text)
    check_equal(config, prepare(config, tmp_path / "out"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out / "other.txt").write_text("x"), "must not exist yet, be empty"),
        (lambda out: (out / "index.json").write_text("{}"), "holds shards already"),
    ],
)
def test_a_directory_of_something_else_is_refused(
    tmp_path: Path, texts: Path, make: Callable[[Path], object], message: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out)
    before = files_of(out)
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig(source=str(texts)), out)
    assert files_of(out) == before


def test_two_at_once_and_too_many_runs(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=f"{texts}/odd,{texts}/even", seq_len=16, holdout=0.2)

    def again(progress: Progress) -> None:
        if not progress.finished:
            with pytest.raises(ConfigError, match="is being prepared by another process"):
                prepare(config, tmp_path / "out")

    prepare(config, tmp_path / "out", part_bytes=50_000, on_progress=again)
    monkeypatch.setattr("dmoe.data.prepare.collect.MAX_RUNS", 1)
    with pytest.raises(ConfigError, match=r"domains that change more than 1 times"):
        prepare(config, tmp_path / "other")


def test_a_full_disk_keeps_what_is_prepared(tmp_path: Path, texts: Path) -> None:
    config = DataConfig(source=str(texts), seq_len=16, holdout=0.2)
    expected = files_of(prepare(config, tmp_path / "whole", shard_tokens=2**20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a shard has more, a part less
    try:
        with pytest.raises(ConfigError, match=r"--out=.*cannot be written \(File too large\)"):
            prepare(config, tmp_path / "out", shard_tokens=2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert left[0] == "0000000.part"
    assert not [name for name in left if name.endswith(".partial") or name == "index.json"]
    assert files_of(prepare(config, tmp_path / "out", shard_tokens=2**20)) == expected


DYING = """
import os, pathlib
import numpy as np
from dmoe.data.tokenizers import byte_tokenizer

class Dying:
    def __init__(self, flag):
        self.flag, self.inner = pathlib.Path(flag), byte_tokenizer()
        self.name, self.vocab_size, self.separator = "dying", 256, 0
        self.token_bytes, self.fingerprint = self.inner.token_bytes, "0" * 64
        self.decode = self.inner.decode
    def encode(self, data):
        if b"file 25" in data and self.flag.exists():
            os.kill(os.getpid(), 9)
        return self.inner.encode(data)
"""


def test_processes_write_the_same_files_and_a_dead_one_is_named(
    tmp_path: Path, texts: Path
) -> None:
    """Two workers with a tokenizer of the user's own; one is killed, then all goes well."""
    (tmp_path / "dying.py").write_text(DYING)
    flag = tmp_path / "flag"
    data = DataConfig(
        source=str(texts),
        holdout=0.2,
        tokenizer=f"{tmp_path}/dying.py:Dying",
        tokenizer_options={"flag": str(flag)},
    )
    data = load_plugins(replace(Config(), data=data)).data
    expected = files_of(prepare(data, tmp_path / "one", part_bytes=4000))
    flag.touch()
    with pytest.raises(ConfigError, match=r"--workers=2: a worker died \(signal 9\)"):
        prepare(data, tmp_path / "two", part_bytes=4000, workers=2)
    assert len(list((tmp_path / "two" / "parts").glob("*.part"))) > 3
    flag.unlink()
    kept = list[int]()
    prepare(
        data,
        tmp_path / "two",
        part_bytes=4000,
        workers=2,
        on_progress=lambda progress: kept.append(progress.kept),
    )
    assert kept[-1] > 3
    assert files_of(tmp_path / "two") == expected


def test_a_set_of_digests() -> None:
    found, expected = DigestSet(), set[bytes]()
    for number in range(5000):
        digest = hashlib.sha256(str(number % 3000).encode()).digest()
        assert found.add(digest) == (digest not in expected)
        expected.add(digest)
        assert digest in found
    assert len(found) == len(expected) == 3000
    assert hashlib.sha256(b"absent").digest() not in found


def test_constant_memory_needs_no_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is never read in more than blocks."""
    path = tmp_path / "large.txt"
    path.write_text("".join(f"line {n}\n" for n in range(30_000)))
    config = DataConfig(source=str(path), seq_len=16)
    expected = files_of(prepare(config, tmp_path / "a", part_bytes=60_000, shard_tokens=90_000))
    monkeypatch.setattr("dmoe.data.prepare.source.SMALL", 1000)
    monkeypatch.setattr(documents_module, "BLOCK", 512)
    refuse = "a large file was read whole"
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(refuse))
    monkeypatch.setattr("dmoe.data.sources.read_records", lambda *given: pytest.fail(refuse))
    prepare(config, tmp_path / "b", part_bytes=60_000, shard_tokens=90_000)
    monkeypatch.undo()
    assert files_of(tmp_path / "b") == expected
    assert os.path.getsize(path) > 100 * 512


def test_the_fields_of_the_config_are_those_of_a_run(tmp_path: Path, texts: Path) -> None:
    config = load(None, [f"data.source={texts}", "data.seq_len=16"]).data
    check_equal(config, prepare(config, tmp_path / "shards", shard_tokens=2**27))
