"""Fitting the annealing law: recovery, intervals, status and warnings."""

import math
import subprocess
import sys

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import LAWS, Curve, FitResult, fit_annealing
from landscape_ray.laws.core.bootstrap import block_length, resample
from landscape_ray.laws.curves.annealing import ANNEALING
from landscape_ray.laws.curves.curve import data_hash

PARAMETERS = ("L0", "A", "alpha", "C")


def names(warnings):
    return {warning.partition(":")[0] for warning in warnings}


@pytest.mark.acceptance
@pytest.mark.parametrize("decay", [0.9, 0.98, 0.995])
@pytest.mark.parametrize("truth", [(3.0, 0.35, 0.5, 1.2), (0.0, 4.0, 0.1, 0.05), (2.2, 0.01, 1.6, 9.0)])
def test_noise_free_recovery(synthetic, truth, decay):
    truth = dict(zip(PARAMETERS, truth, strict=True))
    curves = []
    for name in ("constant", "cosine", "wsd_30"):
        lr, step = synthetic.lr(name), np.arange(80, 1001, 40)
        loss = synthetic.loss(lr, truth, decay)[step - 1]
        curves.append(Curve(name, lr, step, loss, synthetic.warmup))
    fit = fit_annealing(curves, decay=decay, num_bootstrap=0)
    for name in PARAMETERS:
        assert fit.parameters[name] == pytest.approx(truth[name], rel=1e-6, abs=1e-6)
    assert fit.status == ("certified" if truth["L0"] else "weak")
    assert fit.residuals["max_abs"] < 1e-9
    assert fit.residuals["r2"] == pytest.approx(1.0, abs=1e-12)


def test_a_fit_says_how_it_was_made(synthetic):
    curves = synthetic.curves("constant", "cosine", "wsd_30", noise=1e-3)
    fit = fit_annealing(curves, decay=synthetic.decay)
    assert fit.status == "certified"
    assert fit.reasons == ()
    assert fit.warnings == ()
    assert fit.objective["name"] == "huber"
    assert fit.objective["huber_delta"] == 1e-3
    assert fit.certificate["agree_share"] > 0.9
    assert fit.certificate["gradient_norm"] < 1e-9 * fit.objective["value"]
    assert 1 < fit.certificate["condition_number"] < 1e3
    assert fit.certificate["bounds_hit"] == []
    assert fit.certificate["bootstrap"]["method"] == "residual blocks"
    assert fit.data["runs"] == ["constant", "cosine", "wsd_30"]
    assert fit.data["peak_lr"] == synthetic.peak
    assert fit.data["horizon"] == 980
    assert fit.data["sha256"] == data_hash(curves)
    assert fit.samples.shape == (200, 4)
    for name in PARAMETERS:
        low, high = fit.intervals[name]
        assert low < fit.parameters[name] < high
        column = fit.samples[:, PARAMETERS.index(name)]
        assert ((column >= low) & (column <= high)).mean() == pytest.approx(0.9, abs=0.02)
    text = str(fit)
    assert text.startswith("annealing law: certified, 93 points of 3 runs")
    assert "alpha" in text
    assert "at 90%" in text


def test_the_objective_is_what_it_says(synthetic):
    curves = synthetic.curves("constant", "cosine", noise=2e-3)
    fit = fit_annealing(curves, decay=synthetic.decay, num_bootstrap=0)
    total = 0.0
    for curve in curves:
        prediction = synthetic.loss(curve.lr, fit.parameters, fit.parameters["decay"])[curve.step - 1]
        for r in np.abs(np.log(curve.loss_nats) - np.log(prediction)):
            total += r * r / 2 if r <= 1e-3 else 1e-3 * (r - 0.5e-3)
    assert fit.objective["value"] == pytest.approx(total, rel=1e-10)


def test_same_input_gives_the_same_digits_and_the_seed_matters(synthetic):
    curves = synthetic.curves("constant", "cosine", noise=1e-3)
    first, second, other = (fit_annealing(curves, decay=synthetic.decay, seed=seed) for seed in (3, 3, 4))
    assert first.parameters == second.parameters == other.parameters
    np.testing.assert_array_equal(first.samples, second.samples)
    assert not np.array_equal(first.samples, other.samples)


