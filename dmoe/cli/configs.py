"""Command group `dmoe configs`: list and copy the configs that dmoe ships."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from dmoe.config.errors import ConfigError
from dmoe.config.field_aliases import suggest_field
from dmoe.config.shipped import SUFFIX, list_shipped, title

app = typer.Typer(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="List and copy the configs that dmoe ships. Each can be used by its name.\n\n"
    "Example: dmoe configs",
)


@app.callback()
def show(context: typer.Context) -> None:
    """Print the name of each config and what it shows."""
    if context.invoked_subcommand is None:
        shipped = list_shipped()
        width = max(map(len, shipped), default=0)
        for name, path in shipped.items():
            print(f"{name:{width}}  {title(path)}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that dmoe configs lists.")],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="File to write. Default: NAME.yaml, here."),
    ] = None,
) -> None:
    """Copy a shipped config, to change it; never over an existing file.

    Example: dmoe configs copy mixtral_8x7b my_config.yaml
    """
    shipped = list_shipped()
    if name not in shipped:
        near = suggest_field(name, "", list(shipped), list(shipped))
        fix = f"did you mean {near}?" if near else "dmoe configs lists them"
        raise ConfigError("NAME", name, "is no config that dmoe ships", fix)
    path = target or Path(f"{Path(name).name}{SUFFIX}")
    if path.is_dir():
        path = path / f"{Path(name).name}{SUFFIX}"
    try:
        with path.open("xb") as file, shipped[name].open("rb") as source:
            shutil.copyfileobj(source, file)
    except FileExistsError:
        raise ConfigError("FILE", path, "exists", "name another, or remove it") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError("FILE", path, f"cannot be written ({reason})", "name another") from None
    print(f"copied to {path}; use it with: dmoe train {path}")
