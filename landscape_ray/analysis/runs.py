"""One run as a report sees it: its summary, its rows as arrays, and what was really applied to it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from landscape_ray.config import flatten
from landscape_ray.records import COLUMNS, RunSummary

if TYPE_CHECKING:
    from landscape_ray.tracking.collect import Collected

Columns = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A run and its rows, by kind.

    A member of a population that adopts older weights goes back in steps. `steps` and `evals` are what remained:
    ordered by step, the last row of each. `all_steps` are the updates as they were made, none left out.
    """

    summary: RunSummary
    steps: Columns
    evals: Columns
    probes: Columns
    events: Columns
    all_steps: Columns
    variants: Columns
    """Held-out losses with something changed: averaged weights, shifted data."""
    weights_lr: NDArray[np.float64] | None = None
    """Learning rates that the final weights went through, where copied weights make them others than the run's own."""

    @property
    def run_id(self) -> str:
        """Identifier inside the sweep."""
        return self.summary.run_id

    @functools.cached_property
    def schedule(self) -> dict[str, Any]:
        """The table [train.schedule] as asked; empty where the configuration has none."""
        table = self.summary.config.get("schedule", {})
        return dict(table) if isinstance(table, dict) else {"name": str(table)}

    @property
    def shape(self) -> str:
        """Name of the learning-rate schedule; `population` when events changed it on the way."""
        return "population" if self.mutated else str(self.schedule.get("name", "unnamed"))

    @functools.cached_property
    def mutated(self) -> bool:
        """Whether weights were copied or values changed during the run, so that no schedule describes it."""
        return bool(np.isin(self.events["event"].astype(str), ("exploit", "mutate")).any())

    @functools.cached_property
    def peak_lr(self) -> float:
        """The largest learning rate applied to the final weights; the one asked for without any update; else nan."""
        if self.weights_lr is not None and len(self.weights_lr):
            return float(np.nanmax(self.weights_lr))
        if len(self.steps["lr"]):
            return float(np.nanmax(self.steps["lr"]))
        asked = self.schedule.get("peak_lr", math.nan)
        return float(asked) if isinstance(asked, int | float) else math.nan

    @property
    def warmup_steps(self) -> int:
        """Updates of warm-up, as asked; of a foreign run, without a configuration, those that rise to the peak.

        The latter only where the rate never falls before its peak, and reaches it in the first quarter of the run.
        """
        if self.schedule or not len(self.steps["lr"]):
            return int(self.schedule.get("warmup_steps", 0))
        lr = np.asarray(self.steps["lr"], dtype=np.float64)
        if not np.isfinite(lr).all():
            return 0
        first = int(np.argmax(lr >= lr.max() * (1 - 1e-9)))
        rises = bool((np.diff(lr[: first + 1]) >= 0).all()) and first <= len(lr) // 4
        return max(int(self.steps["step"][first]) - 1, 0) if rises and first else 0

    @property
    def loss(self) -> float:
        """Held-out loss at the end; nan for a run that diverged, whatever it was before."""
        return math.nan if self.summary.status == "diverged" else self.summary.final_loss_nats

    @property
    def has_result(self) -> bool:
        """Whether the run went to its end and has a loss: the runs that are compared with each other."""
        return self.summary.status == "finished" and math.isfinite(self.loss)

    @functools.cached_property
    def lives(self) -> NDArray[np.int64]:
        """For each row of `all_steps`, how many times the run had adopted another member's weights before it."""
        return self.lives_of(self.all_steps)

    def lives_of(self, rows: Columns) -> NDArray[np.int64]:
        """Return for each row how many times the run had adopted another member's weights before it."""
        copied = self.events["event"].astype(str) == "exploit"
        adopted = np.asarray(self.events["elapsed_seconds"][copied], dtype=np.float64)
        return np.searchsorted(adopted, np.asarray(rows["elapsed_seconds"], dtype=np.float64), side="left")

    def probe(self, name: str) -> Columns:
        """Return the rows of one probe."""
        chosen = self.probes["probe"].astype(str) == name
        return {key: column[chosen] for key, column in self.probes.items()}


def read_runs(collected: Collected) -> list[Run]:
    """Return every run of a collected sweep with its rows, in the order of the summaries."""
    from landscape_ray.tracking.collect import columns_by_run  # pyarrow is needed here only

    kinds = ("step", "eval", "variant", "probe", "event")
    by_kind = {kind: columns_by_run(collected.records, kind) for kind in kinds}
    empty = {c.name: np.empty(0, dtype=object if c.dtype == "string" else c.dtype) for c in COLUMNS}
    runs = []
    for summary in collected.runs:
        rows = {kind: by_kind[kind].get(summary.run_id, empty) for kind in kinds}
        rest: dict[str, Any] = {"summary": summary, "probes": rows["probe"], "events": rows["event"]}
        rest |= {"variants": rows["variant"]}
        steps, evals = _ordered(rows["step"]), _ordered(rows["eval"])
        runs.append(Run(steps=steps, evals=evals, all_steps=rows["step"], **rest))
    return runs


def _ordered(columns: Columns) -> Columns:
    """Return rows sorted by step; of several with one step (a resume, a rolled-back member) the last one."""
    step = np.asarray(columns["step"], dtype=np.float64)
    if (np.diff(step) > 0).all():
        return columns
    _, index = np.unique(step[::-1], return_index=True)
    keep = len(step) - 1 - index
    return {key: column[keep] for key, column in columns.items()}


NOT_COMPARED = ("seed", "num_steps", "schedule", "probes", "device", "compile")
"""Top-level tables in which runs of one law may differ: they change the schedule, the noise or what is watched."""


def setting(run: Run) -> str:
    """Return the configuration without its schedule and without what does not change training, as one key."""
    kept = {key: value for key, value in run.summary.config.items() if key not in NOT_COMPARED}
    return json.dumps(flatten(kept), sort_keys=True, default=str)
