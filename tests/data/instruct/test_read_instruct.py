"""Conversations are read, split, cut and packed; what cannot be trained on names its line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.rules import check
from dmoe.config.schema import Config, DataConfig
from dmoe.data import DatasetSplits, open_data, open_documents
from dmoe.data.instruct.pack import best_fit


def row(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


def write(path: Path, rows: list[Any]) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(path: Path | str, **fields: Any) -> DataConfig:
    given = {"source": str(path), "format": "instruct", "chat_template": "chatml"}
    return DataConfig(**given | {"seq_len": 200, "holdout": 0.3} | fields)


def conversations(data: DatasetSplits) -> list[list[str]]:
    """Return the text of every conversation of each training sequence, from its positions."""
    found = []
    count = data.train.num_sequences or 0
    masks = data.train.sample_masks(0, count)
    assert masks.valid_BS is not None
    for b, token_S in enumerate(data.train.samples(0, count)):
        text = bytes(token_S[:-1][masks.valid_BS[b]].tolist()).decode()
        found.append([f"<|im_start|>user{part}" for part in text.split("<|im_start|>user")[1:]])
    return found


def whole(question: str, answer: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


ROWS = [row(f"question {n}", "yes " * (n % 9 + 1)) for n in range(60)]


@pytest.mark.parametrize("mask", [None, False])
def test_every_conversation_is_in_one_sequence_whole(tmp_path: Path, mask: bool | None) -> None:
    data = open_data(config(write(tmp_path / "a.jsonl", ROWS), document_mask=mask), 0)
    expected = {whole(r["prompt"], r["completion"]) for r in ROWS}
    sequences = conversations(data)
    found = [text for sequence in sequences for text in sequence]
    assert len(set(found)) == len(found)
    assert set(found) < expected
    assert 0.1 < 1 - len(found) / len(expected) < 0.5, "the rest is held out"
    assert (max(map(len, sequences)) == 1) is (mask is False)


def test_best_fit_is_near_the_fewest_sequences() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    rows = best_fit(lengths, 100)
    assert sorted(n for r in rows for n in r) == list(range(500))
    assert all(sum(lengths[n] for n in r) <= 100 for r in rows)
    assert len(rows) <= 1.06 * sum(lengths) / 100


def test_domains_do_not_share_a_sequence_and_are_mixed_by_temperature(tmp_path: Path) -> None:
    for name, count in (("a", 12), ("b", 48)):
        rows = [row(f"{name} {n}", "ok") for n in range(count)]
        write(tmp_path / f"{name}.jsonl", rows)
    source = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    plain, mixed = (open_data(config(source, temperature=t), 0) for t in (None, 1e9))
    assert plain.domains == ("a", "b")
    label_B = plain.train.sample_labels(0, plain.train.num_sequences or 0)
    for label, texts in zip(label_B, conversations(plain), strict=True):
        assert all(text.startswith(f"<|im_start|>user\n{'ab'[label]} ") for text in texts)
    share = mixed.train.labels(0, 0, 1000, 1000).mean()
    assert 0.4 < share < 0.6
    masks, tokens = mixed.train.masks(3, 0, 4, 4), mixed.train.batch(3, 0, 4, 4)
    assert masks.valid_BS is not None
    assert ((tokens[:, :-1] != 0) == masks.valid_BS).all()


def test_what_is_too_long_is_cut_and_counted(tmp_path: Path) -> None:
    rows = [row(f"q{n}", "a" * (200 if n == 3 else 5)) for n in range(8)]
    options = config(
        write(tmp_path / "a.jsonl", rows),
        validation_source=str(write(tmp_path / "v.jsonl", [row("other", "one")])),
    )
    assert (
        "conversations longer than 200 tokens, cut at the end (1)"
        in open_data(options, 0).describe()
    )
    rows[3] = row("q" * 200, "a")
    write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=r"seq_len=200: .*a\.jsonl line 4, whose first.* 251"):
        open_data(options, 0)
    open_data(replace(options, seq_len=251), 0)


def test_duplicates_and_validation(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [*ROWS[:6], *ROWS[:2]])
    held_out = write(tmp_path / "v.jsonl", ROWS[5:8])
    data = open_data(config(train, validation_source=str(held_out)), 0)
    assert "5 training and 3 held-out conversations" in data.describe()
    assert "duplicate conversations left out (3)" in data.describe()


def test_a_change_of_the_template_or_of_the_roles_is_other_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    source = (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfor %}"
    )
    assert source
    one = open_data(config(path, chat_template=str(tmp_path / "t.jinja")), 0)
    text = (tmp_path / "t.jinja").read_text()
    (tmp_path / "t.jinja").write_text(
        text.replace(
            "{% generation %}{{ m.content }}{% endgeneration %}",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
        )
    )
    other = open_data(config(path, chat_template=str(tmp_path / "t.jinja")), 0)
    assert np.array_equal(one.train.batch(0, 0, 4, 4), other.train.batch(0, 0, 4, 4))
    assert one.fingerprint != other.fingerprint, "only the answers differ"


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", r"a\.jsonl: line 2 is no JSON"),
        ('"text"', "line 2 is a string, not an object"),
        ({"text": "x"}, r"line 2 has no messages, but 'text'"),
        ({"messages": [USER]}, "line 2 has no message of the assistant"),
        ({"messages": [USER, {"content": "a"}]}, "line 2, message 2 has no role"),
        ({"messages": [USER, {"role": "assistant"}]}, "line 2, message 2 has no text"),
        ({"messages": ["q", "a"]}, "line 2, message 1 is no object"),
        ({"prompt": "q"}, "line 2 has no messages, but 'prompt'"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: Any, match: str) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], line, ROWS[1]])
    with pytest.raises(ConfigError, match=match):
        open_data(config(path), 0)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"source": "nowhere.jsonl"}, r"data\.source=nowhere\.jsonl"),
        ({"chat_template": "nowhere.jinja"}, r"data\.chat_template=nowhere\.jinja: must be chatml"),
        ({"chat_template": None}, r"data\.chat_template=None: must be given"),
        ({"eval_source": "x"}, r"data\.eval_source=x: has no meaning for data\.format=instruct"),
        ({"text_field": "x"}, r"data\.text_field=x: has no meaning for data\.format=instruct"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, fields: Any, match: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:3])
    with pytest.raises(ConfigError, match=match):
        open_data(config(path, **fields), 0)


def test_given_texts_are_no_conversations() -> None:
    with pytest.raises(ConfigError, match=r"data\.format=instruct: reads conversations from files"):
        open_documents(config("given"), 0, ["a text", "another"])


def test_a_text_file_is_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(ConfigError, match=r"a\.txt: is .*data\.format=instruct reads records"):
        open_data(config(tmp_path / "a.txt"), 0)


def test_a_template_that_fails_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:3])
    template = tmp_path / "t.jinja"
    for text, match in (
        ("{{ raise_exception('roles!') }}", r"a\.jsonl line \d \(roles!\)"),
        ("{% for %}", r"cannot write .*a\.jsonl line \d"),
        ("{{ messages.append(1) }}", r"cannot write .*a\.jsonl line \d"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            r"marks no answer of .*a\.jsonl line \d",
        ),
    ):
        template.write_text(text)
        with pytest.raises(ConfigError, match=match):
            open_data(config(path, chat_template=str(template)), 0)


def test_a_template_is_refused_for_text() -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template=chatml"):
        check(Config(data=DataConfig(chat_template="chatml")))
