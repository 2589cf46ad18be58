"""Command `dmoe train`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from dmoe.cli.common import ARGUMENTS_HELP, TrustCode, integer, load_arguments, load_resumed
from dmoe.cli.surroundings import keep_running_without_output, large_imports
from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import has_accelerator, main_memory, read_launch_env
from dmoe.config.rules import check, check_memory
from dmoe.config.schema import Config
from dmoe.distributed.launcher import exit_with_launcher


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Start this many local processes.", **integer(1))
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Go on with this run, e.g. runs/latest, with the config that it recorded; only "
            "what changes is given as K=V.",
        ),
    ] = None,
    trust_code: TrustCode = False,
    preflight: Annotated[
        bool,
        typer.Option(
            "--preflight",
            help="First verify on 2 ranks that expert parallelism is correct for this config.",
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port of the local rendezvous. Default: a free one.", **integer(1, 65535)
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", help="Print only notes, alerts and, at the end, the run directory."
        ),
    ] = False,
) -> None:
    """Train a mixture-of-experts language model.

    A run directory with a checkpoint is resumed; notes at the start say what will differ. --resume
    RUN takes the config from the run too.

    Under torchrun, accelerate launch or Slurm, it is one of their ranks; with --ranks N, it starts
    N local ranks; otherwise it is one process.

    Example: dmoe train configs/quickstart.yaml moe.top_k=1 moe.router.renormalize=false --ranks 2
    """
    exit_with_launcher()
    keep_running_without_output()
    # there is nothing to save yet, and the default action would end the process
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    given_arguments = arguments or []
    if resume is None:
        config, given = load_arguments(given_arguments)
    else:
        config, given = load_resumed(resume, given_arguments, trust_code=trust_code)
    launcher = read_launch_env()
    if launcher is not None and ranks is not None:
        raise ConfigError(
            "--ranks",
            ranks,
            "a launcher has already set the world size",
            "leave --ranks out under torchrun",
        )
    world, local = ranks or 1, ranks or 1
    if launcher is not None:
        world, local = launcher.world_size, launcher.local_world_size
    check(config, world)
    if config.train.device == "cpu" or (config.train.device == "auto" and not has_accelerator()):
        check_memory(config, world, local, main_memory())
    if preflight:
        if launcher is not None:
            raise ConfigError(
                "--preflight",
                True,
                "every rank of the launcher would start ranks of its own",
                "run dmoe verify first",
            )
        run_preflight(config)
    if launcher is None and not quiet and sys.stdout.isatty():
        # torch takes seconds to import, and on a busy machine many
        where = f"{ranks} local ranks" if ranks else "one process"
        print(f"starting {where}, with data.source={config.data.source}", flush=True)
    if ranks is None and (launcher is None or launcher.rank == 0):
        _advise(config)
    if ranks is None:
        with large_imports():
            from dmoe.train.run import train

        train(config, given, quiet)
    else:
        from dmoe.distributed.launcher import launch
        from dmoe.runs.provenance import COMMAND, this_command

        os.environ[COMMAND] = this_command()
        options = ["--quiet"] if quiet else []
        options += ["--resume", resume] if resume is not None else []
        options += ["--trust-code"] if trust_code else []
        sys.exit(launch(ranks, ["train", *options, *given_arguments], port))


def _advise(config: Config) -> None:
    """Say before a long read that text of this size should be prepared once."""
    if config.train.task != "language_modelling" or config.data.source == "stdlib":
        return
    from dmoe.data.sources import large_note

    if note := large_note(config.data.source):
        print(f"note: {note}", file=sys.stderr, flush=True)


def run_preflight(config: Config) -> None:
    """Run `dmoe verify` on two ranks; exit with code 1 and the first difference if there is one."""
    from dmoe.verify.verify import verify

    report = verify(config, worlds=[2])
    if report.first is not None:
        first = report.first
        place = f"{first.quantity} differs in {first.case}: {first.where}"
        print(f"dmoe: preflight: {place}: {first.cause}", file=sys.stderr)
        sys.exit(1)
    print(f"preflight: {len(report.cases)} cases train the same model ({report.seconds:.0f} s)")
