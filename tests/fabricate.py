"""Sweep folders with invented rows, written through the real writers: losses obey the momentum law plus noise."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from landscape_ray.laws import annealing_area
from landscape_ray.records import EvalRecord, EventRecord, ProbeRecord, RunSummary, StepRecord
from landscape_ray.reports.views import Sweep
from landscape_ray.schedules import Schedule
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter

LAW = {"L0": 1.62, "A": 0.66, "alpha": 0.42, "C": 2.4, "decay": 0.95}
SHARED_LR = 0.003

SEARCH_POINTS: list[tuple[str, float, float]] = [
    ("constant", SHARED_LR, 0.2),
    ("linear", SHARED_LR, 0.2),
    ("cosine", SHARED_LR, 0.2),
    ("wsd", SHARED_LR, 0.2),
    ("wsd", SHARED_LR, 0.5),
    ("cosine", 0.0011, 0.2),
    ("linear", 0.0062, 0.2),
    ("wsd", 0.0018, 0.35),
    ("cosine", 0.0095, 0.2),
    ("constant", 0.0007, 0.2),
    ("wsd", 0.0145, 0.3),
    ("linear", 0.06, 0.2),
]
"""Schedule, peak learning rate, cooldown fraction; the last one diverges."""

META = {
    "seed": 7,
    "created_unix": 1_750_000_000.0,
    "status": "finished",
    "versions": {"torch": "2.13.0", "ray": "2.60.0"},
    "hardware": {"cpus": 8, "gpus": [], "machine": "x86_64", "system": "Linux"},
    "sweep_id": "0123456789abcdef",
}

SEARCH_SPEC = """name = "{name}"
description = "Which schedule at which learning rate? A small GPT on Python source code."
seed = 7

[train]
num_steps = {steps}
batch_size = 16
data = {{ source = "stdlib", context_length = 128 }}
model = {{ depth = 4, width = 64, num_heads = 4 }}

[train.eval]
every_steps = 25

[train.probes.sharpness]
every_steps = 50

[space."schedule.name"]
choices = ["constant", "linear", "cosine", "wsd"]

[search]
sampler = "tpe"
num_trials = 12
initial = [{{ "schedule.name" = "constant", "schedule.peak_lr" = 0.003 }}]
"""

POPULATION_SPEC = """name = "{name}"
description = "Four members change their learning rate on the way."
seed = 7

[train]
num_steps = {steps}
batch_size = 16

[population]
num_members = 4
interval_steps = 100
quantile_fraction = 0.25
"""


def config(shape: str, peak_lr: float, cooldown: float, steps: int, warmup: int) -> dict[str, Any]:
    """Return a training configuration as the summaries hold it."""
    return {
        "num_steps": steps,
        "batch_size": 16,
        "seed": 7,
        "data": {"source": "stdlib", "context_length": 128},
        "model": {"name": "gpt", "depth": 4, "width": 64, "num_heads": 4, "positions": "rotary", "tied_head": True},
        "optimizer": {"name": "adamw", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95},
        "schedule": {"name": shape, "peak_lr": peak_lr, "warmup_steps": warmup, "cooldown_fraction": cooldown},
        "eval": {"every_steps": 25},
        "probes": {"sharpness": {"every_steps": 50}},
    }


def law_loss(lr: np.ndarray, warmup: int) -> np.ndarray:
    """Return the law's loss after every update, with a penalty for a peak far from 0.004."""
    counted = lr.copy()
    counted[:warmup] = lr.max()
    area = annealing_area(counted, LAW["decay"])
    # the transient of the first steps, which no law describes
    start = 3.2 * np.exp(-np.arange(len(lr)) / (0.015 * len(lr)))
    scale = SHARED_LR / lr.max()  # one course for all peaks: what they differ by is the penalty
    off = 0.035 * math.log(lr.max() / 0.004) ** 2
    falling = 0.8 * LAW["A"] * np.cumsum(scale * counted) ** -LAW["alpha"]
    return LAW["L0"] + off + falling - LAW["C"] * scale * area + start


class Clock:
    """Progress of one run, as the training loop counts it."""

    def __init__(self, start: float) -> None:
        self.elapsed, self.start = 0.0, start
        self.eval_seconds = self.probe_seconds = 0.0

    def at(self, step: int, cost: float) -> dict[str, Any]:
        self.elapsed += cost
        tokens = step * 16 * 128
        stamp = self.start + self.elapsed
        return {
            "step": step,
            "num_tokens": tokens,
            "flops": 1.1e6 * tokens,
            "elapsed_seconds": self.elapsed,
            "time_unix": stamp,
        }


