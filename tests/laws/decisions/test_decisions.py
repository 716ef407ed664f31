"""Decisions against closed forms, and against making the run that was proposed."""

import dataclasses

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import Law, Points, Variable, fit, linear, nonlinear
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.decisions import allocate, next_runs
from landscape_ray.laws.decisions.next_run import grid_of
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA
from landscape_ray.laws.trust.covariance import covariance

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
POINTS = Points(
    {"N": N, "D": D},
    (1.7 + 400 * N**-0.34 + 400 * D**-0.28) * np.exp(3e-3 * np.random.default_rng(0).standard_normal(36)),
)
FOUND = fit(CHINCHILLA, POINTS)


def closed_form(p, compute):
    """Return N* of Hoffmann et al. 2022, equation 4."""
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    return g * (compute / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))


@pytest.mark.acceptance
@pytest.mark.parametrize("compute", [1e17, 1e20, 3e21])
def test_the_best_size_is_the_closed_form(compute):
    found = allocate(CHINCHILLA, FOUND, flops=compute)
    assert found.num_params.value == pytest.approx(closed_form(FOUND.parameters, compute), rel=1e-7)
    assert 6 * found.num_params.value * found.num_tokens.value == pytest.approx(compute)
    beta, alpha = FOUND.parameters["beta"], FOUND.parameters["alpha"]
    assert found.exponent.value == pytest.approx(beta / (alpha + beta), rel=1e-6)
    each = [closed_form(dict(zip(FOUND.sample_names, row, strict=True)), compute) for row in FOUND.samples]
    assert found.num_params.low == pytest.approx(np.quantile(each, 0.05), rel=1e-6)
    assert found.num_params.high == pytest.approx(np.quantile(each, 0.95), rel=1e-6)


def test_regret_is_what_the_choice_costs_in_every_sample():
    found = allocate(CHINCHILLA, FOUND, flops=1e20)
    size = found.num_params.value
    losses = []
    for row in FOUND.samples:
        p = dict(zip(FOUND.sample_names, row, strict=True))
        best = closed_form(p, 1e20)
        mine, theirs = (float(CHINCHILLA.predict({"N": n, "D": 1e20 / (6 * n)}, p)) for n in (size, best))
        losses.append(mine - theirs)
    assert min(losses) >= -1e-9
    assert found.regret.value == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-9)
    assert found.regret.value < 0.1 * (found.loss.high - found.loss.low)


def test_tokens_find_the_compute_whose_best_use_they_are():
    found = allocate(CHINCHILLA, FOUND, tokens=5e9)
    assert found.num_tokens.value == pytest.approx(5e9, rel=1e-6)
    again = allocate(CHINCHILLA, FOUND, flops=found.flops)
    assert again.num_params.value == pytest.approx(found.num_params.value, rel=1e-6)


def test_measured_flops_per_token_move_the_choice():
    more = allocate(CHINCHILLA, FOUND, flops=1e20, flops_per_param_token=12.0)
    assert more.num_params.value == pytest.approx(closed_form(FOUND.parameters, 5e19), rel=1e-7)


def test_outside_is_said_and_far_outside_refused():
    beyond = allocate(CHINCHILLA, FOUND, flops=1e23)
    assert any(w.startswith("extrapolation: N = ") for w in beyond.warnings)
    assert not allocate(CHINCHILLA, FOUND, flops=1e20).warnings
    with pytest.raises(UserError, match="N must be within 100 times the fitted range"):
        allocate(CHINCHILLA, FOUND, flops=1e28)
    assert allocate(CHINCHILLA, FOUND, flops=1e26, allow_extrapolation=True).num_params.value > 1e10


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "budget must be one of flops and tokens, got both or neither"),
        ({"flops": 1e20, "tokens": 1e9}, "budget must be one of flops and tokens, got both or neither"),
        ({"flops": -1.0}, "flops must be positive and finite, got -1"),
        ({"tokens": float("nan")}, "tokens must be positive and finite, got nan"),
    ],
)
def test_unsound_budgets(budget, message):
    with pytest.raises(UserError, match=message):
        allocate(CHINCHILLA, FOUND, **budget)


def test_only_laws_over_size_and_data():
    law = Law(
        name="size",
        formula="L = E + A N^-alpha",
        variables=(Variable("N"),),
        parameters=(linear("E"), linear("A"), nonlinear("alpha", "exponent", 0.01, 3)),
        columns=lambda x, p: (1.0, x["N"] ** -p["alpha"]),
    )
    with pytest.raises(UserError, match="law must have the variables N and D to allocate a budget, got N"):
        allocate(law, fit(law, POINTS, num_bootstrap=0), flops=1e20)


def log_size(parameters):
    return np.log(closed_form(parameters, 1e22))


@pytest.mark.acceptance
def test_the_proposed_run_narrows_the_decision_as_announced():
    """The run is made, with the noise of the others, many times over: the standard error falls as was said."""
    solution, _ = solve(CHINCHILLA, POINTS)
    candidates = grid_of({"N": (1e7, 1e10), "D": (1e9, 1e12)}, 7)
    cost = 6 * candidates["N"] * candidates["D"]
    (proposal,) = next_runs(solution, log_size, candidates, cost, [1e21])
    assert proposal.cost <= 1e21
    before = spread_of(solution)
    extra = {name: np.append(values, proposal.variables[name]) for name, values in POINTS.variables.items()}
    clean = 1.7 + 400 * proposal.variables["N"] ** -0.34 + 400 * proposal.variables["D"] ** -0.28
    after = [
        spread_of(solve(CHINCHILLA, Points(extra, np.append(POINTS.response, clean * np.exp(3e-3 * e))))[0])
        for e in np.random.default_rng(1).standard_normal(12)
    ]
    assert np.median(after) / before == pytest.approx(proposal.width_ratio, abs=0.2)
    assert np.median(after) < before


def spread_of(solution):
    spread = covariance(solution)
    fixed = {name: float(v[0]) for name, v in solution.natural(solution.best).items()}
    _, low, high = spread.interval(log_size, fixed, 0.9)
    return high - low


def test_larger_budgets_narrow_more_and_none_is_left_out_silently():
    solution, _ = solve(CHINCHILLA, POINTS)
    candidates = grid_of({"N": (1e7, 1e10), "D": (1e9, 1e12)}, 7)
    cost = 6 * candidates["N"] * candidates["D"]
    found = next_runs(solution, log_size, candidates, cost, [1e18, 1e20, 1e22])
    ratios = [one.width_ratio for one in found]
    assert ratios == sorted(ratios, reverse=True)
    assert 0 < ratios[-1] < ratios[0] <= 1
    assert next_runs(solution, log_size, candidates, cost, [1.0]) == []  # nothing is to be had for one FLOP


def test_unsound_questions():
    solution, _ = solve(CHINCHILLA, POINTS)
    one = {"N": [1e8], "D": [1e10]}
    with pytest.raises(UserError, match="cost must be positive and finite"):
        next_runs(solution, log_size, one, [0.0], [1.0])
    with pytest.raises(UserError, match="decision must depend on a fitted parameter"):
        next_runs(solution, lambda p: 1.0, one, [1.0], [1.0])


def test_a_failed_fit_decides_nothing():
    failed = dataclasses.replace(FOUND, status="failed", reasons=("no optimum",))
    with pytest.raises(UserError, match="got status 'failed'"):
        allocate(CHINCHILLA, failed, flops=1e20)
