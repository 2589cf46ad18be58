"""Directories of tiny published models, as tests and examples need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.hf.families import tiny

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def save_tokenizer(folder: Path | str) -> None:
    """Save a byte-level tokenizer of 259 ids with a chat template: vocab_size=259 fits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))


def tiny_directory(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> str:
    """Save a tiny model of `families.py` and return its directory."""
    tiny(family, dtype, **changes).save_pretrained(folder)
    return str(folder)


def tokens(batch: int = 4, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Return random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator)
