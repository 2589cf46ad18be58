"""What looks like a secret, so that no file of a run, no tracker and no message ever holds one.

There is no field for a key: wandb finds its own in WANDB_API_KEY or in ~/.netrc. What is left are mistakes: a key pasted into the wrong
field, into a comment, into a path. A config value is refused (`refuse_secrets`), because a config with a hole in it could not be loaded
again; free text is cleaned (`redact`).

A secret is the value of an environment variable whose name says so, what stands behind such a name in a text (`api_key: ...`), and
what has the format of a well-known key. 40 hexadecimal digits are a wandb key of the old format and a git commit alike: they count in
a text only behind such a name or the word wandb, and in a config where they are the whole value. 64 of them, a SHA-256, never count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from dmoe.config.errors import ConfigError

REDACTED = "[redacted]"
SHORTEST = 8
"""Characters from which the value of an environment variable counts: `MY_TOKEN=on` must not blacken every `on`."""
SHORTEST_LINE = 20
"""Of a value with several lines, such as a private key, each line this long counts alone too."""
FAINT = {"KEY", "TOKEN", "PAT", "AUTH"}
STRONG = {
    "APIKEY",
    "SECRET",
    "SECRETS",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "PWD",
    "CREDENTIAL",
    "CREDENTIALS",
}
PLACES = {"FILE", "PATH", "DIR", "NAME", "TYPE", "ID", "PORT", "HOST", "LENGTH", "SIZE"}
"""Last words of names that hold where a secret is, not what it is: AWS_SHARED_CREDENTIALS_FILE."""
NO_SECRET = {"PWD", "OLDPWD"}
"""The working directory, in every shell."""
FORMATS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    "GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "key that begins with sk-": r"(?<![\w-])sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
    "AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "wandb key": r"\bwandb_v\d+_[A-Za-z0-9_-]{20,}",
    "JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    "password in a URL": r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
}
WANDB_40 = re.compile(r"(?i)(?<=wandb)([^\n]{0,40}?\b)([0-9a-f]{40})\b")
NAMING = "|".join(sorted(FAINT | STRONG, key=len))
ASSIGNED = re.compile(
    rf"""(?i)(?<![\w.-])([\w.-]{{0,60}}(?:{NAMING})[\w.-]{{0,60}})"""
    r"""(["']?[ \t]*[:=][ \t]*)("[^"\n]{3,}"|'[^'\n]{3,}'|[^\s"',;]{3,})"""
)
"""A name with such a word in it, which `names_secret` then looks at, and its value, quoted or up to the next space."""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with every secret in it replaced by `[redacted]`. Linear in the text for each variable and format."""
    return _clean(text, _known(environment))


def redact_json(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """A copy of `value` (what JSON can hold) with every secret in its texts and keys replaced; numbers are left alone.

    Each different text is looked at once a call: the rows of many layers have the same keys.
    """
    known, seen = _known(environment), dict[str, str]()

    def clean(text: str) -> str:
        if text not in seen:
            seen[text] = _clean(text, known)
        return seen[text]

    def walk(item: Any, secret: bool = False) -> Any:
        if isinstance(item, str):
            return REDACTED if secret else clean(item)
        if isinstance(item, dict):
            return {
                clean(str(key)): walk(below, names_secret(str(key))) for key, below in item.items()
            }
        return [walk(below, secret) for below in item] if isinstance(item, list | tuple) else item

    return walk(value)


def refuse_secrets(config: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for the first field of the (nested) dataclass `config` that holds a secret; the message does not."""
    for field, value in _walk(config, ""):
        if (kind := find_secret(value, environment)) is not None:
            allowed = f"holds what looks like a secret ({kind}), and a run's config is written to its directory"
            fix = "leave it out: keys are read from the environment; a directory named by a commit is ./NAME"
            raise ConfigError(field, REDACTED, allowed, fix)


def find_secret(value: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """What kind of secret is in a config's `value`, in words (`the value of WANDB_API_KEY`), or None."""
    for secret, name in _known(environment):
        if secret in value:
            return f"the value of {name}"
    for kind, pattern in FORMATS.items():
        if re.search(pattern, value):
            return f"a {kind}"
    if re.fullmatch(r"[0-9a-f]{40}", value):
        return "a wandb key, 40 hexadecimal digits"
    return "a value behind the name of one" if _clean(value, []) != value else None


def _clean(text: str, known: list[tuple[str, str]]) -> str:
    for value, _ in known:
        text = text.replace(value, REDACTED)
    for pattern in FORMATS.values():
        text = re.sub(pattern, REDACTED, text)
    text = WANDB_40.sub(rf"\1{REDACTED}", text)
    return ASSIGNED.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    name, sign, value = found.groups()
    quote = value[0] if value[0] in "\"'" else ""
    return (
        f"{name}{sign}{quote}{REDACTED}{quote}" if _assigns(name, value.strip(quote)) else found[0]
    )


def names_secret(name: str) -> bool:
    """Whether a variable, a key or a field of this name holds a secret: HF_TOKEN, tracking.api_key; not KEYBOARD, tokens_per_second."""
    words = _words(name)
    return (
        bool(words)
        and name not in NO_SECRET
        and words[-1] not in PLACES
        and not (FAINT | STRONG).isdisjoint(words)
    )


def _words(name: str) -> list[str]:
    """`wandbApiKey`, `wandb-api_key` -> WANDB, API, KEY."""
    parts = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).upper()
    return [word for word in re.split(r"[^A-Z0-9]+", parts) if word]


def _assigns(name: str, value: str) -> bool:
    """`key: value` and `token=...` are ordinary English too: there the value has to look random. A placeholder is no secret."""
    if not names_secret(name) or value.startswith(("$", REDACTED)):
        return False
    certain = len(_words(name)) > 1 or not STRONG.isdisjoint(_words(name))
    return certain or (len(value) >= 16 and any(letter.isdigit() for letter in value))


def _known(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """(secret, name of its variable), the longest first: one may be part of another."""
    found: dict[str, str] = {}
    for name, value in environment.items():
        if names_secret(name):
            lines = [line.strip() for line in value.splitlines()]
            parts = [value.strip(), *(line for line in lines if len(line) >= SHORTEST_LINE)]
            found |= {part: name for part in parts if len(part) >= SHORTEST}
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _walk(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """Every text and whole number below `value` with the dotted name of the field it is in."""
    if is_dataclass(value):
        for item in fields(value):
            yield from _walk(getattr(value, item.name), f"{field}.{item.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield field, str(key)
            yield from _walk(item, field)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item, field)
    elif isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        yield field, str(value)
