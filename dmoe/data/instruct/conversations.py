"""Conversations: the rows of files of records with `messages`, or `prompt` and `completion`.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}              one turn of user and assistant
    {"prompt": [messages], "completion": [messages]}    one conversation after the other

What else a message holds (names, tool calls) is passed to the template as it is.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.data.files import Listing, formats_of, list_directory, list_glob
from dmoe.data.formats import RecordFields, Row, format_of, open_rows
from dmoe.data.formats.errors import unreadable
from dmoe.data.formats.records import label_of
from dmoe.data.formats.rows import HUB
from dmoe.data.sources import entries

Message = Mapping[str, Any]
ASSISTANT = "assistant"
"""Role of the messages that are answers."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_FIX = 'give it "messages", or "prompt" and "completion"'


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the file and line they are from, and their domain."""

    messages: tuple[Message, ...]
    place: str
    domain: str

    @property
    def key(self) -> bytes:
        """The bytes whose hash decides the split."""
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True).encode(
            "utf-8", "surrogatepass"
        )


def read_conversations(source: str, fields: RecordFields) -> Iterator[Conversation]:
    """Read all conversations of the files that `source` names, in order.

    Args:
        source: entries separated by commas: files, directories, globs, `hf:NAME`.
        fields: the field of the domain, if any, and the config field that names the source.

    Raises:
        ConfigError: on `fields.origin`, with file and line: a file of no records, a row without
            messages, a message without role or text, a conversation without an answer.
    """
    for entry in entries(source):
        if entry.startswith(HUB):
            yield from _rows(entry, None, fields, Path(entry).name)
            continue
        path = Path(entry).expanduser()
        if path.is_file():
            yield from _rows(path, format_of(path, fields.origin), fields, path.stem.split(".")[0])
            continue
        listing = _listing(entry, path, fields)
        for file, format in formats_of(listing, entry, fields.origin):
            yield from _rows(file, format, fields, path.name.split("*")[0] or path.parent.name)


def _listing(entry: str, path: Path, fields: RecordFields) -> Listing:
    if path.is_dir():
        return list_directory(path)
    if glob.has_magic(entry):
        return list_glob(path)
    allowed = "must be files, directories or globs of records, and there is no such file"
    raise ConfigError(fields.origin, entry, allowed, "check the path")


def _rows(
    path: Path | str, format: Any, fields: RecordFields, domain: str
) -> Iterator[Conversation]:
    if format is not None and format.kind != "records":
        reason = f"is {format.name}, and data.format=instruct reads records"
        raise unreadable(fields.origin, path, reason, "write JSON Lines with messages")
    for row in open_rows(path, format, fields.origin)():
        messages = _messages(path, row, fields)
        label = domain if fields.label is None else _label(path, row, fields)
        yield Conversation(messages, f"{path} {row.place}", label)


def _messages(path: Path | str, row: Row, fields: RecordFields) -> tuple[Message, ...]:
    values = row.values
    if values.get("messages") is not None:
        found = values["messages"]
    elif values.get("prompt") is not None and values.get("completion") is not None:
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": ASSISTANT, "content": completion}]
        found = [*_as_list(prompt), *_as_list(completion)]
    else:
        known = ", ".join(map(repr, values)) or "nothing"
        raise unreadable(fields.origin, path, f"{row.place} has no messages, but {known}", _FIX)
    messages = _as_list(found)
    for number, message in enumerate(messages, 1):
        wrong = _fault(message)
        if wrong:
            reason = f"{row.place}, message {number} {wrong}"
            raise unreadable(fields.origin, path, reason, "repair or remove it")
    if not any(message["role"] == ASSISTANT for message in messages):
        reason = f"{row.place} has no message of the assistant, so nothing to learn"
        raise unreadable(fields.origin, path, reason, "give it an answer, or remove it")
    return tuple(messages)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _fault(message: object) -> str:
    if not isinstance(message, Mapping):
        return "is no object"
    if not isinstance(message.get("role"), str) or not message["role"]:
        return "has no role"
    if not isinstance(message.get("content"), str):
        return "has no text as its content"
    if _LONE_SURROGATE.search(message["content"]):
        return "has half of a surrogate pair in its content, which is no character"
    return ""


def _label(path: Path | str, row: Row, fields: RecordFields) -> str:
    label = label_of(row.values.get(fields.label or ""))
    if label is not None:
        return label
    reason = f"{row.place} has no label in {fields.label!r}"
    raise unreadable(fields.origin, path, reason, "give it one, or set data.label_field")
