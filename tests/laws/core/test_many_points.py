"""Searches on some of many points end where searches on all of them do."""

import numpy as np
import pytest

import landscape_ray.laws.core.fit as fitting
from landscape_ray.laws import LAWS, Curve, CurveSet, Points, annealing_area, fit, fit_annealing
from landscape_ray.schedules import Schedule


def curves(num_points=900):
    found = []
    for seed, name in enumerate(("constant", "cosine", "linear")):
        lr = Schedule(name=name, peak=1e-3, num_steps=1000).values()
        step = np.linspace(50, 1000, num_points).astype(int)
        loss = 3 + 0.35 * np.cumsum(lr) ** -0.5 - 1.2 * annealing_area(lr, 0.98)
        noise = 1e-3 * np.random.default_rng(seed).standard_normal(num_points)
        found.append(Curve(name, lr, step, loss[step - 1] * np.exp(noise)))
    return found


def table(num_points=2500):
    rng = np.random.default_rng(1)
    n, d = np.exp(rng.uniform(16, 23, num_points)), np.exp(rng.uniform(20, 26, num_points))
    loss = 1.8 + 400 * n**-0.34 + 2000 * d**-0.36
    return Points({"N": n, "D": d}, loss * np.exp(0.01 * rng.standard_t(3, num_points)))


@pytest.mark.acceptance
@pytest.mark.parametrize("kind", ["curves", "table"])
def test_the_optimum_is_that_of_a_search_on_all_points(kind, monkeypatch):
    def fitted():
        if kind == "curves":
            return fit_annealing(curves(), decay=0.98, num_bootstrap=0)
        return fit(LAWS["chinchilla"], table(), num_bootstrap=0)

    some = fitted()
    monkeypatch.setattr(fitting, "_MANY_POINTS", 10**9)
    every = fitted()
    assert some.status == every.status == "certified"
    assert some.objective["value"] == pytest.approx(every.objective["value"], rel=1e-12)
    for name, value in every.parameters.items():
        assert some.parameters[name] == pytest.approx(value, rel=1e-7), name
    for key in ("num_starts", "agree_share", "bounds_hit"):
        assert some.certificate[key] == every.certificate[key]


@pytest.mark.slow
def test_parameters_with_a_scale_keep_their_place(monkeypatch):
    """A parameter whose bounds are multiples of a scale of the data is carried from some points to all of them."""
    x = np.geomspace(1e6, 1e10, 2400)
    y = 1.5 + 30 * x**-0.1 * (1 + (x / 1e8) ** 2) ** -0.1
    points = Points({"x": x}, y * np.exp(1e-4 * np.random.default_rng(0).standard_normal(len(x))))
    some = fit(LAWS["broken_power"], points, num_bootstrap=0)
    monkeypatch.setattr(fitting, "_MANY_POINTS", 10**9)
    every = fit(LAWS["broken_power"], points, num_bootstrap=0)
    assert some.objective["value"] <= every.objective["value"] * (1 + 1e-9)


def test_thinned_data_hold_every_run_and_its_ends():
    data = CurveSet(curves(), equal_runs=True)
    thin = data.thinned(90)
    assert [len(step) for _, step in thin.fitted] == [30, 30, 30]
    for (_, some), (_, every) in zip(thin.fitted, data.fitted, strict=True):
        assert (some[0], some[-1]) == (every[0], every[-1])
    assert thin.weights.sum() == pytest.approx(90)
    points = table()
    few = points.thinned(100)
    assert len(few) == 100
    assert set(few.run_ids) <= set(points.run_ids)
    assert points.thinned(10**6).response.tolist() == points.response.tolist()