def test_order_of_the_curves_does_not_matter(synthetic):
    curves = synthetic.curves("constant", "cosine", "linear", noise=1e-3)
    fits = [fit_annealing(part, decay=synthetic.decay, num_bootstrap=0) for part in (curves, curves[::-1])]
    for name in PARAMETERS:
        assert fits[0].parameters[name] == pytest.approx(fits[1].parameters[name], rel=1e-8)


def test_losses_of_the_warmup_and_skipped_steps_are_not_fitted(synthetic):
    lr = synthetic.lr("cosine")
    loss = synthetic.loss(lr)
    step = np.arange(10, 1001, 10)
    spoiled = np.where(step <= 200, 9.0, loss[step - 1])
    curves = [Curve("cosine", lr, step, spoiled, synthetic.warmup), synthetic.curve("constant")]
    fit = fit_annealing(curves, decay=synthetic.decay, skip_steps=200, num_bootstrap=0)
    assert fit.parameters["alpha"] == pytest.approx(0.5, rel=1e-6)
    assert fit.data["num_points"] + fit.data["num_points_dropped"] == 100 + 31
    assert fit.data["num_points_dropped"] == 20 + 5
    early = np.where(step <= synthetic.warmup, 9.0, loss[step - 1])
    curves[0] = Curve("cosine", lr, step, early, synthetic.warmup)
    assert fit_annealing(curves, decay=0.98, num_bootstrap=0).parameters["alpha"] == pytest.approx(0.5, rel=1e-6)


def test_outliers_move_huber_less_than_least_squares(synthetic):
    curves = synthetic.curves("constant", "cosine", "wsd_30", noise=1e-4)
    loss = curves[0].loss_nats.copy()
    loss[-1] *= 1.03
    curves[0] = Curve("constant", curves[0].lr, curves[0].step, loss, synthetic.warmup)
    errors = [
        abs(fit_annealing(curves, decay=0.98, huber_delta=delta, num_bootstrap=0).parameters["C"] - 1.2)
        for delta in (1e-4, math.inf)
    ]
    assert errors[0] < errors[1] / 20


def test_decay_is_chosen_among_several(synthetic):
    curves = synthetic.curves("constant", "cosine", "wsd_10", noise=1e-4)
    fit = fit_annealing(curves, decay=[0.9, 0.98, 0.999], num_bootstrap=0)
    assert fit.parameters["decay"] == 0.98
    assert fit.certificate["num_parameters"] == 5
    assert set(fit.certificate["decay_objectives"]) == {"0.9", "0.98", "0.999"}
    assert min(fit.certificate["decay_objectives"].values()) == fit.objective["value"]
    assert names(fit.warnings) == {"decay_selected"}
    edge = fit_annealing(curves, decay=[0.98, 0.999], num_bootstrap=0)
    assert names(edge.warnings) == {"decay_selected", "decay_at_edge"}


def test_one_schedule_is_weak(synthetic):
    curves = [synthetic.curve("cosine", 1e-3, seed, f"seed_{seed}") for seed in range(3)]
    fit = fit_annealing(curves, decay=synthetic.decay)
    assert fit.status == "weak"
    assert "one_schedule" in fit.reasons
    assert "one_schedule" in names(fit.warnings)
    assert "one_schedule" in str(fit)


def test_a_run_stopped_early_is_not_a_second_schedule(synthetic):
    whole = synthetic.curve("cosine", 1e-3)
    kept = whole.step <= 500
    part = Curve("stopped", whole.lr[:500], whole.step[kept], whole.loss_nats[kept], synthetic.warmup)
    assert "one_schedule" in fit_annealing([whole, part], decay=0.98, num_bootstrap=0).reasons


def test_without_a_decay_the_annealing_term_is_not_identified(synthetic):
    curves = [synthetic.curve("constant", 1e-3, num_steps=n, run_id=f"{n}") for n in (500, 1000)]
    fit = fit_annealing(curves, decay=synthetic.decay)
    assert fit.status == "weak"
    assert {"one_schedule", "C_not_identified"} <= names(fit.warnings)
    assert fit.parameters["C"] == 0.0
    assert "C" not in fit.intervals
    assert "at a bound: C" not in fit.reasons


