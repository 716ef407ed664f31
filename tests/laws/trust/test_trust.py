"""Covariance, profiles, comparisons and fits that have not seen something: against closed forms and slow twins."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from landscape_ray.errors import UserError
from landscape_ray.laws import Law, Objective, Points, Variable, fit, linear, nonlinear
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA
from landscape_ray.laws.trust.checklist import SECTIONS, Evidence, Item, checklist, from_plain, to_plain
from landscape_ray.laws.trust.comparison import compare, objective_table, residual_trends, seed_noise
from landscape_ray.laws.trust.covariance import covariance
from landscape_ray.laws.trust.holdout import leave_groups_out, rollout, rollouts, sizes_of
from landscape_ray.laws.trust.profile import profile

LINE = Law(
    name="line",
    formula="y = a + b x",
    variables=(Variable("x", positive=False),),
    response=Variable("y", positive=False),
    parameters=(linear("a", free=True), linear("b", free=True), nonlinear("k", "unused", 0.0, 1.0)),
    columns=lambda x, p: (1.0, x["x"] + 0 * p["k"]),
    space="raw",
)
SQUARES = {"objective": Objective("least_squares"), "fix": {"k": 0.5}}
RNG = np.random.default_rng(3)
X = RNG.standard_normal(40)
Y = 2 - 3 * X + 0.3 * RNG.standard_normal(40)
DESIGN = np.column_stack([np.ones(40), X])

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))


def chinchilla(noise=3e-3, seed=0):
    clean = 1.7 + 400 * N**-0.34 + 400 * D**-0.28
    return Points({"N": N, "D": D}, clean * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N))))


def test_covariance_of_a_regression_is_whites():
    spread = covariance(solve(LINE, Points({"x": X}, Y), **SQUARES)[0])
    assert spread.names == ("a", "b")
    inverse = np.linalg.inv(DESIGN.T @ DESIGN)
    residual = Y - DESIGN @ (inverse @ DESIGN.T @ Y)
    middle = DESIGN.T @ (residual[:, None] ** 2 * DESIGN) * 40 / 39 * 39 / 38
    np.testing.assert_allclose(spread.matrix, inverse @ middle @ inverse, rtol=1e-8)
    np.testing.assert_allclose(spread.naive, inverse, rtol=1e-8)


def test_points_of_one_run_count_once():
    points = Points({"x": X.repeat(3)}, Y.repeat(3), np.arange(40).repeat(3).astype(str))
    repeated = covariance(solve(LINE, points, **SQUARES)[0])
    single = covariance(solve(LINE, Points({"x": X}, Y), **SQUARES)[0])
    assert repeated.standard_error("b") == pytest.approx(single.standard_error("b"), rel=0.02)


def test_the_delta_method_of_a_linear_function():
    solution, _ = solve(LINE, Points({"x": X}, Y), **SQUARES)
    spread = covariance(solution)
    value, low, high = spread.interval(lambda p: p["a"] + 2 * p["b"], {"k": 0.5}, 0.9)
    error = np.sqrt(np.array([1, 2]) @ spread.matrix @ [1, 2])
    assert value == pytest.approx(spread.values @ [1, 2])
    assert high - low == pytest.approx(2 * stats.t.ppf(0.95, spread.degrees) * error, rel=1e-5)


def test_standard_errors_are_those_between_data_sets():
    each = [
        covariance(solve(CHINCHILLA, chinchilla(seed=s), objective=Objective("least_squares"))[0]) for s in range(60)
    ]
    for name in ("E", "alpha", "beta"):
        values = [float(one.values[one.names.index(name)]) for one in each]
        assert np.mean([one.standard_error(name) for one in each]) == pytest.approx(np.std(values), rel=0.3)


def test_a_profile_of_a_regression_is_the_exact_interval():
    solution, _ = solve(LINE, Points({"x": X}, Y), **SQUARES)
    found, spread = profile(solution, "b", 0.9), covariance(solution)
    reach = np.sqrt(stats.chi2.ppf(0.9, 1)) * spread.standard_error("b")
    assert found.best == pytest.approx(spread.values[1])
    assert found.low == pytest.approx(found.best - reach, rel=1e-4)
    assert found.high == pytest.approx(found.best + reach, rel=1e-4)
    assert not found.open
    assert (np.diff(found.values) > 0).all()
    by_hand = ((found.values - found.best) / spread.standard_error("b")) ** 2
    np.testing.assert_allclose(found.statistic, by_hand, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_profiles_hold_the_truth_at_the_stated_rate():
    held = 0
    for seed in range(60):
        solution, _ = solve(CHINCHILLA, chinchilla(seed=seed), objective=Objective("least_squares"))
        found = profile(solution, "alpha", 0.9)
        held += found.low <= 0.34 <= found.high
    assert held >= 46  # of 54 expected; fewer has a chance below 1e-3


def test_a_profile_is_open_where_nothing_limits_it():
    """Without any point at few tokens, how the loss falls with them is anybody's guess: E may be 0."""
    tail = Points({"N": N, "D": np.linspace(9.99e10, 1e11, 36)}, 1.7 + 400 * N**-0.34 + 1e-3 * RNG.standard_normal(36))
    solution, _ = solve(CHINCHILLA, tail, objective=Objective("least_squares"), fix={"beta": 0.28})
    found = profile(solution, "E", 0.9)
    assert found.low == 0.0
    with pytest.raises(UserError, match="profile must be of a fitted parameter off its bounds, got 'beta'"):
        profile(solution, "beta")


