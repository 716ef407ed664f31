"""Time and memory from a large sweep on disk to fitted laws: collect the Parquet parts, make runs of the rows, fit.

The sweep is made here: every run has as many updates and as many evaluations as asked, written as a sweep writes them.
Beside our route stands the plain one for the same rows: one filter of the whole table for each run.

Usage:
    python scripts/bench_collect.py [--runs 1000] [--points 1000] [--peer-runs 20]
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from landscape_ray.analysis.runs import read_runs
from landscape_ray.analysis.table import table_of
from landscape_ray.laws import Curve, annealing_area, fit, fit_annealing
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA
from landscape_ray.records import RunSummary
from landscape_ray.schedules import Schedule
from landscape_ray.tracking.collect import collect, run_columns
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import ARROW_SCHEMA, WRITE_OPTIONS

TOKENS_PER_STEP = 4096
SHAPES = ("constant", "cosine", "linear", "wsd")


def make_sweep(path: Path, num_runs: int, num_points: int) -> None:
    """Write a sweep of runs of several sizes that follow a law of size and data, and an annealing law."""
    folder = SweepFolder.create(path, spec_text='name = "large"\n', meta={"name": "large", "experiment": "bench"})
    rng = np.random.default_rng(0)
    step = np.arange(1, num_points + 1)
    for index in range(num_runs):
        name = f"t{index:04d}"
        size = float(np.geomspace(1e5, 1e8, 10)[index % 10])
        steps = num_points * (1 + index // 10 % 5)
        shape = SHAPES[index // 50 % 4]
        lr = Schedule(name=shape, peak=1e-3, num_steps=num_points, warmup_steps=10).values()
        tokens = TOKENS_PER_STEP * steps
        final = 1.7 + 400 * size**-0.34 + 400 * tokens**-0.28
        loss = final + 0.05 * (np.cumsum(lr) ** -0.5 - num_points**-0.5) - 1.2 * annealing_area(lr, 0.99)
        loss = loss * np.exp(2e-3 * rng.standard_normal(num_points))
        nothing = pa.nulls(num_points)
        parts = []
        for kind in ("step", "eval"):
            known = {
                "run_id": pa.array([name] * num_points),
                "kind": pa.array([kind] * num_points),
                "step": pa.array(step),
                "num_tokens": pa.array(TOKENS_PER_STEP * step),
                "flops": pa.array(6.0 * size * TOKENS_PER_STEP * step),
                "elapsed_seconds": pa.array(0.01 * step),
                "cost_seconds": pa.array(np.full(num_points, 0.01)),
                "time_unix": pa.array(1.7e9 + 0.01 * step),
                "loss_nats": pa.array(loss),
            }
            if kind == "step":
                known |= {"lr": pa.array(lr), "grad_norm": pa.array(np.ones(num_points))}
            columns = [known.get(f.name, nothing).cast(f.type) for f in ARROW_SCHEMA]
            parts.append(pa.Table.from_arrays(columns, schema=ARROW_SCHEMA))
        trial = folder.trial(name)
        trial.records_path.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(parts), trial.part_path(0), **WRITE_OPTIONS)
        summary = RunSummary(
            run_id=name,
            status="finished",
            config={
                "num_steps": num_points,
                "schedule": {"name": shape, "peak_lr": 1e-3, "warmup_steps": 10},
            },
            varied={},
            step=num_points,
            num_steps=num_points,
            num_tokens=tokens,
            flops=6 * size * tokens,
            num_params=int(size),
            num_params_non_embedding=int(size),
            final_loss_nats=float(final * np.exp(2e-3 * rng.standard_normal())),
        )
        trial.commit(dataclasses.replace(summary, best_loss_nats=summary.final_loss_nats), 1)


@contextmanager
def timed(rows: list[tuple[str, float, str]], name: str) -> Iterator[list[str]]:
    """Append name, seconds and what was done."""
    said: list[str] = []
    started = time.perf_counter()
    yield said
    rows.append((name, time.perf_counter() - started, said[0] if said else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1000, help="updates, and evaluations, of every run")
    parser.add_argument("--peer-runs", type=int, default=20, help="runs that the plain route reads; scaled up to all")
    options = parser.parse_args()
    rows: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "large"
        with timed(rows, "(making the sweep)"):
            make_sweep(path, options.runs, options.points)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with timed(rows, "collect the parts") as said:
            collected = collect(path)
            said.append(f"{len(collected.records):,} rows of {len(collected.runs):,} runs")
        with timed(rows, "runs from rows") as said:
            runs = read_runs(collected)
            said.append(f"{len(runs):,} runs")
        with timed(rows, "scaling law, 200 resamples") as said:
            points, _ = table_of(collected, "bench").points(CHINCHILLA)
            said.append(f"{fit(CHINCHILLA, points, num_bootstrap=200).status}, {len(points):,} points")
        with timed(rows, "annealing law, 100 resamples") as said:
            curves = [
                Curve(
                    run.run_id, run.steps["lr"], run.evals["step"].astype(int), run.evals["loss_nats"], run.warmup_steps
                )
                for run in runs[::50]
            ]
            found = fit_annealing(curves, decay=0.99, num_bootstrap=100)
            said.append(f"{found.status}, {found.data['num_points']:,} points of {len(curves)} curves")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.perf_counter()
        for run in collected.runs[: options.peer_runs]:
            for kind in ("step", "eval", "variant", "probe", "event"):
                run_columns(collected.records, run.run_id, kind)
        plain = (time.perf_counter() - started) * options.runs / options.peer_runs
    print(f"{'what':<30}{'seconds':>9}  ")
    for name, seconds, said_ in rows:
        print(f"{name:<30}{seconds:>9.2f}  {said_}")
    ours = next(seconds for name, seconds, _ in rows if name == "runs from rows")
    print(f"{'peer: a filter for each run':<30}{plain:>9.2f}  from {options.peer_runs} runs; ratio {plain / ours:.0f}")
    print(f"{'peak memory':<30}{peak:>9.0f}  MiB, {before:.0f} MiB of it before collecting")


if __name__ == "__main__":
    main()
