"""References to code of the user's own in place of a kind: `FILE.py:Name`, `package.module:Name`.

Nothing is loaded here (`plugin_loader.py`). Once loaded, a reference is absolute and has the hash
of its file: `/home/me/my_router.py:Nearest@SHA-256`. So resolved.yaml and checkpoints record it, a
run is found again from any directory, and resuming with a file that has changed is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.keywords import attribute

FIELDS = (
    "moe.router.kind",
    "moe.balance.kind",
    "moe.experts.kind",
    "optim.kind",
    "optim.schedule",
    "data.tokenizer",
    "data.source",
)
"""Fields that may hold a reference."""
REFERENCE = re.compile(
    r"(?P<place>[^:,]*[^:,/]\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)"
    r"(?:@(?P<digest>[0-9a-f]{64}))?"
)
FORM = "FILE.py:Name"
"""How messages and `dmoe explain --fields` write a reference."""


@dataclass(frozen=True)
class Reference:
    """A class of the user's own, and the hash of its file once it is known."""

    place: str
    """A path that ends in .py, or the dotted name of a module."""
    name: str
    digest: str | None

    @property
    def is_file(self) -> bool:
        return self.place.endswith(".py")

    @property
    def label(self) -> str:
        """Short form for people: `my_router.py:Nearest`."""
        return f"{Path(self.place).name if self.is_file else self.place}:{self.name}"

    def __str__(self) -> str:
        return f"{self.place}:{self.name}" + (f"@{self.digest}" if self.digest else "")


def parse(value: object, field: str = "") -> Reference | None:
    """Return the reference that a field's value is, or None for a built-in kind.

    `data.source` has entries like `guide:de`, so a module there must have a dot.
    """
    found = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if found is None or (field == "data.source" and "." not in found["place"]):
        return None
    return Reference(found["place"], found["name"], found["digest"])


def is_same_code(one: object, other: object, field: str) -> bool:
    """Return whether two values name one class in files of equal content, wherever they are."""
    a, b = parse(one, field), parse(other, field)
    return a is not None and b is not None and (a.label, a.digest) == (b.label, b.digest)


def label(value: str) -> str:
    """Return a kind for people: a reference without directory and hash, anything else as it is."""
    reference = parse(value)
    return value if reference is None else reference.label


def describe(value: str, options: Mapping[str, Any], field: str = "") -> str:
    """Describe a kind for explain and report; a reference with its name, hash and options."""
    reference = parse(value, field)
    if reference is None:
        return value
    parts = [f"sha256 {reference.digest[:12]}"] if reference.digest else []
    parts += [f"{name} {option}" for name, option in options.items()]
    return f"{reference.label} of your own" + (f" ({', '.join(parts)})" if parts else "")


def options_field(field: str) -> str:
    """Return the name of the field with the options of `field`."""
    section, _, last = field.rpartition(".")
    return f"{section}.options" if last == "kind" else f"{field}_options"


def references(config: Any) -> dict[str, Reference]:
    """Return the references in a config, by field."""
    found = {field: parse(get(config, field), field) for field in FIELDS}
    return {field: reference for field, reference in found.items() if reference is not None}


def check_options(config: Any) -> None:
    """Refuse options of a kind that is built in, and half of the settings of an own loss.

    Raises:
        ConfigError: for the first such field.
    """
    balance = config.moe.balance
    if balance.kind is not None and parse(balance.kind) is None:
        raise ConfigError(
            "moe.balance.kind", balance.kind, f"must be {FORM}", "see docs/plugins.md"
        )
    if (balance.kind is None) != (balance.own == 0):
        allowed = "is the coefficient of moe.balance.kind: both are set, or none"
        raise ConfigError("moe.balance.own", balance.own, allowed, "set the other one")
    for field in FIELDS:
        name, value = options_field(field), get(config, field)
        if (options := get(config, name)) and parse(value, field) is None:
            allowed = f"are passed to code of your own, and {field}={value} is built in"
            raise ConfigError(name, options, allowed, f"leave {name} out, or name {FORM}")


def anchored(value: Any, folder: Path, name: str = "") -> Any:
    """Return nested values of a config file, relative paths of references starting from `folder`.

    So a config file and the code beside it work from any working directory.
    """
    if isinstance(value, Mapping):
        dot = f"{name}." if name else ""
        return {key: anchored(below, folder, f"{dot}{key}") for key, below in value.items()}
    reference = parse(value, name) if name in FIELDS else None
    if reference is None or not reference.is_file:
        return value
    return str(replace(reference, place=str(folder / Path(reference.place).expanduser())))


def get(config: Any, field: str) -> Any:
    """Return the value of a field by its dotted name."""
    for part in field.split("."):
        config = getattr(config, attribute(part))
    return config


def put(section: Any, field: str, value: object) -> Any:
    """Return a copy of a config with another value of the field of this dotted name."""
    first, _, rest = field.partition(".")
    first = attribute(first)
    below = put(getattr(section, first), rest, value) if rest else value
    return replace(section, **{first: below})


def is_under(name: str, sections: Sequence[str]) -> bool:
    """Return whether a field is one of these, or in one of these sections."""
    return any(name == section or name.startswith(f"{section}.") for section in sections)
