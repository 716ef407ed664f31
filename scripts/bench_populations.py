"""Populations against each other and against searches, at the same number of updates.

    python scripts/bench_populations.py                                toys and simulated training: minutes
    python scripts/bench_populations.py --part real --tasks gpt,cnn    a small GPT and a small CNN: an hour of one core

Toys: Figure 2 of the paper on population-based training, and the triangle wave of Ray Tune's example. Simulated: a
noisy quadratic and loss curves of a law, where the best schedule of a family is computed; the greedy gap is what
truncation ends above it, and a column says how much of this gap a row closes (median over paired seeds).

Real: all rows have the same number of members and of updates each, the same initial learning rates for each seed where
they draw any, and end with the lowest held-out loss of a member. The populations change the peak learning rate; the
search draws peak and schedule (constant, linear, cosine or wsd); "best fixed wsd" spaces its peaks evenly over the
domain. "stock rules" are the decision rules of Ray Tune's scheduler with its defaults, carried out in the same process:
perturbation by 0.8 or 1.2 without a domain, a draw from the domain with probability 0.25, members that report NaN out
of the race; all members meet at each interval, as with its option synch. Paired columns are against them under a
constant schedule: median difference, wins.

Populations under a wsd schedule share its cooldown; those marked "constant" have to find one. The forecast row also
evaluates averaged weights: the same updates, more evaluations. With --save every run is appended to a file as a line of
JSON, and runs that the file has are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from landscape_ray.domains import Domain
from landscape_ray.populations import STRATEGIES, Choice, Strategy, Values
from landscape_ray.populations.simulation import (
    LawCurves,
    NoisyQuadratic,
    Problem,
    Simulator,
    ToyQuadratic,
    TriangleWave,
)
from landscape_ray.populations.strategies import Truncation
from landscape_ray.schedules import Schedule

MEMBERS = 8
COOLDOWN = 0.2


class StockRules(Truncation):
    """What Ray Tune's scheduler would decide: the baseline that users have today."""

    name = "stock"

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"factors": (1.2, 0.8), "resample_probability": 0.25}
        super().__init__(*args, **options)

    def propose(self, donor: int) -> Values:
        values = dict(self.members[donor].values)
        for name, domain in self.space.items():
            resample, which, where = self.generator.random(3)
            if resample < self.resample_probability:
                values[name] = domain.at(where)
            else:
                values[name] = float(values[name]) * self.factors[int(which < 0.5)]
        return values

    def rescue(self, number: int) -> Choice:
        return Choice(reason="diverged")

    def _check_values(self, values: Values, source: str) -> None:
        """Let values leave their domains."""


ROWS: dict[str, tuple[type[Strategy], str, dict[str, Any]]] = {
    "random search": (STRATEGIES["independent"], "any", {}),
    "best fixed wsd": (STRATEGIES["independent"], "wsd", {"grid": True}),
    "stock rules, constant": (StockRules, "constant", {}),
    "stock rules, wsd": (StockRules, "wsd", {}),
    "truncation, constant": (STRATEGIES["truncation"], "constant", {}),
    "truncation, wsd": (STRATEGIES["truncation"], "wsd", {}),
    "significance, wsd": (STRATEGIES["significance"], "wsd", {}),
    "pb2, constant": (STRATEGIES["pb2"], "constant", {}),
    "pb2, wsd": (STRATEGIES["pb2"], "wsd", {}),
    "fire, constant": (STRATEGIES["fire"], "constant", {}),
    "mf_pbt, constant": (STRATEGIES["mf_pbt"], "constant", {}),
    "mf_pbt, wsd": (STRATEGIES["mf_pbt"], "wsd", {}),
    "ipbt, constant": (STRATEGIES["ipbt"], "constant", {}),
    "forecast, wsd": (STRATEGIES["forecast"], "wsd", {}),
}
"""Name of the row, its strategy, the schedule of the learning rate, options."""

BASELINE = "stock rules, constant"


def schedule_of(name: str, num_steps: int, warmup_steps: int = 0) -> Schedule:
    return Schedule(name=name, peak=1.0, num_steps=num_steps, warmup_steps=warmup_steps, cooldown_fraction=COOLDOWN)


