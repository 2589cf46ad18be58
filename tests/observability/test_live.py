"""The lines at the foot of a terminal, among what others write."""

from __future__ import annotations

import io

import pyte

from dmoe.observability.display.live import BottomLines


def test_what_others_write_to_the_terminal_stays() -> None:
    """rich's Live goes up by the lines it has drawn and erases the error message another rank wrote below them."""
    screen = pyte.Screen(40, 12)
    stream, region = pyte.Stream(screen), BottomLines(io.StringIO())

    def show() -> None:
        stream.feed(region.file.getvalue().replace("\n", "\r\n"))  # type: ignore[attr-defined]
        region.file = io.StringIO()

    region.say("first", ["panel 1", "panel 2"])
    show()
    stream.feed("rank 1: an error\r\nof two lines\r\n")
    region.draw(["panel 3", "panel 4"])
    region.say("second", ["panel 5", "panel 6"])
    region.leave(["panel 7", "panel 8"])
    show()
    assert [line.rstrip() for line in screen.display if line.strip()] == [
        "first",
        "rank 1: an error",
        "of two lines",
        "second",
        "panel 7",
        "panel 8",
    ]
    assert screen.cursor.y == 6


def test_a_panel_that_became_shorter_leaves_nothing() -> None:
    screen, file = pyte.Screen(40, 12), io.StringIO()
    region = BottomLines(file)
    for lines in (["one", "two", "three"], ["a longer line", "four", "more"], ["five", "six"]):
        region.draw(lines)
    pyte.Stream(screen).feed(file.getvalue().replace("\n", "\r\n"))
    assert [line.rstrip() for line in screen.display if line.strip()] == ["five", "six"]
