"""What the entry point prints of a defect of dmoe's own."""

from __future__ import annotations

import pytest

from dmoe.cli import main


def test_a_traceback_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that is no user's mistake was raised again as it was, with the value of MY_TOKEN in the path it named."""

    def broken() -> int:
        raise IsADirectoryError("/home/hunter2hunter2/run")

    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(main, "dispatch_command", broken)
    monkeypatch.setattr(main, "guard_output", lambda: None)
    with pytest.raises(SystemExit) as left:
        main.run()
    told = capsys.readouterr().err
    assert left.value.code == 1
    assert "IsADirectoryError" in told
    assert "hunter2" not in told
