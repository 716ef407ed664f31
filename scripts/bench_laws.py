"""Time and quality of the annealing-law fit, against a plain multi-start fit with numeric gradients.

Both see the same points, objective (Huber 1e-3 on log loss, summed) and decay, in the same process. Ours is the whole
call, areas and certificate included; the peer gets the areas ready and only minimises, with scipy's L-BFGS-B from a
grid of starts, as published fits do.

Usage:
    python scripts/bench_laws.py [--starts 3] [--repeats 5] [--data FOLDER]

FOLDER holds `annealing_tissue` and `multi_power_law`; without it, and for what is missing, only synthetic runs are
timed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from landscape_ray.laws import Curve, annealing_area, fit_annealing
from landscape_ray.schedules import Schedule

DELTA = 1e-3
HEADER = f"{'data':<28}{'points':>7}{'ours s':>9}{'peer s':>9}{'ratio':>8}{'ours objective':>18}{'peer objective':>18}"


def synthetic(num_steps: int, num_points: int, decay: float) -> list[Curve]:
    """Return three runs that follow the law with noise of 1e-3."""
    curves = []
    for seed, name in enumerate(("constant", "cosine", "wsd")):
        lr = Schedule(name=name, peak=1e-3, num_steps=num_steps, warmup_steps=num_steps // 20).values()
        counted = np.where(np.arange(num_steps) < num_steps // 20, lr.max(), lr)
        step = np.linspace(num_steps // 10, num_steps, num_points).astype(int)
        loss = 3 + 0.35 * np.cumsum(counted) ** -0.5 - 1.2 * annealing_area(counted, decay)
        noise = np.random.default_rng(seed).standard_normal(num_points)
        curves.append(Curve(name, lr, step, loss[step - 1] * np.exp(1e-3 * noise), num_steps // 20))
    return curves


def tissue(folder: Path) -> list[Curve]:
    """Return the authors' 40 points; their schedule includes step 0."""
    with open(folder / "annealing_tissue" / "tissue_20k_cosine_constant.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curves = []
    for name in ("cosine", "constant"):
        lr = Schedule(name=name, peak=2e-4, num_steps=20_000, warmup_steps=500)(np.arange(20_001))
        points = [(int(row["step"]) + 1, float(row["val_loss"])) for row in rows if row["schedule"] == name]
        step, loss = zip(*points, strict=True)
        curves.append(Curve(name, np.asarray(lr), np.array(step), np.array(loss), 500))
    return curves


def multi_power(folder: Path, size: str) -> list[Curve]:
    """Return the three training curves of a model size."""
    cosine = Schedule(name="cosine", peak=3e-4, num_steps=24_000, warmup_steps=2160, final_ratio=0.1).values()
    schedules = {
        "cosine_24000": cosine,
        "constant_24000": np.full(24_000, 3e-4),
        "wsdcon_9": np.where(np.arange(16_000) < 8000, 3e-4, 9e-5),
    }
    curves = []
    for name, lr in schedules.items():
        with open(folder / "multi_power_law" / size / f"{name}.csv", newline="") as file:
            points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        step, loss = zip(*points, strict=True)
        curves.append(Curve(name, lr, np.array(step), np.array(loss), 2160))
    return curves


def peer_fit(curves: list[Curve], decay: float, starts: int) -> tuple[float, float]:
    """Return seconds and the best objective of the multi-start fit, L0, A, alpha and C searched jointly."""
    kept = [curve.step[curve.step > curve.warmup_steps] for curve in curves]
    s1 = np.concatenate([curve.s1()[step - 1] for curve, step in zip(curves, kept, strict=True)])
    s2 = np.concatenate([curve.s2(decay)[step - 1] for curve, step in zip(curves, kept, strict=True)])
    log_loss = np.log(np.concatenate([curve.loss_nats[curve.step > curve.warmup_steps] for curve in curves]))

    def objective(parameters: np.ndarray) -> float:
        l0, a, alpha, c = parameters
        size = np.abs(log_loss - np.log(np.maximum(l0 + a * s1**-alpha - c * s2, 1e-10)))
        inner = np.minimum(size, DELTA)
        return float((inner * (size - inner / 2)).sum())

    grid = itertools.product(
        *(np.linspace(low, high, starts) for low, high in ((1, 3.5), (0.1, 2), (0.1, 1), (0.1, 2)))
    )
    started = time.perf_counter()
    bounds = [(0, None), (0, None), (0.01, 5), (0, None)]
    options: Any = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 10_000, "maxfun": 100_000}
    best = min(minimize(objective, np.array(x0), method="L-BFGS-B", bounds=bounds, options=options).fun for x0 in grid)
    return time.perf_counter() - started, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="starts of the peer along each of its four axes")
    parser.add_argument("--repeats", type=int, default=5, help="our fit is timed this often, the median is printed")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with published curves")
    options = parser.parse_args()
    cases = [
        ("synthetic 1k updates", synthetic(1000, 30, 0.98), 0.98),
        ("synthetic 20k updates", synthetic(20_000, 100, 0.999), 0.999),
    ]
    if (options.data / "annealing_tissue").is_dir():
        cases.append(("annealing_tissue", tissue(options.data), 0.999))
    if (options.data / "multi_power_law").is_dir():
        cases += [
            (f"multi_power_law {size}", multi_power(options.data, size), 0.999) for size in ("25M", "100M", "400M")
        ]
    print(f"peer: scipy L-BFGS-B, numeric gradients, {options.starts**4} starts; ours: 24 starts, no bootstrap")
    print(HEADER)
    for name, curves, decay in cases:
        seconds = []
        for _ in range(options.repeats):
            fresh = [Curve(c.run_id, c.lr, c.step, c.loss_nats, c.warmup_steps) for c in curves]  # no kept areas
            started = time.perf_counter()
            fit = fit_annealing(fresh, decay=decay, huber_delta=DELTA, num_bootstrap=0)
            seconds.append(time.perf_counter() - started)
        ours = float(np.median(seconds))
        peer, peer_objective = peer_fit(curves, decay, options.starts)
        print(
            f"{name:<28}{fit.data['num_points']:>7}{ours:>9.3f}{peer:>9.2f}{peer / ours:>8.0f}"
            f"{fit.objective['value']:>18.10e}{peer_objective:>18.10e}"
        )


if __name__ == "__main__":
    main()
