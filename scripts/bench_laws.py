"""Time and quality of our fits, against plain multi-start fits with scipy, as published fits are made.

Both see the same points and objective (Huber 1e-3 on log loss, summed) in the same process; seconds are of CPU. Ours is
the whole call, certificate included.

Annealing law: the peer gets the areas ready and only minimises, with L-BFGS-B and numeric gradients from a grid of
starts. Chinchilla law: the peer is L-BFGS-B with numeric gradients from the 4,500 starts of approach 3; of these every
`--every`-th is run, and its time multiplied. Bootstraps of the Chinchilla law: 4,000 resamples of the points, the peer
is one BFGS run a resample from the optimum of all points, with numeric gradients (scipy's default) and, in a second
line, with exact ones; of these the first `--resamples` are run, and their time scaled up. The objectives are then means
over those resamples.

Usage:
    python scripts/bench_laws.py [annealing] [chinchilla] [multi_power] [--starts 3] [--every 10] [--resamples 100]
        [--repeats 5] [--data FOLDER]

FOLDER holds `annealing_tissue`, `multi_power_law` and `chinchilla_epoch`; without it, and for what is missing, only
synthetic runs are timed.
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

from landscape_ray.laws import LAWS, Curve, CurveSet, Points, annealing_area, fit, fit_annealing, fit_multi_power
from landscape_ray.laws.core.bootstrap import resample
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.core.fitting import huber
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
    started = time.process_time()
    bounds = [(0, None), (0, None), (0.01, 5), (0, None)]
    options: Any = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 10_000, "maxfun": 100_000}
    best = min(minimize(objective, np.array(x0), method="L-BFGS-B", bounds=bounds, options=options).fun for x0 in grid)
    return time.process_time() - started, best


def row(name: str, num_points: int, ours: float, peer: float, our_objective: float, peer_objective: float) -> None:
    """Print one line of the table."""
    print(
        f"{name:<28}{num_points:>7}{ours:>9.3f}{peer:>9.2f}{peer / ours:>8.0f}"
        f"{our_objective:>18.10e}{peer_objective:>18.10e}",
        flush=True,
    )


def chinchilla(folder: Path) -> tuple[str, Points]:
    """Return a name and the 240 published points, or as many synthetic ones."""
    path = folder / "chinchilla_epoch" / "points.csv"
    if path.is_file():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        n, c, loss = (np.array([float(line[key]) for line in rows]) for key in ("Model Size", "Training FLOP", "loss"))
        kept = loss < np.sort(loss)[-5]
        return "chinchilla", Points({"N": n[kept], "D": (c / (6 * n))[kept]}, loss[kept])
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(5e7), np.log(1e10), 240)), np.exp(rng.uniform(np.log(1e9), np.log(2e11), 240))
    loss = 1.8 + 480 * n**-0.35 + 2100 * d**-0.37
    return "synthetic chinchilla", Points({"N": n, "D": d}, loss * np.exp(0.006 * rng.standard_t(3, 240)))


def surface(points: Points, weights: np.ndarray | None = None) -> Any:
    """Return the peer's objective and its exact gradient as a function of (a, b, e, alpha, beta)."""
    log_n, log_d = (np.log(np.asarray(points.variables[name])) for name in ("N", "D"))
    log_loss = np.log(np.asarray(points.response))
    each = np.ones_like(log_loss) if weights is None else weights

    def evaluate(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = parameters
        terms = np.exp(np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)]))
        total = terms.sum(axis=0)
        residual = log_loss - np.log(total)
        pull = -each * np.clip(residual, -DELTA, DELTA) * terms / total
        slopes = np.array([pull[0].sum(), pull[1].sum(), pull[2].sum(), -(pull[0] @ log_n), -(pull[1] @ log_d)])
        return float(each @ huber(residual, DELTA)), slopes

    return evaluate


