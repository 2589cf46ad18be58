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
INSTALLED = Path("share", "dmoe", "configs")
TITLE = "# What it shows: "
ROOT = Path(__file__).parents[2]
"""The clone, or the folder where pip put the package."""


@cache
def list_shipped() -> dict[str, Path]:
    """Return the files by name, sorted: `quickstart`, `modular/adapter`, ..."""
    if (ROOT / "pyproject.toml").is_file():
        folder = ROOT / "configs"
    else:
        places = [ROOT, Path(sysconfig.get_path("data")), Path(site.getuserbase())]
        folder = next((p / INSTALLED for p in places if (p / INSTALLED).is_dir()), ROOT / INSTALLED)
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
