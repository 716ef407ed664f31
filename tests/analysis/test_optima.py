"""Learning rate and batch from logged runs to the lines of a sweep file: tables, sweeps of ours, command line."""

import dataclasses
import tomllib

import numpy as np
import pytest
from rich.console import Console

from landscape_ray.analysis.optima import cost, fit_step_table, plan, sweep_of
from landscape_ray.analysis.scaling import find_law, fit_table, load, save
from landscape_ray.analysis.step_evidence import published
from landscape_ray.analysis.table import joined, read_table, table_of
from landscape_ray.cli.optima import load_step, recommend_step, refuse_options
from landscape_ray.errors import UserError
from landscape_ray.laws import StepLaw, excess, fit_step_law, flat_region, regret
from landscape_ray.laws.optima.surface import rise
from landscape_ray.records import RunSummary
from landscape_ray.reports.fit_page import figures, render
from landscape_ray.reports.law_tables import law_table, scaling_tables
from landscape_ray.reports.step_tables import plan_text, prediction_text
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter
from tests.analysis.test_scaling import typed
from tests.fabricate import META, SEARCH_SPEC, config

__all__ = ["typed"]

BOWL = {"a": 0.015, "c": -0.004, "b": 0.014, "uuu": 0.003, "uuv": 0.0, "uvv": 0.001, "vvv": -0.001}
PAIRS = [(1e8, 2e9), (1e8, 1e10), (4e8, 2e9), (4e8, 1e10), (1.6e9, 1e10), (1.6e9, 4e10)]
CONTEXT = 1024


def rule(n, d):
    return 3.0 * n**-0.6 * d**0.2, 0.6 * n**-0.1 * d**0.6


def rows(pairs=PAIRS, noise=3e-4, seed=0):
    """Columns N, D, lr, sequences, updates, loss: the batch in whole sequences, the tokens in whole updates."""
    rng = np.random.default_rng(seed)
    found = []
    for n, d in pairs:
        best_lr, best_batch = rule(n, d)
        for u in np.linspace(-0.9, 0.9, 5):
            for v in np.linspace(-0.9, 0.9, 5):
                sequences = max(1, round(best_batch * np.exp(v) / CONTEXT))
                updates = round(d / (sequences * CONTEXT))
                away = np.log(sequences * CONTEXT / best_batch)
                loss = (1.7 + 20 * n**-0.2 + 60 * d**-0.25) * np.exp(rise(BOWL, u, away) + noise * rng.normal())
                found.append((n, updates * sequences * CONTEXT, best_lr * np.exp(u), sequences, updates, loss))
    return np.array(found)


def write(path, columns="N,D,lr,batch_size,steps,loss", table=None, keep=None):
    table = rows() if table is None else table
    names = columns.split(",")
    lines = [",".join(names[i] for i in keep or range(len(names)))]
    lines += [",".join(repr(float(row[i])) for i in keep or range(len(names))) for row in table]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("grid") / "grid.csv")


@pytest.fixture(scope="module")
def table(file):
    return read_table(file)


@pytest.fixture(scope="module")
def found(table):
    return fit_step_table(table, num_bootstrap=30, command="landscape-ray fit grid.csv --law step_law")


def said(renderable):
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


