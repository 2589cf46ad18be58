"""The report in a real browser: errors, numbers at the mouse, screen sizes, colours, printing.

Skipped if Chromium is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmoe.report import write_report
from dmoe.runs.metrics_log import read_metrics_tolerant
from tests.report.browser import Browser
from tests.report.runs import line, write

pytestmark = pytest.mark.slow

PLOT = "document.querySelector('#chart-{} .plot')"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def lightness(colour: str) -> float:
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3]) / 3


def select_option(browser: Browser, chart: str, position: int, option: int) -> None:
    select = f"document.querySelector('#chart-{chart} select[data-choice=\"{position}\"]')"
    browser.run(f"{select}.value = '{option}'; {select}.dispatchEvent(new Event('change'))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200, 2400])
def test_every_width_and_both_schemes(browser: Browser, two: Path, width: int, scheme: str) -> None:
    """No console message, request or horizontal scrolling; all charts fit their frames."""
    browser.open(two, width, scheme=scheme)
    assert browser.problems == []
    assert browser.run("document.documentElement.scrollWidth") == width
    drawn = browser.run(
        "[...document.querySelectorAll('figure')].map((figure) => "
        "[figure.id, figure.querySelector('.main-svg').width.baseVal.value - "
        "figure.querySelector('.plot').clientWidth])"
    )
    assert len(drawn) > 20
    assert [name for name, over in drawn if abs(over) > 1] == []
    assert (lightness(browser.run(BACKGROUND)) < 60) == (scheme == "dark")
    paper = browser.run(
        f"getComputedStyle({PLOT.format('loss')}.querySelector('.main-svg')).backgroundColor"
    )
    assert (lightness(paper) < 60) == (scheme == "dark")


def test_scripts_in_names_do_not_run(browser: Browser, two: Path) -> None:
    browser.open(two)
    assert browser.run("document.title") == "Report on 2 runs - dmoe"
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
    assert browser.run("document.title") == "Report on <b onclick=alert(1)>one&amp; - dmoe"


def test_the_heat_map_shows_the_metrics_value_under_the_mouse(
    browser: Browser, two: Path, full_run: Path
) -> None:
    """Check layer 1, expert 5, step 40 in the data, in the label at the mouse, and in the table."""
    load = next(
        item
        for item in read_metrics_tolerant(full_run / "metrics.jsonl").of("train")
        if item["step"] == 40
    )["layers"][1]["load"]
    browser.open(two)
    select_option(browser, "load", 1, 1)
    trace = browser.run(
        f"(({{x, z, customdata}}) => ({{x, z, customdata}}))({PLOT.format('load')}.data[0])"
    )
    column = trace["x"].index(40)
    assert trace["customdata"][5][column] == load[5]
    assert trace["z"][5][column] == pytest.approx(load[5] / (sum(load) / 8))
    browser.run(f"{PLOT.format('load')}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    spot = browser.run(
        "((plot) => { const box = plot.querySelector('.nsewdrag').getBoundingClientRect(), "
        "{xaxis, yaxis} = plot._fullLayout; "
        f"return [box.left + xaxis.d2p(40), box.top + yaxis.d2p(5)]; }})({PLOT.format('load')})"
    )
    browser.move_mouse(spot[0] - 3, spot[1])
    browser.move_mouse(*spot)
    browser.wait(f"{PLOT.format('load')}.querySelector('.hoverlayer text') !== null")
    label = browser.run(f"{PLOT.format('load')}.querySelector('.hoverlayer text').textContent")
    assert "step 40" in label
    assert "expert 5" in label
    assert f"{load[5] / (sum(load) / 8):.3f} times the fair share" in label
    assert f"{load[5]:,} assignments" in label
    browser.run("document.querySelector('#chart-load summary').click()")
    browser.wait("document.querySelector('#chart-load details table') !== null")
    row = browser.run(
        "[...document.querySelectorAll('#chart-load details tbody tr')[5].children]"
        ".map((cell) => cell.textContent)"
    )
    assert row[0] == "5"
    assert row[1 + column] == f"{load[5]:,}"


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
    assert browser.run(f"{PLOT.format('load')}.data[0].z.length") == 16
    assert browser.problems == []


def test_the_keyboard_reaches_everything(browser: Browser, two: Path) -> None:
    """Tab visits links, selects, legends, tables and details in order, with a visible focus."""
    browser.open(two)
    seen: list[Any] = []
    wanted = browser.run(
        "document.querySelectorAll('a[href], select, button, summary, pre, "
        "section > .tables > .scroll').length"
    )
    for _ in range(wanted):
        browser.press("Tab", 9)
        seen.append(
            browser.run(
                "((at) => [at.tagName, at.textContent.trim().slice(0, 30), "
                "at.getBoundingClientRect().top + scrollY, "
                "getComputedStyle(at).outlineStyle !== 'none'])(document.activeElement)"
            )
        )
    assert seen[0][1] == "Skip to the content"
    assert {name for name, *_ in seen} == {"A", "SELECT", "BUTTON", "SUMMARY", "PRE", "DIV"}
    assert len(seen) == wanted
    assert [item for item in seen if not item[3]] == []


def test_a_legend_hides_a_curve_by_the_keyboard(browser: Browser, two: Path) -> None:
    browser.open(two)
    button = "document.querySelector('#chart-loss .legend button')"
    browser.run(f"{button}.focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run(f"{button}.getAttribute('aria-pressed')") == "false"
    assert browser.run(f"{PLOT.format('loss')}.data[0].visible") is False
    assert browser.run(f"document.activeElement === {button}") is True


def test_curves_show_events(browser: Browser, one: Path) -> None:
    browser.open(one)
    marks = browser.run(
        "(({x, text}) => [x, text])"
        f"({PLOT.format('loss')}.data.find((trace) => trace.name === 'events'))"
    )
    step_by_text = dict(zip(marks[1], marks[0], strict=True))
    assert step_by_text["restart: resumed from 30; world 2; ep 2"] == 30
    assert any(text.startswith("skip: step 31 skipped") for text in step_by_text)
    assert browser.run(f"{PLOT.format('loss')}.layout.shapes.length") == 3


def test_a_change_of_colour_scheme_redraws(browser: Browser, one: Path) -> None:
    browser.open(one)
    colour = f"{PLOT.format('loss')}.data[0].line.color"
    before = browser.run(colour)
    browser.set_screen(1200, scheme="dark")
    browser.wait(f"{colour} !== '{before}'")
    assert browser.problems == []


def test_printing_uses_light_colours_and_paper_width(
    browser: Browser, one: Path, tmp_path: Path
) -> None:
    browser.open(one, 2400, scheme="dark")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(f"{PLOT.format('loss')}.layout.width") < 700
    assert lightness(browser.run(BACKGROUND)) > 200
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(f"{PLOT.format('loss')}.layout.width") > 700
    browser.print_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert browser.problems == []


def test_a_run_without_steps_has_no_chart(browser: Browser, tmp_path: Path) -> None:
    browser.open(
        write_report(
            [write(tmp_path / "run", [line("start", 0, world=1, ep=1)])], tmp_path / "report.html"
        )
    )
    assert browser.problems == []
    assert browser.run("document.querySelectorAll('figure').length") == 0
    assert browser.run("document.querySelectorAll('section').length") == 13
