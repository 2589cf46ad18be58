"""The text of tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

UNFINISHED = "\ufffd"
"""What a decoder writes for the first bytes of a character whose last ones are still to come."""


class TextStream:
    """The text after a prompt, token by token.

    Args:
        decode: the text of token ids.
        prompt_ids: tokens before.
        stop: strings that end the text; they are no part of it.
        write: receives each part of the text once it can no longer change.
    """

    def __init__(
        self,
        decode: Callable[[Iterable[int]], str],
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.decode, self.stop, self.write = decode, stop, write
        self.ids = list(prompt_ids)
        self.start = len(decode(self.ids).removesuffix(UNFINISHED))
        """Characters of the prompt; one that it begins and the text completes is the text's."""
        self.text, self.written = "", 0
        self.stopped_by: str | None = None
        """The stop string that has ended the text."""

    def add(self, token: int) -> bool:
        """Add a token; return True if the text now ends with a stop string."""
        self.ids.append(token)
        self._read(self.decode(self.ids)[self.start :].removesuffix(UNFINISHED))
        return self.stopped_by is not None

    def end(self) -> str:
        """Write what was held back, and return the text."""
        if self.stopped_by is None:
            self._read(self.decode(self.ids)[self.start :])
            self._write_until(len(self.text))
        return self.text

    def _read(self, text: str) -> None:
        found = [(text.find(string), string) for string in self.stop if string in text]
        if found:
            position, self.stopped_by = min(found)
            self.text = text[:position]
            self._write_until(position)
        else:
            self.text = text
            self._write_until(len(text) - self._possible_stop(text))

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        lengths = (
            length
            for string in self.stop
            for length in range(min(len(string) - 1, len(text)), 0, -1)
            if text.endswith(string[:length])
        )
        return max(lengths, default=0)

    def _write_until(self, position: int) -> None:
        if position > self.written and self.write is not None:
            self.write(self.text[self.written : position])
        self.written = max(self.written, position)
