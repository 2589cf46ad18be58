"""Where a run comes from: command, git commit, machine, versions. For its `start` lines.

Nothing here decides anything; what cannot be found is left out. Secrets are redacted by the writer
of `metrics.jsonl`.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dmoe import __version__

COMMAND = "DMOE_COMMAND"
"""Variable in which `--ranks N` leaves its command to the ranks, whose own has no `--ranks`."""
GIT_SECONDS = 5.0
"""A file system that does not answer must not hold the start."""


def describe_provenance() -> dict[str, Any]:
    """Return command, commit, machine and versions as plain values."""
    found: dict[str, Any] = {
        "command": os.environ.get(COMMAND) or this_command(),
        "versions": {
            "dmoe": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": _machine(),
    }
    commit = _git("rev-parse", "HEAD")
    if commit:
        # untracked files do not count: a run directory is one
        changed = _git("status", "--porcelain", "--untracked-files=no")
        found |= {"commit": commit, "dirty": bool(changed)}
    return found


def this_command() -> str:
    """Return the command line of this process, to be pasted into a shell."""
    return shlex.join([_program(), *sys.argv[1:]])


def _program() -> str:
    """Return the name of the program; `python -m dmoe` is `dmoe`."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def _git(*arguments: str) -> str | None:
    """Return what git prints on the working directory's repository; None without one or git."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
            # no lock is taken: another git may be at work
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return result.stdout.strip()


def _machine() -> str:
    """Return the processor, the cores this process may use, and the accelerators."""
    parts = [_cpu_name(), f"{len(os.sched_getaffinity(0))} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
