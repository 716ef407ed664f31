"""Best learning rate and batch from all runs at once: recovery, intervals, regret, refusals."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import (
    BATCH_POWER,
    LR_HORIZON,
    LR_POWER,
    STEPS_BATCH,
    FitResult,
    StepLaw,
    Sweep,
    fit_optima,
    fit_step_law,
    group_optima,
    leave_one_group_out,
    regret,
)
from landscape_ray.laws.core.bound import Bound
from landscape_ray.laws.optima.surface import rise, surface

GROUPS = [(1e7, 1e9), (1e7, 4e9), (4e7, 1e9), (4e7, 4e9), (1.6e8, 4e9), (1.6e8, 1.6e10)]
BOWL = {"a": 0.015, "c": -0.005, "b": 0.014, "uuu": 0.004, "uuv": 0.0, "uvv": 0.002, "vvv": -0.002}
RULE = {"c": 30.0, "p": 0.7, "q": 0.2, "k": 0.6, "r": 0.1, "s": 0.6}


def rule(N, D):
    return RULE["c"] * N ** -RULE["p"] * D ** RULE["q"], RULE["k"] * N ** -RULE["r"] * D ** RULE["s"]


def runs(noise=0.0, seed=0, groups=GROUPS, bowl=BOWL):
    rng = np.random.default_rng(seed)
    columns = []
    for n, d in groups:
        lr, batch = rule(n, d)
        u, v = (a.ravel() for a in np.meshgrid(np.linspace(-1.3, 1.2, 6), np.linspace(-1.1, 1.4, 6)))
        level = 1.7 + 20 * n**-0.2 + 60 * d**-0.25
        loss = level * np.exp(rise(bowl, u, v) + noise * rng.standard_normal(len(u)))
        columns.append([np.full(len(u), n), np.full(len(u), d), lr * np.exp(u), batch * np.exp(v), loss])
    n, d, lr, batch, loss = np.concatenate(columns, axis=1)
    return Sweep(lr, loss, n, d, batch)


def exact(law, rel):
    assert law.lr.by_size == pytest.approx(RULE["p"], rel=rel)
    assert law.lr.by_horizon == pytest.approx(RULE["q"], rel=rel)
    assert law.lr.factor == pytest.approx(RULE["c"], rel=rel)
    assert law.batch.by_size == pytest.approx(RULE["r"], rel=rel)
    assert law.batch.by_horizon == pytest.approx(RULE["s"], rel=rel)
    assert law.batch.factor == pytest.approx(RULE["k"], rel=rel)


def test_the_law_is_recovered_without_noise():
    law = fit_step_law(runs(), window=0.05, num_bootstrap=0)
    exact(law, 1e-5)
    for name, value in BOWL.items():
        assert law.fit.parameters[name] == pytest.approx(value, abs=1e-6), name
    chosen = law.recommend(1e8, 4e9)
    assert (chosen.lr, chosen.batch) == pytest.approx(rule(1e8, 4e9), rel=1e-5)
    assert chosen.expected_regret == pytest.approx(0.0, abs=1e-9)


def test_slopes_of_the_surface_equal_finite_differences():
    sweep = runs()
    law = surface(GROUPS, (1e-5, 1e-3, 1e-1), (1e3, 1e5, 1e7))
    x = {"N": sweep.sizes, "D": sweep.horizons, "lr": np.asarray(sweep.lr), "batch": np.asarray(sweep.batch)}
    bound = Bound(law, x, len(sweep), {})
    at = np.array([[np.log(1e-3), 0.6, 0.1, np.log(1e5), 0.2, 0.5]])
    _, slopes = bound.raw(at)
    for i in range(6):
        up, down = at.copy(), at.copy()
        up[0, i] += 1e-5
        down[0, i] -= 1e-5
        difference = (bound.raw(up)[0] - bound.raw(down)[0]) / 2e-5
        np.testing.assert_allclose(slopes[..., i], difference, rtol=1e-6, atol=1e-6)


def test_intervals_hold_the_truth_and_the_record_is_lossless():
    law = fit_step_law(runs(noise=1e-3), window=0.03, num_bootstrap=60, resample="runs")
    assert law.fit.status == "certified"
    again = StepLaw(FitResult.from_json(law.fit.to_json()))
    assert again.recommend(1e8, 4e9) == law.recommend(1e8, 4e9)
    for product, truth in ((law.lr, "pqc"), (law.batch, "rsk")):
        for part, name in zip(("by_size", "by_horizon", "factor"), truth, strict=True):
            low, high = product.intervals[part]
            assert low <= high
            centre = getattr(product, part)
            assert low - (high - low) < RULE[name] < high + (high - low)
            assert low < centre < high
    chosen = law.recommend(1e8, 4e9)
    assert chosen.lr_interval[0] < chosen.lr < chosen.lr_interval[1]
    assert 0 < chosen.expected_regret < 1e-3
    assert "lr*" in str(law)
    assert "by_size" in str(law)


def test_coverage_of_the_exponents():
    """Over 10 sweeps, 90 % intervals hold the truth of four numbers in about that share."""
    hits = []
    for seed in range(10):
        law = fit_step_law(
            runs(noise=1.5e-3, seed=seed, bowl={n: BOWL[n] for n in "acb"}),
            window=0.03,
            order=2,
            num_bootstrap=60,
            resample="runs",
        )
        for product, names in ((law.lr, "pq"), (law.batch, "rs")):
            for part, name in zip(("by_size", "by_horizon"), names, strict=True):
                low, high = product.intervals[part]
                hits.append(low <= RULE[name] <= high)
    assert 0.75 <= np.mean(hits) <= 1.0


def test_a_given_batch_gets_the_rate_where_the_loss_is_lowest_for_it():
    law = fit_step_law(runs(), window=0.05, num_bootstrap=0)
    n, d = 4e7, 4e9
    lr, batch = rule(n, d)
    chosen = law.recommend(n, d, batch=1.5 * batch)
    u = np.linspace(-1, 1, 20_001)
    lowest = u[np.argmin(rise(BOWL, u, np.log(1.5)))]
    assert np.log(chosen.lr / lr) == pytest.approx(lowest, abs=1e-3)
    assert chosen.batch == pytest.approx(1.5 * batch)
    assert chosen.batch_interval is None


def test_regret_counts_the_nearest_run():
    sweep = runs()
    best = regret(sweep, rule)
    assert best.mean < 0.002
    twice = regret(sweep, lambda N, D: (2 * rule(N, D)[0], rule(N, D)[1]))
    assert twice.mean > best.mean
    assert twice.worst >= twice.mean
    assert "6 groups" in str(twice)
    held_out = leave_one_group_out(sweep, lambda r: fit_step_law(r, window=0.05, num_bootstrap=0).rule)
    np.testing.assert_allclose(held_out.relative, best.relative)
    by_size = leave_one_group_out(sweep, lambda r: rule, by="size")
    assert sorted(by_size.groups) == sorted(best.groups)
    with pytest.raises(UserError, match="by must be group or size, got 'N'"):
        leave_one_group_out(sweep, lambda r: rule, by="N")
    with pytest.raises(UserError, match="sweep must have two groups at least"):
        leave_one_group_out(runs(groups=GROUPS[:1]), lambda r: rule)
    with pytest.raises(UserError, match="lr of the rule must be finite and > 0, got nan"):
        regret(sweep, lambda N, D: (np.nan, None))


def test_both_stages_agree_with_the_joint_fit():
    optima = group_optima(runs(bowl={n: BOWL[n] for n in "acb"}), window=0.05)
    assert len(optima.found) == len(GROUPS)
    for optimum in optima.found:
        assert (optimum.lr, optimum.batch) == pytest.approx(rule(optimum.N, optimum.D), rel=1e-6)
    lr = fit_optima(LR_POWER, optima, num_bootstrap=20).parameters
    batch = fit_optima(BATCH_POWER, optima, num_bootstrap=20).parameters
    assert [lr["p"], lr["q"], batch["r"], batch["s"]] == pytest.approx([RULE[n] for n in "pqrs"], rel=1e-5)


@pytest.mark.parametrize(
    ("sweep", "options", "message"),
    [
        (Sweep([1e-3] * 3, [2.0, 2.001, 2.002]), {}, "lr must have three different values .*, got 1"),
        (runs(), {"window": 0.0}, "window must be > 0"),
        (runs(), {"order": 4}, "order must be 2 or 3, got 4"),
        (runs(), {"resample": "points"}, "resample must be auto, groups or runs"),
        (
            Sweep(np.geomspace(1e-4, 1e-2, 9), 2 + 0.001 * np.cos(np.linspace(-1, 1, 9))),
            {"order": 2},
            "the loss must have a lowest point over learning rate",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(sweep, options, message):
    with pytest.raises(UserError, match=message):
        fit_step_law(sweep, num_bootstrap=0, **options)


def test_recommendations_have_a_range():
    law = fit_step_law(runs(), window=0.05, num_bootstrap=0)
    assert any("extrapolation: N" in warning for warning in law.recommend(2e9, 4e9).warnings)
    with pytest.raises(UserError, match="N must lie within 100 times the fitted range"):
        law.recommend(1e11, 4e9)
    assert law.recommend(1e11, 4e9, allow_extrapolation=True).lr > 0
    with pytest.raises(UserError, match="D must be finite and > 0"):
        law.recommend(1e8, -1)
    with pytest.raises(UserError, match="batch must be finite and > 0"):
        law.recommend(1e8, 4e9, batch=0)


def test_a_sweep_of_the_rate_only():
    lr = np.geomspace(1e-4, 1e-1, 13)
    law = fit_step_law(Sweep(lr, 2 * np.exp(0.01 * np.log(lr / 3e-3) ** 2)), window=0.1, num_bootstrap=0)
    assert law.batch is None
    assert law.recommend().lr == pytest.approx(3e-3, rel=1e-6)
    assert law.recommend().batch is None
    assert any("one_N" in warning for warning in law.recommend(2.0).warnings)
    with pytest.raises(UserError, match="batch must have been swept"):
        law.recommend(batch=64)
    with pytest.raises(UserError, match="fit must be one of fit_step_law"):
        StepLaw(fit_optima(LR_HORIZON, group_optima(runs()), num_bootstrap=0))


def test_an_optimum_outside_its_sweep_is_named():
    sweep = runs()
    lr = np.asarray(sweep.lr)
    n, d = GROUPS[-1]
    cut = ~((sweep.sizes == n) & (sweep.horizons == d) & (lr > 0.9 * rule(n, d)[0]))
    warnings = fit_step_law(sweep.take(cut), window=0.05, num_bootstrap=0).fit.warnings
    assert any(w.startswith("outside_sweep: the best lr of N 1.6e+08, D 1.6e+10") for w in warnings)
    assert any(w.startswith("edge: the best lr of N 1.6e+08, D 1.6e+10") for w in warnings)


def test_a_law_of_something_else_is_refused():
    with pytest.raises(UserError, match="law must predict lr or batch, got 'steps_batch'"):
        fit_optima(STEPS_BATCH, group_optima(runs()))
