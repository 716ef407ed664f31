"""Populations against each other and against searches, at the same number of updates.

    python scripts/bench_populations.py                                toys and simulated training: minutes
    python scripts/bench_populations.py --part real --tasks gpt,cnn    a small GPT and a small CNN: an hour of one core

Toys: Figure 2 of the paper on population-based training, and the triangle wave of Ray Tune's example. Simulated: a
noisy quadratic and loss curves of a law, where the best schedule of a family is computed; the greedy gap is what
truncation ends above it, and a column says how much of this gap a row closes (median over paired seeds).

Real: all rows spend the same number of updates, 8 members of --steps each, and end with the lowest held-out loss of a
member that came to the end. They share the initial learning rates of a seed where they draw any. The populations change
the peak learning rate; the searches draw peak and schedule (constant, linear, cosine or wsd); "best fixed wsd" spaces
its peaks evenly over the domain. "ASHA + TPE" promotes one of three trials at 1/8 and 3/8 of a run. Paired columns say
how forecasts end against each row: median difference, wins.

"stock Ray" is Ray Tune's own scheduler object with its defaults (quantiles of a quarter, resampling with probability
0.25, factors 1.2 and 0.8 without bounds, diverged members left alone), asked for every decision; the training itself
is done here, at no cost of Ray's actors (see population_rivals.py). Its members meet at each interval (synch = True);
"stock Ray asynchronous" is its default, where a copy may fall back an interval and pay for it with more updates.

Populations under a wsd schedule share its cooldown; those marked "constant" have to find one. The rows "forecast" and
"averaged truncation" also evaluate averaged weights: the same updates, more evaluations. With --save every run is
appended to a file as a line of JSON, and runs that the file has are not made again; --no-training prints what it has.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from population_rivals import AveragedTruncation, StockRay, asha_tpe

from landscape_ray.domains import Domain
from landscape_ray.populations import STRATEGIES, Strategy
from landscape_ray.populations.simulation import (
    LawCurves,
    NoisyQuadratic,
    Problem,
    Simulator,
    ToyQuadratic,
    TriangleWave,
)
from landscape_ray.schedules import Schedule

MEMBERS = 8
COOLDOWN = 0.2


ROWS: dict[str, tuple[type[Strategy], str, dict[str, Any]]] = {
    "random search": (STRATEGIES["independent"], "any", {}),
    "best fixed wsd": (STRATEGIES["independent"], "wsd", {"grid": True}),
    "stock Ray, constant": (StockRay, "constant", {}),
    "stock Ray, wsd": (StockRay, "wsd", {}),
    "stock Ray asynchronous, constant": (StockRay, "constant", {"synchronous": False}),
    "truncation, constant": (STRATEGIES["truncation"], "constant", {}),
    "truncation, wsd": (STRATEGIES["truncation"], "wsd", {}),
    "significance, wsd": (STRATEGIES["significance"], "wsd", {}),
    "pb2, constant": (STRATEGIES["pb2"], "constant", {}),
    "pb2, wsd": (STRATEGIES["pb2"], "wsd", {}),
    "fire, constant": (STRATEGIES["fire"], "constant", {}),
    "mf_pbt, constant": (STRATEGIES["mf_pbt"], "constant", {}),
    "mf_pbt, wsd": (STRATEGIES["mf_pbt"], "wsd", {}),
    "ipbt, constant": (STRATEGIES["ipbt"], "constant", {}),
    "averaged truncation, wsd": (AveragedTruncation, "wsd", {}),
    "forecast, wsd": (STRATEGIES["forecast"], "wsd", {}),
}
"""Name of the row, its strategy, the schedule of the learning rate, options."""

ASHA = "ASHA + TPE"
"""A row of real training that is no population."""

OURS = "forecast, wsd"
"""The row that all others are compared with."""

SCHEDULES = Domain(choices=["constant", "linear", "cosine", "wsd"])


def schedule_of(name: str, num_steps: int, warmup_steps: int = 0) -> Schedule:
    return Schedule(name=name, peak=1.0, num_steps=num_steps, warmup_steps=warmup_steps, cooldown_fraction=COOLDOWN)


def make(row: str, domain: Domain, lr_name: str, schedule: Schedule, **settings: Any) -> Strategy:
    """Return the strategy of a row."""
    kind, shape, options = ROWS[row]
    space = {lr_name: domain}
    options = dict(options)
    if shape == "any":
        space["schedule.name"] = SCHEDULES
    if options.pop("grid", False):
        options["initial"] = [{lr_name: domain.at((k + 0.5) / MEMBERS)} for k in range(MEMBERS)]
    if kind is STRATEGIES["forecast"]:
        options |= {"schedule": schedule, "lr_name": lr_name}
    return kind(space, num_members=MEMBERS, **settings, **options)


# toys


def toys(seeds: int) -> None:
    print(f"{'toy':<44}{'ours':>10}{'without':>10}")
    space = {"h0": Domain(uniform=[0.0, 1.0]), "h1": Domain(uniform=[0.0, 1.0])}
    start = [{"h0": 1.0, "h1": 0.0}, {"h0": 0.0, "h1": 1.0}]
    settings: dict[str, Any] = {"num_members": 2, "interval_steps": 10, "initial": start}

    def quadratic(name: str, num_steps: int, **options: Any) -> float:
        ends = []
        for seed in range(seeds):
            strategy = STRATEGIES[name](space, num_steps=num_steps, seed=seed, **settings, **options)
            Simulator(ToyQuadratic(), strategy, seed=seed).finish()
            ends.append(1.2 - strategy.members[strategy.best()].loss)
        return statistics.median(ends)

    ours = quadratic("truncation", 400, quantile_fraction=0.5, resample_probability=0.25)
    print(f"{'quadratic of Figure 2, best Q of 1.2':<44}{ours:>10.4f}{quadratic('independent', 2000):>10.4f}")

    def wave(name: str) -> float:
        ends = []
        for seed in range(seeds):
            strategy = STRATEGIES[name](
                {"lr": Domain(log_uniform=[1e-4, 2e-2])}, num_members=4, num_steps=2000, interval_steps=5, seed=seed
            )
            Simulator(TriangleWave(), strategy, seed=seed).finish()
            ends.append(200 - strategy.members[strategy.best()].loss)
        return statistics.median(ends)

    print(f"{'triangle wave, score after 2000 (goal 200)':<44}{wave('truncation'):>10.1f}{wave('independent'):>10.1f}")


# simulated training

SIMULATED: dict[str, tuple[Callable[[Schedule], Any], Domain]] = {
    "noisy quadratic": (
        functools.partial(NoisyQuadratic, noise=1.0, num_dimensions=1000),
        Domain(log_uniform=[1e-3, 1.9]),
    ),
    "law curves": (LawCurves, Domain(log_uniform=[1e-4, 1e-1])),
}
SIMULATED_STEPS, SIMULATED_INTERVAL = 2000, 100
SIMULATED_ROWS = [row for row, (kind, shape, _) in ROWS.items() if shape != "any" and kind is not AveragedTruncation]


def best_known(problem: Any, domain: Domain) -> tuple[float, str]:
    """Return the lowest expected final loss among wsd schedules, and which it is."""
    shares = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    shapes = {s: Schedule(name="wsd", peak=1.0, num_steps=SIMULATED_STEPS, cooldown_fraction=s) for s in shares}
    found = [
        (problem.expected(lr * shapes[share].values()), lr, share)
        for lr in np.geomspace(*domain.bounds, 33)
        for share in shares
    ]
    loss, lr, share = min(found)
    return float(loss), f"wsd, peak {lr:.3g}, cooldown {share:.0%}"


def simulated_end(task: str, row: str, seed: int) -> float:
    """Return the expected loss of the best member's end: its last loss without the error of one evaluation."""
    problem, domain = SIMULATED[task]
    shape = ROWS[row][1]
    strategy = make(
        row,
        domain,
        "lr",
        schedule_of(shape, SIMULATED_STEPS),
        num_steps=SIMULATED_STEPS,
        interval_steps=SIMULATED_INTERVAL,
        seed=seed,
    )
    trained: Problem = problem(schedule_of(shape, SIMULATED_STEPS))
    Simulator(trained, strategy, seed=seed).finish()
    return strategy.members[strategy.best()].loss


