"""Workers exit when the launcher is killed with SIGKILL; with the real torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmoe.distributed.launcher import exit_with_launcher

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"),
        reason="only Linux tells a process of its parent's death",
    ),
]

WORKER = """
import os, sys, time
from pathlib import Path
from dmoe.distributed.launcher import exit_with_launcher

exit_with_launcher()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(1)  # restarted workers matter: another thread of torchrun may start them
fresh = Path(sys.argv[1]) / f"fresh-{os.environ['RANK']}"
fresh.write_text(str(os.getpid()))
fresh.replace(fresh.with_name(f"pid-{os.environ['RANK']}"))
time.sleep(100)
"""
DEATH_SIGNAL = """
import ctypes, os, sys
from dmoe.distributed.launcher import exit_with_launcher

if sys.argv[1] == "late":
    parents = iter([os.getppid(), 1])
    os.getppid = lambda: next(parents)
exit_with_launcher()
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)  # PR_GET_PDEATHSIG
print(number.value)
"""


def runs(pid: int) -> bool:
    """Return True if the process runs and is not a zombie."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            not in "ZX"
        )
    except OSError:
        return False


def wait_for_workers(folder: Path, launcher: subprocess.Popen[str]) -> list[int]:
    deadline = time.monotonic() + 90
    while len(files := sorted(folder.glob("pid-*"))) < 2:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline, "torchrun has not restarted its workers"
        time.sleep(0.05)
    return [int(file.read_text(encoding="utf-8")) for file in files]


def test_workers_die_with_a_killed_launcher_and_not_before(tmp_path: Path) -> None:
    """Each worker has its own session, so only the signal ends it."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
        script,
        tmp_path,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids: list[int] = []
    try:
        pids = wait_for_workers(tmp_path, launcher)
        time.sleep(1.0)
        assert all(runs(pid) for pid in pids)
        launcher.kill()
        launcher.wait()
        deadline = (
            time.monotonic() + 20
        )  # it takes milliseconds; a worker without the signal sleeps for 100 s
        while any(runs(pid) for pid in pids):
            assert time.monotonic() < deadline, "a worker outlives its launcher"
            time.sleep(0.01)
    finally:
        launcher.kill()
        launcher.communicate()
        for pid in filter(runs, pids):
            os.kill(pid, signal.SIGKILL)


def ask(kind: str, launched: bool) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"
    }
    environment |= {"TORCHELASTIC_RUN_ID": "none"} if launched else {}
    return subprocess.run(
        [sys.executable, "-c", DEATH_SIGNAL, kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_only_a_worker_of_the_elastic_launcher_asks_for_the_signal() -> None:
    assert ask("in time", launched=True).stdout.strip() == str(int(signal.SIGKILL))
    assert ask("in time", launched=False).stdout.strip() == "0"


def test_a_launcher_that_died_just_before_is_noticed() -> None:
    assert ask("late", launched=True).returncode == -signal.SIGKILL


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)
    exit_with_launcher()
