"""The report in a real browser, as a reader uses it: every figure is drawn, curves answer, nothing is fetched.

`LANDSCAPE_RAY_SCREENSHOTS=folder` keeps pictures of the page in every size and colour, to be looked at.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from landscape_ray.reports.page import write_report

LOOKS = {
    "desktop-light": {},
    "desktop-dark": {"dark": True},
    "phone-light": {"width": 390, "height": 844, "phone": True},
    "phone-dark": {"width": 390, "height": 844, "phone": True, "dark": True},
}
GROUNDS = {"light": (255, 255, 255), "dark": (21, 24, 28)}

DRAWN = """
Object.keys(JSON.parse(document.getElementById('figures').textContent).figures).every(
  key => document.querySelectorAll('#plot-' + key + ' .main-svg').length)
"""
KEYS = "Object.keys(JSON.parse(document.getElementById('figures').textContent).figures)"

# Where in the window the middle point of the first answering curve of a figure is.
CURVE = """
(function (key) {
  var node = document.getElementById('plot-' + key);
  node.scrollIntoView({block: 'center', behavior: 'instant'});
  var trace = node._fullData.find(t => t.hovertemplate && t.mode === 'lines' && t.line.width > 2.5);
  var x = node._fullLayout.xaxis, y = node._fullLayout[trace.yaxis.replace('y', 'yaxis')];
  var k = Math.floor(trace.x.length / 2), box = node.getBoundingClientRect();
  return [box.left + x._offset + x.l2p(trace.x[k]), box.top + y._offset + y.l2p(trace.y[k]), trace.y[k]];
})('%s')
"""


def column(number: int) -> str:
    return (
        f"Array.from(document.querySelectorAll('#runs ~ .scroll tbody tr')).map(r => r.cells[{number}].dataset.value)"
    )


@pytest.fixture(scope="module")
def report(search_folder: Any, population_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([search_folder, population_folder], tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """The page on a desktop, shared by tests that leave it as it was."""
    with browser.page() as page:
        page.open(report.as_uri())
        page.wait_for(DRAWN)
        yield page


@pytest.mark.acceptance
def test_a_curve_answers_and_nothing_is_logged_or_fetched(opened, report):
    x, y, value = opened.evaluate(CURVE % "generalisation")
    opened.move(x - 3, y - 3)
    opened.move(x, y)
    said = opened.wait_for("document.querySelector('#plot-generalisation .hoverlayer')?.textContent")
    assert "held out" in said
    assert f"{value:.5g}" in said
    assert opened.errors() == []
    assert opened.requests() == [report.as_uri()]


@pytest.mark.slow
def test_every_figure_is_drawn_and_fits(opened):
    assert len(opened.evaluate(KEYS)) == 10
    wide = (
        "Array.from(document.querySelectorAll('.plot svg')).some(s => s.getBoundingClientRect().right > innerWidth + 1)"
    )
    assert opened.evaluate(DRAWN)
    assert not opened.evaluate(wide)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_legend_switches_a_series(opened):
    hidden = "document.getElementById('plot-forecast').data.filter(t => t.visible === false).length"
    button = "document.querySelector('#legend-forecast button')"
    before = opened.evaluate(hidden)
    opened.evaluate(f"{button}.click()")
    assert opened.evaluate(hidden) > before
    assert opened.evaluate(f"{button}.getAttribute('aria-pressed')") == "false"
    opened.evaluate(f"{button}.click()")
    assert opened.evaluate(hidden) == before


@pytest.mark.slow
def test_a_drag_zooms_and_a_double_click_shows_everything(opened):
    x, y, _ = opened.evaluate(CURVE % "loss-curves")
    seen = "document.getElementById('plot-loss-curves')._fullLayout.xaxis.range.map(Number)"
    before = opened.evaluate(seen)
    mouse = {"button": "left", "buttons": 1, "clickCount": 1}
    opened.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
    for step in range(1, 6):
        opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 30 * step, y=y + 20 * step, **mouse)
    opened.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + 150, y=y + 100, **mouse)
    opened.wait_for(f"{seen}[0] > {before[0]} && {seen}[1] < {before[1]}")
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            opened.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)
    opened.wait_for(f"{seen}[1] - {seen}[0] >= {before[1] - before[0]} * 0.95")


@pytest.mark.slow
def test_columns_sort_both_ways(opened):
    head = "document.querySelectorAll('#runs ~ .scroll th')[2].click()"
    opened.evaluate(head)
    ascending = opened.evaluate(column(2))
    assert ascending == sorted(ascending)
    assert len(set(ascending)) > 1
    opened.evaluate(head)
    assert opened.evaluate(column(2)) == sorted(ascending, reverse=True)


@pytest.mark.slow
def test_theme_changes_page_and_figures_and_paper_is_light(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    line = (
        "document.getElementById('plot-forecast').data.find(t => t.mode === 'lines' && t.line.width > 2.5).line.color"
    )
    light, color = opened.evaluate(ground), opened.evaluate(line)
    opened.evaluate("document.getElementById('theme').click()")
    dark = opened.evaluate(ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")
    assert opened.evaluate(line) != color
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.evaluate(ground) == light
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.evaluate(ground) == dark
    opened.evaluate("document.getElementById('theme').click()")


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("look", LOOKS)
def test_page_in_every_size_and_colour(browser, report, picture, look):
    with browser.page(**LOOKS[look]) as page:
        page.open(report.as_uri())
        page.wait_for(DRAWN)
        width = LOOKS[look].get("width", 1280)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        shot = page.screenshot(picture(f"report-{look}"), whole=True)
        assert page.errors() == []
    image = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
    assert image.width == width
    assert image.getpixel((2, 2)) == GROUNDS[look.partition("-")[2]]
    assert len(np.unique(np.asarray(image.resize((64, 640))).reshape(-1, 3), axis=0)) > 200  # not a blank page


@pytest.mark.slow
def test_paper(browser, report, picture):
    with browser.page() as page:
        page.open(report.as_uri())
        page.wait_for(DRAWN)
        pdf = page.print_pdf(picture("report").with_suffix(".pdf")).read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 4 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type /Page/") <= 24
