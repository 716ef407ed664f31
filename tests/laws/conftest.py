"""Curves with a known law, and the published curves."""

import csv
from pathlib import Path

import numpy as np
import pytest

from landscape_ray.laws import Curve, annealing_area
from landscape_ray.schedules import Schedule

TRUTH = {"L0": 3.0, "A": 0.35, "alpha": 0.5, "C": 1.2}
DECAY = 0.98
PEAK = 1e-3
WARMUP = 50
SCHEDULES = {
    "constant": {"name": "constant"},
    "cosine": {"name": "cosine", "final_ratio": 0.1},
    "linear": {"name": "linear"},
    "wsd_10": {"name": "wsd", "cooldown_fraction": 0.1},
    "wsd_30": {"name": "wsd", "cooldown_fraction": 0.3},
    "wsd_sqrt": {"name": "wsd", "cooldown_fraction": 0.4, "cooldown_shape": "sqrt"},
}


class Synthetic:
    """Runs of 1,000 updates that follow the law with known parameters, like the small runs of a sweep."""

    truth = TRUTH
    decay = DECAY
    peak = PEAK
    warmup = WARMUP
    names = tuple(SCHEDULES)

    def lr(self, name, num_steps=1000, peak=PEAK):
        return Schedule(**SCHEDULES[name], peak=peak, num_steps=num_steps, warmup_steps=WARMUP).values()

    def loss(self, lr, truth=TRUTH, decay=DECAY):
        counted = np.where(np.arange(len(lr)) < WARMUP, lr.max(), lr)
        area = annealing_area(counted, decay)
        return truth["L0"] + truth["A"] * np.cumsum(counted) ** -truth["alpha"] - truth["C"] * area

    def curve(self, name, noise=0.0, seed=0, run_id=None, num_steps=1000):
        lr = self.lr(name, num_steps)
        step = np.arange(80, num_steps + 1, 30)
        error = noise * np.random.default_rng(seed).standard_normal(len(step))
        return Curve(run_id or name, lr, step, self.loss(lr)[step - 1] * np.exp(error), WARMUP)

    def curves(self, *names, noise=0.0, seed=0):
        return [self.curve(name, noise, 1000 * seed + i) for i, name in enumerate(names)]


@pytest.fixture(scope="session")
def synthetic():
    return Synthetic()


@pytest.fixture(scope="session")
def published():
    """The folder with the published data, next to the repository; tests skip where it is absent."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("published data are not here")
    return folder


@pytest.fixture(scope="session")
def tissue_curves(published):
    """The 40 points of the law's authors, in their conventions.

    Peak 2e-4, warm-up 500, cosine to zero at step 20,000. Their areas at step s include update 0, so the schedule has
    20,001 entries and step s is point s + 1 here.
    """
    with open(published / "annealing_tissue" / "tissue_20k_cosine_constant.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curves = []
    for name in ("cosine", "constant"):
        lr = Schedule(name=name, peak=2e-4, num_steps=20_000, warmup_steps=500)(np.arange(20_001))
        points = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["schedule"] == name]
        step, loss = zip(*points, strict=True)
        curves.append(Curve(name, lr, np.array(step) + 1, np.array(loss), 500))
    return curves


@pytest.fixture(scope="session")
def multi_power_curves(published):
    """Returns the nine curves of a model size by schedule; the learning rates in the files check the rebuilt ones."""

    def load(size):
        curves = {}
        for path in sorted((published / "multi_power_law" / size).glob("*.csv")):
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            step, lr, loss = (np.array([float(row[key]) for row in rows]) for key in ("step", "lr", "loss"))
            full = _multi_power_schedule(path.stem)
            np.testing.assert_allclose(full[step.astype(int)], lr, rtol=1e-12)
            curves[path.stem] = Curve(path.stem, full, step.astype(int), loss, 2160)
        return curves

    return load


@pytest.fixture(scope="session")
def authors_curves(published):
    """Returns the nine curves of a size as the authors' program takes them.

    Their warm-up rises from 0 to the peak in 2,160 updates, and the loss at step s has seen update s too. Points in the
    warm-up are left out here, so that curves whose warm-up counts (`warmup_counts`) hold the same points.
    """

    def load(size, warmup_counts=False):
        curves = {}
        for path in sorted((published / "multi_power_law" / size).glob("*.csv")):
            with open(path, newline="") as file:
                rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
            lr = _multi_power_schedule(path.stem).copy()
            lr[:2160] = np.linspace(0, 3e-4, 2160)
            step, loss = (np.array(column) for column in zip(*rows, strict=True))
            kept = (step < len(lr)) & (step + 1 > 2160)
            warmup = 0 if warmup_counts else 2160
            curves[path.stem] = Curve(path.stem, lr, step[kept] + 1, loss[kept], warmup)
        return curves

    return load


def _multi_power_schedule(name):
    kind, _, rest = name.partition("_")
    peak, end = 3e-4, 3e-5
    if kind in ("constant", "cosine"):
        total = int(rest)
        ratio = {"constant": 0.0, "cosine": end / peak}[kind]
        return Schedule(name=kind, peak=peak, num_steps=total, warmup_steps=2160, final_ratio=ratio).values()
    if kind == "wsdcon":
        return np.where(np.arange(16_000) < 8000, peak, int(rest) * 1e-5)
    progress = np.clip((np.arange(24_000) - 20_000) / 4000, 0, 1)
    return peak + (end - peak) * progress if kind == "wsdld" else peak * (end / peak) ** progress
