"""The configs that dmoe ships: found by name from a clone and from a wheel alike.

In a clone they are the folder `configs/`; a wheel installs them as `share/dmoe/configs` beside the
packages (`pip install --target`), in the environment, or in the user's folder.
"""

from __future__ import annotations

import site
import sysconfig
from functools import cache
from pathlib import Path

SUFFIX = ".yaml"
INSTALLED = Path("share", "dmoe")
TITLE = "# What it shows: "
ROOT = Path(__file__).parents[2]
"""The clone, or the folder where pip put the package."""


def shared_folder() -> Path:
    """Return the folder that holds `configs/` and `constraints.txt`."""
    if (ROOT / "pyproject.toml").is_file():
        return ROOT
    places = [ROOT, Path(sysconfig.get_path("data")), Path(site.getuserbase())]
    return next((p / INSTALLED for p in places if (p / INSTALLED).is_dir()), ROOT / INSTALLED)


def tested_versions() -> dict[str, str]:
    """Return the version of each package that this release is tested with, from constraints.txt."""
    path = shared_folder() / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.strip().lower(): version.strip() for name, version in pins}


@cache
def list_shipped() -> dict[str, Path]:
    """Return the files by name, sorted: `quickstart`, `modular/adapter`, ..."""
    folder = shared_folder() / "configs"
    found = {str(path.relative_to(folder)): path for path in folder.rglob(f"*{SUFFIX}")}
    return {name.removesuffix(SUFFIX): found[name] for name in sorted(found)}


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