def write_updates(
    writer: PartWriter,
    clock: Clock,
    lr: np.ndarray,
    losses: np.ndarray,
    start: int,
    stop: int,
    rng: np.random.Generator,
    sharp: bool = True,
) -> float:
    """Write updates start + 1 .. stop with their evaluations and probes; return the last held-out loss."""
    last = math.nan
    for step in range(start, stop + 1):
        if step > start:
            rates = {"lr": float(lr[step - 1]), "weight_decay": 0.1, "momentum": 0.9}
            train = float(losses[step - 1] + 0.05 * rng.standard_normal())
            writer.append(
                StepRecord(**clock.at(step, 0.05), cost_seconds=0.05, loss_nats=train, grad_norm=1.0, **rates)
            )
        if step % 25 == 0 or step == stop:
            last = float(losses[max(step - 1, 0)] + 0.004 * rng.standard_normal())
            writer.append(EvalRecord(**clock.at(step, 0.08), cost_seconds=0.08, loss_nats=last))
            clock.eval_seconds += 0.08
        if sharp and step % 50 == 0:
            rate = max(float(lr[max(step - 1, 0)]), 1e-5)
            value = min(40 + 1.1 * step, 1.7 / rate) * float(np.exp(0.06 * rng.standard_normal()))
            spent = {"probe": "sharpness", "value": value, "standard_error": 0.03 * value, "num_matvecs": 6}
            writer.append(ProbeRecord(**clock.at(step, 0.04), cost_seconds=0.04, **spent))
            clock.probe_seconds += 0.04
    return last


def summary(run_id: str, cfg: dict[str, Any], clock: Clock, step: int, final: float, **more: Any) -> RunSummary:
    tokens = step * 16 * 128
    fields: dict[str, Any] = {
        "status": "finished",
        "varied": {f"schedule.{key}": cfg["schedule"][key] for key in ("name", "peak_lr", "cooldown_fraction")},
        "best_loss_nats": final,
    }
    return RunSummary(
        run_id=run_id,
        config=cfg,
        step=step,
        num_steps=cfg["num_steps"],
        num_tokens=tokens,
        flops=1.1e6 * tokens,
        num_params=216_000,
        num_params_non_embedding=216_000 - 256 * 64,
        final_loss_nats=final,
        elapsed_seconds=clock.elapsed,
        probe_seconds=clock.probe_seconds,
        eval_seconds=clock.eval_seconds,
        **(fields | more),
    )


