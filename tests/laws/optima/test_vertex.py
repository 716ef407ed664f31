"""Parabolas of groups: the vertex, its interval, and where there is none."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import (
    BATCH_POWER,
    LR_BATCH_POWER,
    LR_BATCH_SQRT,
    LR_HORIZON,
    LR_HORIZON_SIZE,
    Sweep,
    fit_optima,
    group_optima,
)

LR = np.geomspace(1e-4, 1e-2, 7)


def bowl(lr, at, curvature=0.02, level=2.0):
    return level * np.exp(curvature / 2 * np.log(lr / at) ** 2)


def horizons(noise, seed, beta=0.32):
    rng = np.random.default_rng(seed)
    lr, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e-4, 1e-1, 13), np.geomspace(1e9, 1e11, 5)))
    loss = bowl(lr, 2.5 * d**-beta) * np.exp(noise * rng.standard_normal(len(lr)))
    return Sweep(lr, loss, D=d)


def test_the_interval_covers_the_vertex():
    hits = []
    for seed in range(60):
        noise = 2e-3 * np.random.default_rng(seed).standard_normal(len(LR))
        optimum = group_optima(Sweep(LR, bowl(LR, 1.2e-3) * np.exp(noise)), window=1.0, seed=seed).found[0]
        hits.append(optimum.lr_interval[0] <= 1.2e-3 <= optimum.lr_interval[1])
    assert 0.8 <= np.mean(hits) <= 0.98


def test_no_noise_no_interval_and_a_flat_parabola():
    three = group_optima(Sweep(LR[1:4], bowl(LR[1:4], LR[2])))
    assert three.found[0].lr_interval == (0.0, np.inf)
    assert "no_noise" in three.found[0].warnings[0]
    noisy = bowl(LR, 1e-3, curvature=1e-4) * np.exp(3e-3 * (-1.0) ** np.arange(7))
    flat = group_optima(Sweep(LR, noisy), window=1.0).found[0]
    assert flat.lr_interval == (0.0, np.inf)
    assert any("flat" in warning for warning in flat.warnings)
    assert "inf" in str(flat)


def test_reasons_for_no_optimum():
    rows = [
        (1.0, LR, 2 - 1e-3 * np.log(LR / 1e-3) ** 2),  # opens downward
        (2.0, LR, bowl(LR, 5e-2)),  # vertex outside
        (3.0, LR[:1], bowl(LR[:1], 1e-3)),  # one rate
        (4.0, LR, bowl(LR, 1e-3)),
        (5.0, LR, bowl(LR, 9e-3)),  # the best is the last one tried
    ]
    sweep = Sweep(
        np.concatenate([lr for _, lr, _ in rows]),
        np.concatenate([loss for _, _, loss in rows]),
        N=np.concatenate([np.full(len(lr), n) for n, lr, _ in rows]),
    )
    optima = group_optima(sweep, window=0.5)
    assert [optimum.N for optimum in optima.found] == [4.0, 5.0]
    assert "must open upward" in optima.refused[1.0, 1.0]
    assert "lr of the vertex must lie in what was tried" in optima.refused[2.0, 1.0]
    assert "lr must have three different values for a parabola, got 1" in optima.refused[3.0, 1.0]
    assert optima.found[1].warnings[0] == "edge: the best lr measured is the last one tried, 0.01"
    with pytest.raises(UserError, match="sweep must have an optimum in some group, got none \\(lr must have three"):
        group_optima(Sweep(LR[:2], LR[:2]))


def test_options_and_degenerate_batches_are_refused():
    sweep = Sweep(LR, bowl(LR, 1e-3))
    with pytest.raises(UserError, match="confidence must be in"):
        group_optima(sweep, confidence=1.0)
    with pytest.raises(UserError, match="window must be > 0"):
        group_optima(sweep, window=0)
    with pytest.raises(UserError, match="by_batch must have a batch"):
        group_optima(sweep, by_batch=True)
    with pytest.raises(UserError, match="sweep must determine 6 coefficients of a parabola"):
        group_optima(Sweep(LR, bowl(LR, 1e-3), batch=LR * 1e6))  # rate and batch always together


def test_the_horizon_law_and_its_coverage():
    exact = fit_optima(LR_HORIZON, group_optima(horizons(0.0, 0), window=0.05), num_bootstrap=0)
    assert exact.parameters["beta"] == pytest.approx(0.32, rel=1e-6)
    hits = []
    for seed in range(30):
        optima = group_optima(horizons(2e-3, seed), window=0.05, seed=seed)
        found = fit_optima(LR_HORIZON, optima, num_bootstrap=200, seed=seed)
        hits.append(found.intervals["beta"][0] <= 0.32 <= found.intervals["beta"][1])
    assert np.mean(hits) >= 0.8


def test_the_exponent_of_the_horizon_may_change_with_the_size():
    lr, d, n = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e-5, 1e-1, 17), np.geomspace(1e9, 1e11, 3), [1e7, 1e8, 1e9])
    )
    size = np.log(n / 1e8)
    best = 2.0 * np.exp(-0.5 * size - (0.3 - 0.02 * size) * np.log(d))
    found = fit_optima(LR_HORIZON_SIZE, group_optima(Sweep(lr, bowl(lr, best), n, d), window=0.05), num_bootstrap=0)
    assert [found.parameters[name] for name in ("p", "beta", "gamma")] == pytest.approx([0.5, 0.3, -0.02], rel=1e-5)


def test_the_rate_over_the_batch():
    lr, batch = (a.ravel() for a in np.meshgrid(np.geomspace(1e-5, 1e-1, 17), 2.0 ** np.arange(14, 20)))
    optima = group_optima(Sweep(lr, bowl(lr, 3e-6 * batch**0.5), batch=batch), by_batch=True, window=0.05)
    assert len(optima.found) == 6
    assert fit_optima(LR_BATCH_SQRT, optima, num_bootstrap=0).parameters["c"] == pytest.approx(3e-6, rel=1e-6)
    assert fit_optima(LR_BATCH_POWER, optima, num_bootstrap=0).parameters["a"] == pytest.approx(0.5, rel=1e-6)
    with pytest.raises(UserError, match="batch must have been swept in every group"):
        fit_optima(BATCH_POWER, optima)
    with pytest.raises(UserError, match="batch must be known in every group"):
        fit_optima(LR_BATCH_SQRT, group_optima(horizons(0.0, 0)))


def test_what_was_said_of_the_optima_comes_along():
    sweep = Sweep(
        np.tile(LR, 4),
        np.concatenate([bowl(LR, 9e-3), bowl(LR, 3e-3), bowl(LR, 1e-3), bowl(LR, 1e-6)]),
        D=np.repeat([1e8, 1e9, 1e10, 1e11], 7),
    )
    found = fit_optima(LR_HORIZON, group_optima(sweep, window=0.5), num_bootstrap=0)
    assert any(warning.startswith("uncertain_optimum: N 1, D 1e+08 (edge") for warning in found.warnings)
    assert any(warning.startswith("no_optimum: 1, 1e+11 (lr of the vertex") for warning in found.warnings)
