"""A scaling law from a file to decisions: in Python, and from the command line."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from landscape_ray.analysis.recommend import recommend_size
from landscape_ray.analysis.scaling import ScalingFit, find_law, fit_table, load, query, save
from landscape_ray.analysis.table import read_table
from landscape_ray.cli import main
from landscape_ray.errors import UserError
from landscape_ray.laws import Law, Variable, linear, nonlinear
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA
from landscape_ray.reports.fit_page import figures, render, write_page
from landscape_ray.reports.law_tables import law_table, recommendation_text, scaling_tables

POWER = Law(
    name="power_of_mine",
    formula="L = E + A N^-alpha",
    variables=(Variable("N", "parameters", "model size"),),
    parameters=(linear("E"), linear("A"), nonlinear("alpha", "exponent", 0.01, 3)),
    columns=lambda x, p: (1.0, x["N"] ** -p["alpha"]),
)
NO_LAW = "text"

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
LOSS = (1.7 + 400 * N**-0.34 + 400 * D**-0.28) * np.exp(2e-3 * np.random.default_rng(0).standard_normal(36))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    rows = [
        f"r{i},{float(n) / 1e6!r},{float(d)!r},{float(y)!r}" for i, (n, d, y) in enumerate(zip(N, D, LOSS, strict=True))
    ]
    path.write_text("\n".join(["run,params_m,D,loss", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def table(file):
    return read_table(file, {"N": "params_m*1e6"})


@pytest.fixture(scope="module")
def found(table):
    return fit_table("chinchilla", table, num_bootstrap=100, command="landscape-ray fit runs.csv --law chinchilla")


def test_a_fit_carries_its_evidence(found):
    assert found.fit.status == "certified"
    assert found.fit.parameters["alpha"] == pytest.approx(0.34, abs=0.03)
    assert len(found.rollouts) == 2
    assert 0 <= found.fit.misfit < 0.02
    names = {item.name for item in found.record}
    assert {"form", "objective", "held out: N", "stability without one size", "refit", "C was computed"} <= names
    assert [item.value for item in found.record if item.name == "refit"] == [
        "landscape-ray fit runs.csv --law chinchilla"
    ]
    np.testing.assert_allclose(found.predicted, CHINCHILLA.predict({"N": N, "D": D}, found.fit.parameters))


def test_saved_and_loaded_it_is_the_same(found, table, tmp_path):
    path = save(found, table, tmp_path / "fit")
    again = load(tmp_path / "fit")
    assert again.to_json() == found.to_json()
    assert load(path).fit == found.fit
    refit = fit_table("chinchilla", read_table(tmp_path / "fit" / "table.csv"), num_bootstrap=100)
    assert refit.fit.parameters == found.fit.parameters
    np.testing.assert_array_equal(refit.fit.samples, found.fit.samples)


def test_a_law_of_ones_own_by_its_path(table):
    mine = fit_table(f"{__name__}:POWER", table, candidates=["chinchilla"], num_bootstrap=20)
    assert mine.law is POWER
    item = next(item for item in mine.record if item.name == "candidate laws compared")
    assert item.verdict == "warning"
    assert "'chinchilla' forecasts left-out runs better" in item.remark


def test_what_is_no_law():
    with pytest.raises(UserError, match="law must be a known name or a path"):
        find_law("chinchila")
    with pytest.raises(UserError, match=r"law must be a landscape_ray\.laws\.Law, got str"):
        find_law(f"{__name__}:NO_LAW")


def test_what_is_no_fit(tmp_path):
    with pytest.raises(UserError, match=r"no fit at .*; make one with `landscape-ray fit"):
        load(tmp_path)
    (tmp_path / "fit.json").write_text('{"kind": "annealing"}')
    with pytest.raises(UserError, match=r"fit must be the JSON text of a ScalingFit \(another kind of fit\)"):
        load(tmp_path)


def test_a_query_needs_what_the_law_depends_on():
    assert query(CHINCHILLA, {"N": 1e8, "C": 6e18}) == {"N": 1e8, "D": 1e10}
    with pytest.raises(UserError, match=r"--set must give D; law 'chinchilla' depends on N \(model size\), D"):
        query(CHINCHILLA, {"N": 1e8})


class TestRecommendation:
    def test_compute_time_and_tokens_agree(self, found):
        by_flops = recommend_size(found, flops=1e20)
        by_time = recommend_size(found, seconds=1e5, flops_per_second=1e15)
        assert by_time.allocation == by_flops.allocation
        assert by_time.seconds == pytest.approx(1e5)
        assert by_flops.seconds is None
        by_tokens = recommend_size(found, tokens=by_flops.allocation.num_tokens.value)
        assert by_tokens.allocation.flops == pytest.approx(1e20, rel=1e-5)
        assert by_flops.flops_per_param_token == pytest.approx(6.0)

    def test_the_next_runs_are_within_their_shares(self, found):
        runs = recommend_size(found, flops=1e21).next_runs
        assert 1 <= len(runs) <= 3
        assert max(run.cost for run in runs) <= 1e20 * (1 + 1e-9)
        assert all(0 < run.width_ratio < 1 for run in runs)

    def test_the_speed_of_the_runs_is_used(self, found):
        columns = {**found.points, "seconds": (np.array(found.points["C"]) / 2e12).tolist()}
        timed = recommend_size(dataclasses.replace(found, points=columns), seconds=1e6)
        assert timed.allocation.flops == pytest.approx(2e18)

    def test_unsound_budgets(self, found):
        with pytest.raises(UserError, match="budget must be one of --flops, --hours and --tokens, got none"):
            recommend_size(found)
        with pytest.raises(UserError, match="got flops and tokens"):
            recommend_size(found, flops=1e20, tokens=1e9)
        with pytest.raises(UserError, match="--hours needs --flops-per-second"):
            recommend_size(found, seconds=10.0)

    def test_in_words(self, found):
        text = recommendation_text(recommend_size(found, flops=1e20))
        assert text.startswith("[bold]1e20 FLOPs[/bold]:")
        assert "parameters" in text
        assert "regret" in text
        assert "the next run" in text


class TestPage:
    def test_figures_say_what_they_show(self, found):
        law, agreement, *residuals = figures(found)
        assert law.key == "law"
        assert "ten times the largest run" in law.takeaway
        assert agreement.key == "agreement"
        assert [one.key for one in residuals] == ["residuals-n", "residuals-d"]

    def test_the_page_holds_the_whole_record_and_loads_nothing(self, found, tmp_path):
        page = write_page(found, tmp_path).read_text()
        for item in found.record:
            assert item.name in page
        assert "certified" in page
        assert 'src="http' not in page
        assert 'id="theme"' in page

    def test_text_from_files_is_escaped(self, found):
        page = render(dataclasses.replace(found, source="<img src=x>", excluded={"<b>": "<script>"}))
        assert "<img src=x>" not in page
        assert "<script>&" not in page
        assert "&lt;b&gt;: &lt;script&gt;" in page

    def test_one_variable(self, table):
        mine = fit_table(f"{__name__}:POWER", table, num_bootstrap=0)
        law = figures(mine)[0]
        assert law.title == "The law over model size"
        assert "page" not in render(mine)[:15]


def test_tables_for_the_terminal(found):
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(scaling_tables(found))
    console.print(law_table())
    text = console.export_text()
    assert "chinchilla law of runs.csv: certified, 36 points of 36 runs" in text
    assert "L = E + A N^-alpha + B D^-beta" in text
    assert "held out: N up to" in text


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "landscape_ray.cli", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def typed(capsys, monkeypatch):
    """Do what `run` does, in this process: each other one would load all anew."""

    def typed(*arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["landscape-ray", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(arguments, code or 0, *capsys.readouterr())

    return typed


@pytest.mark.acceptance
def test_a_foreign_table_through_the_command_line(file, tmp_path, typed):
    """One line fits it; two more predict and recommend; mistakes are one sentence."""
    fitted = run("fit", file, "--law", "chinchilla", "-c", "N=params_m*1e6", "--num-bootstrap", 50, cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    assert "certified" in fitted.stdout
    folder = tmp_path / "fits" / "runs" / "chinchilla"
    assert {path.name for path in folder.iterdir()} == {"fit.json", "table.csv", "page.html"}
    saved = ScalingFit.from_json((folder / "fit.json").read_text())
    assert saved.command.startswith("landscape-ray fit ")
    assert json.loads((folder / "fit.json").read_text())["kind"] == "scaling"
    predicted = run("predict", folder, "--set", "N=1e9", "--set", "D=5e11", cwd=tmp_path)
    assert "90% interval" in predicted.stdout, predicted.stderr
    recommended = run("recommend", folder, "--flops", "1e20", cwd=tmp_path)
    assert "regret" in recommended.stdout, recommended.stderr
    failed = run("fit", file, cwd=tmp_path)
    assert failed.returncode == 2
    assert "--law must name a law" in " ".join(failed.stderr.split())
    for arguments, message in (
        (("fit", file, "--law", "chinchilla", "-c", "N"), "--column must be OURS=THEIRS, got 'N'"),
        (("fit", file, file, "--law", "chinchilla"), "a table must come alone"),
        (("fit", file, "--law", "chinchilla", "--fix", "E=low"), "--fix must be NAME=NUMBER, got 'E=low'"),
        (("predict", folder, "--set", "N=1e9"), "--set must give D"),
        (("recommend", tmp_path, "--flops", "1e20"), "a budget needs a fit over N and D"),
    ):
        failed = typed(*arguments, cwd=tmp_path)
        assert failed.returncode == 2
        assert message in " ".join(failed.stderr.split())
