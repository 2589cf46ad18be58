"""`dmoe watch`, and the live panel of a run, on a pseudo-terminal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from dmoe.observability.display.watch import RunWatcher, StallDetector
from dmoe.runs.metrics_follower import MetricsFollower
from tests.cli.commands import SMALL, dmoe, environment, refused
from tests.cli.conftest import Run
from tests.cli.terminal import Terminal

pytestmark = pytest.mark.ranks

LOAD = [30, 2, 16, 16]


def metrics_line(event: str, step: int, at: float = 0.0, **values: Any) -> str:
    return json.dumps({"event": event, "step": step, "time": at or time.time(), **values}) + "\n"


def train_line(step: int, at: float = 0.0) -> str:
    layers = [{"layer": 0, "load": LOAD, "drop_rate": 0.25}]
    return metrics_line(
        "train",
        step,
        at,
        loss=10 / step,
        bits_per_byte=14 / step,
        tokens_per_second=1000.0,
        layers=layers,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Create a run directory without metrics."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "resolved.yaml").write_text("train:\n  steps: 40\n", encoding="utf-8")
    return path


@pytest.fixture
def writer(run: Path) -> Iterator[TextIO]:
    with (run / "metrics.jsonl").open("a", encoding="utf-8", buffering=1) as file:
        yield file


@pytest.fixture
def watcher(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Start `dmoe watch` with its output in a pipe."""
    command = [sys.executable, "-m", "dmoe", "watch", str(run)]
    env = environment() | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def read_until_line(process: subprocess.Popen[str], words: str) -> list[str]:
    """Return the lines printed up to the one with `words`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if words in line:
            return lines
    raise AssertionError(f"{words!r} is not in {lines}")


@pytest.mark.timeout(120)
def test_run_is_followed_from_before_its_start_to_its_end(
    writer: TextIO, watcher: subprocess.Popen[str]
) -> None:
    read_until_line(watcher, "has logged nothing yet; waiting")
    writer.write(metrics_line("start", 0, resumed_from=0) + train_line(1))
    assert read_until_line(watcher, "step 1/40  loss 10.000")[0] == "the run has started"
    writer.write(train_line(2) + metrics_line("alert", 2, title="routing", text="dead experts"))
    assert read_until_line(watcher, "alert: dead experts")[0].startswith("step 2/40  loss 5.000")
    writer.write(metrics_line("eval", 2, loss=5.5, bits_per_byte=7.0, split="held_out"))
    read_until_line(watcher, "step 2: validation loss 5.500, 7.000 bits/byte")
    writer.write(metrics_line("end", 2))
    assert read_until_line(watcher, "the run has ended after step 2")
    assert watcher.wait(timeout=60) == 0


@pytest.mark.timeout(120)
def test_killed_run_is_followed_into_the_next_attempt(
    run: Path, writer: TextIO, watcher: subprocess.Popen[str]
) -> None:
    read_until_line(watcher, "waiting")
    torn = train_line(10)
    writer.write(metrics_line("start", 0, resumed_from=0) + train_line(5) + torn[:40])
    read_until_line(watcher, "step 5/40")
    whole = (run / "metrics.jsonl").read_text(encoding="utf-8")
    with (run / "metrics.jsonl").open("r+", encoding="utf-8") as file:  # as the next attempt does
        file.truncate(len(whole) - 40)
    (run / "resolved.yaml").write_text("train:\n  steps: 60\n", encoding="utf-8")
    writer.write(metrics_line("restart", 4, resumed_from=4) + train_line(6))
    printed = read_until_line(watcher, "step 6/60")
    assert "the run was resumed after step 4" in printed
    watcher.send_signal(signal.SIGINT)
    _, errors = watcher.communicate(timeout=60)
    assert (watcher.returncode, errors) == (130, "")


def test_follower_returns_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.poll() == ([], False)
    line = train_line(1)
    path.write_text(line + line[:30], encoding="utf-8")
    assert [found["step"] for found in follower.poll()[0]] == [1]
    assert follower.poll() == ([], False)
    path.write_text(line + line + '"no object"\n' + train_line(2), encoding="utf-8")
    assert [found["step"] for found in follower.poll()[0]] == [1, 2]
    assert follower.unreadable == 1
    path.write_text(train_line(3), encoding="utf-8")
    lines, replaced = follower.poll()
    assert replaced, "a shorter file is a new one"
    assert [found["step"] for found in lines] == [3]


def test_once_prints_the_current_state(run: Path, writer: TextIO) -> None:
    writer.write(metrics_line("start", 0, resumed_from=0) + train_line(5) + train_line(10))
    writer.write(metrics_line("restart", 5, resumed_from=5, attempt=1) + train_line(6))
    result = dmoe("watch", str(run), "--once", cwd=run)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("step 6/40")
    assert "last line 0:0" in lines[1]
    assert "loss 1.667" in lines[2], "that of step 6"
    assert any("1.88 e0" in line and "0.12 e1" in line and "25.0%" in line for line in lines)
    assert "\x1b" not in result.stdout


def test_once_on_a_real_run(alone: Run, place: Path) -> None:
    result = dmoe("watch", str(alone.path), "--once", cwd=place)
    assert result.returncode == 0, result.stderr
    for words in (
        "step 6/6",
        "100%",
        "has ended after step 6",
        "validation",
        "forward",
        "max/mean",
        "saved step 6",
    ):
        assert words in result.stdout
    assert len([line for line in result.stdout.splitlines() if re.match(r" +[01]  ", line)]) == 2
    piped = dmoe("watch", str(alone.path), cwd=place)
    assert piped.returncode == 0
    assert piped.stdout.splitlines()[1].startswith("step 6/6  loss ")


def test_path_without_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(dmoe("watch", "file", cwd=tmp_path), "RUN", "not a directory")
    refused(dmoe("watch", "nothing", "--once", cwd=tmp_path), "RUN", "not a run directory yet")


def test_latest_is_resolved_once(tmp_path: Path) -> None:
    latest = tmp_path / "latest"
    watch = RunWatcher(latest)
    assert "the directory does not exist yet" in watch.state.status
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            metrics_line("start", 0) + train_line(1 if name == "first" else 2)
        )
    latest.symlink_to("first")
    assert [line["step"] for line in watch._poll()[0]] == [0, 1]
    latest.unlink()
    latest.symlink_to("second")
    assert watch._poll() == ([], False)


class FakeClocks:
    """Two clocks set by the test: time of day, and monotonic."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 5000.0, 0.0


