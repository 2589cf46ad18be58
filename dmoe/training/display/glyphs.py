"""The characters a panel is drawn with: blocks and lines, or ASCII where the terminal has no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ASCII", "UNICODE", "CharSet", "charset_for"]


@dataclass(frozen=True)
class CharSet:
    levels: str
    """Eight heights, the lowest first."""
    dead: str
    """An expert that no token chose."""
    done: str
    left: str
    parts: str
    """One fill for each part of a stacked bar; colour tells neighbours apart too, where there is colour."""
    cut: str
    """Stands for what did not fit."""

    def spelled(self, text: str) -> str:
        """`text` as one line without control characters, and in these letters: it may hold what a model wrote, or another user."""
        line = "".join(letter if letter.isprintable() else " " for letter in text)
        return line.encode("ascii", "replace").decode() if self.cut.isascii() else line


UNICODE = CharSet(levels="▁▂▃▄▅▆▇█", dead="x", done="━", left="─", parts="█▓▒░▚━", cut="…")
ASCII = CharSet(levels=".:-=+*#@", dead="x", done="#", left="-", parts="#=+-o~", cut="...")


def charset_for(encoding: str | None, environment: Mapping[str, str]) -> CharSet:
    """By stdout's encoding; ASCII also on the Linux console, whose font has few blocks, and where LC_ALL asks for plain C, although
    Python writes UTF-8 there."""
    poor = environment.get("TERM") == "linux" or environment.get("LC_ALL") in ("C", "POSIX")
    return UNICODE if not poor and (encoding or "").lower().replace("-", "").startswith("utf") else ASCII
