"""The panel at any width, with any numbers; the displays without a terminal."""

from __future__ import annotations

import io
import math
import re
import time
from typing import Any

import pyte
import pytest
from rich.console import Console

from dmoe.observability.display import NullDisplay, PlainDisplay, QuietDisplay, open_display
from dmoe.observability.display.layer_table import ASCII, UNICODE, CharSet, charset_for, load_bars
from dmoe.observability.display.live import LiveDisplay
from dmoe.observability.display.panel import panel_lines, sparkline, stacked_bar
from dmoe.observability.display.state import DisplayState, event_text

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7])")
NOT_NUMBERS = (None, math.nan, math.inf)


def layer(index: int, load: list[Any]) -> dict[str, Any]:
    known = [value for value in load if value]
    mean = sum(known) / len(load) if known else 1
    return {
        "layer": index,
        "load": load,
        "load_max_over_mean": max(known, default=0) / mean,
        "dead_experts": load.count(0),
        "drop_rate": 0.125,
        "router_entropy": 1.5,
    }


def train_values(layers: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    return {
        "loss": 2.5,
        "bits_per_byte": 3.25,
        "grad_norm": 0.75,
        "lr": 1e-3,
        "tokens_per_second": 12345.0,
        "drop_rate": 0.125,
        "load_max_over_mean": 2.0,
        "step_time": {
            "data": 0.1,
            "forward": 0.4,
            "backward": 0.4,
            "exchange": 0.05,
            "optimizer": 0.04,
            "other": 0.01,
        },
        "straggler": 1.25,
        "memory": 3_200_000_000,
        "mfu": 0.31,
        "layers": layers,
    } | other


def state_of(values: dict[str, Any], step: int = 10, steps: int | None = 200) -> DisplayState:
    state = DisplayState(steps)
    for number in range(1, step):
        state.on_event("train", number, {"loss": 5 / number}, float(number))
    state.on_event("eval", step - 1, {"loss": 2.6, "bits_per_byte": 3.5}, step - 1.0)
    state.on_event(
        "alert",
        step - 1,
        {"text": "dead experts: many; what usually helps: patience " + "and more " * 40},
        None,
    )
    state.on_event("train", step, values, float(step))
    return state


def panel(
    state: DisplayState, width: int = 100, height: int = 40, charset: CharSet = UNICODE
) -> list[str]:
    return [line.plain for line in panel_lines(state, 10.0, width, height, charset)]


@pytest.mark.parametrize("width", [20, 60, 100, 200])
@pytest.mark.parametrize("height", [1, 6, 12, 40])
@pytest.mark.parametrize("experts", [1, 8, 128])
@pytest.mark.parametrize("layers", [0, 2, 60])
def test_panel_fits_any_terminal(width: int, height: int, experts: int, layers: int) -> None:
    state = state_of(
        train_values(
            [
                layer(index, [7 * expert % 13 for expert in range(experts)])
                for index in range(layers)
            ]
        )
    )
    for charset in (UNICODE, ASCII):
        lines = panel_lines(state, 10.0, width, height, charset)
        assert 0 < len(lines) <= height
        assert max(line.cell_len for line in lines) <= width
        assert lines[0].plain.startswith("step 10/200")
        if charset is ASCII:
            assert all(line.plain.isascii() for line in lines)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_terminal_shows_panel_lines_unchanged(width: int) -> None:
    """Through rich and the emulated terminal: no line is wrapped, none is lost."""
    state = state_of(
        train_values([layer(index, [expert + 1 for expert in range(128)]) for index in range(3)])
    )
    console = Console(
        file=io.StringIO(),
        width=width,
        height=30,
        force_terminal=True,
        color_system="256",
        highlight=False,
    )
    live = LiveDisplay(console, state, UNICODE, lambda: 10.0)
    live.bottom.terminal_size = lambda: (width, 30)  # type: ignore[method-assign]
    screen = pyte.Screen(width, 30)
    live.bottom.file = io.StringIO()
    live.bottom.draw(live._frame())
    pyte.Stream(screen).feed(live.bottom.file.getvalue().replace("\n", "\r\n"))
    shown = [line.rstrip() for line in screen.display]
    wanted = [line.rstrip() for line in panel(state, width - 1, 27)]
    assert shown[1 : 1 + len(wanted)] == wanted
    assert not any(shown[1 + len(wanted) :])
    assert (screen.cursor.y, screen.cursor.x) == (0, 0)


def test_layer_row_names_hottest_and_coldest_expert() -> None:
    rows = panel(state_of(train_values([layer(3, [10, 40, 0, 30])])))
    row = next(line for line in rows if line.startswith("    3  "))
    assert re.search(r"2\.00 e1 +12\.5% +1 +0\.00 e2 +1\.50$", row)
    assert row[7:].split("  ")[0] == "▂▂▂▂ ████ xxxx ▆▆▆▆", (
        "half the mean, twice, nothing, one and a half"
    )


@pytest.mark.parametrize(
    ("load", "bars"),
    [
        ([5, 5, 5, 5], "▄▄▄▄"),
        ([0, 10, 20, 10], "x▄█▄"),
        ([0, 0], "xx"),
        ([1, 1, 1, 97], "▁▁▁█"),
        ([3], "▄"),
    ],
)
def test_bar_height_is_load_over_mean(load: list[float], bars: str) -> None:
    assert load_bars(load, len(load), UNICODE).plain == bars


def test_shared_bar_shows_highest_load() -> None:
    load = [10.0] * 128
    load[77] = 40.0
    strip = load_bars(load, 32, UNICODE).plain
    assert len(strip) == 32
    assert [place for place, bar in enumerate(strip) if bar == "█"] == [77 // 4]


def test_omitted_layers_are_summarised_and_worst_are_kept() -> None:
    layers = [layer(index, [10, 10, 10, 10 + (index == 20) * 60]) for index in range(40)]
    rows = panel(state_of(train_values(layers)), height=12)
    assert any(line.startswith("   20  ") for line in rows)
    assert sum(bool(re.match(r" +\d+  ", line)) for line in rows) < 40
    assert any(re.match(r"and \d+ more: max/mean at most 1\.00", line) for line in rows)


def test_step_time_is_split() -> None:
    line = next(
        line for line in panel(state_of(train_values([])), width=140) if line.startswith("time ")
    )
    assert re.findall(r"(\w+) (\d+%)", line) == [
        ("data", "10%"),
        ("forward", "40%"),
        ("backward", "40%"),
        ("exchange", "5%"),
        ("optimizer", "4%"),
        ("other", "1%"),
    ]
    narrow = next(
        line for line in panel(state_of(train_values([])), width=60) if line.startswith("time ")
    )
    assert "forward 40%" in narrow, "the longest parts are named first"
    assert "other" not in narrow


def test_dense_model_has_no_table() -> None:
    text = "\n".join(panel(state_of(train_values([]))))
    assert "loss 2.500" in text
    assert "layer" not in text


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_numbers_that_are_not_finite(value: float | None) -> None:
    broken = dict.fromkeys(
        ("loss", "bits_per_byte", "grad_norm", "tokens_per_second", "drop_rate", "mfu", "memory"),
        value,
    )
    row = layer(0, [1, 2]) | {"load": [1, value], "drop_rate": value, "router_entropy": value}
    state = state_of(train_values([row, {"layer": 1}], **broken, step_time={"forward": value}))
    text = "\n".join(panel(state))
    assert "loss not finite" in text
    assert "nan" not in text
    assert "forward" not in text
    display = PlainDisplay(state, lambda: 10.0)
    display.log_event("train", 11, {"loss": value, "drop_rate": value})


def test_every_value_may_be_absent() -> None:
    assert panel(state_of({}))[0].startswith("step 10/200")
    assert panel(DisplayState(None))[0] == "step 0"


def test_no_color_disables_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    def frame() -> str:
        console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
        state = state_of(train_values([layer(0, [1, 9, 0, 2])]))
        return "\n".join(LiveDisplay(console, state, UNICODE, lambda: 10.0)._frame())

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert COLOUR.search(frame())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(frame())


@pytest.mark.parametrize(
    ("encoding", "environment", "charset"),
    [
        ("utf-8", {}, UNICODE),
        ("UTF8", {"TERM": "xterm", "LC_ALL": "C.UTF-8"}, UNICODE),
        ("ascii", {}, ASCII),
        ("iso8859-1", {}, ASCII),
        (None, {}, ASCII),
        ("utf-8", {"LC_ALL": "C"}, ASCII),
        ("utf-8", {"TERM": "linux"}, ASCII),
    ],
)
def test_charset_depends_on_terminal(
    encoding: str | None, environment: dict[str, str], charset: CharSet
) -> None:
    assert charset_for(encoding, environment) is charset


def test_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([8.0, 1.0, None, 4.5], 10, UNICODE) == "█▁ ▅"
    assert sparkline([3.0, 3.0], 10, UNICODE) == "▄▄"
    assert sparkline([None, None], 10, UNICODE) == sparkline([], 10, UNICODE) == ""
    assert len(sparkline([float(number) for number in range(1000)], 24, UNICODE)) == 24


@pytest.mark.parametrize("parts", [[1.0], [0.5, 0.25, 0.25], [1e-6, 1, 1e-6, 3, 0.7, 0.1]])
@pytest.mark.parametrize("width", [1, 7, 40])
def test_stacked_bar_fills_its_width(parts: list[float], width: int) -> None:
    assert len(stacked_bar(parts, width, ASCII)) == width


def test_control_characters_do_not_reach_the_terminal() -> None:
    file = io.StringIO()
    live = LiveDisplay(
        Console(file=file, force_terminal=True), DisplayState(10), UNICODE, time.monotonic
    )
    live.print("sample:\n\x1b]0;owned\x07\x1b[2Jtext\r\u202e")
    live.state.on_event("alert", 1, {"text": "\x1b[2J"}, None)
    assert not set("\x07\u202e") & set(file.getvalue())
    assert file.getvalue().replace("\r\x1b[J", "", 1).count("\x1b") == 0
    assert "\x1b[2J" not in "\n".join(live._frame())


def test_terminal_failure_is_raised_in_the_training_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = LiveDisplay(
        Console(file=io.StringIO(), force_terminal=True), DisplayState(10), UNICODE, time.monotonic
    )

    def fail(lines: list[str]) -> None:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(live.bottom, "draw", fail)
    live.step(1)
    live._thread.join(timeout=10)  # type: ignore[union-attr]
    with pytest.raises(OSError, match="the terminal is gone"):
        live.step(2)
    live.close()


def test_display_kind_depends_on_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """With FORCE_COLOR, which CI systems set, rich takes a file for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(open_display(10, 0, is_main=True)) is PlainDisplay
    assert type(open_display(10, 0, is_main=True, quiet=True)) is QuietDisplay
    assert type(open_display(10, 0, is_main=False)) is NullDisplay


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay(DisplayState(4), iter([0.0, 0.0, 2.0, 2.0, 3.0, 3.0]).__next__)
    display.log_event("train", 1, {"loss": 2.0})
    display.log_event("train", 2, train_values([]))
    display.log_event("eval", 2, {"loss": 2.0}, "held out")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/4  loss 2.000",
        "step 2/4  loss 2.500  bits/byte 3.250  12,345 tokens/s  dropped 12.5%  load max/mean 2.00  left 0:04",
        "held out",
    ]


def test_quiet_prints_alerts_rollbacks_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    display = QuietDisplay()
    display.print("a line")
    display.step(1)
    for event in ("start", "train", "eval", "checkpoint", "alert", "rollback", "end"):
        display.log_event(event, 1, {}, f"line of {event}")
    display.log_event("alert", 1, {})
    assert capsys.readouterr().out.splitlines() == [
        "line of alert",
        "line of rollback",
        "line of end",
    ]


def test_classifier_shows_accuracy() -> None:
    """A classifier has no bits per byte, which was shown as `not finite bits/byte`."""
    values = {key: value for key, value in train_values([]).items() if key != "bits_per_byte"}
    state = state_of(values)
    state.on_event("eval", 10, {"loss": 0.25, "accuracy": 0.9512}, 10.0)
    lines = "\n".join(panel(state))
    assert "validation 95.12% accuracy at 10" in lines
    assert "byte" not in lines
    assert (
        event_text("eval", 10, {"loss": 0.25, "accuracy": 0.9512})
        == "step 10: validation loss 0.250, 95.12% accuracy"
    )
    assert (
        event_text("eval", 10, {"loss": 0.25, "bits_per_byte": None})
        == "step 10: validation loss 0.250, not finite"
    )