def test_a_parameter_at_its_bound_is_weak(synthetic):
    truth = {"L0": 3.0, "A": 0.35, "alpha": 0.5, "C": -0.8}
    curves = []
    for name in ("constant", "cosine"):
        lr, step = synthetic.lr(name), np.arange(80, 1001, 40)
        curves.append(Curve(name, lr, step, synthetic.loss(lr, truth)[step - 1], synthetic.warmup))
    fit = fit_annealing(curves, decay=synthetic.decay, num_bootstrap=20)
    assert fit.parameters["C"] == 0.0
    assert fit.status == "weak"
    assert "at a bound: C" in fit.reasons


def test_few_points_are_weak(synthetic):
    curves = [
        Curve(c.run_id, c.lr, c.step[::6], c.loss_nats[::6], c.warmup_steps)
        for c in (synthetic.curve("constant"), synthetic.curve("wsd_30", num_steps=400))
    ]
    fit = fit_annealing(curves, decay=synthetic.decay, num_bootstrap=0)
    assert "points per parameter, fewer than 3" in " ".join(fit.reasons)


def test_a_warmup_that_was_not_declared_is_noticed(synthetic):
    curve = synthetic.curve("cosine")
    undeclared = Curve("undeclared", curve.lr, curve.step, curve.loss_nats)
    fit = fit_annealing([undeclared, synthetic.curve("constant")], decay=0.98, num_bootstrap=0)
    assert "lr_rises" in names(fit.warnings)
    assert "undeclared" in " ".join(fit.warnings)


def test_json_round_trip_is_exact(synthetic):
    curves = synthetic.curves("constant", "cosine", noise=1e-3)
    for options in ({"num_bootstrap": 7}, {"num_bootstrap": 0, "huber_delta": math.inf}):
        fit = fit_annealing(curves, decay=[0.97, 0.98], **options)
        back = FitResult.from_json(fit.to_json())
        assert back == fit
        assert back.to_json() == fit.to_json()
        assert back.parameters == fit.parameters
        assert back.intervals == fit.intervals
        np.testing.assert_array_equal(back.samples, fit.samples)
        assert back.samples.shape == fit.samples.shape
    assert fit != fit_annealing(curves, decay=0.9, num_bootstrap=0)


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"law": "annealing"}'])
def test_other_text_is_not_a_fit(text):
    with pytest.raises(UserError, match="fit must be the JSON text of a FitResult"):
        FitResult.from_json(text)


def test_five_runs_are_resampled_as_runs(synthetic):
    curves = synthetic.curves("constant", "cosine", "linear", "wsd_10", "wsd_30", noise=1e-3)
    assert fit_annealing(curves, decay=0.98).certificate["bootstrap"]["method"] == "runs"
    assert fit_annealing(curves[:4], decay=0.98).certificate["bootstrap"]["method"] == "residual blocks"


def test_run_weights_are_shared_within_runs_with_mean_and_variance_one():
    run = np.repeat(np.arange(6), 4)
    weights, y, _ = resample(np.ones(24), np.zeros(24), run, 4, 20_000, seed=0)
    assert (weights.reshape(-1, 6, 4) == weights[:, ::4, None]).all()
    np.testing.assert_allclose(weights.mean(axis=1), 1.0)
    assert weights[:, 0].mean() == pytest.approx(1.0, abs=0.02)
    assert weights[:, 0].var() == pytest.approx(1.0, abs=0.05)
    assert (y == 1).all()


def test_residual_samples_have_the_spread_of_the_residuals():
    rng = np.random.default_rng(0)
    residual, run = 1e-3 * rng.standard_normal(60), np.repeat([0, 1], 30)
    y = np.full(60, 3.0)
    weights, drawn, method = resample(y, residual, run, 4, 4000, seed=1)
    assert (weights == 1).all()
    assert method["method"] == "residual blocks"
    noise = np.log(drawn) - np.log(y * np.exp(-residual))
    assert noise.mean() == pytest.approx(0.0, abs=3e-5)
    for number in (0, 1):
        expected = residual[run == number].std() * math.sqrt(60 / 56)
        centred = noise[:, run == number] - noise[:, run == number].mean(axis=1, keepdims=True)
        assert centred.std() == pytest.approx(expected, rel=0.1)