class TestTable:
    def test_sequences_become_tokens_and_near_horizons_one(self, table):
        sweep, dropped, items, per_example = sweep_of(table)
        assert per_example == CONTEXT
        assert len(sweep.groups) == len(PAIRS)
        assert not dropped
        np.testing.assert_allclose(sweep.batch, CONTEXT * table.columns["batch_size"])
        assert "horizons joined" in {item.name for item in items}

    def test_units_are_checked(self, tmp_path):
        wrong = write(tmp_path / "a.csv", "N,D,lr,batch,steps,loss")
        with pytest.raises(UserError, match="batch must be in the unit of D, but D is 1024 times"):
            sweep_of(read_table(wrong))
        alone = write(tmp_path / "b.csv", keep=[0, 1, 2, 3, 5])
        with pytest.raises(UserError, match="batch must be known in tokens, got batch_size alone; map the updates too"):
            sweep_of(read_table(alone))
        unknown = read_table(alone, {"batch": "batch_size*1024"})
        _, _, items, per_example = sweep_of(unknown)
        assert [item.verdict for item in items if item.name == "batch unit"] == ["unknown"]
        assert per_example == CONTEXT

    def test_what_is_missing_is_said(self, table, tmp_path):
        with pytest.raises(UserError, match=r"column 'lr' \(peak learning rate\) must be there for law 'step_law'"):
            sweep_of(read_table(write(tmp_path / "a.csv", keep=[0, 1, 5])))
        bare = read_table(write(tmp_path / "b.csv", table=rows(PAIRS[:1]), keep=[2, 5]))
        sweep, _, items, _ = sweep_of(bare)
        assert sweep.batch is None
        assert {"batch", "no column N", "no column D"} <= {item.name for item in items}
        bad = dataclasses.replace(table, columns=table.columns | {"loss": -table.columns["loss"]})
        with pytest.raises(UserError, match="no run has all of lr, loss"):
            sweep_of(bad)
        loss = table.columns["loss"].copy()
        loss[3] = np.nan
        _, dropped, _, _ = sweep_of(dataclasses.replace(table, columns=table.columns | {"loss": loss}))
        assert dropped == {"4": "loss is missing or not > 0"}

    def test_a_batch_that_changes_with_the_horizon_only_is_not_swept(self, tmp_path):
        table = rows()
        sweep, _, items, _ = sweep_of(read_table(write(tmp_path / "a.csv", table=table[2::5])))
        assert sweep.batch is None
        assert any(item.name == "batch not swept" and item.verdict == "warning" for item in items)


class TestFit:
    def test_it_carries_its_evidence(self, found):
        law = StepLaw(found.fit)
        assert law.lr.by_size == pytest.approx(0.6, abs=0.05)
        assert law.batch.by_horizon == pytest.approx(0.6, abs=0.1)
        record = {item.name: item for item in found.record}
        assert {"held out: each pair of N and D", "held out: each N", "near the optimum", "refit"} <= record.keys()
        assert "stability without one size" in record
        assert "regret of the published constants (Li et al. 2025)" in record
        assert "--fix r=0" in record["candidate laws compared"].value
        assert any(one.startswith("each pair of N and D: regret") for one in found.rollouts)
        assert np.mean(found.fit.data["regret"]["left_out"]) < 2e-3
        assert np.mean(found.fit.data["regret"]["middle"]) > np.mean(found.fit.data["regret"]["left_out"])

    def test_saved_and_loaded_it_is_the_same(self, found, table, tmp_path):
        save(found, table, tmp_path)
        again = load(tmp_path)
        assert again.to_json() == found.to_json()
        assert plan(again, {"N": 1e9, "D": 2e10}) == plan(found, {"N": 1e9, "D": 2e10})
        np.testing.assert_allclose(again.law.predict(_points(again), again.fit.parameters), again.predicted)
        assert load_step(tmp_path).law_path == "step_law"

    def test_other_fits_are_told_apart(self, table, tmp_path):
        other = fit_table("chinchilla", table, num_bootstrap=0)
        with pytest.raises(UserError, match="fit must be of law 'step_law' for a learning rate, got 'chinchilla'"):
            plan(other, {"N": 1e9, "D": 2e10})
        save(other, table, tmp_path)
        with pytest.raises(UserError, match="--with must be a fit of law step_law, got one of 'chinchilla'"):
            load_step(tmp_path)
        with pytest.raises(UserError, match="law must be of points, got 'step_law'"):
            find_law("step_law")
        with pytest.raises(UserError, match=r"--fix must be r=0 for law 'step_law' .*, got p=1"):
            fit_step_table(table, fix={"p": 1.0})
        with pytest.raises(UserError, match="--objective and --delta must be left out for law step_law"):
            refuse_options("least_absolute", 1e-3, None)
        with pytest.raises(UserError, match="--compare must be left out for law step_law, got chinchilla"):
            refuse_options("huber", 1e-3, ["chinchilla"])

    def test_size_and_horizon_on_one_line(self, tmp_path):
        pairs = [(1e8, 2e9), (2e8, 4e9), (4e8, 8e9), (8e8, 1.6e10)]
        found = fit_step_table(read_table(write(tmp_path / "a.csv", table=rows(pairs))), num_bootstrap=0)
        names = {warning.split(":")[0] for warning in found.fit.warnings}
        assert {"one_line", "few_groups"} <= names
        best = plan(found, {"N": 1.6e9, "D": 3.2e10})
        assert best.choice.lr == pytest.approx(rule(1.6e9, 3.2e10)[0], rel=0.1)
        assert any(one.startswith("one_line") for one in plan(found, {"N": 4e8, "D": 4e10}).warnings)
        with pytest.raises(UserError, match=r"D must lie within 10 times the .* that go with N"):
            plan(found, {"N": 1e8, "D": 1e12}, allow_extrapolation=False)
        held = fit_step_table(read_table(tmp_path / "a.csv"), fix={"r": 0.0}, num_bootstrap=0)
        assert "r" not in held.fit.parameters


