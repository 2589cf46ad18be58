"""Keep secrets out of the files of a run, the trackers and all messages.

No field holds a key: wandb reads its own from WANDB_API_KEY or ~/.netrc. What is left are mistakes:
a key pasted into another field, a comment or a path. A config value is refused (`refuse_secrets`),
because a config with a hole could not be loaded again; free text is cleaned (`redact`).

A secret is the value of an environment variable with a telling name, a value behind such a name in
a text (`api_key: ...`), or a well-known key format. 40 hexadecimal digits are an old wandb key and
a git commit alike: in a text they count only behind a telling name or the word wandb, in a config
if they are the whole value. 64 of them, a SHA-256, never count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from dmoe.config.errors import ConfigError

REDACTED = "[redacted]"
MIN_LENGTH = 8
"""Shortest secret in the environment: `MY_TOKEN=on` must not remove every `on`."""
MIN_LINE = 20
"""Shortest line that counts alone, in a value of several lines such as a private key."""
COMMON_WORDS = {"KEY", "TOKEN", "PAT", "AUTH"}
"""Alone they are ordinary English too: `key: value`."""
SECRET_WORDS = COMMON_WORDS | {
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
ORDINARY_WORDS = frozenset(
    {"BOS", "EOS", "PAD", "UNK", "SEP", "CLS", "MASK", "SPECIAL", "NOISE", "SPLIT", "GROUP", "SORT"}
    | {"MISSING", "UNEXPECTED", "UNKNOWN", "INVALID", "DUPLICATE"}
)
"""Beside one of COMMON_WORDS, in lower case, they make a name of code or of a tokenizer: split_key,
eos_token."""
PUBLIC_WORDS = {"FILE", "PATH", "DIR", "NAME", "TYPE", "ID", "PORT", "HOST", "LENGTH", "SIZE"} | {
    "ERROR",
    "EXCEPTION",
    "WARNING",
    "COUNT",
}
"""Last words of names that say where a secret is, not what it is (AWS_SHARED_CREDENTIALS_FILE), or
what went wrong with one (KeyError: what follows is the most useful word of a traceback)."""
FORMATS = re.compile(
    "|".join(
        (
            r"\bhf_[A-Za-z0-9]{30,}",
            r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{22,}",
            r"\bglpat-[A-Za-z0-9_-]{20,}",
            r"(?<![\w-])sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
            r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
            r"\bwandb_v\d+_[A-Za-z0-9_-]{20,}",
            r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
        )
    )
)
"""Hugging Face, GitHub, GitLab, sk- (OpenAI), AWS, wandb, JSON web token, private key, URL."""
WANDB_40 = re.compile(r"(?i)(?<=wandb)([^\n]{0,40}?\b)[0-9a-f]{40}\b")
ASSIGNMENT = re.compile(
    rf"""(?i)(?<![\w.-])([\w.-]{{0,60}}(?:{"|".join(sorted(SECRET_WORDS))})[\w.-]{{0,60}})"""
    r"""(["']?[ \t]*[:=][ \t]*)("[^"\n]{3,}"|'[^'\n]{3,}'|[^\s"',;]{3,})"""
)
"""A name that contains a secret word, and its value, quoted or up to the next space."""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Replace every secret in `text` by `[redacted]`. Linear time per variable and format."""
    return _redact(text, _secrets(environment))


def redact_json(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Copy a JSON value with every secret in its texts and keys replaced. Keeps numbers.

    Each different text is searched once per call: the rows of many layers have the same keys.
    """
    secrets = _secrets(environment)
    clean = cache(lambda text: _redact(text, secrets))

    def walk(item: Any, secret: bool = False) -> Any:
        if isinstance(item, str):
            return REDACTED if secret else clean(item)
        if isinstance(item, dict):
            texts = {str(key): below for key, below in item.items()}
            return {clean(key): walk(below, is_secret_name(key)) for key, below in texts.items()}
        return [walk(below, secret) for below in item] if isinstance(item, list | tuple) else item

    return walk(value)


def refuse_secrets(config: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a config with a secret in a field. The message does not contain it.

    Raises:
        ConfigError: for the first such field.
    """
    secrets = _secrets(environment)  # once: for each of 150 values it took a tenth of a second
    for field, value in _values(config, ""):
        if (kind := _kind_of_secret(value, secrets)) is not None:
            allowed = (
                f"holds what looks like a secret ({kind}), and a run's config is written to its "
                "directory"
            )
            fix = (
                "leave it out: keys are read from the environment; a directory named by a commit "
                "is ./NAME"
            )
            raise ConfigError(field, REDACTED, allowed, fix)


def find_secret(value: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Describe the secret in a config value (`the value of WANDB_API_KEY`), or return None."""
    return _kind_of_secret(value, _secrets(environment))


def _kind_of_secret(value: str, secrets: list[tuple[str, str]]) -> str | None:
    for secret, name in secrets:
        if secret in value:
            return f"the value of {name}"
    if FORMATS.search(value) or re.fullmatch(r"[0-9a-f]{40}", value):
        return "the format of a well-known key"
    return "a value behind the name of a secret" if _redact(value, []) != value else None


def is_secret_name(name: str) -> bool:
    """Return whether a variable, key or field of this name holds a secret.

    Yes: HF_TOKEN, tracking.api_key, wandbApiKey. No: KEYBOARD, tokens_per_second, KeyError, PWD
    (in every shell the working directory).
    """
    words = _words(name)
    telling = words and words[-1] not in PUBLIC_WORDS and not SECRET_WORDS.isdisjoint(words)
    return bool(telling) and name not in ("PWD", "OLDPWD")


def _words(name: str) -> list[str]:
    """Split a name: `wandbApiKey`, `wandb-api_key` -> WANDB, API, KEY."""
    parts = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).upper()
    return [word for word in re.split(r"[^A-Z0-9]+", parts) if word]


def _redact(text: str, secrets: list[tuple[str, str]]) -> str:
    for value, _ in secrets:
        text = text.replace(value, REDACTED)
    text = WANDB_40.sub(rf"\1{REDACTED}", FORMATS.sub(REDACTED, text))
    return ASSIGNMENT.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    """Remove the value of an assignment, unless it is a placeholder or ordinary English."""
    name, sign, quoted = found.groups()
    value = quoted.strip("\"'") if quoted[0] in "\"'" else quoted
    words = _words(name)
    # `token=...` alone, or `eos_token=...`: the value has to look random.
    telling = [word for word in words if name != name.lower() or word not in ORDINARY_WORDS]
    certain = len(telling) > 1 or COMMON_WORDS.isdisjoint(words)
    random = len(value) >= 16 and any(letter.isdigit() for letter in value)
    if not is_secret_name(name) or value.startswith(("$", REDACTED)) or not (certain or random):
        return found[0]
    return name + sign + quoted.replace(value, REDACTED)


def _secrets(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """List each secret and its variable, the longest first: one may contain another."""
    found: dict[str, str] = {}
    for name, value in environment.items():
        if is_secret_name(name):
            lines = [line.strip() for line in value.splitlines()]
            parts = [value.strip(), *(line for line in lines if len(line) >= MIN_LINE)]
            found |= {part: name for part in parts if len(part) >= MIN_LENGTH}
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _values(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of every value of a config, and of each list item."""
    for name, value in vars(section).items():
        if is_dataclass(value):
            yield from _values(value, f"{prefix}{name}.")
        else:
            for item in value if isinstance(value, list) else [value]:
                yield f"{prefix}{name}", str(item)
