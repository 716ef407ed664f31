"""The limit of stability on a page: the same number as that of the probes, and of the curvature that it bounds."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from landscape_ray.analysis.runs import Run
from landscape_ray.probes.sharpness.stability import sgd_curvature, threshold
from landscape_ray.reports import insight
from landscape_ray.reports.figures import Figure, Series
from landscape_ray.reports.stability import CURVATURES, GAINS, Limit, limit_of_stability, shares_of_noise
from landscape_ray.reports.static import render
from landscape_ray.reports.views import Sweep

BOTH = set(CURVATURES)


def limit(sweep: Sweep, fabricate: ModuleType, measured: set[str], **config: Any) -> Limit:
    momentum = config.pop("momentum", None)
    changed = fabricate.configured(sweep, momentum, **config)
    found: Limit = limit_of_stability(changed.runs[0], measured)
    return found


def named(figure: Figure, name: str, panel: int = 0) -> list[Series]:
    return [one for one in figure.panels[panel].series if one.name == name]


@pytest.mark.acceptance
@given(st.sampled_from(["sgd", "nesterov", "adamw", "schedule_free_adamw"]), st.floats(0, 0.99), st.floats(1e-6, 10))
def test_it_is_the_threshold_of_the_probes(
    search: Sweep, fabricate: ModuleType, name: str, momentum: float, lr: float
) -> None:
    table = {"name": "sgd", "nesterov": True} if name == "nesterov" else {"name": name}
    run = fabricate.configured(search, momentum, optimizer=table).runs[0]
    run = dataclasses.replace(run, steps={**run.steps, "lr": np.full(len(run.steps["lr"]), lr)})
    found = limit_of_stability(run, BOTH)
    expected = threshold(table["name"], lr, momentum, nesterov=name == "nesterov")
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    assert found.holds
    assert found.probe == ("sharpness" if table["name"] == "sgd" else "preconditioned_sharpness")


def test_plain_gradient_descent_has_two_over_the_rate(search: Sweep, fabricate: ModuleType) -> None:
    found = limit(search, fabricate, BOTH, optimizer={"name": "sgd"}, momentum=0.0)
    assert (found.formula, found.holds) == ("2/LR", True)
    assert limit(search, fabricate, BOTH, optimizer={"name": "sgd"}).formula == "(2 + 2β)/LR"


def test_a_momentum_that_was_not_recorded_is_the_configured_one(search: Sweep, fabricate: ModuleType) -> None:
    for table, formula in (({"name": "sgd", "momentum": 0.5}, "(2 + 2β)/LR"), ({"name": "adamw", "beta1": 0.5}, None)):
        found = limit(search, fabricate, BOTH, optimizer=table, momentum=math.nan)
        np.testing.assert_allclose(found.values, threshold(table["name"], 1.0, 0.5) / search.runs[0].steps["lr"])
        assert formula in (None, found.formula)


@pytest.mark.parametrize(
    ("config", "measured", "probe"),
    [
        ({"optimizer": {"name": "adamw"}}, {"sharpness"}, "sharpness"),
        ({"optimizer": {"name": "muon"}}, BOTH, "sharpness"),
        ({"optimizer": {"name": "sgd"}, "sam": {"rho": 0.05}}, BOTH, "sharpness"),
        ({"optimizer": {"name": "adamw"}, "sam": {"rho": 0.05}}, {"preconditioned_sharpness"}, CURVATURES[1]),
        ({"optimizer": {"name": "sgd"}, "model": {"parametrisation": "mup"}}, {"sharpness"}, "sharpness"),
        ({"optimizer": "of another program"}, {"sharpness"}, "sharpness"),
    ],
)
def test_where_no_limit_is_known_there_is_a_yardstick(
    search: Sweep, fabricate: ModuleType, config: dict[str, Any], measured: set[str], probe: str
) -> None:
    found = limit(search, fabricate, measured, **config)
    assert (found.holds, found.formula, found.probe) == (False, "2/LR", probe)
    np.testing.assert_allclose(found.values, 2 / search.runs[0].steps["lr"])


def test_with_factors_of_the_learning_rate_the_limit_is_one_of_the_preconditioned(
    search: Sweep, fabricate: ModuleType
) -> None:
    found = limit(search, fabricate, BOTH, optimizer={"name": "sgd"}, model={"parametrisation": "mup"})
    assert (found.holds, found.probe) == (True, "preconditioned_sharpness")


def test_the_rate_is_that_of_the_update_before_the_measurement(search: Sweep) -> None:
    run = search.runs[2]
    found = limit_of_stability(run, {"sharpness"})
    at = found.at(np.array([0.0, 1.0, 7.0, 300.0, 999.0]))
    np.testing.assert_allclose(at, 2 / run.steps["lr"][[0, 0, 6, 299, 299]])
    bare = dataclasses.replace(run, steps={name: column[:0] for name, column in run.steps.items()})
    assert np.isnan(limit_of_stability(bare, {"sharpness"}).at(np.array([1.0]))).all()


def test_a_rate_of_zero_has_no_finite_limit(search: Sweep) -> None:
    run = search.runs[0]
    still = dataclasses.replace(run, steps={**run.steps, "lr": np.zeros(len(run.steps["lr"]))})
    assert np.isinf(limit_of_stability(still, {"sharpness"}).values).all()


def test_gains_at_the_usual_momentum_are_the_published_ones() -> None:
    assert {name: float(gain(np.array([0.9]))[0]) for name, gain in GAINS.items()} == pytest.approx(
        dict(zip(GAINS, (2, 3.8, 3.8 / 2.8, 38, 20), strict=True))
    )


@pytest.mark.acceptance
def test_the_figure_of_sgd_has_the_limit_of_momentum(search: Sweep, fabricate: ModuleType) -> None:
    figure = insight.sharpness([fabricate.configured(search, 0.9, optimizer={"name": "sgd"})])
    assert isinstance(figure, Figure)
    assert [panel.y.label for panel in figure.panels] == ["sharpness λ", "curvature / limit"]
    drawn = next(one for one in named(figure, "limit (2 + 2β)/LR of the same run") if one.x[-1] == 300)
    best = search.best
    assert best is not None
    np.testing.assert_allclose(drawn.y, 3.8 / best.steps["lr"][drawn.x.astype(int) - 1])
    assert "the limit (2 + 2β)/LR" in figure.takeaway
    assert "yardstick" not in figure.takeaway + figure.note


@pytest.mark.acceptance
def test_the_figure_of_adam_has_the_preconditioned_sharpness_at_its_limit(search: Sweep, fabricate: ModuleType) -> None:
    sweep = fabricate.probed(search, {"preconditioned_sharpness": lambda step: np.where(step > 0, 20.0 * step, np.nan)})
    figure = insight.sharpness([sweep])
    assert isinstance(figure, Figure)
    labels = [panel.y.label for panel in figure.panels]
    assert labels == ["sharpness λ", "preconditioned sharpness", "curvature / limit"]
    name = "limit (2 + 2β₁)/((1 − β₁) LR) of the same run"
    assert not named(figure, name)
    assert named(figure, name, panel=1)
    best: Run = sweep.best
    entry = insight.legend_entry(best, best.run_id)
    (upper,), (lower,) = named(figure, entry, panel=1), named(figure, entry, panel=2)
    assert upper.x.tolist() == list(range(50, 301, 50))
    np.testing.assert_allclose(lower.y, upper.y * best.steps["lr"][upper.x.astype(int) - 1] / 38)
    assert "yardstick" not in figure.takeaway + figure.note
    assert "P⁻¹H" in figure.note
    assert render(figure)[:4] == b"\x89PNG"


def test_values_that_are_not_finite_are_no_measurement(search: Sweep, fabricate: ModuleType) -> None:
    bare = dataclasses.replace(
        search,
        runs=tuple(
            dataclasses.replace(run, probes={name: column[:0] for name, column in run.probes.items()})
            for run in search.runs
        ),
    )
    text = insight.sharpness([fabricate.probed(bare, {"sharpness": lambda step: np.full(len(step), np.nan)})])
    assert isinstance(text, str)
    assert "[train.probes.sharpness]" in text


def test_what_other_runs_measure_far_above_is_cut_off(search: Sweep, fabricate: ModuleType) -> None:
    sweep = fabricate.configured(search, 0.0, optimizer={"name": "sgd"})
    shown = insight.highlighted([run for _, run in insight.sharpness_runs([sweep])])
    wild = next(run for run in sweep.runs if run not in shown)
    far = dataclasses.replace(wild, probes={**wild.probes, "value": wild.probes["value"] * 1e6})
    figure = insight.sharpness([dataclasses.replace(sweep, runs=tuple(far if r is wild else r for r in sweep.runs))])
    assert isinstance(figure, Figure)
    highest = max(2 / min(run.peak_lr for run in shown), max(float(r.probe("sharpness")["value"].max()) for r in shown))
    assert figure.panels[0].y.limits is not None
    assert figure.panels[0].y.limits[1] <= 25.001 * highest


@pytest.mark.acceptance
def test_sgd_has_its_trace_condition_and_its_batch_sharpness(search: Sweep, fabricate: ModuleType) -> None:
    probes = {
        "trace": lambda step: 50.0 + step,
        "trace/frobenius": lambda step: np.full(len(step), 20.0),
        "batch_sharpness": lambda step: np.full(len(step), 7.0),
    }
    sweep = fabricate.probed(search, probes)
    plain = fabricate.configured(sweep, 0.0, optimizer={"name": "sgd"})
    run = plain.best
    found = shares_of_noise(run)
    steps, shares = found["SGD's trace condition"]
    B = run.summary.config["batch_size"]
    lr = run.steps["lr"][np.maximum(steps.astype(int) - 1, 0)]
    wanted = [sgd_curvature(50.0 + step, batch_size=B, frobenius_norm=20.0) for step in steps]
    np.testing.assert_allclose(shares, np.array(wanted) * lr / 2)
    np.testing.assert_allclose(found["batch sharpness"][1], 7.0 * lr / 2)
    figure = insight.sharpness([plain])
    assert isinstance(figure, Figure)
    drawn = named(figure, "SGD's trace condition of the same run", panel=1)
    assert {one.dash for one in drawn} == {"dot"}
    assert "tr(H)/B" in figure.note
    assert "2412.20553" in figure.note
    assert render(figure)[:4] == b"\x89PNG"
    # with momentum, under other optimizers and under SAM nothing is known; nor of batches of another size
    for momentum, tables in (
        (0.9, {"optimizer": {"name": "sgd"}}),
        (0.0, {"optimizer": {"name": "adamw"}}),
        (0.0, {"optimizer": {"name": "sgd"}, "sam": {"rho": 0.05}}),
    ):
        assert shares_of_noise(fabricate.configured(sweep, momentum, **tables).best) == {}
    other = fabricate.configured(
        sweep, 0.0, optimizer={"name": "sgd"}, probes={"batch_sharpness": {"batch_size": B + 1}}
    )
    assert list(shares_of_noise(other.best)) == ["SGD's trace condition"]


def test_without_a_hessian_the_trace_is_that_of_the_gauss_newton_matrix(search: Sweep, fabricate: ModuleType) -> None:
    sweep = fabricate.probed(search, {"ggn_trace": lambda step: np.where(step > 0, 64.0, -1.0)})
    run = fabricate.configured(sweep, 0.0, optimizer={"name": "sgd"}).best
    steps, shares = shares_of_noise(run)["SGD's trace condition"]
    assert steps.min() > 0  # a negative trace has no condition
    lr = run.steps["lr"][steps.astype(int) - 1]
    np.testing.assert_allclose(shares, 64.0 / run.summary.config["batch_size"] * lr / 2)