class TestPlan:
    def test_the_choice_its_region_and_the_toml(self, found):
        best = plan(found, {"N": 8e8, "D": 2e10})
        lr, batch = rule(8e8, 2e10)
        assert best.choice.lr == pytest.approx(lr, rel=0.05)
        assert best.choice.batch == pytest.approx(batch, rel=0.1)
        low, high = best.region.lr
        assert low < best.choice.lr < high
        text = plan_text(best)
        data = tomllib.loads(text)
        assert data["train"]["schedule"]["peak_lr"] == pytest.approx(best.choice.lr, rel=1e-2)
        tokens = data["train"]["batch_size"] * CONTEXT * data["train"]["num_steps"]
        assert tokens == pytest.approx(2e10, rel=1e-3)
        assert "within 0.1 % of the lowest loss" in text
        assert "fastest" in text
        assert "on groups left out of the fit" in text
        by_compute = plan(found, {"C": 6 * 8e8 * 2e10, "N": 8e8})
        assert by_compute.choice == best.choice

    def test_a_given_batch_gets_its_own_rate(self, found):
        best = plan(found, {"N": 8e8, "D": 2e10})
        twice = plan(found, {"N": 8e8, "D": 2e10, "batch": 1.8 * best.choice.batch})
        assert twice.given_cost.value > 1e-3
        assert "as given" in plan_text(twice)
        assert any(one.startswith("far_batch") for one in plan(found, {"N": 8e8, "D": 2e10, "batch": 1e3}).warnings)

    def test_what_a_choice_costs(self, found):
        at = {"N": 8e8, "D": 2e10}
        best = plan(found, at)
        near = cost(found, at | {"lr": best.choice.lr, "batch": best.choice.batch})
        off = cost(found, at | {"lr": 1.6 * best.choice.lr, "batch": best.choice.batch})
        assert near.value < 3e-4 < 5e-4 < off.value
        assert near.low <= near.value <= near.high
        far = cost(found, at | {"lr": 20 * best.choice.lr})
        assert far.beyond
        assert "more than 1 % above the lowest loss" in prediction_text(best, far, at | {"lr": 0.1})
        assert "interval" in prediction_text(best, off, at | {"lr": 0.1, "batch": 1e5})
        region = flat_region(StepLaw(found.fit), 8e8, 2e10)
        edge = cost(dataclasses.replace(found, fit=_bare(found.fit)), at | {"lr": region.lr[1]})
        assert edge.value == pytest.approx(1e-3, rel=0.01)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"N": 1e9}, r"--set must give D \(training tokens\).* the fitted runs have 2e\+09 to 4e\+10"),
            ({"N": 1e9, "D": 1e10, "width": 3}, "--set must name N, D, C, lr or batch, got 'width'"),
            ({"N": 1e14, "D": 1e10}, "N must lie within 100 times the fitted range"),
        ],
    )
    def test_what_cannot_be_asked(self, found, values, message):
        with pytest.raises(UserError, match=message):
            plan(found, values)

    def test_more_that_cannot_be_asked(self, found):
        at = {"N": 8e8, "D": 2e10}
        with pytest.raises(UserError, match="--set must give lr to say what it costs"):
            cost(found, at)
        with pytest.raises(UserError, match="lr must be finite and > 0, got -1"):
            cost(found, at | {"lr": -1.0})
        with pytest.raises(UserError, match=r"--set lr is what is recommended, got 0\.001"):
            recommend_step(found, at | {"lr": 1e-3}, False)
        with pytest.raises(UserError, match=r"within must be > 0 and <= 0\.01, the window of the fit, got 0\.1"):
            flat_region(StepLaw(found.fit), 8e8, 2e10, within=0.1)


