"""Requests by signal: what is recorded, and when it is cleared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dmoe.distributed.launcher import STOP_SIGNALS
from dmoe.train.reduction import Requests
from dmoe.train.signals import REPEAT_SECONDS, Signals

NUMBERS = (*STOP_SIGNALS, signal.SIGUSR1)


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NUMBERS}
    installed = Signals()
    installed.install_handlers()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_no_request_without_a_signal(signals: Signals) -> None:
    assert signals.take_requests(failed=False) == Requests(stop=False, save=False, failed=False)
    assert signals.take_requests(failed=True) == Requests(stop=False, save=False, failed=True)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_request_stays(signals: Signals, number: signal.Signals) -> None:
    send(number)
    assert signals.is_stop_requested()
    assert signals.stop_signal == number
    for _ in range(3):
        assert signals.take_requests(failed=False) == Requests(stop=True)


def test_save_request_is_taken_once(signals: Signals) -> None:
    send(signal.SIGUSR1)
    send(signal.SIGUSR1)
    assert not signals.is_stop_requested()
    assert signals.take_requests(failed=False) == Requests(save=True)
    assert signals.take_requests(failed=False) == Requests()


def test_save_signal_during_the_save_is_cleared(signals: Signals) -> None:
    send(signal.SIGUSR1)
    signals.clear_save_request()
    assert signals.take_requests(failed=False) == Requests()


def test_stop_and_save_together(signals: Signals) -> None:
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert signals.take_requests(failed=False) == Requests(stop=True, save=True)


def test_an_inherited_ignore_is_kept() -> None:
    """`nohup dmoe train` must go on when the terminal is closed; TERM is never ignored."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in NUMBERS}
    try:
        signals = Signals()
        signals.install_handlers()
        send(signal.SIGHUP)
        send(signal.SIGINT)
        assert not signals.is_stop_requested()
        send(signal.SIGTERM)
        assert signals.is_stop_requested()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_warnings_of_a_limit_are_not_the_second_request(signals: Signals) -> None:
    """The kernel repeats XCPU each second; LSF sends USR2, and INT ten seconds later."""
    for number in (signal.SIGXCPU, signal.SIGXCPU, signal.SIGUSR2, signal.SIGINT, signal.SIGXCPU):
        send(number)
    assert signals.stop_signal == signal.SIGXCPU


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGHUP", "SIGHUP")]
)
def test_second_stop_signal_ends_the_process_at_once(first: str, second: str) -> None:
    """In a process that would not end by itself; SIGUSR1 in between does not count."""
    program = (
        "from dmoe.train.signals import Signals\nimport time\n"
        "signals = Signals(); signals.install_handlers(); print('ready', flush=True)\n"
        "while not signals.is_stop_requested(): time.sleep(0.01)\n"
        "print('stopping', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, first))
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGUSR1)
        # Within REPEAT_SECONDS: the first signal again, forwarded by two senders.
        process.send_signal(getattr(signal, second))
        time.sleep(2 * REPEAT_SECONDS)
        assert process.poll() is None
        process.send_signal(getattr(signal, second))
        assert process.wait(timeout=30) == -getattr(signal, second)
