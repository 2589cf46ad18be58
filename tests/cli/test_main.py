"""Entry point: the traceback of a bug in dmoe."""

from __future__ import annotations

import pytest

from dmoe.cli import main


def test_a_traceback_has_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The traceback of a bug contained the value of MY_TOKEN, as part of a path."""

    def broken() -> int:
        raise IsADirectoryError("/home/hunter2hunter2/run")

    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(main, "dispatch_command", broken)
    monkeypatch.setattr(main, "prepare_process", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main.run()
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert "IsADirectoryError" in printed
    assert "hunter2" not in printed
