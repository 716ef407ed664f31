"""The task ladder: both steps, the chain, and its intervals."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import Points, fit_ladder, smooth_checkpoints
from landscape_ray.laws.core.bootstrap import resample

SIZES, TOKENS = (a.ravel() for a in np.meshgrid([2e8, 4e8, 8e8, 1.3e9], [1.0, 2.0, 5.0, 10.0]))
TOKENS = TOKENS * 20 * SIZES
NAMES = [f"{n:g}-{d:g}" for n, d in zip(SIZES, TOKENS, strict=True)]


def loss_of(n, d):
    return 0.5 + 40 * n**-0.25 + 100 * d**-0.24


def accuracy_of(loss):
    return 1 - 0.72 / (1 + np.exp(-6 * (loss - 0.85)))


def tables(noise=0.0, seed=0, names=NAMES):
    rng = np.random.default_rng(seed)
    ends = loss_of(SIZES, TOKENS) * np.exp(noise * rng.standard_normal(16))
    early = np.geomspace(0.1, 1, 12)
    loss = np.array([end * early**-0.1 for end in ends])
    accuracy = accuracy_of(loss) + noise * rng.standard_normal((16, 1)) + noise * rng.standard_normal(loss.shape)
    run_of = np.repeat(names, 12)
    return Points({"N": SIZES, "D": TOKENS}, ends, NAMES), Points({"task_loss": loss.ravel()}, accuracy.ravel(), run_of)


def test_both_steps_and_the_chain_are_exact_without_noise():
    ladder = fit_ladder(*tables(), num_bootstrap=0)
    chain = ladder.predict(7e9, 1e12)
    assert chain.loss.value[0] == pytest.approx(loss_of(7e9, 1e12), rel=1e-6)
    assert chain.accuracy == pytest.approx(accuracy_of(loss_of(7e9, 1e12)), rel=1e-6)
    assert chain.low == pytest.approx(chain.accuracy)
    fitted = fit_ladder(*tables(), top=None, num_bootstrap=0).step_2.parameters
    assert [fitted[name] for name in ("top", "drop", "k", "L_half")] == pytest.approx([1, 0.72, 6, 0.85], rel=1e-5)
    held = fit_ladder(*tables(), chance=0.28, num_bootstrap=0).step_2
    assert held.fixed == {"top": 1.0, "drop": 0.72}


def test_the_chain_is_the_second_step_of_every_draw_of_the_first():
    ladder = fit_ladder(*tables(noise=4e-3), num_bootstrap=80)
    assert ladder.paired
    chain = ladder.predict(4e9, 4e11)
    first = dict(zip(ladder.step_1.sample_names, ladder.step_1.samples.T, strict=True))
    second = dict(zip(ladder.step_2.sample_names, ladder.step_2.samples.T, strict=True))
    loss = first["E"] + first["A"] * 4e9 ** -first["alpha"] + first["B"] * 4e11 ** -first["beta"]
    share = 1 / (1 + np.exp(-second["k"] * (loss - second["L_half"])))
    expected = np.quantile(second["top"] - second["drop"] * share, [0.05, 0.95])
    np.testing.assert_allclose([chain.low, chain.high], expected, rtol=1e-9)
    assert chain.measured_low < chain.low < chain.accuracy < chain.high < chain.measured_high
    assert ladder.step_1.certificate["condition_number"] > 1


def test_paired_draws_give_runs_the_same_weights():
    run_16, run_many = np.arange(16), np.repeat(np.arange(16), 12)
    ones = np.ones(16)
    weights, _, _ = resample(ones, 0 * ones, run_16, 5, 7, 3, method="auto")
    many, _, _ = resample(np.ones(192), np.zeros(192), run_many, 3, 7, 3, method="auto")
    np.testing.assert_array_equal(many, weights[:, run_many])


@pytest.mark.slow
def test_measured_accuracies_fall_into_the_interval():
    hits = []
    for seed in range(12):
        chain = fit_ladder(*tables(noise=4e-3, seed=seed), num_bootstrap=60).predict(4e9, 4e11)
        hits.append(chain.measured_low <= accuracy_of(loss_of(4e9, 4e11)) <= chain.measured_high)
    assert np.mean(hits) >= 0.75


def test_different_runs_are_independent_and_far_losses_are_named():
    runs, checkpoints = tables(noise=1e-3, names=[name + "'" for name in NAMES])
    chain = fit_ladder(runs, checkpoints, num_bootstrap=10).predict(9e10, 2e13)
    assert any(warning.startswith("unpaired") for warning in chain.warnings)
    assert any(warning.startswith("step_2 extrapolation: the expected loss") for warning in chain.warnings)
    assert any(warning.startswith("step_1 extrapolation: N is 69 times") for warning in chain.warnings)
    with pytest.raises(UserError, match="N must lie within 100 times"):
        fit_ladder(runs, checkpoints, num_bootstrap=0).predict(1e13, 1e12)


def test_bad_tables_are_refused():
    runs, checkpoints = tables()
    percent = Points(checkpoints.variables, 100 * np.asarray(checkpoints.response), checkpoints.run_of)
    with pytest.raises(UserError, match=r"accuracy must be in \[0, 1\], got .*; divide percentages by 100"):
        fit_ladder(runs, percent)
    with pytest.raises(UserError, match=r"chance must be in \[0, top\) with a top given, got 0.25 and top None"):
        fit_ladder(runs, checkpoints, top=None, chance=0.25)


def test_smoothing_averages_those_before():
    values = np.random.default_rng(0).standard_normal(23)
    smooth = smooth_checkpoints(values, skip=0.1, window=5)
    kept = values[3:]
    np.testing.assert_allclose(smooth, [kept[max(i - 4, 0) : i + 1].mean() for i in range(20)])
    with pytest.raises(UserError, match="skip must be in"):
        smooth_checkpoints(values, skip=1.0)
    with pytest.raises(UserError, match="window must be >= 1"):
        smooth_checkpoints(values, window=0)
