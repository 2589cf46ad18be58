"""The report in a real browser: errors, numbers at the mouse, screen sizes, colours, printing.

Skipped if Chromium is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmoe.report import PANELS, write_report
from dmoe.report.run import load_runs
from dmoe.runs.metrics_log import read_metrics_tolerant
from tests.report.browser import Browser
from tests.report.runs import line, write

pytestmark = pytest.mark.slow

PLOT = "document.querySelector('#chart-{} .plot')"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def lightness(colour: str) -> float:
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3]) / 3


def open_all(browser: Browser) -> None:
    """Open all sections, and wait until their charts are drawn."""
    browser.run("document.getElementById('open-all').click()")
    browser.wait(
        "[...document.querySelectorAll('figure')].every((figure) => "
        "figure.querySelector('.drawn') || !figure.querySelector('.missing').hidden)"
    )


def select_option(browser: Browser, chart: str, position: int, option: int) -> None:
    select = f"document.querySelector('#chart-{chart} select[data-choice=\"{position}\"]')"
    browser.run(f"{select}.value = '{option}'; {select}.dispatchEvent(new Event('change'))")


def switch(browser: Browser, chart: str, text: str) -> None:
    """Press the radio button with this text."""
    browser.run(
        f"[...document.querySelectorAll('#chart-{chart} fieldset label')]"
        f".find((label) => label.textContent === '{text}').click()"
    )


def label_at(browser: Browser, chart: str, across: float, down: float) -> str:
    """Return the label at the mouse, at a share of the width and height of the drawn area."""
    plot = PLOT.format(chart)
    browser.run(f"{plot}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = browser.run(
        "((box) => [box.left, box.top, box.width, box.height])"
        f"({plot}.querySelector('.target').getBoundingClientRect())"
    )
    spot = box[0] + across * box[2], box[1] + down * box[3]
    browser.move_mouse(spot[0] - 2, spot[1])
    browser.move_mouse(*spot)
    browser.wait(f"{plot}.querySelector('.hover')?.hidden === false")
    found: str = browser.run(
        f"[...{plot}.querySelectorAll('.hover div')].map((part) => part.textContent).join('; ')"
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200, 2400])
def test_every_width_and_both_schemes(browser: Browser, two: Path, width: int, scheme: str) -> None:
    """No console message, request or horizontal scrolling; all charts fit their frames."""
    browser.open(two, width, scheme=scheme)
    assert browser.run("document.querySelectorAll('.drawn').length") == 2, "closed ones wait"
    open_all(browser)
    assert browser.problems == []
    assert browser.run("document.documentElement.scrollWidth") == width
    drawn = browser.run(
        "[...document.querySelectorAll('figure')].map((figure) => "
        "[figure.id, figure.querySelector('.drawn').width.baseVal.value - "
        "figure.querySelector('.plot').clientWidth])"
    )
    assert len(drawn) > 20
    assert [name for name, over in drawn if abs(over) > 1] == []
    # no number of an axis is cut off or written over another of its axis
    cut = browser.run(
        "[...document.querySelectorAll('.drawn')].flatMap((root) => { const frame = root"
        ".getBoundingClientRect(); return [...root.querySelectorAll('text')].filter((text) => { "
        "const box = text.getBoundingClientRect(); return box.left < frame.left - 1 || box.right > "
        "frame.right + 1; }).map((text) => [root.closest('figure').id, text.textContent]); })"
    )
    assert cut == []
    assert (lightness(browser.run(BACKGROUND)) < 60) == (scheme == "dark")
    axis = browser.run(f"getComputedStyle({PLOT.format('loss')}.querySelector('.axes text')).fill")
    assert (lightness(axis) > 128) == (scheme == "dark")


def test_the_first_screen_has_tiles_loss_and_load(browser: Browser, one: Path) -> None:
    """Without scrolling: the sentence, five numbers, and both charts."""
    browser.open(one, 1280, 900)
    bottoms = browser.run(
        "['.sentence', '.tile:last-child', '#chart-loss .drawn', '#chart-load .drawn']"
        ".map((name) => document.querySelector(name).getBoundingClientRect().bottom)"
    )
    assert max(bottoms) < 900
    assert browser.run("document.querySelectorAll('.tile').length") == 5
    browser.set_screen(400)
    browser.wait("document.documentElement.scrollWidth === 400")
    assert browser.run("document.querySelector('.tiles').getBoundingClientRect().right") <= 400


def test_scripts_in_names_do_not_run(browser: Browser, two: Path) -> None:
    browser.open(two)
    assert browser.run("document.title") == "2 runs compared - dmoe report"
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert "onerror" in browser.run("document.querySelector('pre').textContent")
    names = browser.run(
        "[...document.querySelectorAll('#chart-loss .legend span')].map((item) => item.textContent)"
    )
    assert names[0] == "<b onclick=alert(1)>one&amp;, training"
    assert browser.run("document.querySelector('#chart-loss .legend b, .plot a') === null")


def test_the_security_policy_blocks_unescaped_markup(
    browser: Browser, one: Path, tmp_path: Path
) -> None:
    """Unescaped markup in the page runs nothing."""
    text = one.read_text(encoding="utf-8").replace(
        "</main>", "<img src='data:,' onerror='document.title=\"owned\"'></main>"
    )
    (tmp_path / "unescaped.html").write_text(text, encoding="utf-8")
    browser.open(tmp_path / "unescaped.html")
    browser.wait("document.querySelector('img').complete")
    assert browser.run("document.title") == "<b onclick=alert(1)>one&amp; - dmoe report"


def test_the_heat_map_shows_the_metrics_value_under_the_mouse(
    browser: Browser, two: Path, full_run: Path
) -> None:
    """Check layer 1, expert 5, step 40: label at the mouse, colour of the cell, and table."""
    lines = read_metrics_tolerant(full_run / "metrics.jsonl").of("train")
    steps = [item["step"] for item in lines]
    load = lines[steps.index(40)]["layers"][1]["load"]
    column = steps.index(40)
    browser.open(two)
    select_option(browser, "load", 1, 1)
    across = (column + 0.5) / len(steps)
    label = label_at(browser, "load", across, 5.5 / 8)
    ratio = load[5] / (sum(load) / 8)
    assert label == (
        f"step 40; expert 5; {ratio:.3f} times the fair share; {load[5]:,} assignments"
    )
    pixel = browser.run(
        f"((canvas) => [...canvas.getContext('2d').getImageData(canvas.width * {across}, "
        f"canvas.height * {5.3 / 8}, 1, 1).data])({PLOT.format('load')}.querySelector('canvas'))"
    )
    red, _, blue = pixel[:3]
    assert (blue > red) == (ratio < 1), "blue is below the fair share, orange above"
    switch(browser, "load", "by load")
    means = [
        sum(
            item["layers"][1]["load"][expert] * 8 / sum(item["layers"][1]["load"]) for item in lines
        )
        for expert in range(8)
    ]
    busiest = max(range(8), key=means.__getitem__)
    assert f"expert {busiest};" in label_at(browser, "load", across, 0.5 / 8)
    browser.run("document.querySelector('#chart-load summary').click()")
    browser.wait("document.querySelector('#chart-load details table') !== null")
    row = browser.run(
        "[...document.querySelectorAll('#chart-load details tbody tr')[5].children]"
        ".map((cell) => cell.textContent)"
    )
    assert row[0] == "5"
    assert row[1 + column] == f"{load[5]:,}"


def test_colours_of_the_scale(browser: Browser, tmp_path: Path) -> None:
    """1 is near-white; a quarter and four times are the ends; no token has a colour of its own."""
    loads = [[10, 10, 10, 10], [40, 0, 0, 0], [16, 8, 8, 8], [5, 35, 0, 0]]
    run = write(
        tmp_path / "run",
        [
            line("train", step, layers=[{"layer": 0, "load": load}])
            for step, load in enumerate(loads)
        ],
    )
    browser.open(write_report([run], tmp_path / "report.html"))

    def cell(expert: int, step: int) -> list[int]:
        found: list[int] = browser.run(
            f"((canvas) => [...canvas.getContext('2d').getImageData(canvas.width * {(step + 0.3) / 4}, "
            f"canvas.height * {(expert + 0.3) / 4}, 1, 1).data])"
            f"({PLOT.format('load')}.querySelector('canvas'))"
        )
        return found[:3]

    assert min(cell(0, 0)) > 230
    assert cell(0, 1) == [217, 72, 1]
    assert cell(1, 1) == cell(2, 3)
    assert max(cell(1, 1)) < 80
    red, _, blue = cell(0, 3)
    assert blue > red + 60
    assert cell(0, 2)[0] > cell(0, 2)[2] + 20


def test_large_maps_are_decoded(browser: Browser, tmp_path: Path) -> None:
    """With one byte per number, the page shows the counts up to the error that it states."""
    loads = [[1 + step * (expert + 1) for expert in range(64)] for step in range(500)]
    loads[3][7] = 0
    lines = [
        line("train", step, layers=[{"layer": 0, "load": load}]) for step, load in enumerate(loads)
    ]
    path = write_report([write(tmp_path / "run", lines)], tmp_path / "report.html")
    browser.open(path)
    browser.run("document.querySelector('#chart-load summary').click()")
    cells = browser.run(
        "[...document.querySelectorAll('#chart-load details tbody tr')]"
        ".map((row) => [...row.cells].slice(1).map((cell) => Number(cell.textContent.replace(/,/g, ''))))"
    )
    caption = browser.run("document.querySelector('#chart-load details caption').textContent")
    bound = (499 * 64 + 1) ** (1 / 508) - 1
    assert caption == f"In assignments, rounded by at most {100 * bound:.1f}%"
    assert cells[7][3] == 0
    for step in (0, 3, 250, 499):
        for expert in range(64):
            exact = loads[step][expert]
            # five digits are shown
            assert abs(cells[expert][step] - exact) <= bound * exact * 1.001 + 1
    assert browser.problems == []


def test_missing_views_are_reported(browser: Browser, two: Path) -> None:
    """The second run has no layer 1: a sentence replaces the chart until another is selected."""
    browser.open(two)
    select_option(browser, "load", 1, 1)
    select_option(browser, "load", 0, 1)
    missing = "document.querySelector('#chart-load .missing')"
    assert browser.run(f"{missing}.hidden") is False
    assert browser.run(f"{missing}.textContent") == "Not recorded: two, layer 1."
    assert browser.run(f"{PLOT.format('load')}.hidden") is True
    select_option(browser, "load", 1, 0)
    assert browser.run(f"{missing}.hidden") is True
    assert "expert 15;" in label_at(browser, "load", 0.5, 15.5 / 16)
    assert browser.problems == []


def test_the_keyboard_reaches_everything(browser: Browser, two: Path) -> None:
    """Tab visits links, choices, legends, tables and sections in order, with a visible focus."""
    browser.open(two)
    open_all(browser)
    seen: list[Any] = []
    wanted = browser.run(
        "document.querySelectorAll('a[href], select, button, summary, pre, input:checked, "
        "main .tables > .scroll, main .charts > .scroll').length"
    )
    for _ in range(wanted):
        browser.press("Tab", 9)
        seen.append(
            browser.run(
                "((at) => [at.tagName, at.textContent.trim().slice(0, 30), "
                "at.getBoundingClientRect().top + scrollY, "
                "getComputedStyle(at.closest('fieldset') ?? at).outlineStyle !== 'none'])"
                "(document.activeElement)"
            )
        )
    assert seen[0][1] == "Skip to the content"
    tags = {name for name, *_ in seen}
    assert tags == {"A", "SELECT", "BUTTON", "SUMMARY", "PRE", "DIV", "INPUT"}
    assert len(seen) == wanted
    assert [item for item in seen if not item[3]] == []


def test_a_legend_hides_a_curve_by_the_keyboard(browser: Browser, two: Path) -> None:
    browser.open(two)
    button = "document.querySelector('#chart-loss .legend button')"
    name = browser.run(f"{button}.textContent")
    drawn = (
        f"[...{PLOT.format('loss')}.querySelectorAll('.curve')]"
        f".filter((path) => path.dataset.curve === {name!r}).length"
    )
    assert browser.run(drawn) == 2, "as measured, and smoothed"
    browser.run(f"{button}.focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run(f"{button}.getAttribute('aria-pressed')") == "false"
    assert browser.run(drawn) == 0
    assert browser.run(f"document.activeElement === {button}") is True


def test_the_loss_chart_switches_quantity_axis_and_range(
    browser: Browser, one: Path, full_run: Path
) -> None:
    lines = read_metrics_tolerant(full_run / "metrics.jsonl").of("train")
    browser.open(one)
    last = lines[-1]

    def ticks() -> list[str]:
        found: list[str] = browser.run(
            f"[...{PLOT.format('loss')}.querySelectorAll('.axes text')].map((text) => text.textContent)"
        )
        return found

    def trained_at_the_end() -> float:
        label = label_at(browser, "loss", 0.999, 0.5)
        return float(label.partition("training ")[2].partition(";")[0])

    top = f"{PLOT.format('loss')}.querySelector('.curve.raw').getBBox().y"
    assert browser.run(top) < 0, "the first steps are above the frame"
    assert trained_at_the_end() == pytest.approx(last["bits_per_byte"], rel=1e-4)
    switch(browser, "loss", "Loss")
    assert trained_at_the_end() == pytest.approx(last["loss"], rel=1e-4)
    assert "nats per target" in ticks()
    switch(browser, "loss", "tokens")
    assert label_at(browser, "loss", 0.999, 0.5).startswith("184 k;")
    switch(browser, "loss", "time")
    assert "time of training" in ticks()
    switch(browser, "loss", "log steps")
    assert label_at(browser, "loss", 0.001, 0.5).startswith("step 2;")
    switch(browser, "loss", "Bits per byte")
    switch(browser, "loss", "all")
    assert browser.run(top) > 0, "the first steps are inside"
    assert browser.problems == []


def test_curves_show_events(browser: Browser, one: Path) -> None:
    """The legend names each kind by the mark that the chart has; the label has the text."""
    browser.open(one)
    names = browser.run(
        "[...document.querySelectorAll('#chart-loss .legend span')].map((part) => part.textContent)"
    )
    assert names == ["training", "validation", "alert", "restart", "skipped step"]
    glyphs = "{}.querySelectorAll('.glyph').length"
    assert browser.run(glyphs.format(PLOT.format("loss"))) == 3
    label = label_at(browser, "loss", 0.5, 0.5)
    assert "restart: resumed from 30; world 2; ep 2" in label
    assert "alert: expert 3 of layer 0 is dead" in label
    browser.run("document.querySelector('#chart-loss .legend li:nth-child(3) button').click()")
    assert browser.run(glyphs.format(PLOT.format("loss"))) == 2


def test_a_link_opens_its_section(browser: Browser, one: Path) -> None:
    browser.open(one)
    assert browser.run("document.getElementById('drops').open") is False
    browser.run("document.querySelector('nav a[href=\"#drops\"]').click()")
    assert browser.run("document.getElementById('drops').open") is True
    browser.wait("document.querySelector('#chart-drop-rate .drawn') !== null")


def test_a_change_of_colour_scheme_redraws(browser: Browser, one: Path) -> None:
    browser.open(one)
    colour = f"getComputedStyle({PLOT.format('loss')}.querySelector('.curve')).stroke"
    cell = (
        "((canvas) => [...canvas.getContext('2d').getImageData(5, 5, 1, 1).data].join())"
        f"({PLOT.format('load')}.querySelector('canvas'))"
    )
    before = browser.run(colour), browser.run(cell)
    browser.set_screen(1200, scheme="dark")
    browser.wait(f"{colour} !== '{before[0]}' && {cell} !== '{before[1]}'")


def test_printing_uses_light_colours_and_paper_width(
    browser: Browser, one: Path, tmp_path: Path
) -> None:
    browser.open(one, 2400, scheme="dark")
    width = "{}.querySelector('.drawn').width.baseVal.value".format(PLOT.format("loss"))
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(width) < 700
    assert lightness(browser.run(BACKGROUND)) > 200
    assert browser.run("document.querySelector('#drops').open") is True, "all of it is printed"
    assert browser.run("document.querySelector('#chart-drop-rate .drawn') !== null")
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(width) > 700
    assert browser.run("document.querySelector('#drops').open") is False
    browser.print_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert browser.problems == []


def test_a_run_without_steps_has_no_chart(browser: Browser, tmp_path: Path) -> None:
    """A count written here by hand was forgotten when the plan's panel came: it is asked of the
    builders of panels."""
    run = write(tmp_path / "run", [line("start", 0, world=1, ep=1)])
    browser.open(write_report([run], tmp_path / "report.html"))
    built = [panel for build in PANELS if (panel := build(load_runs([run]))) is not None]
    assert browser.problems == []
    assert browser.run("document.querySelectorAll('figure').length") == 0
    assert browser.run("document.querySelectorAll('details.panel').length") == len(built) + 1