def test_blocks_are_longer_for_more_autocorrelation():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(400)
    smooth = np.convolve(noise, np.ones(20) / 20, mode="same")
    assert block_length(noise) < 6
    assert block_length(smooth) > 3 * block_length(noise)
    assert block_length(np.zeros(10)) == 1
    assert block_length(np.array([1.0])) == 1


@pytest.mark.acceptance
def test_intervals_cover_the_truth(synthetic):
    """Of 90 % intervals over 40 data sets about 90 % cover; fewer than 70 % would be a fault (p < 1e-3)."""
    covered = dict.fromkeys(PARAMETERS, 0)
    for seed in range(40):
        curves = synthetic.curves("constant", "cosine", "wsd_30", noise=1e-3, seed=seed)
        fit = fit_annealing(curves, decay=synthetic.decay, num_bootstrap=100)
        for name in PARAMETERS:
            low, high = fit.intervals[name]
            covered[name] += low <= synthetic.truth[name] <= high
    assert min(covered.values()) >= 28, covered


@pytest.mark.acceptance
@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say(synthetic):
    """95 % intervals on 200 data sets: the share over all parameters lies in [92 %, 98 %]."""
    covered = dict.fromkeys(PARAMETERS, 0)
    for seed in range(200):
        curves = synthetic.curves("constant", "cosine", "wsd_30", noise=1e-3, seed=seed)
        fit = fit_annealing(curves, decay=synthetic.decay, num_bootstrap=400, confidence=0.95)
        for name in PARAMETERS:
            low, high = fit.intervals[name]
            covered[name] += low <= synthetic.truth[name] <= high
    share = {name: count / 200 for name, count in covered.items()}
    print(share)
    assert all(0.92 <= value <= 0.98 for value in share.values()), share


def test_more_noise_gives_wider_intervals(synthetic):
    widths = []
    for noise in (1e-4, 1e-3):
        curves = synthetic.curves("constant", "cosine", "wsd_30", noise=noise)
        low, high = fit_annealing(curves, decay=synthetic.decay, huber_delta=math.inf).intervals["alpha"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(10 * widths[0], rel=0.2)


def test_curves_of_different_peaks_are_refused(synthetic):
    other = Curve("high", synthetic.lr("cosine", peak=2e-3), [900], [3.0], synthetic.warmup)
    with pytest.raises(
        UserError, match=r"curves must share one peak learning rate, got constant: 0\.001, high: 0\.002"
    ):
        fit_annealing([synthetic.curve("constant"), other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must hold values in \[0, 1\), got \[1.0\]"),
        ({"decay": []}, r"decay must hold values in \[0, 1\), got \[\]"),
        ({"decay": [0.9, math.nan]}, "decay must hold values"),
        ({"huber_delta": 0.0}, "huber_delta must be > 0, got 0.0"),
        ({"num_bootstrap": -1}, "num_bootstrap must be >= 0, got -1"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"skip_steps": 995}, "curves must have more than 4 points after the warm-up, got 0"),
    ],
)
def test_options_out_of_range(synthetic, options, message):
    with pytest.raises(UserError, match=message):
        fit_annealing([synthetic.curve("cosine")], **options)


def test_no_curves_and_repeated_names_are_refused(synthetic):
    with pytest.raises(UserError, match="curves must hold at least one curve"):
        fit_annealing([])
    with pytest.raises(UserError, match="curves must have distinct run_ids, got 'cosine' twice"):
        fit_annealing([synthetic.curve("cosine"), synthetic.curve("cosine")])


def test_the_registry_lists_the_law():
    assert LAWS["annealing"] is ANNEALING


@pytest.mark.acceptance
def test_laws_load_neither_torch_nor_ray_nor_mlflow():
    code = (
        "import sys, numpy as np\n"
        "from landscape_ray.laws import Curve, fit_annealing\n"
        "lr = np.linspace(1e-3, 1e-4, 100)\n"
        "step = np.arange(1, 101)\n"
        "fit_annealing([Curve('a', lr, step, 2 + np.cumsum(lr) ** -0.5)], decay=0.9)\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'pyarrow', 'matplotlib', 'plotly', 'optuna'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
