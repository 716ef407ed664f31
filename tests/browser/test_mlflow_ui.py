"""The MLflow UI on finished sweeps: parents and children, a metric chart, the report, in every size and colour."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from landscape_ray.records import SystemRecord
from landscape_ray.reports.page import write_report
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.tracking.projector import Projector
from landscape_ray.tracking.server import find_runs, open_client
from landscape_ray.tracking.ui import address, start_page, start_server, stop_server, wait_until_up

pytestmark = pytest.mark.slow

LOOKS = {
    "desktop-light": {},
    "desktop-dark": {"dark": True},
    "phone-light": {"width": 390, "height": 844, "phone": True},
    "phone-dark": {"width": 390, "height": 844, "phone": True, "dark": True},
}
SECONDS = 90.0
TEXT = "document.body.innerText"

# The part of the report's frame that is in the window, without the corner in which the UI has a button of its own. On a
# phone the UI puts frames beside its own columns.
FRAME = """
(function () {
  var frame = document.querySelector('iframe');
  frame.scrollIntoView({block: 'nearest', inline: 'end', behavior: 'instant'});
  var box = frame.getBoundingClientRect(), middle = box.top + 0.6 * (box.bottom - box.top);
  var right = Math.min(box.right, innerWidth), bottom = Math.min(middle, innerHeight);
  return [Math.max(box.left, 0), box.top, right, bottom].map(Math.round);
})()
"""

# The run table draws the columns that are in sight: turn it on by one, from its end to its beginning.
TURN = """
(function (table) {
  var end = !table || table.scrollLeft + table.clientWidth > table.scrollWidth - 10;
  if (table) table.scrollLeft = end ? 0 : table.scrollLeft + 120;
  return true;
})(document.querySelector('.ag-center-cols-viewport'))
""".strip()


class Site:
    """A running UI and the runs in it."""

    def __init__(self, url: str, page: str, runs: dict[str, str], experiment: str) -> None:
        self.url, self.page, self.runs, self.experiment = url, page, runs, experiment

    def run(self, name: str, tab: str = "") -> str:
        """Return the address of a run's page; the name is the beginning of its own."""
        run_id = next(run_id for own, run_id in self.runs.items() if own.startswith(name))
        return f"{self.url}/#/experiments/{self.experiment}/runs/{run_id}{tab}?workflowType=machine_learning"


