"""The rank study on a page: its table and figure, and the sentence in their place."""

from __future__ import annotations

import dataclasses
import re
from types import ModuleType

import pytest

from landscape_ray.laws.ranking import Association
from landscape_ray.reports import rank_section
from landscape_ray.reports.markup import prose
from landscape_ray.reports.page import render_page, write_report
from landscape_ray.reports.ranking import RankStudy
from landscape_ray.reports.views import Sweep, open_sweep
from landscape_ray.text import signed
from landscape_ray.tracking.folder import SweepFolder

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def study(search_folder: SweepFolder, search: Sweep) -> RankStudy:
    found = rank_section.study([search_folder], [search])
    assert isinstance(found, RankStudy)
    return found


@pytest.mark.acceptance
def test_the_table_has_every_correlation_with_its_interval(study: RankStudy) -> None:
    shown = rank_section.rank_table(study)
    (row,) = study.overall
    marked = study.significant(study.overall)
    for name, cell in row.cells.items():
        assert isinstance(cell, Association)
        mark = "*" if (0, name) in marked else ""
        assert f"<td>{signed(cell.tau, 2)}{mark} [{signed(cell.low, 2)}, {signed(cell.high, 2)}]</td>" in shown
        assert f"<th>{name}</th>" in shown
    assert "over 11 runs of 11 configurations (1 run left out: diverged), with its 95 % interval" in shown
    assert "Holm&#x27;s correction for all 2 comparisons" in shown


def test_parts_are_under_a_fold_and_reasons_are_shown(study: RankStudy) -> None:
    (row,) = study.overall
    cells = {**row.cells, "gap": "all values are equal"}
    parts = [dataclasses.replace(row, measure=f"trace/{k}", cells=cells) for k in range(3)]
    shown = rank_section.rank_table(dataclasses.replace(study, overall=(row, *parts)))
    above, below = shown.split("<details>")
    assert ("sharpness" in above, "trace/" in above) == (True, False)
    assert "3 parts of these measures" in below
    assert below.count("all values are equal") == 3
    alone = rank_section.rank_table(dataclasses.replace(study, overall=tuple(parts)))
    assert "<details>" not in alone
    assert "trace/2" in alone


def test_the_page_has_the_figure_and_the_table(search_folder: SweepFolder, tmp_path) -> None:
    page = write_report(search_folder, tmp_path / "a.html").read_text()
    assert 'id="figure-rank"' in page
    assert "Kendall&#x27;s τ of each measure" in page


def test_too_few_runs_are_one_sentence(fabricate: ModuleType, tmp_path) -> None:
    folder = fabricate.make_search(tmp_path / "few", steps=100, points=fabricate.SEARCH_POINTS[:3])
    said = rank_section.study([folder], [open_sweep(folder)])
    assert isinstance(said, str)
    assert said.startswith("A rank study must have 5 finished configurations with a probe, got 3 among 3")
    assert said.endswith(".")
    page = write_report(folder).read_text()
    assert said in re.sub(r"&#x27;", "'", page)
    assert 'id="figure-rank"' not in page


def test_a_study_that_takes_long_is_left_to_the_command(
    search_folder: SweepFolder, search: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_section, "MAX_WORK", 100)
    said = rank_section.study([search_folder], [search])
    assert said == "A rank study of 1 measure over 11 runs takes a while; `landscape-ray rank` does it."


def test_a_page_of_sweeps_alone_says_that_no_study_was_made(search: Sweep) -> None:
    assert prose(rank_section.NOT_ASKED) in render_page([search])


@pytest.mark.acceptance
def test_names_of_measures_stay_text(study: RankStudy, search: Sweep) -> None:
    (row,) = study.overall
    values = next(iter(study.measures.values()))
    targets = {f"{name}{HOSTILE}" if name != study.headline else name: v for name, v in study.targets.items()}
    cells = {f"{name}{HOSTILE}" if name != study.headline else name: c for name, c in row.cells.items()}
    attacked = dataclasses.replace(
        study,
        overall=(dataclasses.replace(row, measure=HOSTILE, cells=cells),),
        conditional=(),
        measures={HOSTILE: values},
        targets=targets,
    )
    page = render_page([search], attacked)
    assert "<img" not in page.split("<script type")[0]
    assert "&lt;img src=x" in rank_section.rank_table(attacked)