def make_search(
    path: Path,
    *,
    steps: int = 600,
    points: list[tuple[str, float, float]] | None = None,
    sharp: bool = True,
    name: str = "lr_schedules",
) -> SweepFolder:
    """Write a finished search; with the default points the last run diverges."""
    spec = SEARCH_SPEC.format(name=name, steps=steps)
    folder = SweepFolder.create(path, spec_text=spec, meta={"name": path.name, **META})
    warmup = steps // 20
    for index, (shape, peak, cooldown) in enumerate(SEARCH_POINTS if points is None else points):
        rng = np.random.default_rng([3, index])
        run_id = f"t{index:03d}"
        cfg = config(shape, peak, cooldown, steps, warmup)
        fields = {"warmup_steps": warmup, "cooldown_fraction": cooldown}
        lr = Schedule(name=shape, peak=peak, num_steps=steps, **fields).values()
        losses = law_loss(lr, warmup)
        clock = Clock(META["created_unix"] + 20.0 * (index // 2))
        writer = PartWriter(folder.trial(run_id))
        if peak > 0.05:
            stop = steps // 6 // 25 * 25
            losses = losses + np.exp(np.arange(steps) / stop * 1.2)
            last = write_updates(writer, clock, lr, losses, 0, stop, rng, sharp)
            how = f"loss nan in update {stop + 1}"
            writer.append(EventRecord(**clock.at(stop, 0.0), event="diverged", detail=json.dumps({"how": how})))
            done = summary(run_id, cfg, clock, stop, last, status="diverged", message=f"diverged: {how}")
        else:
            last = write_updates(writer, clock, lr, losses, 0, steps, rng, sharp)
            done = summary(run_id, cfg, clock, steps, last)
        folder.trial(run_id).commit(done, writer.flush())
    return folder


def make_population(path: Path, *, steps: int = 600, name: str = "population") -> SweepFolder:
    """Write a population of four: t001 copies t000 at a third of the way, t003 copies t001 at two thirds."""
    spec = POPULATION_SPEC.format(name=name, steps=steps)
    folder = SweepFolder.create(path, spec_text=spec, meta={"name": path.name, **META})
    third = steps // 3 // 25 * 25
    copies = {"t001": (third, "t000"), "t003": (2 * third, "t001")}
    peaks = {"t000": 0.004, "t001": 0.0009, "t002": 0.0022, "t003": 0.012}
    after = {"t001": 0.0031, "t003": 0.00155}
    rates = {run_id: np.full(steps, peak) for run_id, peak in peaks.items()}
    losses: dict[str, np.ndarray] = {}
    for run_id in peaks:
        own = rates[run_id].copy()
        if run_id in copies:
            at, donor = copies[run_id]
            own[:at], own[at:] = rates[donor][:at], after[run_id]
        rates[run_id] = own
        losses[run_id] = law_loss(own, 0)
    for index, (run_id, peak) in enumerate(peaks.items()):
        rng = np.random.default_rng([5, index])
        clock, writer = Clock(META["created_unix"]), PartWriter(folder.trial(run_id))
        first = np.full(steps, peak)
        stop = copies[run_id][0] if run_id in copies else steps
        last = write_updates(writer, clock, first, law_loss(first, 0), 0, stop, rng, sharp=False)
        final_lr = peak
        if run_id in copies:
            at, donor = copies[run_id]
            final_lr = after[run_id]
            event = {"event": "exploit", "donor": donor, "donor_step": at}
            detail = json.dumps({"schedule.peak_lr": final_lr})
            writer.append(EventRecord(**clock.at(at, 0.0), detail=detail, **event))
            last = write_updates(writer, clock, rates[run_id], losses[run_id], at, steps, rng, sharp=False)
        cfg = config("constant", final_lr, 0.2, steps, 0)
        done = summary(run_id, cfg, clock, steps, last, varied={"schedule.peak_lr": final_lr})
        folder.trial(run_id).commit(done, writer.flush())
    return folder


def probed(
    sweep: Sweep, values: Mapping[str, Callable[[np.ndarray], np.ndarray]], *, error: float = 0.1, every: int = 50
) -> Sweep:
    """Return the sweep with more probes: name to values at the steps; each error a share of its value.

    A measurement costs two gradients and half a second, which its main estimate bears.
    """
    runs = []
    for run in sweep.runs:
        rows = {name: list(column) for name, column in run.probes.items()}
        steps = np.arange(0, run.summary.step + 1, every)
        for name, of in values.items():
            main = "/" not in name
            for step, value in zip(steps.tolist(), np.asarray(of(steps), dtype=np.float64).tolist(), strict=True):
                row = {"probe": name, "step": step, "value": value, "standard_error": error * abs(value)}
                row |= {"price_gradients": 2.0 * main, "cost_seconds": 0.5 * main}
                for column in rows:
                    rows[column].append(row.get(column, 0))
        columns = {
            name: np.array(column, dtype=object if name == "probe" else np.float64)
            for name, column in rows.items()
            if name in ("probe", "step", "value", "standard_error", "price_gradients", "cost_seconds")
        }
        spent = run.summary.probe_seconds + 0.5 * len(steps) * sum("/" not in name for name in values)
        runs.append(
            dataclasses.replace(run, probes=columns, summary=dataclasses.replace(run.summary, probe_seconds=spent))
        )
    return dataclasses.replace(sweep, runs=tuple(runs))


def configured(sweep: Sweep, momentum: float | None = None, **tables: Any) -> Sweep:
    """Return the sweep with other tables in the configuration of its runs, and another momentum in its updates."""
    runs = []
    for run in sweep.runs:
        summary = dataclasses.replace(run.summary, config=run.summary.config | tables)
        steps = dict(run.steps)
        if momentum is not None:
            steps["momentum"] = np.full(len(steps["lr"]), momentum)
        runs.append(dataclasses.replace(run, summary=summary, steps=steps))
    return dataclasses.replace(sweep, runs=tuple(runs))
