"""The configs that dmoe ships: found by name from a clone and from a wheel alike.

In a clone they are the folder `configs/`. A wheel installs it as `share/dmoe/configs`; the record
of the installed files says where that is, so `pip install --target` works too.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

SUFFIX = ".yaml"
INSTALLED = ("share", "dmoe", "configs")
TITLE = "# What it shows: "


@cache
def list_shipped() -> dict[str, Path]:
    """Return the files by name, sorted: `quickstart`, `modular/adapter`, ..."""
    clone = Path(__file__).parents[2] / "configs"
    if clone.is_dir():
        found = {path.relative_to(clone): path for path in clone.rglob(f"*{SUFFIX}")}
    else:
        found = {}
        for file in _installed_files():
            if INSTALLED[-1] in file.parts and file.suffix == SUFFIX:
                start = file.parts.index(INSTALLED[-1])
                if file.parts[start - 2 : start + 1] == INSTALLED:
                    found[Path(*file.parts[start + 1 :])] = Path(str(file.locate()))
    return {str(name.with_suffix("")): found[name] for name in sorted(found)}


def _installed_files() -> list:  # type: ignore[type-arg]  # PackagePath is not exported
    try:
        return files("dmoe") or []
    except PackageNotFoundError:
        return []


def find_config(given: str) -> str:
    """Return the path of a config: `given` if that exists, else the shipped one of that name.

    `mixtral_8x7b`, `mixtral_8x7b.yaml` and `configs/mixtral_8x7b.yaml` are one name. An unknown
    name is returned as it is; reading it gives the error.
    """
    name = given.removeprefix("configs/").removesuffix(SUFFIX)
    if not Path(given).exists() and name in list_shipped():
        return str(list_shipped()[name])
    return given


def title(path: Path) -> str:
    """Return what a shipped config shows: the first sentence of its comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    text = lines[0].removeprefix(TITLE)
    for line in lines[1:]:
        if not line.startswith("#   "):
            break
        text += f" {line[4:].strip()}"
    return text.split(". ")[0].rstrip(".")
