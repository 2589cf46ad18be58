"""Fault 31: wandb online without network: training starts within 15 s and succeeds."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.cli.commands import SMALL, dmoe, metrics, train_lines

pytestmark = pytest.mark.drills

KEY = "ab12cd34" * 5
BOUND = 45.0
"""Seconds; wandb itself would wait for 90. A loaded machine has taken 30."""


class FakeServer(http.server.ThreadingHTTPServer):
    """Server that counts its requests and can end a waiting answer."""

    daemon_threads = True

    def __init__(self, handler: type[FallsSilent]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.requests, self.end = 0, threading.Event()


class FallsSilent(http.server.BaseHTTPRequestHandler):
    """Server that answers like wandb once, then never again."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        server = cast(FakeServer, self.server)
        server.requests += 1
        if server.requests > 1:
            server.end.wait(60)
            return
        self.answer(200, {"data": {"viewer": None}})

    def answer(self, code: int, content: dict[str, Any]) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None: ...


class RefusesKey(FallsSilent):
    """Server that refuses every key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.answer(401, {"errors": [{"message": "no such key"}]})


class OtherServer(FallsSilent):
    """Server that is not wandb."""

    def do_POST(self) -> None:
        self.answer(200, {"hello": "world"})


@contextmanager
def serving(handler: type[FallsSilent]) -> Iterator[str]:
    with FakeServer(handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.end.set()
        server.shutdown()


@contextmanager
def silent() -> Iterator[str]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    yield "http://127.0.0.1:9"


@contextmanager
def unroutable() -> Iterator[str]:
    """Give an unused address (RFC 5737); behind a proxy, the proxy answers with an error."""
    yield "http://192.0.2.1"


@contextmanager
def unresolvable() -> Iterator[str]:
    yield "https://wandb.invalid"


CASES = {
    "closed port": (closed(), "cannot be reached"),
    "unroutable address": (unroutable(), "http://192.0.2.1"),
    "no such host": (unresolvable(), "https://wandb.invalid"),
    "never answers": (
        silent(),
        "does not answer within|timed out",
    ),  # the second: of the connection
    "falls silent": (serving(FallsSilent), "resume status"),
    "takes no key": (serving(RefusesKey), "401"),
    "not wandb": (serving(OtherServer), "is not a wandb server"),
}


def online(place: Path, url: str, **env: str) -> tuple[list[dict[str, Any]], str, float]:
    """Train online; return the lines of metrics.jsonl, the output and the end time."""
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
    assert any(cause in alerts[0] for cause in why.split("|")), alerts
    assert alerts[0] in output
    logs = place / "run/logs/wandb"
    assert len(list(logs.glob("offline-run-*"))) == 1
    assert not list(logs.glob("run-*")), "files of the online attempt"


@pytest.mark.parametrize("name", CASES)
def test_wandb_online_without_its_server(name: str, tmp_path: Path) -> None:
    """wandb waits 90 s for a server, then raises: the run ended before its first step."""
    server, why = CASES[name]
    with server as url:
        lines, output, ended = online(tmp_path, url)
    assert_trained_offline(tmp_path, lines, output, why)
    started, end = (
        next(line["time"] for line in lines if line["event"] == event) for event in ("start", "end")
    )
    created = (tmp_path / "run/config.yaml").stat().st_mtime
    assert started - created < BOUND, (
        "only wandb runs between the creation of the directory and the first step"
    )
    assert ended - end < BOUND, "the end is bounded too"


def test_wandb_online_without_a_key(tmp_path: Path) -> None:
    with serving(FallsSilent) as url:
        lines, output, _ = online(tmp_path, url, WANDB_API_KEY="")
    assert_trained_offline(tmp_path, lines, output, "there is no API key")