def add_samples(folder: SweepFolder) -> None:
    """Give the trials of a sweep two samples of what their processes did."""
    for trial in folder.trials():
        summary, writer = trial.summary(), PartWriter(trial, trial.num_parts())
        assert summary is not None
        for k, step in enumerate((summary.step // 2, summary.step)):
            place = {"step": step, "num_tokens": step, "flops": 1.0, "elapsed_seconds": 0.1 * step}
            for name, value in {"process_cpu_percentage": 97.0 + k, "process_memory_bytes": 5e8 * (1 + k)}.items():
                writer.append(SystemRecord(**place, time_unix=1.7e9 + 10 * k, probe=name, value=value))
        trial.commit(summary, writer.flush())


@pytest.fixture(scope="module")
def site(browser: Any, search_folder: Any, population_folder: Any, tmp_path_factory: Any) -> Iterator[Site]:
    results = tmp_path_factory.mktemp("results")
    folders = [
        SweepFolder(Path(shutil.copytree(folder.path, results / folder.path.name)))
        for folder in (search_folder, population_folder)
    ]
    report = write_report(folders)
    for folder in folders:
        add_samples(folder)
    uri = f"sqlite:///{results / 'mlflow.db'}"
    for number, folder in enumerate(folders):
        folder.update_meta(sweep_id=f"{number:032x}")  # fabricated sweeps share one
        projector = Projector(folder, uri, "landscape_ray")
        projector.set_parent({"sweep/best_loss_nats": 2.1}, {"searcher": "tpe"}, f"**A result** of {folder.path.name}")
        projector.log_artifacts([report])
        assert projector.close(timeout_seconds=SECONDS).error == ""
    client = open_client(uri)
    experiment = client.get_experiment_by_name("landscape_ray").experiment_id
    runs = {run.info.run_name: run.info.run_id for run in find_runs(client, experiment)}
    page = start_page(uri)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_server(uri, host="127.0.0.1", port=port)
    try:
        wait_until_up(server, "127.0.0.1", port)
        yield Site(address("127.0.0.1", port), page, runs, experiment)
    finally:
        stop_server(server)


def quiet(page: Any) -> list[str]:
    """Return the page's errors but for what the UI's own code complains about."""
    return [one for one in page.errors() if "/users/current" not in one and "ResizeObserver" not in one]


def num_colors(shot: Path, box: list[int]) -> int:
    """Return how many colours a part of a screenshot has: few where it is empty."""
    part = np.asarray(Image.open(shot).convert("RGB").crop(box))
    return len(np.unique(part.reshape(-1, 3), axis=0))


def without_assistant(page: Any, url: str) -> None:
    """Open a page of the UI with the panel closed that opens by itself at the first visit."""
    page.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
        "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');",
    )
    page.open(url)


@pytest.mark.acceptance
def test_parents_are_seen_and_open_to_their_children(browser, site, picture):
    with browser.page() as page:
        without_assistant(page, f"{site.url}/#/{site.page}")
        page.wait_for(f"{TEXT}.includes('search') && {TEXT}.includes('members')", SECONDS)
        for column in ("sweep/best_loss_nats", "eval/loss_nats", "schedule.peak_lr", "searcher"):
            page.wait_for(f"{TURN} && document.body.innerHTML.includes('{column}')", SECONDS)
        page.evaluate(
            "Array.from(document.querySelectorAll('.ag-row'))"
            ".find(row => row.innerText.includes('search')).querySelector('button').click()"
        )
        page.wait_for(f"{TEXT}.includes('t000 constant')", SECONDS)
        page.screenshot(picture("mlflow-runs"))
        assert quiet(page) == []


@pytest.mark.acceptance
def test_a_metric_chart_is_drawn(browser, site, picture):
    with browser.page() as page:
        without_assistant(page, site.run("t003", "/model-metrics"))
        page.wait_for("document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length > 1", SECONDS)
        assert page.evaluate(f"{TEXT}.includes('loss_nats')")
        page.screenshot(picture("mlflow-metrics"))
        assert quiet(page) == []


@pytest.mark.acceptance
def test_samples_of_processor_and_memory_are_under_system_metrics(browser, site, picture):
    with browser.page() as page:
        without_assistant(page, site.run("t003", "/system-metrics"))
        page.wait_for(f"{TEXT}.includes('process_cpu_percentage')", SECONDS)
        page.wait_for("document.querySelectorAll('.js-plotly-plot').length > 1", SECONDS)
        assert page.evaluate(f"{TEXT}.includes('process_memory_bytes')")
        assert not page.evaluate(f"{TEXT}.includes('loss_nats')")
        page.screenshot(picture("mlflow-system"))
        assert quiet(page) == []


@pytest.mark.acceptance
@pytest.mark.parametrize("look", LOOKS)
def test_the_report_is_an_artifact_of_the_parent(browser, site, picture, look):
    with browser.page(**LOOKS[look]) as page:
        without_assistant(page, site.run("search", "/artifacts/report.html"))
        page.wait_for(f"{TEXT}.includes('report.html')", SECONDS)
        page.wait_for("!!document.querySelector('iframe')", SECONDS)
        deadline = time.monotonic() + SECONDS
        while True:  # the frame is sandboxed, so that what is in it is only seen
            box = page.evaluate(FRAME)
            shot = page.screenshot(picture(f"mlflow-report-{look}"))
            if num_colors(shot, box) > 12:
                break
            assert time.monotonic() < deadline, "the report is not drawn"
            time.sleep(0.5)
        assert quiet(page) == []


@pytest.mark.parametrize("look", ["desktop-dark", "phone-light"])
def test_the_parent_tells_its_result(browser, site, picture, look):
    with browser.page(**LOOKS[look]) as page:
        without_assistant(page, site.run("search"))
        page.wait_for(f"{TEXT}.includes('A result of search')", SECONDS)
        page.wait_for(f"{TEXT}.includes('t009 constant')", SECONDS)
        page.screenshot(picture(f"mlflow-parent-{look}"))