def test_leaving_out_is_refitting_without():
    points = chinchilla()
    found = leave_groups_out(CHINCHILLA, points)
    assert len(found.groups) == 36
    for i in (0, 17, 35):
        kept = np.arange(36) != i
        alone = fit(CHINCHILLA, points.take(kept), num_bootstrap=0).parameters
        for name, value in alone.items():
            assert found.parameters[name][i] == pytest.approx(value, rel=1e-5)
        x = {"N": N[i], "D": D[i]}
        error = CHINCHILLA.predict(x, alone) / points.response[i] - 1
        assert found.errors[i] == pytest.approx(float(error), abs=1e-8)


def test_leaving_out_sizes_and_decisions():
    points = chinchilla()
    found = leave_groups_out(CHINCHILLA, points, sizes_of(points), decision=lambda p: p["alpha"] / p["beta"])
    assert len(found.groups) == 6
    np.testing.assert_allclose(found.decision, found.parameters["alpha"] / found.parameters["beta"])
    group, moved = found.most_influential("alpha")
    assert abs(moved) == np.abs(found.parameters["alpha"] - found.best["alpha"]).max()
    assert group in found.groups
    with pytest.raises(UserError, match="groups must be at least two, got 1"):
        leave_groups_out(CHINCHILLA, points, np.ones(36))
    assert sizes_of(Points({"D": D}, points.response)) is None


def test_rollouts_forecast_what_lies_beyond():
    points = chinchilla()
    along = {one.variable: one for one in rollouts(CHINCHILLA, points, num_bootstrap=50)}
    assert set(along) == {"N", "D"}
    one = along["N"]
    assert one.factor == pytest.approx(1e9 / np.unique(N)[-3])
    assert one.num_fitted == 24
    assert len(one.relative_error) == 12
    assert one.mean_error < 0.02
    assert one.inside.mean() > 0.5
    assert "12 inside their 90% interval" in str(one)
    with pytest.raises(UserError, match="above must divide the values of N"):
        rollout(CHINCHILLA, points, "N", 1e10)
    with pytest.raises(UserError, match="variable must be one of N, D, got 'M'"):
        rollout(CHINCHILLA, points, "M", 1e10)


def test_a_failed_fit_forecasts_nothing(monkeypatch):
    import landscape_ray.laws.trust.holdout as module

    failed = dataclasses.replace(fit(CHINCHILLA, chinchilla(), num_bootstrap=0), status="failed", reasons=("none",))
    monkeypatch.setattr(module, "fit", lambda *args, **options: failed)
    with pytest.raises(UserError, match=r"the fit to N <= 1e\+08 failed"):
        rollout(CHINCHILLA, chinchilla(), "N", 1e8)


SIZE_ONLY = Law(
    name="size_only",
    formula="L = E + A N^-alpha",
    variables=(Variable("N"),),
    parameters=(linear("E"), linear("A"), nonlinear("alpha", "exponent", 0.01, 3)),
    columns=lambda x, p: (1.0, x["N"] ** -p["alpha"]),
)


def test_the_true_law_wins_out_of_sample_and_by_aicc():
    first, second = compare([SIZE_ONLY, CHINCHILLA], chinchilla())
    assert (first.law, second.law) == ("chinchilla", "size_only")
    assert first.aicc < second.aicc
    assert first.mean_error < second.mean_error
    assert (first.difference, first.wins) == (0.0, 0)
    assert second.difference > 2 * second.standard_error
    assert second.wins < 18


def test_aicc_by_hand():
    points = chinchilla()
    _, second = compare([SIZE_ONLY, CHINCHILLA], points)
    solution, _ = solve(SIZE_ONLY, points, objective=Objective("least_squares"))
    rss = float((solution.residual**2).sum())
    assert second.aicc == pytest.approx(36 * np.log(rss / 36) + 8 + 2 * 4 * 5 / 31)


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match="laws must be at least two to compare, got 1"):
        compare([CHINCHILLA], chinchilla())
    with pytest.raises(UserError, match="laws must predict the same response with the same residuals"):
        compare([CHINCHILLA, LINE], chinchilla())


