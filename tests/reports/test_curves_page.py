"""The page of a law of loss curves, from a foreign table of curves."""

import numpy as np
import pytest

from landscape_ray.analysis.annealing import annealing_curves, fit_collected
from landscape_ray.errors import UserError
from landscape_ray.laws import LAWS, annealing_area
from landscape_ray.reports.curves_page import render, write_curves_page
from landscape_ray.schedules import Schedule
from landscape_ray.tracking.collect import collect_csv

NUM_STEPS, WARMUP = 200, 10


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A table as another program writes it: a rate for every update, a loss for every tenth."""
    lines = ["run,update,rate,val"]
    for seed, name in enumerate(("constant", "cosine", "linear", "wsd")):
        lr = Schedule(name=name, peak=1e-3, num_steps=NUM_STEPS, warmup_steps=WARMUP).values()
        loss = 3 + 0.35 * np.cumsum(lr) ** -0.3 - 1.2 * annealing_area(lr, 0.95)
        loss *= np.exp(1e-3 * np.random.default_rng(seed).standard_normal(NUM_STEPS))
        for k in range(NUM_STEPS):
            measured = loss[k] if (k + 1) % 10 == 0 else ""
            lines.append(f"<{name}>,{k + 1},{float(lr[k])!r},{measured}")
    path = tmp_path_factory.mktemp("curves") / "curves.csv"
    path.write_text("\n".join(lines) + "\n")
    return collect_csv(path, {"run_id": "run", "step": "update", "lr": "rate", "loss_nats": "val"})


@pytest.fixture(scope="module")
def found(collected):
    return fit_collected(collected, decays=(0.95,), num_bootstrap=20)


def test_the_warmup_of_a_foreign_run_is_read_off_its_rates(collected):
    group = annealing_curves(collected).groups[0]
    assert {curve.warmup_steps for curve in group.curves} == {WARMUP - 1}


def test_a_foreign_rate_may_be_told_for_some_updates(collected, tmp_path):
    """Every second update tells the same curves within what lies between; every fiftieth is too few."""
    text = "run_id,step,lr,loss_nats\n"
    for every in (2, 50):
        rows = [text]
        for curve in annealing_curves(collected).groups[0].curves:
            loss = dict(zip(curve.step.tolist(), curve.loss_nats.tolist(), strict=True))
            steps = range(every, NUM_STEPS + 1, every)
            rows += [f"{curve.run_id},{k},{float(curve.lr[k - 1])!r},{loss.get(k, '')}\n" for k in steps]
        path = tmp_path / f"every_{every}.csv"
        path.write_text("".join(rows))
    group = annealing_curves(collect_csv(tmp_path / "every_2.csv")).groups[0]
    for some, full in zip(group.curves, annealing_curves(collected).groups[0].curves, strict=True):
        np.testing.assert_allclose(some.lr[WARMUP:], full.lr[WARMUP:], atol=2e-5)
        assert some.step.tolist() == full.step.tolist()
    with pytest.raises(UserError, match="needs >= 3 finished"):
        annealing_curves(collect_csv(tmp_path / "every_50.csv"))


def test_the_page_shows_the_law_its_forecasts_and_its_record(collected, found, tmp_path):
    curves = annealing_curves(collected).groups[0].curves
    path = write_curves_page(found, LAWS["annealing"], curves, "curves.csv", tmp_path / "annealing.html")
    page = path.read_text()
    for key in ("law", "forecast", "finals", "residuals"):
        assert f'id="figure-{key}"' in page
    for section in ("The law", "Schedules it had not seen", "What is left over", "How it was made and checked"):
        assert section in page
    assert "curves.csv" in page
    assert "<constant>" not in page.replace("\\u003cconstant\\u003e", "")  # names of runs are text, never markup
    for forecast in found.forecasts:
        assert f"{forecast.predicted_final:.4f}" in page
    assert page.count(">schedule left out<") == 4


def test_the_record_of_a_curve_fit_travels_with_it(found):
    again = type(found).from_json(found.to_json())
    sections = again.fit.checklist["sections"]
    assert [item["name"] for item in sections["E validation"]].count("schedule left out") == 4
    assert any(item["name"] == "other objectives" for item in sections["D fitting"])
    assert any(item["verdict"] == "unknown" for item in sections["B training set-up"])


def test_a_law_that_needs_more_says_so(collected, found):
    curves = annealing_curves(collected).groups[0].curves
    with pytest.raises(UserError, match="fit must be of the law 'annealing_sized', got 'annealing'"):
        render(found, LAWS["annealing_sized"], curves, "curves.csv")
