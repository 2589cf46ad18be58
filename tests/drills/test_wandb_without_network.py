"""Fault 31: wandb online without network: training starts within 15 seconds, ends with exit code 0, and metrics.jsonl is whole."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import SMALL, dmoe, metrics, train_lines

pytestmark = pytest.mark.drills

KEY = "ab12cd34" * 5
BOUND = 15.0


class Falls(http.server.BaseHTTPRequestHandler):
    """A server that says it is wandb, and then never answers again."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked += 1  # type: ignore[attr-defined]
        if self.server.asked > 1:  # type: ignore[attr-defined]
            self.server.end.wait(60)  # type: ignore[attr-defined]
            return
        self.answer(200, {"data": {"viewer": None}})

    def answer(self, code: int, content: dict[str, Any]) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None: ...


class Refuses(Falls):
    """A server that takes no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.answer(401, {"errors": [{"message": "no such key"}]})


class Another(Falls):
    """A server, but not wandb's."""

    def do_POST(self) -> None:
        self.answer(200, {"hello": "world"})


@contextmanager
def serving(handler: type[Falls]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.end, server.daemon_threads = 0, threading.Event(), True  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.end.set()  # type: ignore[attr-defined]
        server.shutdown()


@contextmanager
def silent() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    yield "http://127.0.0.1:9"


@contextmanager
def unroutable() -> Iterator[str]:
    """An address of RFC 5737 that nobody has; where a proxy stands between, it is the proxy that answers, with an error."""
    yield "http://192.0.2.1"


@contextmanager
def nameless() -> Iterator[str]:
    yield "https://wandb.invalid"


CASES = {
    "closed port": (closed(), "cannot be reached"),
    "unroutable address": (unroutable(), "http://192.0.2.1"),
    "no such host": (nameless(), "https://wandb.invalid"),
    "never answers": (silent(), "does not answer within"),
    "falls silent": (serving(Falls), "resume status"),
    "takes no key": (serving(Refuses), "401"),
    "not wandb": (serving(Another), "is not a wandb server"),
}


def online(place: Path, url: str, **env: str) -> tuple[list[dict[str, Any]], str, float]:
    """Lines of metrics.jsonl, both outputs, and the time at which the process had ended."""
    own = {
        "WANDB_BASE_URL": url,
        "HOME": str(place),
        "NETRC": str(place / "netrc"),
        "WANDB_API_KEY": KEY,
    } | env
    mine = (
        "tracking.trackers=[wandb]",
        "tracking.wandb_mode=online",
        "train.run_dir=run",
        "train.eval_every=0",
    )
    result = dmoe("train", *SMALL, *mine, cwd=place, **own)
    ended = time.time()
    assert result.returncode == 0, result.stderr[-3000:]
    assert KEY not in result.stdout + result.stderr
    return metrics(place / "run"), result.stdout + result.stderr, ended


def assert_trained_offline(place: Path, lines: list[dict[str, Any]], output: str, why: str) -> None:
    assert sorted(train_lines(place / "run")) == [1, 2, 3, 4, 5, 6]
    alerts = [
        line["text"] for line in lines if line["event"] == "alert" and "wandb" in line["text"]
    ]
    assert len(alerts) == 1
    assert why in alerts[0]
    assert alerts[0] in output
    logs = place / "run/logs/wandb"
    assert len(list(logs.glob("offline-run-*"))) == 1
    assert not list(logs.glob("run-*")), "nothing is left of the attempt"


@pytest.mark.parametrize("name", CASES)
def test_wandb_online_without_its_server(name: str, tmp_path: Path) -> None:
    """wandb waits 90 seconds for a server by default, then raises: the run was over before its first step."""
    server, why = CASES[name]
    with server as url:
        lines, output, ended = online(tmp_path, url)
    assert_trained_offline(tmp_path, lines, output, why)
    started, end = (
        next(line["time"] for line in lines if line["event"] == event) for event in ("start", "end")
    )
    made = (tmp_path / "run/config.yaml").stat().st_mtime
    assert started - made < BOUND, (
        "between the run's directory and its first step stands wandb alone"
    )
    assert ended - end < BOUND, "the end is bounded too"


def test_wandb_online_without_a_key(tmp_path: Path) -> None:
    with serving(Falls) as url:
        lines, output, _ = online(tmp_path, url, WANDB_API_KEY="")
    assert_trained_offline(tmp_path, lines, output, "there is no API key")
