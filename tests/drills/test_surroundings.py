"""Drills 36 to 44: what a shell, a terminal or a scheduler does to a run does not end it in silence.

The story: closing the terminal lost a run without a word (no handler for SIGHUP), also under
`nohup` with `--ranks 2`, whose launcher handled what nohup had told it to ignore. `| head -1` lost
it at the next printed line, `>&-` was an AttributeError, and a removed working directory an OSError
after the last step.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dmoe.checkpoint import latest, verify
from dmoe.config.schema import DataConfig
from dmoe.data import prepare_shards
from tests.cli.commands import environment, metrics
from tests.drills.jobs import DRILL, ROOT, Job, events, processes_of, wait_until

pytestmark = pytest.mark.drills

ENDLESS = ("train.steps=100000", "train.log_every=10", "checkpoint.every=100000")
SECONDS = 60.0
LATIN1 = os.fsdecode(b"caf\xe9")


@contextmanager
def shell(
    run: Path, script: str, *overrides: str, options: Sequence[str] = (), **how: Any
) -> Iterator[Job]:
    """Run a bash script whose `"$@"` is `dmoe train ...`; kill what is left at the end."""
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dmoe", "train", *DRILL, f"train.run_dir={run}", *overrides]
    env = environment() | {"PYTHONPATH": str(ROOT), "DMOE_DRILL": str(run)} | how.pop("env", {})
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= {"cwd": run.parent} | how
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command, *options],
        env=env,
        text=True,
        **streams,
    )
    try:
        yield Job(process, run)
    finally:
        process.kill()
        for pid in processes_of(run):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def has_steps(started: Job, least: int) -> bool:
    """Return whether step `least` is logged."""
    return (started.run / "metrics.jsonl").exists() and started.steps() >= least


def end(started: Job) -> tuple[int, str, str]:
    """Wait for the end; return exit code, output and errors."""
    output, errors = started.process.communicate(timeout=SECONDS)
    return started.process.returncode, output or "", errors or ""


def assert_saved(run: Path) -> int:
    """Assert that the run stopped after a step that is saved; return the step."""
    stop = [line for line in metrics(run) if line["event"] == "end"][-1]
    assert stop["stopped"] is True
    newest = latest(run / "checkpoints")
    assert newest is not None
    assert verify(newest).step == stop["step"]
    return int(stop["step"])


def test_a_closed_terminal_saves_the_run_and_nohup_lets_it_go_on(tmp_path: Path) -> None:
    """Faults 36 and 37: with `--ranks 2`; a hang-up takes the output of all ranks away, too."""
    run, two = tmp_path / "run", ("--ranks", "2")
    terminal, end_of_ranks = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), end_of_ranks)
    # a session of its own whose terminal it is: then the kernel sends HUP to the launcher alone
    script = f'exec {sys.executable} -c "{TAKE_TERMINAL}" "$@"'
    with shell(run, script, *ENDLESS, options=two, start_new_session=True, **streams) as started:
        os.close(end_of_ranks)
        wait_until(lambda: has_steps(started, 10), started, what="step 10")
        os.close(terminal)
        assert end(started)[0] == 128 + signal.SIGHUP
    step = assert_saved(run)
    with shell(run, 'exec nohup "$@"', *ENDLESS, options=two) as started:
        wait_until(lambda: has_steps(started, step + 20), started, what="20 steps more")
        pids = [started.process.pid, *started.workers()]
        assert len(pids) == 3
        for pid in pids:
            os.kill(pid, signal.SIGHUP)
        last = started.steps() + 20
        wait_until(lambda: has_steps(started, last), started, what="20 steps more")
        started.signal(signal.SIGTERM)
        assert end(started)[0] == 128 + signal.SIGTERM
    assert assert_saved(run) >= last


TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    " os.execv(sys.argv[1], sys.argv[1:])"
)
"""Make stdin the controlling terminal of this session."""


def test_a_reader_that_left_does_not_end_the_run(tmp_path: Path) -> None:
    """Fault 39: `| head -1`, in a process whose environment is not UTF-8, either (fault 41)."""
    run = tmp_path / "run"
    script = '"$@" | head -1; exit ${PIPESTATUS[0]}'
    with shell(run, script, env={"NAME": LATIN1, "LC_ALL": "C"}) as started:
        code, output, errors = end(started)
    assert (code, output.count("\n")) == (0, 1), errors
    assert errors.count("dmoe: stdout can no longer be written (Broken pipe); the run") == 1
    assert "Traceback" not in errors
    assert [line["step"] for line in events(run, "end")] == [12]


def test_closed_descriptors_and_a_removed_directory(tmp_path: Path) -> None:
    """Faults 38, 40 and 42: `<&- >&- 2>&-`, the directory goes, then a scheduler's SIGUSR2.

    Without a reserved descriptor the files of the run would get numbers 0 to 2, and with them what
    libraries print.
    """
    run, gone = tmp_path / "run", tmp_path / "gone"
    gone.mkdir()
    with shell(run, 'exec "$@" <&- >&- 2>&-', *ENDLESS, cwd=gone) as started:
        wait_until(lambda: has_steps(started, 10), started, what="step 10")
        files = {os.readlink(f"/proc/{started.process.pid}/fd/{number}") for number in range(3)}
        assert files == {os.devnull}
        gone.rmdir()
        started.signal(signal.SIGUSR2)
        assert end(started) == (128 + signal.SIGUSR2, "", "")
    assert_saved(run)


@pytest.mark.parametrize("limit", ["-Sn", "-n"])
def test_many_shards_and_names_that_are_not_utf8(limit: str, tmp_path: Path) -> None:
    """Faults 38, 41 and 43: a mapped shard is an open file, and a shell's limit is low.

    A soft limit is raised; of a hard one the sentence names it. Text in files whose names are not
    UTF-8 is read. SIGXCPU comes again each second.
    """
    text, shards, run = tmp_path / "text", tmp_path / "shards", tmp_path / "run"
    text.mkdir()
    for number in range(40):
        (text / f"{number}{LATIN1}.txt").write_text(f"{number} " * 80, encoding="utf-8")
    index = prepare_shards(DataConfig(source=str(text), holdout=0.2), shards, shard_tokens=50)
    files = sum(len(split.shards) for split in index.splits.values())
    assert files > 100
    source = (f"data.source={shards}", "data.holdout=0.2")
    with shell(run, f'ulimit {limit} 100; exec "$@"', *ENDLESS, *source) as started:
        if limit == "-Sn":
            wait_until(lambda: has_steps(started, 10), started, what="step 10")
            started.signal(signal.SIGXCPU)
        code, _, errors = end(started)
    if limit == "-Sn":
        assert (code, errors) == (128 + signal.SIGXCPU, "")
        assert_saved(run)
    else:
        assert (code, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("dmoe: ulimit -n: too many files are open")
        assert not run.exists()


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun of Open MPI has started several processes"),
        ({"GLOO_SOCKET_IFNAME": LATIN1}, "must name a network interface of this machine"),
        ({"TORCH_DISTRIBUTED_DEBUG": "ON"}, "must be OFF, INFO or DETAIL"),
    ],
    ids=["mpirun", "interface", "debug"],
)
def test_what_others_left_in_the_environment(
    env: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    """Fault 44: refused before torch is imported."""
    with shell(tmp_path / "run", 'exec "$@"', env=env) as started:
        code, output, errors = end(started)
    assert (code, output, errors.count("\n")) == (2, "", 1), errors
    assert sentence in errors
    assert not (tmp_path / "run").exists()