def simulated(seeds: int, rows: Sequence[str]) -> None:
    for task, (problem, domain) in SIMULATED.items():
        best, which = best_known(problem(schedule_of("constant", SIMULATED_STEPS)), domain)
        greedy = [simulated_end(task, "truncation, constant", seed) for seed in range(seeds)]
        print(f"\n{task}: best known {best:.4f} ({which}); greedy gap {statistics.median(greedy) - best:.4f}")
        print(f"{'':<34}{'median':>10}{'mean':>10}{'gap closed':>12}{'wins':>8}{'s/run':>8}")
        for row in rows:
            started = time.perf_counter()
            ends = [simulated_end(task, row, seed) for seed in range(seeds)]
            closed = statistics.median((a - b) / (a - best) for a, b in zip(greedy, ends, strict=True))
            wins = sum(b < a for a, b in zip(greedy, ends, strict=True))
            print(
                f"{row:<34}{statistics.median(ends):>10.4f}{statistics.mean(ends):>10.4f}{closed:>11.0%} "
                f"{wins:>4}/{seeds:<3}{(time.perf_counter() - started) / seeds:>7.2f}",
                flush=True,
            )


# real training

TASKS: dict[str, tuple[dict[str, Any], Domain]] = {
    "gpt": (
        {
            "batch_size": 8,
            "data": {"source": "stdlib", "context_length": 32},
            "model": {"name": "gpt", "depth": 2, "width": 32, "num_heads": 2},
            "eval": {"num_batches": 4, "batch_size": 16},
        },
        Domain(log_uniform=[1e-4, 1e-1]),
    ),
    "cnn": (
        {
            "batch_size": 16,
            "data": {"name": "images", "source": "digits", "augment": "shift"},
            "model": {"name": "cnn", "depth": 3, "width": 8},
            "optimizer": {"name": "sgd", "momentum": 0.9},
            "eval": {"num_batches": "all", "batch_size": 128},
        },
        Domain(log_uniform=[1e-4, 1.0]),
    ),
}
REAL_ROWS = [
    "random search",
    "best fixed wsd",
    ASHA,
    "stock Ray, constant",
    "stock Ray, wsd",
    "truncation, wsd",
    "averaged truncation, wsd",
    "pb2, wsd",
    "mf_pbt, wsd",
    OURS,
]
ROUNDS, EVALS = 16, 2
LR = "schedule.peak_lr"


