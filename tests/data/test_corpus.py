from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Corpus, Document
from dmoe.data.sources import read_corpus
from dmoe.data.splits import holdout_hash, split_corpus


def names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents]


def made(*contents: bytes) -> Corpus:
    return Corpus(tuple(Document(content, str(i), "x") for i, content in enumerate(contents)))


def test_stdlib_is_source_without_tests() -> None:
    corpus = read_corpus("stdlib")
    assert len(corpus.documents) > 300
    assert names(corpus) == sorted(names(corpus), key=lambda name: name.split("/"))
    assert corpus.bytes_per_domain.keys() == {"python"}
    for name in names(corpus):
        parts = name.split("/")
        assert name.endswith(".py")
        assert not {"test", "tests", "idle_test", "site-packages"} & set(parts)
        assert not any(part.startswith(("config-", "_sysconfigdata")) for part in parts)
    assert "torch" not in {name.split("/")[1] for name in names(corpus)}


def test_a_zipped_library_falls_back_to_torch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "empty")})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    corpus = read_corpus("stdlib")
    assert names(corpus) == ["python/__init__.py"]
    assert any("torch's own source" in note for note in corpus.notes)
    assert "torch's own source" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data.source=stdlib: found no .py file"):
        read_corpus("stdlib")


def test_files_globs_and_directories(texts: Path) -> None:
    assert len(read_corpus(str(texts)).documents) == 60
    assert names(read_corpus(f"{texts}/*/0*.txt"))[:2] == ["texts/even/00.txt", "texts/even/02.txt"]
    assert len(read_corpus(f"{texts}/**/*.txt").documents) == 60
    both = read_corpus(f"{texts}/even , {texts}/odd/01.txt")
    assert [document.domain for document in both.documents] == ["even"] * 30 + ["01"]


def test_names_and_order_do_not_depend_on_the_place(texts: Path, tmp_path: Path) -> None:
    before = read_corpus(str(texts))
    moved = tmp_path / "elsewhere" / "texts"
    moved.parent.mkdir()
    texts.rename(moved)
    assert read_corpus(str(moved)).documents == before.documents


def test_duplicates_and_empty_files_are_left_out(texts: Path) -> None:
    (texts / "copy.txt").write_bytes((texts / "even" / "00.txt").read_bytes())
    (texts / "empty.txt").write_bytes(b"")
    corpus = read_corpus(str(texts))
    assert len(corpus.documents) == 60
    assert corpus.notes == ("duplicate or empty files left out (2)",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/a.txt", "data.source=/nowhere/a.txt: .*there is no such file"),
        ("/nowhere/*.txt", "no text file is found here"),
        ("{tmp}/none", "no text file is found here"),
        ("", "data.source='': "),
        (" , ", "at least one byte of text"),
        ("{tmp}/empty.txt", "at least one byte of text"),
    ],
)
def test_bad_sources_are_refused(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        read_corpus(source.format(tmp=tmp_path))


def test_the_hold_out_depends_on_content_alone(texts: Path) -> None:
    train, held_out = split_corpus(read_corpus(str(texts)), 0.3)
    (texts / "even" / "00a.txt").write_text("a new file")
    (texts / "odd" / "37.txt").unlink()
    (texts / "odd" / "39.txt").rename(texts / "even" / "000.txt")
    new_train, new_held_out = split_corpus(read_corpus(str(texts)), 0.3)
    old = {d.content: False for d in train.documents} | {
        d.content: True for d in held_out.documents
    }
    new = {d.content: False for d in new_train.documents} | {
        d.content: True for d in new_held_out.documents
    }
    assert len(new) == 60
    assert len(old.keys() & new.keys()) == 59
    assert all(old[content] == new[content] for content in old.keys() & new.keys())
    assert 6 < len(held_out.documents) < 30


def test_a_larger_share_holds_out_more_and_keeps_what_was_held_out() -> None:
    corpus = made(*(f"text {i}".encode() for i in range(2000)))
    small, large = (set(split_corpus(corpus, share)[1].documents) for share in (0.05, 0.1))
    assert small < large
    assert 70 < len(small) < 130


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_and_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data.holdout=.*must be greater than 0 and less than 1"):
        split_corpus(made(b"a", b"b"), share)


def test_one_document_is_cut_at_a_character() -> None:
    text = "é".encode() * 100
    train, held_out = split_corpus(made(text), 0.055)
    assert train.documents[0].content + held_out.documents[0].content == text
    assert len(held_out.documents[0].content) == 12, "11 bytes would begin inside a character"
    assert train.notes == ("one document: its last 5.50% held out",)
    with pytest.raises(ConfigError, match="must cut the single document of 1 bytes"):
        split_corpus(made(b"a"), 0.5)


def suggested(error: ConfigError) -> float:
    return float(str(error).split("set data.holdout=")[1].split(" ")[0])


def test_a_one_sided_split_is_refused_and_the_fix_works() -> None:
    corpus = made(*(b"%d" % n for n in range(60)))
    fractions = sorted(holdout_hash(document.content) for document in corpus.documents)
    with pytest.raises(ConfigError, match="no one of 60") as none_out:
        split_corpus(corpus, fractions[0] / 2)
    assert len(split_corpus(corpus, suggested(none_out.value))[1].documents) >= 1
    with pytest.raises(ConfigError, match="every one of 60") as all_out:
        split_corpus(corpus, (fractions[-1] + 1) / 2)
    assert len(split_corpus(corpus, suggested(all_out.value))[0].documents) >= 1