def make(row: str, domain: Domain, lr_name: str, schedule: Schedule, **settings: Any) -> Strategy:
    """Return the strategy of a row."""
    kind, shape, options = ROWS[row]
    space = {lr_name: domain}
    options = dict(options)
    if shape == "any":
        space["schedule.name"] = Domain(choices=["constant", "linear", "cosine", "wsd"])
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
SIMULATED_ROWS = [row for row, (_, shape, _) in ROWS.items() if shape != "any"]


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
        print(f"{'':<24}{'median':>10}{'mean':>10}{'gap closed':>12}{'wins':>8}{'s/run':>8}")
        for row in rows:
            started = time.perf_counter()
            ends = [simulated_end(task, row, seed) for seed in range(seeds)]
            closed = statistics.median((a - b) / (a - best) for a, b in zip(greedy, ends, strict=True))
            wins = sum(b < a for a, b in zip(greedy, ends, strict=True))
            print(
                f"{row:<24}{statistics.median(ends):>10.4f}{statistics.mean(ends):>10.4f}{closed:>11.0%} "
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
REAL_ROWS = [row for row in ROWS if not row.startswith(("significance", "fire", "ipbt"))]
ROUNDS, EVALS = 16, 2
LR = "schedule.peak_lr"


def real_end(task: str, row: str, seed: int, num_steps: int) -> dict[str, Any]:
    """Train a population; return its end as a row."""
    from landscape_ray.training.population import CohortPopulation

    train, domain = TASKS[task]
    shape, interval, warmup = ROWS[row][1], num_steps // ROUNDS, num_steps // 50
    train = train | {
        "num_steps": num_steps,
        "eval": train["eval"] | {"every_steps": interval // EVALS},
        "schedule": {
            "name": "wsd" if shape == "any" else shape,
            "warmup_steps": warmup,
            "cooldown_fraction": COOLDOWN,
        },
    }
    if ROWS[row][0] is STRATEGIES["forecast"]:
        # averaged over the last half of an interval, more or less
        train["averaging"] = {"name": "ema", "decay": 1 - 2 / interval}
    schedule = schedule_of("wsd" if shape == "any" else shape, num_steps, warmup)
    strategy = make(row, domain, LR, schedule, num_steps=num_steps, interval_steps=interval, seed=seed)
    started = time.process_time()
    population = CohortPopulation(train, strategy, seed=seed, route=ROUTES[task])
    for _ in population.run():
        pass
    best = strategy.members[strategy.best()]
    return {
        "task": task,
        "row": row,
        "seed": seed,
        "num_steps": num_steps,
        "loss": best.loss,
        "lr": best.values[LR],
        "updates": population.num_updates,
        "exploits": sum(decision.donor is not None for decision in population.decisions),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


ROUTES = {"gpt": "stacked", "cnn": "single"}
"""Fixed, so that runs repeat to the bit."""


def real(tasks: Sequence[str], rows: Sequence[str], seeds: int, num_steps: int, save: Path | None) -> None:
    import torch

    torch.set_num_threads(1)
    known = [json.loads(line) for line in save.read_text().splitlines()] if save and save.exists() else []
    ends = {(r["task"], r["row"], r["seed"]): r for r in known if r["num_steps"] == num_steps}
    for task in tasks:
        for seed in range(seeds):
            for row in rows:
                if (task, row, seed) not in ends:
                    found = ends[task, row, seed] = real_end(task, row, seed, num_steps)
                    if save:
                        with save.open("a") as file:
                            file.write(json.dumps(found) + "\n")
    for task in tasks:
        print(f"\n{task}: {MEMBERS} members of {num_steps} updates, {seeds} seeds, final held-out loss in nats")
        print(
            f"{'':<24}{'median':>9}{'worst':>9}{'difference':>12}{'wins':>7}{'updates':>9}{'exploits':>10}{'CPU s':>7}"
        )
        base = [ends[task, BASELINE, seed]["loss"] for seed in range(seeds) if (task, BASELINE, seed) in ends]
        for row in rows:
            found = [ends[task, row, seed] for seed in range(seeds)]
            losses = [f["loss"] for f in found]
            paired = [b - a for a, b in zip(base, losses, strict=True)] if len(base) == seeds else []
            difference = (
                f"{statistics.median(paired):+12.4f}{sum(d < 0 for d in paired):>4}/{seeds}" if paired else f"{'':>18}"
            )
            print(
                f"{row:<24}{statistics.median(losses):>9.4f}{max(losses):>9.4f}{difference}"
                f"{statistics.median(f['updates'] for f in found):>10.0f}"
                f"{statistics.median(f['exploits'] for f in found):>10.0f}"
                f"{statistics.median(f['cpu_seconds'] for f in found):>7.0f}"
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
    options = parser.parse_args()
    parts = options.part or ["toys", "simulated"]
    chosen = [row.strip() for row in options.rows.split(";") if row.strip()]
    for row in chosen:
        if row not in ROWS:
            parser.error(f"--rows must name rows of the table, got '{row}'; valid: {'; '.join(ROWS)}")
    if "toys" in parts:
        toys(options.seeds or 20)
    if "simulated" in parts:
        simulated(options.seeds or 20, chosen or SIMULATED_ROWS)
    if "real" in parts:
        real(options.tasks.split(","), chosen or REAL_ROWS, options.seeds or 5, options.steps, options.save)


if __name__ == "__main__":
    main()
