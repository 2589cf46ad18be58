"""Command `dmoe sweep`: one run per combination of values, in one directory, then one table."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from dmoe.cli.common import integer, load_arguments, split
from dmoe.cli.runs import terminal_width
from dmoe.cli.surroundings import keep_running_without_output
from dmoe.config.errors import ConfigError
from dmoe.config.fields import field_named
from dmoe.config.rules import check
from dmoe.config.rules.tracking import check_tracking
from dmoe.config.schema import Config
from dmoe.report.comparison import comparison_lines
from dmoe.report.run import is_finished, load_runs

MAX_RUNS = 1000
POLL_SECONDS = 0.1
COMMA = re.compile(r""",(?=(?:[^\[\]"']|\[[^\]]*\]|"[^"]*"|'[^']*')*$)""")
"""A comma between values: not inside brackets or quotes."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class SweepRun:
    """One combination of values."""

    name: str
    """Name of its directory, e.g. `top_k=1,seed=0`."""
    arguments: tuple[str, ...]
    """Of `dmoe train`."""


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[CONFIG] K=V[,V ...] [K=V[,V ...] ...]",
            help="As for dmoe train; a field with several values, separated by commas, is varied.",
        ),
    ],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Directory of the runs. Default: a new one under runs/. Given again, finished "
            "runs are skipped and the others go on.",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Local processes of each run.", **integer(1))
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at one time.", **integer(1))] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all configs, print the runs and start none.")
    ] = False,
) -> None:
    """Train one run per combination of values, then compare them as dmoe compare does.

    All configs are checked before the first run starts. What a run prints is in NAME.log. A run
    that fails does not end the others; the exit code is 1 then. A stop signal is passed on: the
    runs save their step, and the same command with --dir goes on.

    Example: dmoe sweep configs/quickstart.yaml moe.top_k=1,2 train.seed=0,1,2 --jobs 2
    """
    keep_running_without_output()
    sweep = {run.name: run for run in plan(arguments)}
    configs = {name: load_arguments(list(run.arguments))[0] for name, run in sweep.items()}
    for config in configs.values():
        check(config, ranks or 1)
        check_tracking(config)
    base = directory or Path("runs") / time.strftime("sweep-%Y%m%d-%H%M%S")
    commands = {name: train_command(run, base, ranks) for name, run in sweep.items()}
    if dry_run:
        print("\n".join(shlex.join(["dmoe", *parts]) for parts in commands.values()))
        return
    make_directory(base)
    again = shlex.join(["dmoe", "sweep", *arguments, "--dir", str(base)])
    print(f"{len(sweep)} runs in {base}; to go on after a stop: {again}", flush=True)
    done = [name for name in sweep if _is_done(base / name, configs[name])]
    for name in done:
        print(f"{name}: done before", flush=True)
    runner = _Runner(base, threads=max(1, num_cores() // (jobs * (ranks or 1))))
    runner.run({name: parts for name, parts in commands.items() if name not in done}, jobs)
    found = [base / name for name in sweep if (base / name / "resolved.yaml").is_file()]
    if found:
        print("\n".join(["", *comparison_lines(load_runs(found), terminal_width())]))
    for name in runner.failed:
        print(f"dmoe: {name} failed; see {base / name}.log", file=sys.stderr)
    if runner.stopped or runner.failed:
        sys.exit(128 + runner.stopped if runner.stopped else 1)


def make_directory(base: Path) -> None:
    """Create the directory of the runs.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError("--dir", base, f"cannot be written ({reason})", "name another") from None


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def plan(arguments: Sequence[str]) -> list[SweepRun]:
    """List the runs, the last field varying fastest.

    Raises:
        ConfigError: no field has several values, there are too many runs, or a run directory.
    """
    path, overrides = split(list(arguments))
    fixed, varied = list[str](), dict[str, list[str]]()
    for override in overrides:
        key, _, text = override.partition("=")
        values = [value.strip() for value in COMMA.split(text)]
        if key in varied or (len(values) > 1 and any(f.startswith(f"{key}=") for f in fixed)):
            raise ConfigError(key, text, "is given twice", "list all of its values once")
        if key == "train.run_dir":
            raise ConfigError(key, text, "is set by the sweep", "name the directory with --dir")
        if len(values) > 1 and len(set(values)) < len(values):
            raise ConfigError(key, text, "has one value twice", "list each value once")
        if len(values) > 1:
            varied[key] = values
        else:
            fixed.append(override)
    number = 1
    for values in varied.values():
        number *= len(values)
    if not varied or number > MAX_RUNS:
        shown = " ".join(overrides) or "no overrides"
        allowed = f"gives {number} runs" if varied else "varies no field"
        fix = f"a sweep has at most {MAX_RUNS}" if varied else "e.g. moe.top_k=1,2 train.seed=0,1"
        raise ConfigError("K=V", shown, allowed, fix)
    start = [path] if path is not None else []
    return [
        SweepRun(
            ",".join(f"{_short(key, varied)}={_safe(v)}" for key, v in zip(varied, c, strict=True)),
            (*start, *fixed, *(f"{key}={v}" for key, v in zip(varied, c, strict=True))),
        )
        for c in itertools.product(*varied.values())
    ]


def _short(key: str, varied: dict[str, list[str]]) -> str:
    """Return the last part of a field's name, or all of it where another field ends alike."""
    leaf = key.rpartition(".")[2]
    alike = [name for name in varied if name.rpartition(".")[2] == leaf]
    return leaf if len(alike) == 1 and field_named(key) else key


def _safe(value: str) -> str:
    """Return a value as a part of a directory's name."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("_")[:60] or "_"


def train_command(run: SweepRun, base: Path, ranks: int | None) -> list[str]:
    """Return the arguments of `dmoe` that train one run."""
    more = [] if ranks is None else ["--ranks", str(ranks)]
    return ["train", *run.arguments, f"train.run_dir={base / run.name}", "--quiet", *more]


class _Runner:
    """Runs commands in processes of their own, and passes stop signals on to them."""

    def __init__(self, base: Path, threads: int) -> None:
        self.base, self.failed, self.stopped = base, list[str](), 0
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = self.stopped or number
        for child in list(self.running.values()):
            child.send_signal(number)

    def run(self, commands: dict[str, list[str]], jobs: int) -> None:
        """Run the commands, `jobs` at a time; after a stop, start no other."""
        waiting = list(commands)
        while (waiting and not self.stopped) or self.running:
            while waiting and len(self.running) < jobs and not self.stopped:
                name = waiting.pop(0)
                self._start(name, commands[name])
            for name, child in list(self.running.items()):
                if child.poll() is not None:
                    del self.running[name]
                    self._report(name, child.returncode)
            time.sleep(POLL_SECONDS)

    def _start(self, name: str, arguments: list[str]) -> None:
        # a session of its own: Ctrl-C in the terminal reaches it once, from here
        with (self.base / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "dmoe", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        print(f"{name}: started", flush=True)

    def _report(self, name: str, code: int) -> None:
        if code and not self.stopped:
            self.failed.append(name)
        result = "stopped" if code and self.stopped else "failed" if code else "done"
        print(f"{name}: {result}", flush=True)


def _is_done(path: Path, config: Config) -> bool:
    """Return whether a run has ended, and with this config."""
    if not (path / "metrics.jsonl").is_file():
        return False
    run = load_runs([path])[0]
    if run.config is None or not is_finished(run):
        return False
    here = replace(config.train, run_dir=run.config.train.run_dir)
    return run.config == replace(config, train=here)
