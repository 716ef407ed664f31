from __future__ import annotations

import dataclasses
import html.parser
import json
import re

import pytest

from landscape_ray import text
from landscape_ray.analysis.annealing import annealing_curves
from landscape_ray.errors import UserError
from landscape_ray.reports import law_section
from landscape_ray.reports.law_checks import checks
from landscape_ray.reports.page import export_figures, render_page, safe_json, write_report
from landscape_ray.reports.sections import runs_table
from landscape_ray.reports.views import Sweep, asked, open_sweep
from landscape_ray.tracking.collect import collect

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{x}}"
VOID = {"meta", "br", "img", "input", "link", "circle", "rect", "path"}


class Reader(html.parser.HTMLParser):
    """Collects what a browser would act upon, and checks that elements close in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def said(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def page(search, population) -> str:
    return render_page([search, population])


@pytest.fixture(scope="module")
def read(page) -> Reader:
    return Reader(page)


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)[1])


@pytest.mark.acceptance
def test_page_loads_nothing(read):
    for tag, attributes in read.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        for name in ("src", "srcset", "action", "data", "poster"):
            assert name not in attributes
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    policy = next(a["content"] for tag, a in read.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_embedded_once(page):
    assert page.count("plotly.js v") == 1
    assert len(page) < 8_000_000


def test_links_lead_somewhere(read):
    identifiers = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    links = [attributes["href"][1:] for tag, attributes in read.tags if tag == "a"]
    assert links
    assert set(links) <= set(identifiers)


def test_every_figure_has_its_place_and_its_data(page, read):
    places = {a["id"].removeprefix("plot-") for _, a in read.tags if (a.get("class") or "") == "plot"}
    assert places == set(embedded(page)["figures"])
    assert "forecast" in places


def test_every_run_is_in_the_table_with_its_status(read, search, population):
    cells = [attributes.get("data-value") for tag, attributes in read.tags if tag == "td"]
    for sweep in (search, population):
        for run in sweep.runs:
            assert run.run_id in cells
    assert cells.count("diverged") == 1
    assert cells.count("finished") == 15


def test_equal_input_gives_equal_bytes(search_folder, population_folder, tmp_path):
    one = write_report([search_folder.path, population_folder.path], tmp_path / "a.html")
    two = write_report([search_folder, population_folder], tmp_path / "b.html")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.acceptance
def test_forecast_on_the_page_is_the_saved_one(search_folder, read):
    saved = json.loads((search_folder.fits_path / "annealing.json").read_text())
    headline = next(one for one in saved["forecasts"] if one["run_id"] == saved["headline"])
    for one in saved["forecasts"]:
        for key in ("observed_final", "predicted_final", "low", "high"):
            assert text.loss(one[key]) in read.said
    assert f"forecasts {text.loss(headline['predicted_final'])} nats/token for the cosine schedule" in read.said
    assert f"measured: {text.loss(headline['observed_final'])}" in read.said
    for value in saved["fit"]["parameters"].values():
        assert text.number(value, 5) in read.said
    for reason in saved["fit"]["reasons"]:
        assert reason in read.said


def test_headline_numbers(read, search, population):
    best = min((search.best, population.best), key=lambda run: run.loss)
    assert (
        f"held-out loss {text.loss(best.loss)} nats/token with peak learning rate {text.lr(best.peak_lr)}" in read.said
    )
    assert "bits/byte" in read.said
    assert "15 finished, 1 diverged" in read.said


def hostile(sweep: Sweep) -> Sweep:
    """The same sweep with a name that attacks in every place that takes text."""
    runs = []
    for index, run in enumerate(sweep.runs):
        name = f"{HOSTILE}{index}"
        config = {**run.summary.config, "schedule": {**run.summary.config["schedule"], "name": HOSTILE}}
        config["data"] = {"source": HOSTILE}
        summary = dataclasses.replace(
            run.summary, run_id=name, message=HOSTILE, varied={HOSTILE: HOSTILE, "x": 1}, config=config
        )
        runs.append(dataclasses.replace(run, summary=summary))
    names = {run.run_id: f"{HOSTILE}{index}" for index, run in enumerate(sweep.runs)}
    fit = sweep.fit
    if fit is not None:
        forecasts = tuple(
            dataclasses.replace(one, run_id=names[one.run_id], fitted_on=tuple(names[r] for r in one.fitted_on))
            for one in fit.forecasts
        )
        fit = dataclasses.replace(
            fit,
            run_ids=tuple(names[run_id] for run_id in fit.run_ids),
            shapes={names[run_id]: HOSTILE for run_id in fit.shapes},
            excluded={names[run_id]: HOSTILE for run_id in fit.excluded},
            headline=names[fit.headline],
            rule=HOSTILE,
            forecasts=forecasts,
        )
    meta = {"name": HOSTILE, "status": HOSTILE, "versions": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE}}
    return dataclasses.replace(
        sweep, name=HOSTILE, meta=meta, spec_text=HOSTILE, runs=tuple(runs), fit=fit, warnings=(HOSTILE,)
    )


@pytest.mark.acceptance
def test_hostile_names_stay_text(search, page):
    attacked = render_page([hostile(search)])
    read = Reader(attacked)
    assert "img" not in {tag for tag, _ in read.tags}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    # the scripts are ours, no more and no fewer than on any page
    assert attacked.count("</script>") == page.count("</script>")
    assert HOSTILE in "".join(read.text)
    assert "<img" not in json.dumps(embedded(attacked)["figures"])


def test_safe_json_is_json_and_ends_no_element():
    data = {"a": ["</script>", "<!--", "]]>", "&amp;", "\u2028"]}
    assert json.loads(safe_json(data)) == data
    assert not set("<>&\u2028") & set(safe_json(data))
    with pytest.raises(ValueError, match="Out of range float values"):
        safe_json(float("nan"))


def test_sections_without_data_say_what_would_fill_them(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "empty", points=[])
    read = Reader(write_report(folder).read_text())
    assert "No run has finished yet: no run has committed anything yet." in read.said
    assert "landscape-ray fit" in read.said
    assert "[train.probes.sharpness]" in read.said
    assert export_figures(folder, tmp_path / "figures") == []
    assert folder.report_path.exists()


def test_one_run_that_is_still_going(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "one", steps=100, points=fabricate.SEARCH_POINTS[:1], sharp=False)
    trial = folder.trial("t000")
    trial.set_status("running")
    folder.update_meta(status="running", single_run=True)
    read = Reader(render_page([open_sweep(folder)]))
    assert "state when this page was written: running" in read.said
    assert "landscape-ray train lr_schedules.toml" in read.said
    assert "1 running" in read.said


def test_interrupted_runs_are_shown_as_pending(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "cut", steps=100, points=fabricate.SEARCH_POINTS[:4], sharp=False)
    trial = folder.trial("t003")
    lowest = dataclasses.replace(trial.summary(), final_loss_nats=1.0, step=50)  # it may still not be the best
    trial.commit(dataclasses.replace(lowest, status="pending", message="interrupted at step 50"), trial.num_parts())
    folder.trial("t004").set_status("pending", "interrupted at step 0")  # it died before its first commit
    folder.update_meta(status="interrupted")
    sweep = open_sweep(folder)
    assert sweep.best.run_id != "t003"
    assert dict(asked(sweep))["Runs"] == "3 finished, 2 pending"
    read = Reader(render_page([sweep]))
    assert "state when this page was written: interrupted" in read.said
    assert "3 finished, 2 pending" in read.said
    rows = runs_table([sweep]).split("<tr")
    (row,) = (row for row in rows if ">t003<" in row)
    assert ">pending<" in row
    assert ">interrupted at step 50<" in row
    assert ">50 / 100<" in row
    (empty,) = (row for row in rows if ">t004<" in row)
    assert ">pending<" in empty
    assert rows.index(row) > max(index for index, each in enumerate(rows) if ">finished<" in each)


def test_only_interrupted_runs(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "cut", steps=100, points=fabricate.SEARCH_POINTS[:2], sharp=False)
    for trial in folder.trials():
        trial.set_status("pending", "interrupted at step 100")
    assert "No run has finished yet: 2 runs pending." in Reader(render_page([open_sweep(folder)])).said
    with pytest.raises(UserError, match="needs >= 3 finished runs"):
        annealing_curves(collect(folder))


def test_default_place_is_the_first_sweep(fabricate, tmp_path):
    folder = fabricate.make_search(tmp_path / "s", steps=50, points=fabricate.SEARCH_POINTS[:2], sharp=False)
    assert write_report(str(folder.path)) == folder.path / "report.html"


def test_no_folder_at_all():
    with pytest.raises(UserError, match="folders must name at least one sweep"):
        write_report([])


def test_something_that_is_no_sweep(tmp_path):
    with pytest.raises(UserError, match="not a sweep folder"):
        write_report(tmp_path)


def test_exported_figures(search_folder, tmp_path):
    paths = export_figures(search_folder, tmp_path / "deep" / "figures")
    names = ["loss-curves", "generalisation", "schedules", "search-result", "importance", "sharpness", "rank"]
    names += ["forecast", "time-spent"]
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[::2])
    assert all(b"<svg" in path.read_bytes() for path in paths[1::2])
    assert [path.suffix for path in export_figures(search_folder, tmp_path, ("png",))] == [".png"] * len(names)


def test_intervals_that_miss_too_often_are_called_too_narrow(search):
    fit = search.fit
    assert "understate the error" not in Reader(render_page([search])).said
    missed = tuple(dataclasses.replace(one, observed_final=one.high + 0.01) for one in fit.forecasts)
    sweep = dataclasses.replace(search, fit=dataclasses.replace(fit, forecasts=missed))
    said = Reader(render_page([sweep])).said
    assert "0 of 5 measured losses lie inside their interval. That is too few for intervals of 90 %" in said
    assert "measured: outside the interval" in said


def test_a_law_comes_with_its_checklist(search):
    said = Reader(law_section.law(search, [search])).said
    assert "How it was checked" in said
    assert f"{search.fit.fit.certificate['num_starts']} starts agree" in said
    assert "of 5 inside their 90 % interval" in said
    loose = dataclasses.replace(
        search.fit.fit,
        certificate=search.fit.fit.certificate | {"bounds_hit": ["L0"], "points_per_parameter": 2.0},
        reasons=("intervals wider than the value: L0",),
    )
    rows = checks(dataclasses.replace(search.fit, fit=loose)).split("<tr>")
    for name in ("optimum", "parameters determined", "enough data"):
        (row,) = (row for row in rows if f">{name}<" in row)
        assert ">read<" in row
    assert "at a bound: L0" in rows[2]
    assert "none was held out" in checks(dataclasses.replace(search.fit, forecasts=()))
