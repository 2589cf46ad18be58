"""Load code of the user's own: the only place that runs it.

`load_plugins` is called for a config that the user of this command gives: as a file, as overrides,
or as an object. A config that is read from a run or a checkpoint loads nothing: a directory that
somebody else has written must not run code because it is looked at. Without `load_plugins`,
`plugin_class` raises; `dmoe generate --trust-code` calls it for a run. The bytes that are hashed
are the bytes that run; what they import is not hashed.

Imports no torch; the user's file may. The class is constructed with what its kind gets
(docs/plugins.md) and the field's options as keyword arguments.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import Reference, is_under, options_field, parse, put, references


def load_plugins(config: Any) -> Any:
    """Load the code that a config names, and return the config with absolute, hashed references.

    Call it only for a config that the user gives, and in each process that builds from it.

    Raises:
        ConfigError: no such file or name, a changed file, or an exception of the code itself.
    """
    for field, reference in references(config).items():
        path = _source_file(field, reference)
        content = _read(field, reference, path)
        digest = hashlib.sha256(content).hexdigest()
        accepted = is_under(field, config.checkpoint.accept_changes)
        if reference.digest not in (None, digest) and not accepted:
            raise ConfigError(
                field,
                reference.label,
                f"{path} is not the file that this config was written with "
                f"({reference.digest[:12]}, now {digest[:12]})",
                f"restore it, or accept it with checkpoint.accept_changes=[{field}]",
            )
        place = str(path) if reference.is_file else reference.place
        pinned = Reference(place, reference.name, digest)
        if _key(pinned) not in sys.modules:
            sys.modules[_key(pinned)] = _import(field, pinned, path, content)
        _class_in(sys.modules[_key(pinned)], field, pinned)
        config = put(config, field, str(pinned))
    return config


def plugin_class(value: str, field: str) -> type | None:
    """Return the loaded class of a reference; None for a built-in kind. Loads nothing.

    Raises:
        ConfigError: the code is not loaded, as for a config that comes from a run.
    """
    reference = parse(value, field)
    if reference is None:
        return None
    kind = loaded_class(value)
    if kind is None:
        raise _untrusted(field, reference)
    return kind


def refuse_code(config: Any, given: Collection[str]) -> None:
    """Refuse code that the config of a run names, but in the fields that the user has `given`.

    Raises:
        ConfigError: for the first such field.
    """
    for field, reference in references(config).items():
        if field not in given:
            raise _untrusted(field, reference)


def _untrusted(field: str, reference: Reference) -> ConfigError:
    allowed = "is code of your own, and a config that is read from a run loads none by itself"
    fix = "if you trust it, add --trust-code (dmoe.config.plugin_loader.load_plugins)"
    return ConfigError(field, f"{reference.place}:{reference.name}", allowed, fix)


def loaded_class(value: str) -> type | None:
    """Return the class of a reference if `load_plugins` has loaded it in this process."""
    reference = parse(value)
    module = None if reference is None else sys.modules.get(_key(reference))
    found = None if reference is None else getattr(module, reference.name, None)
    return found if isinstance(found, type) else None


def construct(
    value: str,
    field: str,
    *arguments: Any,
    options: Mapping[str, Any],
    base: type | None = None,
    methods: tuple[str, ...] = (),
) -> Any:
    """Construct the class of a reference.

    Args:
        value: the reference.
        field: the field that holds it, for errors.
        arguments: what every class of this kind gets.
        options: keyword arguments from the config.
        base: class that it must be derived from.
        methods: what it must have, where there is no base class.

    Raises:
        ConfigError: another class, options that it does not take, or an exception of its own.
    """
    kind = plugin_class(value, field)
    assert kind is not None
    reference = parse(value, field)
    assert reference is not None
    if base is not None and not issubclass(kind, base):
        allowed = f"must be derived from {base.__module__}.{base.__name__}"
        raise ConfigError(field, reference.label, allowed, "see docs/plugins.md")
    try:
        inspect.signature(kind).bind(*arguments, **options)
    except TypeError as error:
        given, fix = ", ".join(options) or "none", f"its arguments: {inspect.signature(kind)}"
        allowed = f"are not what {reference.label} takes: {error}"
        raise ConfigError(options_field(field), given, allowed, fix) from None
    try:
        made = kind(*arguments, **options)
    except ConfigError:
        raise
    except Exception as error:
        allowed = f"cannot be made: {_describe(error, reference.place)}"
        raise ConfigError(field, reference.label, allowed, "correct it") from error
    if missing := [name for name in methods if not hasattr(made, name)]:
        allowed = f"must have {', '.join(methods)}, and has no {' and no '.join(missing)}"
        raise ConfigError(field, reference.label, allowed, "see docs/plugins.md")
    return made


def _key(reference: Reference) -> str:
    """Return the name in `sys.modules` that only `load_plugins` writes."""
    text = f"{reference.place}@{reference.digest}"
    return f"dmoe_plugin_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _source_file(field: str, reference: Reference) -> Path:
    if reference.is_file:
        return Path(reference.place).expanduser().absolute()
    try:
        spec = importlib.util.find_spec(reference.place)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        allowed = f"there is no Python module {reference.place} on this Python's path"
        raise ConfigError(
            field, reference.label, allowed, "install it, or name its file, ./x.py:Name"
        )
    return Path(spec.origin)


def _read(field: str, reference: Reference, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        allowed = f"{path} cannot be read ({error.strerror or type(error).__name__})"
        fix = f"give the path of the file, e.g. {field}=./{path.name}:{reference.name}"
        raise ConfigError(field, reference.label, allowed, fix) from None


class _Source(importlib.abc.InspectLoader):
    """Runs exactly the bytes that were hashed: no second read, no cached bytecode."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content, self.path = content, path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.content)

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.content, str(self.path))


def _import(field: str, reference: Reference, path: Path, content: bytes) -> ModuleType:
    try:
        if not reference.is_file:
            return importlib.import_module(reference.place)
        spec = importlib.util.spec_from_loader(
            _key(reference), _Source(content, path), origin=str(path)
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__file__ = str(path)
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]
            raise
        return module
    except (Exception, SystemExit) as error:
        allowed = f"cannot be imported: {_describe(error, str(path))}"
        raise ConfigError(field, reference.label, allowed, "correct it") from error


def _describe(error: BaseException, path: str) -> str:
    """Return type and message of an error, with the last line of the user's file on its way."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f"{text} ({Path(path).name}, line {lines[-1]})" if lines else text


def _class_in(module: ModuleType, field: str, reference: Reference) -> type:
    found = getattr(module, reference.name, None)
    if isinstance(found, type):
        return found
    own = (n for n, v in vars(module).items() if isinstance(v, type) and not n.startswith("_"))
    there = ", ".join(sorted(n for n in own if vars(module)[n].__module__ == module.__name__))
    what = "is no class" if found is not None else "is not in it"
    allowed = f"{reference.name} {what}; {reference.label.split(':')[0]} has {there or 'none'}"
    raise ConfigError(field, reference.label, allowed, "name a class")