@pytest.fixture
def clocks() -> FakeClocks:
    return FakeClocks()


@pytest.fixture
def stall_detector(clocks: FakeClocks) -> StallDetector:
    return StallDetector(
        minimum=30, factor=3, monotonic=lambda: clocks.monotonic, wall=lambda: clocks.wall
    )


def test_stall_is_relative_to_earlier_pauses(
    clocks: FakeClocks, stall_detector: StallDetector
) -> None:
    for at in (0.0, 20.0, 40.0, 45.0):
        stall_detector.on_line({"event": "train", "time": 1000 + at}, fresh=True)
    clocks.monotonic = 60
    assert not stall_detector.message
    clocks.monotonic, clocks.wall = 61, 9e9  # a change of the wall clock has no effect
    assert "no line for 1:01; the longest pause before was 0:20" in stall_detector.message
    assert stall_detector.clock() == 1045 + 61
    stall_detector.on_line({"event": "train", "time": 1110.0}, fresh=True)
    assert not stall_detector.message


def test_stall_needs_a_minimum_of_seconds(
    clocks: FakeClocks, stall_detector: StallDetector
) -> None:
    for at in range(10):
        stall_detector.on_line({"event": "train", "time": 1000 + at / 10}, fresh=True)
    clocks.monotonic = 29
    assert not stall_detector.message
    clocks.monotonic = 31
    assert stall_detector.message