def test_objectives_side_by_side():
    rows = objective_table(CHINCHILLA, chinchilla())
    assert set(rows) == {"huber", "least_absolute", "least_squares"}
    assert rows["huber"]["alpha"] != rows["least_squares"]["alpha"]
    assert rows["huber"]["alpha"] == pytest.approx(0.34, abs=0.03)


def test_a_wrong_form_leaves_a_trend():
    right, wrong = (
        residual_trends(law, chinchilla(), solve(law, chinchilla(), objective=Objective("least_squares"))[0].residual)
        for law in (CHINCHILLA, dataclasses.replace(SIZE_ONLY, variables=CHINCHILLA.variables))
    )
    assert set(right) == {"N", "D", "D/N"}
    assert abs(right["D"][1]) < 3
    assert abs(wrong["D"][1]) > 5


def test_noise_between_seeds():
    assert seed_noise(CHINCHILLA, chinchilla()) is None
    once, twice = chinchilla(seed=1), chinchilla(seed=2)
    both = Points({"N": np.tile(N, 2), "D": np.tile(D, 2)}, np.concatenate([once.response, twice.response]))
    spread, count = seed_noise(CHINCHILLA, both)
    assert count == 36
    assert spread == pytest.approx(3e-3, rel=0.35)


class TestChecklist:
    points = chinchilla()
    found = fit(CHINCHILLA, points)

    def record(self, evidence=None, **changes):
        return checklist(CHINCHILLA, dataclasses.replace(self.found, **changes), evidence or Evidence())

    def item(self, items, name):
        return next(item for item in items if item.name == name)

    def test_what_was_not_looked_at_is_said(self):
        items = self.record()
        assert self.item(items, "candidate laws compared").verdict == "warning"
        assert self.item(items, "stability without one run").verdict == "unknown"
        assert self.item(items, "held out").verdict == "warning"
        assert self.item(items, "noise between seeds").verdict == "unknown"
        assert self.item(items, "trends of the residuals").verdict == "unknown"

    def test_sections_come_in_order_and_survive_json(self):
        items = self.record()
        order = [list(SECTIONS).index(item.section) for item in items]
        assert order == sorted(order)
        plain = json.loads(json.dumps(to_plain(items)))
        assert from_plain(plain) == items
        assert sum(plain["counts"].values()) == len(items)

    def test_all_evidence(self):
        evidence = Evidence(
            runs_out=leave_groups_out(CHINCHILLA, self.points),
            sizes_out=leave_groups_out(CHINCHILLA, self.points, sizes_of(self.points)),
            rollouts=rollouts(CHINCHILLA, self.points, num_bootstrap=50),
            objectives=objective_table(CHINCHILLA, self.points),
            candidates=compare([CHINCHILLA, SIZE_ONLY], self.points),
            trends={"D": (0.1, 5.0), "N": (0.0, 0.1)},
            noise=(2e-3, 7),
            decision_spread=1.7,
        )
        items = self.record(evidence, misfit=0.01, num_misfits=6)
        assert self.item(items, "candidate laws compared").verdict == "ok"
        assert "the residuals depend on D" in self.item(items, "trends of the residuals").remark
        assert self.item(items, "noise between seeds").value == "0.200%, from 7 repeats"
        assert "factor of 2.70" in self.item(items, "stability of the decision").value
        assert self.item(items, "misfit").value.startswith("1.000%, from 6")
        assert self.item(items, "held out: N").section == "E"
        assert "moved" in self.item(items, "stability without one size").value or "without" in (
            self.item(items, "stability without one size").value
        )

    def test_a_better_law_is_named(self):
        candidates = compare([CHINCHILLA, SIZE_ONLY], self.points)
        items = checklist(SIZE_ONLY, fit(SIZE_ONLY, self.points), Evidence(candidates=candidates))
        item = self.item(items, "candidate laws compared")
        assert item.verdict == "warning"
        assert "'chinchilla' forecasts left-out runs better" in item.remark

    def test_weak_and_failed_fits(self):
        assert self.item(self.record(status="weak", reasons=("few points",)), "optimum").verdict == "warning"
        assert self.item(self.record(status="failed", reasons=("none",)), "optimum").verdict == "refusal"

    def test_given_parameters_penalties_and_facts_are_recorded(self):
        changed = dataclasses.replace(self.found, fixed={"E": 1.7}, penalty={"alpha": (0.34, 2.0)})
        facts = [Item("B", "optimizer", "adamw")]
        items = checklist(CHINCHILLA, changed, Evidence(), facts)
        assert self.item(items, "given parameters").value == "E = 1.7"
        assert self.item(items, "penalties").value == "alpha to 0.34 (stiffness 2)"
        assert facts[0] in items
