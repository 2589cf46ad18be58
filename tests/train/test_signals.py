"""What a process remembers of the signals it got, and when it stops remembering."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dmoe.train.reduction import Requests
from dmoe.train.signals import ECHO, Signals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    listening = Signals()
    listening.listen()
    yield listening
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_without_a_signal_nothing_is_asked_for(signals: Signals) -> None:
    assert signals.requests(failed=False) == Requests(stop=False, save=False, failed=False)
    assert signals.requests(failed=True) == Requests(stop=False, save=False, failed=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_stays_until_the_end(signals: Signals, number: signal.Signals) -> None:
    send(number)
    assert signals.stop
    assert signals.number == number
    for _ in range(3):
        assert signals.requests(failed=False) == Requests(stop=True)


def test_a_request_to_save_is_told_once(signals: Signals) -> None:
    send(signal.SIGUSR1)
    send(signal.SIGUSR1)
    assert not signals.stop
    assert signals.requests(failed=False) == Requests(save=True)
    assert signals.requests(failed=False) == Requests()


def test_who_hears_of_it_after_the_save_does_not_ask_again(signals: Signals) -> None:
    send(signal.SIGUSR1)
    signals.saved()
    assert signals.requests(failed=False) == Requests()


def test_both_at_once(signals: Signals) -> None:
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert signals.requests(failed=False) == Requests(stop=True, save=True)


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM")])
def test_a_second_request_to_end_is_obeyed_at_once(first: str, second: str) -> None:
    """In a process of its own, busy with what it would not leave by itself; a request to save between does not count as one."""
    program = (
        "from dmoe.train.signals import Signals\nimport time\n"
        "signals = Signals(); signals.listen(); print('ready', flush=True)\n"
        "while not signals.stop: time.sleep(0.01)\nprint('heard', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, first))
        assert process.stdout.readline() == "heard\n"
        process.send_signal(signal.SIGUSR1)
        process.send_signal(
            getattr(signal, second)
        )  # at once: the same request, passed on by two who heard it
        time.sleep(2 * ECHO)
        assert process.poll() is None
        process.send_signal(getattr(signal, second))
        assert process.wait(timeout=30) == -getattr(signal, second)
