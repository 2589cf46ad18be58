"""A forked program is what a new interpreter would be: environment, output, exit code, signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cli.commands import environment
from tests.forked import ROOT, ForkedProcess

PROGRAM = """
import os, sys, threading
print(sys.argv[1:], os.environ["HERE"], os.getcwd(), os.getppid(), flush=True)
with open("/proc/self/environ", "rb") as file:
    print(b"HERE=there" in file.read().split(b"\\0"), sorted(os.listdir("/proc/self/fd"))[:4])
sys.stderr.write("error\\n")
if sys.argv[1] == "wait":
    sys.stdout.flush()
    threading.Event().wait()
sys.exit(int(sys.argv[1]))
"""
RANK = """
import os, signal, sys, tempfile
from pathlib import Path
kept = tempfile.TemporaryDirectory()
here = Path(sys.argv[1])
(here / os.environ["RANK"]).write_text(f"{os.getppid()} {kept.name} {os.getsid(0) == os.getpid()}")
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(folder: Path, text: str, module: str, *arguments: str) -> ForkedProcess:
    (folder / "program.py").write_text(text, encoding="utf-8")
    return ForkedProcess(module, arguments, folder, environment() | {"HERE": "there"})


@pytest.mark.parametrize("code", [0, 3])
def test_output_environment_and_exit_code(code: int, tmp_path: Path) -> None:
    process = start(tmp_path, PROGRAM, "program", str(code), "x")
    out, err = process.communicate(timeout=60)
    first, second = out.splitlines()
    assert first.startswith(f"{[str(code), 'x']} there {tmp_path} ")
    assert int(first.split()[-1]) != os.getpid()
    assert second == "True ['0', '1', '2', '3']", "3 is the listing itself"
    assert (err, process.returncode) == ("error\n", code)


def test_it_dies_of_a_signal(tmp_path: Path) -> None:
    process = start(tmp_path, PROGRAM, "program", "wait")
    assert process.stdout is not None
    assert process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM


@pytest.mark.ranks
def test_ranks_are_children_of_torchrun_and_restarted_by_it(tmp_path: Path) -> None:
    """Each in its own session; what one has at exit handlers is done, what torchrun has is not."""
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = start(
        tmp_path, RANK, "torch.distributed.run", *options, "-m", "program", str(tmp_path)
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for rank in ("0", "1"):
        parent, folder, session = (tmp_path / rank).read_text().split()
        assert (int(parent), session) == (process.pid, "True")
        assert not Path(folder).exists()
    assert (ROOT / "tests").is_dir()
