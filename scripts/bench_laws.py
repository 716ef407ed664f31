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

from landscape_ray.laws import Curve, CurveSet, annealing_area, fit_annealing, fit_multi_power
from landscape_ray.laws.memory.multi_power import MULTI_POWER
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
    for lr in schedules.values():
        lr[:2160] = cosine[:2160]
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


def multi_power_peer(curves: list[Curve]) -> tuple[float, float, dict[str, float]]:
    """Return seconds, objective and parameters of a fit in the style of the law's authors.

    One start from the law of instant annealing, L0 + A S^-alpha - B (peak - eta), and the authors' middle guesses of
    the shape; sums over every update, point after point; scipy's L-BFGS-B with numeric gradients on all seven
    parameters, Huber 1e-3 on the log loss, summed, 60 iterations at most. (The authors use automatic gradients, a grid
    of starts and Adam.)
    """
    points = []
    for curve in curves:
        area, lr = np.concatenate([[0.0], np.cumsum(curve.lr)]), curve.lr
        drop = -np.diff(lr, prepend=lr[0])
        drop[: curve.warmup_steps + 1] = 0.0
        for step, loss in zip(curve.step, curve.loss_nats, strict=True):
            if step > curve.warmup_steps:
                points.append(
                    (area[step], drop[:step], lr[:step] / lr.max(), (area[step] - area[:step]) / lr.max(), loss)
                )
    log_loss = np.log([point[4] for point in points])

    def huber(predicted: np.ndarray) -> float:
        size = np.abs(log_loss - np.log(np.maximum(predicted, 1e-10)))
        inner = np.minimum(size, DELTA)
        return float((inner * (size - inner / 2)).sum())

    def predict(p: np.ndarray) -> np.ndarray:
        l0, a, alpha, b, log_c, beta, gamma = p
        return np.array(
            [
                l0 + a * area**-alpha - b * np.sum(drop * (1 - (1 + np.exp(log_c) * rate**-gamma * since) ** -beta))
                for area, drop, rate, since, _ in points
            ]
        )

    def instant(p: np.ndarray) -> float:
        l0, a, alpha, b = p
        peak = max(curve.peak_lr for curve in curves)
        return huber(np.array([l0 + a * x[0] ** -alpha - b * peak * (1 - x[2][-1]) for x in points]))

    started = time.perf_counter()
    low = [(0, None), (0, None), (0.01, 5), (0, None)]
    first = minimize(instant, np.array([2.5, 0.5, 0.5, 400.0]), method="L-BFGS-B", bounds=low).x
    bounds: Any = [*low, (-12, 3), (0.02, 5), (0, 1.5)]
    options: Any = {"maxiter": 60, "ftol": 1e-12}
    start = np.append(first, [np.log(0.1), 0.6, 0.6])
    found = minimize(lambda p: huber(predict(p)), start, method="L-BFGS-B", bounds=bounds, options=options)
    values = dict(zip(("L0", "A", "alpha", "B", "C", "beta", "gamma"), found.x, strict=True))
    return time.perf_counter() - started, float(found.fun), values | {"C": float(np.exp(values["C"]))}


def unseen_error(parameters: dict[str, float], curves: list[Curve]) -> float:
    """Return the mean relative error over curves that were not fitted."""
    errors = []
    for curve in curves:
        data = CurveSet([curve])
        predicted = MULTI_POWER.predict(MULTI_POWER.prepare(data, {}), parameters)  # type: ignore[misc]
        errors.append(np.abs(predicted / data.response - 1).mean())
    return float(np.mean(errors))


def bench_multi_power(folder: Path, repeats: int) -> None:
    """Print a row a model size: the regularised fit, strength included, against the plain one."""
    print("\nmulti-power law; ours: 6 strengths by left-out schedules, then the fit; peer: see multi_power_peer")
    print(f"{'data':<28}{'ours s':>9}{'peer s':>9}{'ratio':>8}{'ours unseen':>14}{'peer unseen':>14}")
    for size in ("25M", "100M", "400M"):
        train = multi_power(folder, size)
        unseen = []
        for kind, lr in {
            "wsdcon_3": np.where(np.arange(16_000) < 8000, 3e-4, 3e-5),
            "wsdcon_18": np.where(np.arange(16_000) < 8000, 3e-4, 18e-5),
            "constant_72000": np.full(72_000, 3e-4),
        }.items():
            lr[:2160] = 3e-4 * (np.arange(2160) + 1) / 2160
            table = np.genfromtxt(folder / "multi_power_law" / size / f"{kind}.csv", delimiter=",", names=True)
            unseen.append(Curve(kind, lr, table["step"].astype(int), table["loss"], 2160))
        seconds = []
        for _ in range(repeats):
            fresh = [Curve(c.run_id, c.lr, c.step, c.loss_nats, c.warmup_steps) for c in train]
            started = time.perf_counter()
            fit = fit_multi_power(fresh, num_bootstrap=0)
            seconds.append(time.perf_counter() - started)
        ours = float(np.median(seconds))
        peer, _, values = multi_power_peer(train)
        print(
            f"{f'multi_power_law {size}':<28}{ours:>9.2f}{peer:>9.1f}{peer / ours:>8.0f}"
            f"{unseen_error(fit.parameters, unseen):>14.5f}{unseen_error(values, unseen):>14.5f}"
        )


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
    if (options.data / "multi_power_law").is_dir():
        bench_multi_power(options.data, options.repeats)


if __name__ == "__main__":
    main()
