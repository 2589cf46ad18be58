"""The tokenizer of a run as the files that transformers, vLLM and others read.

The byte tokenizer becomes a byte-level BPE without merges: id b is byte b, and id 0, the separator,
is <|endoftext|>. NUL has no token there, and is left out of a text as dmoe leaves it out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmoe.config.plugins import label, parse
from dmoe.config.schema import DataConfig
from dmoe.data import open_tokenizer
from dmoe.data.tokenizers import Tokenizer, read_tokenizer_file
from dmoe.data.tokenizers.hf_json import byte_alphabet

END = "<|endoftext|>"


def write_tokenizer(folder: Path, config: DataConfig) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json; return what a user should know."""
    tokenizer = open_tokenizer(config)
    if config.tokenizer == "bytes":
        content = byte_tokenizer_json()
    elif config.tokenizer.endswith(".json") and parse(config.tokenizer) is None:
        content = with_separator(json.loads(read_tokenizer_file(config.tokenizer)), tokenizer)
    else:
        name = label(config.tokenizer)
        return [f"data.tokenizer={name} is no tokenizer.json, so the export has no tokenizer"]
    end = name_of(content, tokenizer.separator)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.seq_len,
    }
    for name, values in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return []


def byte_tokenizer_json() -> dict[str, Any]:
    """Return the byte tokenizer as a tokenizer.json."""
    vocab = {END: 0} | {letter: byte for letter, byte in byte_alphabet().items() if byte}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(0)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [],
        },
    }


def with_separator(content: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer.json with a token for the separator: dmoe adds one where there is none."""
    known = {token["id"] for token in content.get("added_tokens", [])}
    if tokenizer.separator in known:
        return content
    added = [*content.get("added_tokens", []), _special(tokenizer.separator)]
    return content | {"added_tokens": added}


def name_of(content: dict[str, Any], index: int) -> str:
    """Return the text of a special token."""
    return str(next(t["content"] for t in content["added_tokens"] if t["id"] == index))


def _special(index: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": END, **flags, "special": True}
