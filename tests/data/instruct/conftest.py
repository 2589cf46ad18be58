"""A tiny byte-level tokenizer with special tokens, and conversations of several shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.instruct.templates import SPECIAL

ROWS: list[dict[str, Any]] = [
    {"messages": [turn for n in range(turns) for turn in (
        {"role": "user", "content": f"add {n} and {number * 7}"},
        {"role": "assistant", "content": f"that is {n + number * 7}, of course"},
    )]}
    for number, turns in enumerate((1, 2, 3, 1, 2))
]  # fmt: skip
ROWS += [
    {"prompt": "the expert routes", "completion": "tokens über gate"},
    {
        "prompt": [{"role": "user", "content": " white space around "}],
        "completion": [{"role": "assistant", "content": " and here  "}],
    },
]


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return list(row["messages"])
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    return [*prompt, *completion]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*SPECIAL, "<|endoftext|>"],
    )
    tokenizer.train_from_iterator([json.dumps(row) for row in ROWS], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path
