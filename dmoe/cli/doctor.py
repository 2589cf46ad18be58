"""Command `dmoe doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import ARGUMENTS_HELP, integer, load_arguments
from dmoe.config.errors import ConfigError, DmoeError
from dmoe.config.launch_env import has_accelerator, main_memory, read_launch_env
from dmoe.config.rules import check, check_memory
from dmoe.config.rules.memory import BYTES_PER_PARAMETER
from dmoe.config.rules.parallel import model_size
from dmoe.config.schema import Config

if TYPE_CHECKING:
    from dmoe.doctor import Finding

GRADIENT_BYTES = 4
"""Of the bytes per parameter in training, those that no checkpoint holds."""
MARKS = {"ok": "[green]ok[/green]", "warning": "[yellow]warning[/yellow]"}
SECONDS = 120.0


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="Start this many local ranks and measure their links.", **integer(1, 64)),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine, or the ranks of a job, before training: what fails and what to change.

    Versions, devices, back-ends, cores, memory, limits, ports, the file system of the run
    directory; with several ranks also their versions, clocks, links and whether all see that
    directory. With CONFIG, its memory and the size of its checkpoints too. Under torchrun or
    Slurm all ranks of the job take part, which takes five seconds more. The exit code is 1 where
    training would fail.

    Example: dmoe doctor configs/quickstart.yaml --ranks 2
    """
    config, _ = load_arguments(arguments or [])
    launch = read_launch_env()
    if launch is not None and ranks is not None:
        fix = "leave --ranks out under torchrun"
        raise ConfigError("--ranks", ranks, "a launcher has already set the world size", fix)
    world = ranks or 1 if launch is None else launch.world_size
    local = world if launch is None else launch.local_world_size
    check(config, world)
    if launch is not None:
        findings = _of_this_rank(config, world, local)
    elif world == 1:
        findings = _of_this_machine(config, world, local)
    else:
        from dmoe.distributed.local_ranks import run_ranks

        parts = run_ranks(world, _started_rank, config, timeout=SECONDS)
        findings = _read(parts[0])
    if launch is None or launch.rank == 0:
        if as_json:
            print(json.dumps([asdict(finding) for finding in findings], indent=2))
        else:
            _print(findings)
        sys.stdout.flush()
    sys.exit(1 if any(finding.state == "failed" for finding in findings) else 0)


def _of_this_machine(config: Config, world: int, local: int) -> list[Finding]:
    from dmoe.doctor import Finding, check_machine, check_storage

    size = model_size(config)
    per_parameter = BYTES_PER_PARAMETER.get(config.optim.kind, 8) - GRADIENT_BYTES
    keep = config.checkpoint.keep
    checkpoint = per_parameter * (size.dense + size.experts)
    findings = check_machine(local) + check_storage(_folder(config), checkpoint, keep)
    if config.train.device == "cpu" or not has_accelerator():
        try:
            check_memory(config, world, local, main_memory())
        except ConfigError as error:
            findings.append(Finding("memory of the config", "failed", str(error), error.fix))
    return findings


def _of_this_rank(config: Config, world: int, local: int) -> list[Finding]:
    """Take part in the checks over all ranks of a launcher. Collective."""
    from dmoe.distributed.init import init_distributed, shutdown
    from dmoe.doctor import check_ranks

    process = init_distributed(config.train.device, config.parallel.backend, SECONDS)
    own = _of_this_machine(config, world, local)
    findings = check_ranks(process, own, _folder(config))
    shutdown()
    return findings


def _started_rank(rank: int, world: int, config: Config) -> str:
    """Run the checks on a rank that `--ranks` started, and return them as text."""
    from dmoe.distributed.init import init_distributed
    from dmoe.doctor import check_ranks

    process = init_distributed("cpu", "gloo", SECONDS)
    own = _of_this_machine(config, world, world)
    return json.dumps([asdict(f) for f in check_ranks(process, own, _folder(config))])


def _read(text: object) -> list[Finding]:
    from dmoe.doctor import Finding

    if not isinstance(text, str):
        raise DmoeError("a rank returned no findings")
    return [Finding(**item) for item in json.loads(text)]


def _folder(config: Config) -> Path:
    """Return the closest directory that exists to where the run will be saved."""
    folder = Path(config.train.run_dir or "runs").expanduser().absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark = MARKS.get(finding.state, "[bold red]FAILED[/bold red]")
        text = escape(finding.found)
        if finding.fix and finding.fix != finding.found:
            text += f"\n-> {escape(finding.fix)}"
        table.add_row(mark, escape(finding.check), text)
    console = Console(highlight=False)
    console.print(table)
    failed = sum(finding.state == "failed" for finding in findings)
    warned = sum(finding.state == "warning" for finding in findings)
    console.print(f"{len(findings)} checks, {failed} failed, {warned} with a warning")
