"""Lines at the bottom of a terminal that other processes write to."""

from __future__ import annotations

import io

import pyte

from dmoe.observability.display.live import BottomLines


def test_output_of_other_processes_stays() -> None:
    """rich's Live moves up by its own lines and erases another rank's error message below them."""
    screen = pyte.Screen(40, 12)
    stream, bottom = pyte.Stream(screen), BottomLines(io.StringIO())

    def feed_screen() -> None:
        stream.feed(bottom.file.getvalue().replace("\n", "\r\n"))  # type: ignore[attr-defined]
        bottom.file = io.StringIO()

    bottom.print_above("first", ["panel 1", "panel 2"])
    feed_screen()
    stream.feed("rank 1: an error\r\nof two lines\r\n")
    bottom.draw(["panel 3", "panel 4"])
    bottom.print_above("second", ["panel 5", "panel 6"])
    bottom.finish(["panel 7", "panel 8"])
    feed_screen()
    assert [line.rstrip() for line in screen.display if line.strip()] == [
        "first",
        "rank 1: an error",
        "of two lines",
        "second",
        "panel 7",
        "panel 8",
    ]
    assert screen.cursor.y == 6


def test_shorter_panel_leaves_no_old_lines() -> None:
    screen, file = pyte.Screen(40, 12), io.StringIO()
    bottom = BottomLines(file)
    for lines in (["one", "two", "three"], ["a longer line", "four", "more"], ["five", "six"]):
        bottom.draw(lines)
    pyte.Stream(screen).feed(file.getvalue().replace("\n", "\r\n"))
    assert [line.rstrip() for line in screen.display if line.strip()] == ["five", "six"]