def chinchilla_fit(name: str, points: Points, every: int, repeats: int) -> None:
    """Time the global fit against the grid of starts of approach 3."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        found = fit(LAWS["chinchilla"], points, num_bootstrap=0)
        seconds.append(time.process_time() - started)
    evaluate = surface(points)
    axes = (np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5))
    starts = list(itertools.product(*axes, np.arange(0, 2.5, 0.5)))[every // 2 :: every]
    started = time.process_time()
    with np.errstate(all="ignore"):
        ends = [minimize(lambda p: evaluate(p)[0], np.array(x0, dtype=float), method="L-BFGS-B") for x0 in starts]
    peer = (time.process_time() - started) * 4500 / len(starts)
    best = min(end.fun for end in ends if np.isfinite(end.fun))
    row(name, len(points), float(np.median(seconds)), peer, found.objective["value"], best)


def chinchilla_bootstrap(points: Points, num_resamples: int) -> None:
    """Time 4,000 bootstraps against one BFGS run a resample."""
    law = LAWS["chinchilla"]
    started = time.process_time()
    fit(law, points, num_bootstrap=4000, resampling="counts", seed=42)
    ours = time.process_time() - started
    solution, _ = solve(law, points)
    weights, _, _ = resample(solution.y, solution.residual, points.run, 5, 4000, 42, method="counts")
    mean = float(solution.refit(weights[:num_resamples]).objective.mean())
    p = {key: float(value[0]) for key, value in solution.natural(solution.best).items()}
    start = np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]])
    for kind in ("numeric", "exact"):
        ends = []
        started = time.process_time()
        for w in weights[:num_resamples]:
            evaluate = surface(points, w)
            function = evaluate if kind == "exact" else lambda q, evaluate=evaluate: evaluate(q)[0]
            ends.append(minimize(function, start, jac=kind == "exact", method="BFGS").fun)
        peer = (time.process_time() - started) * 4000 / num_resamples
        row(f"4,000 bootstraps, {kind}", len(points), ours, peer, mean, float(np.mean(ends)))


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
            found = fit_multi_power(fresh, num_bootstrap=0)
            seconds.append(time.perf_counter() - started)
        ours = float(np.median(seconds))
        peer, _, values = multi_power_peer(train)
        print(
            f"{f'multi_power_law {size}':<28}{ours:>9.2f}{peer:>9.1f}{peer / ours:>8.0f}"
            f"{unseen_error(found.parameters, unseen):>14.5f}{unseen_error(values, unseen):>14.5f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("annealing", "chinchilla", "multi_power")
    parser.add_argument("part", nargs="*", help=f"of {', '.join(parts)}; all if none is named")
    parser.add_argument("--starts", type=int, default=3, help="starts of the peer along each of its four axes")
    parser.add_argument(
        "--every", type=int, default=10, help="of the peer's 4,500 starts of the Chinchilla law, one in"
    )
    parser.add_argument("--resamples", type=int, default=100, help="resamples that the peer fits, of 4,000")
    parser.add_argument("--repeats", type=int, default=5, help="our fit is timed this often, the median is printed")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with published curves")
    options = parser.parse_args()
    asked = options.part or parts
    if not set(asked) <= set(parts):
        parser.error(f"part must be of {', '.join(parts)}, got {', '.join(asked)}")
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
    print(
        f"annealing: peer {options.starts**4} starts; chinchilla: peer 4,500 starts, one in {options.every} run, times"
    )
    print(f"{options.every}; bootstraps: peer {options.resamples} of 4,000 run, time scaled up")
    print(HEADER)
    for name, curves, decay in cases if "annealing" in asked else ():
        seconds = []
        for _ in range(options.repeats):
            fresh = [Curve(c.run_id, c.lr, c.step, c.loss_nats, c.warmup_steps) for c in curves]  # no kept areas
            started = time.process_time()
            found = fit_annealing(fresh, decay=decay, huber_delta=DELTA, num_bootstrap=0)
            seconds.append(time.process_time() - started)
        ours = float(np.median(seconds))
        peer, peer_objective = peer_fit(curves, decay, options.starts)
        row(name, found.data["num_points"], ours, peer, found.objective["value"], peer_objective)
    if "chinchilla" in asked:
        name, points = chinchilla(options.data)
        chinchilla_fit(name, points, options.every, options.repeats)
        chinchilla_bootstrap(points, options.resamples)
    if "multi_power" in asked and (options.data / "multi_power_law").is_dir():
        bench_multi_power(options.data, options.repeats)


if __name__ == "__main__":
    main()
