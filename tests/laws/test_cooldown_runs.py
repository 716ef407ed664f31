"""Forecasts of the published cooldown runs: schedules and horizons that the fits had not seen, and their ranking."""

import collections
import csv
import gzip

import numpy as np
import pytest
from scipy.stats import spearmanr, t

from landscape_ray.laws import Curve, calibrate, fit_annealing, fit_multi_power, leave_one_schedule_out, predict_curve
from landscape_ray.laws.curves.annealing import ANNEALING
from landscape_ray.laws.memory.multi_power import MULTI_POWER

pytestmark = [pytest.mark.data, pytest.mark.acceptance]

LONGEST_FITTED = 25_000
SKIPPED = 2000
FINAL_LOSSES = {  # 124M, learning rate 1e-3, 50,000 updates: linear cooldown over this share of them
    "0.1": 2.98255,
    "0.2": 2.96599,
    "0.4": 2.95478,
    "0.6": 2.95287,
    "0.8": 2.95502,
    "0.9": 2.95801,
}


@pytest.fixture(scope="module")
def runs(published):
    """Rows of the run table, those of a second data set and of two-stage schedules left out."""
    with open(published / "cooldown_runs" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["scheduler"] != "wsd_twostage" and row["dataset"] == "slimpajama"]


@pytest.fixture(scope="module")
def losses(published):
    """Held-out losses (step, loss) by run."""
    found = collections.defaultdict(dict)
    with gzip.open(published / "cooldown_runs" / "curves.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            if row["split"] == "val":
                found[row["run_id"]][int(row["iter"])] = float(row["loss"])
    return found


def rates(row):
    total, warmup, peak = int(row["iterations"]), int(row["warmup_steps"]), float(row["lr"])
    k = np.arange(total)
    if row["scheduler"] == "cos":
        final = float(row["cos_final_lr"] or -1)
        final = final if final > 0 else 0.1 * peak
        body = final + (peak - final) * 0.5 * (1 + np.cos(np.pi * (k - warmup) / (total - warmup)))
    else:
        length = int(float(row["fract_decay"] or 0) * total)
        progress = np.clip((k - (total - length)) / max(length, 1), 0, 1)
        body = peak * (1 - (np.sqrt(progress) if row["decay_type"] == "sqrt" else progress))
    return np.where(k < warmup, peak * (0.01 + 0.99 * k / warmup), body)


def curve(row, losses, num_points=None):
    table = sorted((s, y) for s, y in losses[row["run_id"]].items() if s > SKIPPED)
    if num_points and len(table) > num_points:
        table = [table[i] for i in np.unique(np.linspace(0, len(table) - 1, num_points).astype(int))]
    step, loss = zip(*table, strict=True)
    return Curve(row["run_id"], rates(row), step, loss, int(row["warmup_steps"]))


def test_published_final_losses_are_in_the_data(runs):
    def final(**wanted):
        found = [r for r in runs if r["params"] == "123587328" and r["iterations"] == "50000" and r["lr"] == "0.001"]
        found = [
            r for r in found if all(r[key] == value for key, value in wanted.items()) and "grad_norm" not in r["file"]
        ]
        return [round(float(r["final_val_loss"]), 5) for r in found]

    for share, loss in FINAL_LOSSES.items():
        assert loss in [
            pytest.approx(v, abs=2e-5) for v in final(scheduler="wsd", decay_type="linear", fract_decay=share)
        ]
    assert final(scheduler="wsd", decay_type="sqrt", fract_decay="0.2") == [pytest.approx(2.95990, abs=2e-5)]
    assert sorted(final(scheduler="cos")) == [pytest.approx(2.96353, abs=2e-5), pytest.approx(2.98194, abs=2e-5)]
    assert final(scheduler="wsd", fract_decay="0.0") == [pytest.approx(3.14055, abs=2e-5)]


@pytest.mark.slow
@pytest.mark.parametrize(("law", "typical", "rank"), [(ANNEALING, 0.006, 0.3), (MULTI_POWER, 0.003, 0.7)])
def test_forecasts_cover_and_rank(runs, losses, law, typical, rank):
    """Fits to the runs of up to 25,000 updates; three learning rates, each on its own.

    Forecast are the last losses of the longer runs (horizons not seen), and of each fitted run by the others (schedules
    not seen), whose interval is from the errors of those others.
    """
    inside_long, inside_left, errors, ranks = [], [], [], []
    for lr in ("0.0005", "0.001", "0.002"):
        group = [r for r in runs if r["params"] == "123587328" and r["lr"] == lr and "grad_norm" not in r["file"]]
        short = [curve(r, losses, 16) for r in group if int(r["iterations"]) <= LONGEST_FITTED]
        long = [curve(r, losses) for r in group if int(r["iterations"]) > LONGEST_FITTED]
        options = {"skip_steps": SKIPPED, "num_bootstrap": 0}
        if law is ANNEALING:
            decays = [0.99, 0.995, 0.998, 0.999, 0.9995]
            fit = fit_annealing(short, decay=decays, skip_steps=SKIPPED, num_bootstrap=100)
            left_out = leave_one_schedule_out(short, decay=fit.parameters["decay"], **options)
        else:
            fit = fit_multi_power(short, strengths=[1e-6], skip_steps=SKIPPED, num_bootstrap=50)
            left_out = leave_one_schedule_out(short, law=law, fitter=fit_multi_power, strengths=[1e-6], **options)
        misses = np.array([one.relative_error for one in left_out])
        for i, miss in enumerate(misses):
            others = np.delete(misses, i)
            inside_left.append(abs(miss) <= t.ppf(0.95, len(others)) * np.sqrt(np.mean(others**2)))
        fit = calibrate(fit, left_out)
        found = [predict_curve(fit, c.lr, c.step[-1:], c.warmup_steps, law=law) for c in long]
        predicted, observed = np.array([f.loss_nats[0] for f in found]), np.array([c.loss_nats[-1] for c in long])
        errors += list(np.abs(predicted / observed - 1))
        inside_long += [f.low[0] <= y <= f.high[0] for f, y in zip(found, observed, strict=True)]
        horizons = np.array([len(c.lr) for c in long])
        for horizon in np.unique(horizons):
            same = horizons == horizon
            if same.sum() >= 5:
                ranks.append(spearmanr(predicted[same], observed[same])[0])
    assert len(inside_long) == 52
    coverage = np.mean(inside_left + inside_long)
    print(
        f"{law.name}: coverage {coverage:.3f} ({np.mean(inside_left):.3f} of {len(inside_left)} schedules, "
        f"{np.mean(inside_long):.3f} of 52 horizons), error {np.mean(errors):.4f}, ranks {np.round(ranks, 2)}"
    )
    assert 0.80 <= coverage <= 0.98
    assert np.mean(errors) < typical
    assert min(ranks) > rank