def test_no_stall_without_an_earlier_pause(
    clocks: FakeClocks, stall_detector: StallDetector
) -> None:
    for event, at in (("start", 100), ("train", 110), ("restart", 120)):
        stall_detector.on_line({"event": event, "time": at}, fresh=True)
    clocks.monotonic = 3600
    assert not stall_detector.message, (
        "pauses of an earlier attempt do not count: the first step may take an hour"
    )
    assert stall_detector.age_text == "last line 1:00:00 ago"


def test_age_of_an_old_line_uses_the_wall_clock(
    clocks: FakeClocks, stall_detector: StallDetector
) -> None:
    stall_detector.on_line({"event": "train", "time": 4000.0}, fresh=False)
    clocks.monotonic = 5
    assert stall_detector.age_text == "last line 16:45 ago, if the clocks of both machines agree"
    stall_detector.on_line({"event": "train"}, fresh=False)
    assert stall_detector.age_text == ""
    assert stall_detector.clock() is None


def test_watch_does_not_import_torch() -> None:
    code = "import sys, dmoe.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.timeout(120)
def test_terminal_shows_panel_below_printed_lines(tmp_path: Path) -> None:
    with Terminal(
        "train", *SMALL, "data.source=synthetic:zipf", "train.run_dir=run", cwd=tmp_path, rows=40
    ) as terminal:
        assert terminal.finish() == 0, terminal.text
        text, raw = terminal.text, terminal.raw
    lines = text.splitlines()
    assert text.count("step 6/6 ") == 1, "a frame was left behind"
    panel = next(place for place, line in enumerate(lines) if line.startswith("step 6/6 "))
    for words in (
        "data: ",
        "model: ",
        "run directory: run",
        "step 3: validation loss",
        "step 6: validation loss",
    ):
        assert sum(line.startswith(words) for line in lines[:panel]) == 1, words
    below = "\n".join(lines[panel:])
    assert re.search(r"^loss \d\.\d{3} .*bits/byte \d", below, re.MULTILINE)
    assert re.search(r"^ +1  .*\d\.\d\d e\d", below, re.MULTILINE), "a row for layer 1"
    assert re.search(r"^sample:\n(.*\n)+run directory: run$", below, re.MULTILINE)
    assert b"\x1b[?25l" not in raw, (
        "no end of the process could leave the terminal without a cursor"
    )


@pytest.mark.timeout(120)
def test_watch_panel_survives_resize_and_interrupt(run: Path, writer: TextIO) -> None:
    writer.write(metrics_line("start", 0, resumed_from=0) + train_line(1))
    with Terminal("watch", str(run), cwd=run, columns=100) as terminal:
        terminal.read_until(lambda text: "step 1/40" in text and "1.88 e0" in text)
        terminal.narrow(60)
        writer.write("".join(train_line(step) for step in range(2, 21)))
        terminal.read_until(lambda text: "step 20/40" in text)
        assert max(map(len, terminal.text.splitlines())) <= 60
        assert terminal.text.count("max/mean") == 1, "the panel of the old width is gone"
        terminal.send(signal.SIGINT)
        assert terminal.finish() == 130
        assert "Traceback" not in terminal.text
        last = max(place for place, line in enumerate(terminal.screen.display) if line.strip())
        assert (terminal.screen.cursor.y, terminal.screen.cursor.x) == (last + 1, 0), (
            "the shell's prompt goes below the panel"
        )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("term", ["dumb", "linux"])
def test_dumb_and_linux_terminals(run: Path, writer: TextIO, term: str) -> None:
    writer.write(
        metrics_line("start", 0, resumed_from=0)
        + train_line(1)
        + train_line(2)
        + metrics_line("end", 2)
    )
    # The line starts with the path of the run, which pytest-xdist makes longer: it must not wrap.
    with Terminal("watch", str(run), cwd=run, columns=300, TERM=term, NO_COLOR="1") as terminal:
        assert terminal.finish() == 0
        assert "run: the run has ended after step 2" in terminal.text
        assert terminal.raw.isascii()
        assert not re.search(rb"\x1b\[(\d+;)*3\d", terminal.raw)
        assert (b"\x1b" in terminal.raw) == (term == "linux")