def make_sweep(path, mutate=None):
    """A sweep of ours at one N and D: five learning rates by four batches, written by the real writers."""
    folder = SweepFolder.create(
        path, spec_text=SEARCH_SPEC.format(name="grid", steps=600), meta={"name": path.name, **META}
    )
    number = 0
    for batch in (8, 16, 32, 64):
        for lr in np.geomspace(1e-3, 1.6e-2, 5):
            steps = 76800 // batch // 8
            cfg = config("cosine", float(lr), 0.2, steps, 10) | {"batch_size": batch}
            cfg |= {} if mutate is None else mutate(number)
            away, off = np.log(lr / 4e-3), np.log(batch / 22.0)
            loss = float(
                2.0 * np.exp(0.004 * away**2 + 0.003 * off**2 - 0.001 * away * off + 1e-4 * np.sin(7 * number))
            )
            done = RunSummary(
                run_id=f"t{number:03d}",
                status="finished",
                config=cfg,
                varied={"schedule.peak_lr": float(lr), "batch_size": batch},
                step=steps,
                num_steps=steps,
                num_tokens=steps * batch * 128,
                flops=1e12,
                num_params=216_000,
                num_params_non_embedding=200_000,
                final_loss_nats=loss,
                best_loss_nats=loss,
                elapsed_seconds=10.0,
            )
            folder.trial(done.run_id).commit(done, PartWriter(folder.trial(done.run_id)).flush())
            number += 1
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("ours") / "grid")


@pytest.fixture(scope="module")
def one(folder):
    return fit_step_table(table_of(collect(folder.path), "sweep grid"), num_bootstrap=20)


class TestOurSweep:
    def test_one_size_gives_its_optimum_and_says_what_it_does_not_know(self, one):
        assert [w.split(":")[0] for w in one.fit.warnings if w.startswith("one_")] == ["one_N", "one_D"]
        best = plan(one, {})
        assert best.choice.lr == pytest.approx(4e-3, rel=0.1)
        assert best.choice.batch == pytest.approx(22 * 128, rel=0.2)
        assert best.tokens_per_example == 128
        assert best.held_out is None
        assert any(one.startswith("one_N") for one in plan(one, {"N": 4e5}).warnings)
        with pytest.raises(UserError, match=r"N must lie within 10 times the fitted range .* sweep a second N"):
            plan(one, {"N": 1e8})
        drawn = [figure.key for figure in figures(one)]
        assert drawn[:2] == ["law", "map"]
        assert "regret" not in drawn

    def test_runs_that_differ_in_more_are_named(self, tmp_path):
        folder = make_sweep(tmp_path / "grid", lambda i: {"optimizer": {"name": ("adamw", "sgd")[i % 2]}})
        table = table_of(collect(folder.path), "sweep grid")
        assert "optimizer.name" in table.varied
        assert joined([table, table], ["a", "b"]).varied == table.varied
        _, _, items, _ = sweep_of(table)
        (item,) = [item for item in items if item.name == "runs differ in more"]
        assert item.value == "optimizer.name"

    def test_a_population_is_named(self, population_folder):
        table = table_of(collect(population_folder.path), "sweep")
        assert any(item.name == "changed during training" and item.verdict == "warning" for item in table.facts)

    def test_a_rate_only_sweep_recommends_for_its_batch(self, folder):
        table = table_of(collect(folder.path), "sweep grid")
        here = table.columns["batch_size"] == 16
        kept = dataclasses.replace(
            table,
            run_ids=tuple(r for r, fine in zip(table.run_ids, here, strict=True) if fine),
            columns={name: values[here] for name, values in table.columns.items()},
        )
        found = fit_step_table(kept, num_bootstrap=0)
        best = plan(found, {})
        assert best.choice.batch is None
        assert tomllib.loads(plan_text(best))["train"]["batch_size"] == 16
        assert any(one.startswith("no_bootstrap") for one in best.warnings)
        assert "How flat" in render(found)
        with pytest.raises(UserError, match="batch must have been swept to say what one costs"):
            excess(StepLaw(found.fit), best.N, best.D, 1e-3, 512)

    @pytest.mark.acceptance
    def test_by_the_command_line(self, folder, typed):
        where = folder.path.parent
        fitted = typed("fit", folder.path, "--law", "step_law", "--num-bootstrap", 10, cwd=where)
        assert fitted.returncode == 0, fitted.stderr
        target = folder.fits_path / "step_law"
        assert {path.name for path in target.iterdir()} == {"fit.json", "table.csv", "page.html"}
        recommended = typed("recommend", target, cwd=where)
        assert "peak_lr = 0.00" in recommended.stdout, recommended.stderr


