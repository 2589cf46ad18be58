"""Read both splits of data.format=instruct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label
from dmoe.config.schema import DataConfig
from dmoe.data.instruct.chat_template import ChatTemplate, open_chat_template
from dmoe.data.instruct.conversations import Conversation, read_conversations
from dmoe.data.instruct.encode import Encoded, encode_conversation
from dmoe.data.instruct.pack import Stream, cut, pack
from dmoe.data.sequences.token_masks import PADDING
from dmoe.data.splits import FEW, holdout_hash, record_fields, refuse_fields
from dmoe.data.tokenizers import Tokenizer, nul_note


class InstructData(NamedTuple):
    """Both splits as token streams."""

    train: Stream
    held_out: Stream
    domains: tuple[str, ...]
    template: ChatTemplate
    summary: str


def read_instruct(config: DataConfig, tokenizer: Tokenizer) -> InstructData:
    """Read, split, encode and pack conversations.

    Raises:
        ConfigError: on the field of data.* that cannot work.
    """
    refuse_fields(config, ("eval_source", "text_field"), "data.format=instruct")
    template = open_chat_template(config)
    fields = record_fields(config)
    found, removed = _unique(read_conversations(config.source, fields))
    if not found:
        allowed = "must hold at least one conversation"
        raise ConfigError("data.source", label(config.source), allowed, "name another file")
    if config.validation_source is None:
        train, held_out = split(found, config.holdout)
    else:
        origin = record_fields(config, "data.validation_source")
        held_out, _ = _unique(read_conversations(config.validation_source, origin))
        keys = {conversation.key for conversation in held_out}
        train = [conversation for conversation in found if conversation.key not in keys]
        removed += len(found) - len(train)
        if not (train and held_out):
            allowed = "must hold conversations, and leave some of data.source for training"
            fix = "name other files, or leave it out"
            raise ConfigError("data.validation_source", config.validation_source, allowed, fix)
    names = tuple(sorted({c.domain for c in (*train, *held_out)}))
    streams, num_cut, num_nul = [], 0, 0
    for part in (train, held_out):
        encoded = list[Encoded]()
        for conversation in part:
            whole = encode_conversation(conversation, template, tokenizer)
            kept, is_cut = cut(whole, config.seq_len, conversation.place)
            encoded.append(kept)
            num_cut += is_cut
            num_nul += sum(message["content"].count("\0") for message in conversation.messages)
        streams.append(
            pack(
                encoded,
                [conversation.domain for conversation in part],
                names,
                config.seq_len,
                tokenizer.separator,
                share=config.document_mask is not False,
            )
        )
    notes = [
        f"{label(config.source)}: {len(train):,} training and {len(held_out):,} held-out "
        f"conversations; chat template {template.name}, the loss is on answers alone"
    ]
    padding = (streams[0].role_N[:-1] == PADDING).mean()
    notes.append(f"{padding:.0%} of the places of training sequences are padding")
    if removed:
        notes.append(f"duplicate conversations left out ({removed})")
    if num_nul:
        notes.append(nul_note(num_nul))
    if num_cut:
        notes.append(
            f"conversations longer than {config.seq_len} tokens, cut at the end ({num_cut})"
        )
    return InstructData(streams[0], streams[1], names, template, "; ".join(notes))


def split(
    found: Sequence[Conversation], holdout: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold out conversations by a hash of their content; of fewer than FEW an exact share.

    Raises:
        ConfigError: on data.holdout, if one split would be empty.
    """
    hashes = [holdout_hash(conversation.key) for conversation in found]
    limit = holdout
    if len(found) < FEW or min(hashes) >= holdout:
        limit = sorted(hashes)[min(len(found) - 1, max(1, round(len(found) * holdout)))]
    train = [c for c, h in zip(found, hashes, strict=True) if h >= limit]
    held_out = [c for c, h in zip(found, hashes, strict=True) if h < limit]
    if not (train and held_out):
        allowed = f"must leave some of {len(found)} conversations to both sides"
        raise ConfigError("data.holdout", holdout, allowed, "use more, or a share nearer to 0.5")
    return train, held_out


def _unique(conversations: Iterable[Conversation]) -> tuple[list[Conversation], int]:
    """Return the conversations without exact duplicates, and the number of those."""
    seen: dict[bytes, Conversation] = {}
    count = 0
    for conversation in conversations:
        count += 1
        seen.setdefault(conversation.key, conversation)
    return list(seen.values()), count - len(seen)
