"""Fixtures: run directories, their reports, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmoe.report import write_report
from tests.report.browser import CHROMIUM, Browser
from tests.report.runs import write_run


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with all metrics, under a name that is markup."""
    return write_run(tmp_path_factory.mktemp("report") / "<b onclick=alert(1)>one&amp;")


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run of half the length, with other numbers of experts, layers and ranks."""
    return write_run(
        tmp_path_factory.mktemp("report") / "two", 30, layers=1, experts=16, ranks=4, seed=1
    )


@pytest.fixture(scope="session")
def one(full_run: Path) -> Path:
    return write_report([full_run], full_run / "report.html")


@pytest.fixture(scope="session")
def two(full_run: Path, other_run: Path) -> Path:
    return write_report([full_run, other_run], other_run / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
