"""Conversations to tokens, and which of them are an answer of the assistant.

A template with generation marks says itself what an answer is. Another one is rendered in prefixes:
with M messages of which the i-th is the assistant's, its answer is what

    render(messages[: i + 1])    has more than    render(messages[:i], add_generation_prompt=True)

Both must be beginnings of the whole text; a template that changes earlier turns is refused, never
trained on all tokens. So the answer ends with what the template closes a turn with.

The text is cut at both ends of each answer and the parts are encoded one by one: a prompt has the
tokens that it has when an answer is to be generated. Special tokens of the tokenizer that the
template writes are one token each; a message must not hold them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.instruct.chat_template import ChatTemplate
from dmoe.data.instruct.conversations import ASSISTANT, Conversation, Message
from dmoe.data.instruct.generation_tag import END, START
from dmoe.data.tokenizers import SpecialToken, Tokenizer


class Encoded(NamedTuple):
    """Tokens of one conversation."""

    token_N: np.ndarray
    """int64."""
    answer_N: np.ndarray
    """bool: part of an answer."""


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> Encoded:
    """Return the tokens of a conversation and which of them are answers.

    Raises:
        ConfigError: on data.chat_template or data.source, with the line of the conversation.
    """
    special = special_tokens(tokenizer)
    _check_contents(conversation, special)
    find = marked_answers if template.marks_answers else answers_by_prefixes
    text, spans = find(conversation, template)
    parts: list[tuple[str, bool]] = []
    position = 0
    for start, end in spans:
        parts += [(text[position:start], False), (text[start:end], True)]
        position = end
    parts.append((text[position:], False))
    tokens = [encode_text(part, tokenizer, special) for part, _ in parts]
    answers = [np.full(len(t), is_answer) for t, (_, is_answer) in zip(tokens, parts, strict=True)]
    return Encoded(np.concatenate(tokens), np.concatenate(answers))


def marked_answers(
    conversation: Conversation, template: ChatTemplate
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and the (start, end) of each answer that the template marks."""
    marked = template.render(conversation.messages, conversation.place)
    text, spans = "", []
    for number, part in enumerate(re.split(f"[{START}{END}]", marked)):
        if number % 2 and part:
            spans.append((len(text), len(text) + len(part)))
        text += part
    if not spans:
        raise _refused(template, f"marks no answer of {conversation.place}")
    return text, spans


def answers_by_prefixes(
    conversation: Conversation, template: ChatTemplate
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and the (start, end) of each message of the assistant in it."""
    messages, place = conversation.messages, conversation.place
    text, spans = template.render(messages, place), []
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = template.render(messages[:i], place, add_generation_prompt=True)
        after = template.render(messages[: i + 1], place)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            raise _refused(
                template,
                f"writes the beginning of {place} in another way than the whole, so its answer "
                f"{i + 1} cannot be told from the rest",
            )
        spans.append((len(before), len(after)))
    return text, spans


def prompt_ids(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer
) -> list[int]:
    """Return the tokens after which the model writes its answer."""
    text = template.render(messages, "the prompt", add_generation_prompt=True)
    text = text.replace(START, "").replace(END, "")
    ids: list[int] = encode_text(text, tokenizer, special_tokens(tokenizer)).tolist()
    return ids


def special_tokens(tokenizer: Tokenizer) -> dict[str, SpecialToken]:
    """Return the special tokens by name; a tokenizer of the user's own may have none."""
    return dict(getattr(tokenizer, "special", {}))


def encode_text(text: str, tokenizer: Tokenizer, special: dict[str, SpecialToken]) -> np.ndarray:
    """Encode a text in which the names of special tokens are these tokens: int64 [n]."""
    if not special:
        return np.asarray(tokenizer.encode(text.encode("utf-8", "surrogatepass")), dtype=np.int64)
    longest_first = sorted(special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    ids = [np.zeros(0, dtype=np.int64)]
    for number, part in enumerate(parts):
        if number % 2:
            ids.append(np.array([special[part].id], dtype=np.int64))
            continue
        if number and special[parts[number - 1]].rstrip:
            part = part.lstrip()
        if number + 1 < len(parts) and special[parts[number + 1]].lstrip:
            part = part.rstrip()
        ids.append(np.asarray(tokenizer.encode(part.encode("utf-8", "surrogatepass")), np.int64))
    return np.concatenate(ids)


def _check_contents(conversation: Conversation, special: dict[str, SpecialToken]) -> None:
    """Refuse a message that holds what only the template may write."""
    for number, message in enumerate(conversation.messages, 1):
        for name in (START, END, *special):
            if name in message["content"]:
                allowed = (
                    f"holds the special token {name!r} in message {number} of "
                    f"{conversation.place}, where it would end a turn"
                )
                raise ConfigError("data.source", "its text", allowed, "remove it from the message")


def _refused(template: ChatTemplate, reason: str) -> ConfigError:
    fix = "mark the answers in it with {% generation %} ... {% endgeneration %}"
    return ConfigError("data.chat_template", template.name, reason, fix)
