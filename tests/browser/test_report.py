"""The report in a real browser: every figure is drawn, nothing is logged as an error, nothing is fetched."""

from __future__ import annotations

import html
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from landscape_ray.analysis.annealing import fit_sweep
from landscape_ray.reports.page import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=8000",
    "--enable-logging=stderr",
    "--v=0",
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

# Appended to a copy of the page: does what a reader does, then writes what it saw into the document.
PROBE = """
<script>
(async function () {
  var seen = {}, keys = Object.keys(JSON.parse(document.getElementById('figures').textContent).figures);
  function traces(key) { return document.getElementById('plot-' + key).data; }
  function column(index) {
    return Array.from(document.querySelectorAll('#runs ~ .scroll tbody tr')).map(function (row) {
      return row.cells[index].dataset.value;
    });
  }
  function ground() { return getComputedStyle(document.body).backgroundColor; }
  seen.drawn = keys.filter(function (key) { return document.querySelectorAll('#plot-' + key + ' .main-svg').length; });
  seen.keys = keys;
  seen.wide = Array.from(document.querySelectorAll('.plot svg')).some(function (svg) {
    return svg.getBoundingClientRect().right > innerWidth + 1;
  });
  seen.sideways = document.documentElement.scrollWidth > innerWidth;
  var button = document.querySelector('#legend-forecast button');
  var before = traces('forecast').filter(function (t) { return t.visible === false; }).length;
  button.click();
  seen.hidden = traces('forecast').filter(function (t) { return t.visible === false; }).length - before;
  seen.pressed = button.getAttribute('aria-pressed');
  var heads = document.querySelectorAll('#runs ~ .scroll th');
  heads[2].click();
  seen.ascending = column(2);
  heads[2].click();
  seen.descending = column(2);
  seen.light = ground();
  var line = traces('forecast').find(function (t) { return t.mode === 'lines' && t.line.width > 2.5; }).line.color;
  document.getElementById('theme').click();
  seen.dark = ground();
  seen.repainted = traces('forecast').some(function (t) { return t.line && t.line.color === line; }) === false;
  dispatchEvent(new Event('beforeprint'));
  seen.printed = ground();
  dispatchEvent(new Event('afterprint'));
  seen.after = ground();
  seen.fetched = performance.getEntriesByType('resource').length;
  var out = document.createElement('pre');
  out.id = 'seen';
  out.textContent = JSON.stringify(seen);
  document.body.appendChild(out);
})();
</script>
</body>"""


def visit(page: Path, tmp_path: Path, *flags: str) -> tuple[str, str]:
    """Return (document after the scripts ran, what the browser logged)."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make = runpy.run_path(str(Path(__file__).parents[1] / "fabricate.py"))
    search = make["make_search"](folder / "search", steps=200)
    population = make["make_population"](folder / "members", steps=200)
    fit_sweep(search, num_bootstrap=10)
    return write_report([search, population], folder / "report.html")


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    import json

    probed = page.with_name("probed.html")
    text = page.read_text()
    at = text.rindex("</body>")
    probed.write_text(text[:at] + PROBE + text[at + len("</body>") :])
    dom, log = visit(probed, tmp_path_factory.mktemp("visit"), "--window-size=1280,900")
    assert "CONSOLE" not in log, log
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.S)
    assert found, log
    return json.loads(html.unescape(found[1]))


@pytest.mark.acceptance
def test_page_opens_without_an_error(page, tmp_path):
    dom, log = visit(page, tmp_path)
    console = [line for line in log.splitlines() if "CONSOLE" in line or "Refused" in line]
    assert console == []
    assert dom.count("main-svg") >= 7


def test_every_figure_is_drawn_and_fits(seen):
    assert seen["drawn"] == seen["keys"]
    assert len(seen["keys"]) == 9
    assert not seen["wide"]
    assert not seen["sideways"]


def test_legend_switches_a_series(seen):
    assert seen["hidden"] >= 1
    assert seen["pressed"] == "false"


def test_columns_sort_both_ways(seen):
    assert seen["ascending"] == sorted(seen["ascending"])
    assert seen["descending"] == sorted(seen["descending"], reverse=True)
    assert len(set(seen["ascending"])) > 1


def test_theme_changes_page_and_figures_and_paper_is_light(seen):
    assert seen["light"] == seen["printed"] == "rgb(255, 255, 255)"
    assert seen["dark"] == seen["after"] == "rgb(21, 24, 28)"
    assert seen["repainted"]


def test_nothing_is_fetched(seen):
    assert seen["fetched"] == 0


def test_dark_preference_is_followed(page, tmp_path):
    dom, _ = visit(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert 'data-theme="dark"' in dom[:400]


def test_phone_has_no_sideways_scrolling(page, tmp_path):
    frame = page.with_name("frame.html")
    script = "document.title = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    frame.write_text(
        f'<title>-</title><iframe src="{page.name}" style="width:390px;height:800px;border:0"></iframe>'
        f'<script>addEventListener("load", function () {{ {script} }})</script>'
    )
    dom, _ = visit(frame, tmp_path, "--allow-file-access-from-files")
    assert re.search(r"<title>(\d+)</title>", dom)[1] == "390"