def test_the_page_and_the_terminal(found):
    keys = [figure.key for figure in figures(found)]
    assert keys[:4] == ["law", "bowl", "map", "regret"]
    # each pair of N and D has a floor of its own, which leaves no trend over them whatever the form
    assert {key for key in keys if key.startswith("residuals")} == {"residuals-lr", "residuals-batch"}
    (trends,) = (item.value for item in found.record if item.name == "trends of the residuals")
    assert trends.count("over log") == 2
    assert "over log lr" in trends
    page = render(found)
    for item in found.record:
        assert item.name.replace("&", "&amp;") in page
    text = said(scaling_tables(found))
    assert "step_law of grid.csv: certified" in text
    assert "held out: each pair of N and D: regret" in text
    assert "exponent of N" in text
    assert "step_law" in said(law_table())


@pytest.mark.acceptance
def test_a_foreign_table_through_the_command_line(file, tmp_path, typed):
    """One line fits it; others say what a choice costs, what to train with, and size, rate and batch for a budget."""
    fitted = typed("fit", file, "--law", "step_law", "--num-bootstrap", 20, cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    folder = tmp_path / "fits" / "grid" / "step_law"
    at = ("--set", "N=1e9", "--set", "D=2e10")
    predicted = typed("predict", folder, *at, "--set", "lr=1e-3", "--set", "batch=5e5", cwd=tmp_path)
    assert "above the lowest loss" in predicted.stdout, predicted.stderr
    recommended = typed("recommend", folder, *at, cwd=tmp_path)
    assert tomllib.loads(recommended.stdout.split("warning:")[0])["train"]["batch_size"] > 0, recommended.stderr
    assert typed("fit", file, "--law", "chinchilla", "--num-bootstrap", 5, cwd=tmp_path).returncode == 0
    other = tmp_path / "fits" / "grid" / "chinchilla"
    both = typed("recommend", other, "--flops", "1e20", "--with", folder, cwd=tmp_path)
    assert "[train.schedule]" in both.stdout, both.stderr
    for arguments, message in (
        (
            ("recommend", folder, "--flops", "1e20"),
            "a budget needs a fit over N and D, with that of step_law as --with",
        ),
        (("recommend", other, *at), "--set is for fits of step_law, got one of 'chinchilla'"),
        (("recommend", tmp_path, *at), "--set and --with need a saved fit"),
    ):
        failed = typed(*arguments, cwd=tmp_path)
        assert failed.returncode == 2
        assert message in " ".join(failed.stderr.split())


@pytest.mark.acceptance
@pytest.mark.data
def test_the_published_dense_runs(published_data):
    """Read by the columns of the file, the law has less regret than the published constants."""
    mapping = {"loss": "smooth loss", "batch_size": "bs", "steps": "ti", "run": "exp_name"}
    table = read_table(published_data / "step_law" / "dense_lr_bs_loss.csv", mapping)
    sweep, dropped, _, per_example = sweep_of(table)
    assert (len(sweep), len(sweep.groups), per_example) == (1911, 17, 2048)
    assert not dropped
    law = fit_step_law(sweep, num_bootstrap=0)
    assert law.regret(sweep).mean < regret(sweep, published).mean < 0.001


def _points(found):
    return {name: np.array(values) for name, values in found.points.items()}


def _bare(fit):
    return dataclasses.replace(fit, samples=fit.samples[:0])
