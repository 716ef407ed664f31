"""Importances on searches whose answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from landscape_ray.analysis.importance import MIN_RUNS, importances


def search(count, loss, seed=0):
    """Return runs of a random search over three values, one of which never matters."""
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(count):
        lr, shape, dud = 10 ** rng.uniform(-4, -1), str(rng.choice(["a", "b", "c"])), rng.uniform()
        value = loss(lr, shape, rng.standard_normal())
        ended = math.isfinite(value)
        summary = SimpleNamespace(
            status="finished" if ended else "diverged", varied={"lr": lr, "shape": shape, "dud": dud}
        )
        runs.append(SimpleNamespace(has_result=ended, loss=value, summary=summary))
    return runs


def by_name(runs):
    return {one.name: one for one in importances(runs)}


def test_what_the_loss_is_made_of_is_found_and_the_rest_is_not():
    found = by_name(search(40, lambda lr, shape, noise: (math.log10(lr) + 2.5) ** 2 + 0.5 * (shape == "a")))
    assert [name for name, one in found.items() if one.found] == ["lr", "shape"]
    assert found["lr"].share > 0.7 > found["shape"].share
    assert not found["dud"].found


def test_diverged_runs_rank_last():
    found = by_name(search(40, lambda lr, shape, noise: math.nan if lr > 0.01 else noise))
    assert found["lr"].found
    assert not found["dud"].found


def test_a_scale_of_losses_does_not_matter():
    quiet = search(24, lambda lr, shape, noise: (math.log10(lr) + 2.5) ** 2)
    loud = search(24, lambda lr, shape, noise: math.exp((math.log10(lr) + 2.5) ** 2))
    assert importances(quiet) == importances(loud)


def test_noise_is_called_important_about_one_time_in_twenty():
    wrong = [by_name(search(16, lambda lr, shape, noise: noise, seed))["dud"].found for seed in range(60)]
    assert np.mean(wrong) <= 0.15


@pytest.mark.parametrize("count", [0, MIN_RUNS - 1])
def test_too_few_runs_tell_nothing(count):
    assert importances(search(count, lambda lr, shape, noise: lr)) == []


def test_values_that_never_change_and_runs_that_are_equal_tell_nothing():
    runs = search(12, lambda lr, shape, noise: lr)
    for run in runs:
        run.summary.varied = {"lr": 0.1}
    assert importances(runs) == []
    assert importances(search(12, lambda lr, shape, noise: 1.0)) == []