def real_end(task: str, row: str, seed: int, num_steps: int) -> dict[str, Any]:
    """Train a population; return its end as a row."""
    from landscape_ray.training.population import CohortPopulation

    train, domain = TASKS[task]
    shape = "any" if row == ASHA else ROWS[row][1]
    interval, warmup = num_steps // ROUNDS, num_steps // 50
    train = train | {
        "num_steps": num_steps,
        "eval": train["eval"] | {"every_steps": interval // EVALS},
        "schedule": {
            "name": "wsd" if shape == "any" else shape,
            "warmup_steps": warmup,
            "cooldown_fraction": COOLDOWN,
        },
    }
    started = time.process_time()
    about = {"task": task, "row": row, "seed": seed, "num_steps": num_steps}
    if row == ASHA:
        space = {LR: domain, "schedule.name": SCHEDULES}
        found = asha_tpe(train, space, seed, num_steps=num_steps, min_steps=2 * interval, budget=MEMBERS * num_steps)
        return about | found | {"cpu_seconds": round(time.process_time() - started, 1)}
    if ROWS[row][0] in (STRATEGIES["forecast"], AveragedTruncation):
        # averaged over the last half of an interval, more or less
        train["averaging"] = {"name": "ema", "decay": 1 - 2 / interval}
    schedule = schedule_of("wsd" if shape == "any" else shape, num_steps, warmup)
    strategy = make(row, domain, LR, schedule, num_steps=num_steps, interval_steps=interval, seed=seed)
    population = CohortPopulation(train, strategy, seed=seed, route=ROUTES[task])
    for _ in population.run():
        pass
    best = strategy.members[strategy.best()]
    return about | {
        "loss": best.loss,
        "values": best.values,
        "updates": population.num_updates,
        "exploits": sum(decision.donor is not None for decision in population.decisions),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


ROUTES = {"gpt": "recorded", "cnn": "single"}
"""Fixed, so that runs repeat to the bit."""


def real(
    tasks: Sequence[str], rows: Sequence[str], seeds: int, num_steps: int, save: Path | None, *, train: bool
) -> None:
    """Make the runs that the file lacks, and print the table of those that there are."""
    import torch

    torch.set_num_threads(1)
    known = [json.loads(line) for line in save.read_text().splitlines()] if save and save.exists() else []
    ends = {(r["task"], r["row"], r["seed"]): r for r in known if r["num_steps"] == num_steps}
    for task, seed, row in itertools.product(tasks, range(seeds), rows):
        if train and (task, row, seed) not in ends:
            found = ends[task, row, seed] = real_end(task, row, seed, num_steps)
            if save:
                with save.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    for task in tasks:
        print(f"\n{task}: {MEMBERS} members of {num_steps} updates, final held-out loss in nats")
        print(f"{'':<34}{'seeds':>6}{'median':>9}{'worst':>9}{'forecast -':>12}{'wins':>7}{'updates':>9}{'CPU s':>7}")
        for row in rows:
            found = {seed: ends[task, row, seed] for seed in range(seeds) if (task, row, seed) in ends}
            if not found:
                continue
            losses = [f["loss"] for f in found.values()]
            pairs = [
                ends[task, OURS, seed]["loss"] - f["loss"]
                for seed, f in found.items()
                if row != OURS and (task, OURS, seed) in ends
            ]
            paired = f"{statistics.median(pairs):+12.4f}{sum(d < 0 for d in pairs):>4}/{len(pairs):<2}" if pairs else ""
            print(
                f"{row:<34}{len(found):>6}{statistics.median(losses):>9.4f}{max(losses):>9.4f}{paired:<19}"
                f"{statistics.median(f['updates'] for f in found.values()):>9.0f}"
                f"{statistics.median(f['cpu_seconds'] for f in found.values()):>7.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=("toys", "simulated", "real"), action="append", help="default: toys, simulated"
    )
    parser.add_argument("--seeds", type=int, default=0, help="default: 20, of real training 5")
    parser.add_argument("--rows", default="", help="rows to make, separated by ';'")
    parser.add_argument("--tasks", default="gpt,cnn", help="of real training")
    parser.add_argument("--steps", type=int, default=480, help="updates of each member in real training")
    parser.add_argument("--save", type=Path, help="file that runs of real training are appended to")
    parser.add_argument("--no-training", action="store_true", help="only print the runs that the file has")
    options = parser.parse_args()
    parts = options.part or ["toys", "simulated"]
    chosen = [row.strip() for row in options.rows.split(";") if row.strip()]
    for row in chosen:
        if row not in ROWS and not (row == ASHA and parts == ["real"]):
            parser.error(f"--rows must name rows of the table, got '{row}'; valid: {'; '.join([ASHA, *ROWS])}")
    if "toys" in parts:
        toys(options.seeds or 20)
    if "simulated" in parts:
        simulated(options.seeds or 20, chosen or SIMULATED_ROWS)
    if "real" in parts:
        real(
            options.tasks.split(","),
            chosen or REAL_ROWS,
            options.seeds or 5,
            options.steps,
            options.save,
            train=not options.no_training,
        )


if __name__ == "__main__":
    main()
