"""Who copied whom in a population, and the path of the weights that won: the schedule that was found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from landscape_ray.analysis.runs import Run
from landscape_ray.reports.figures import Floats


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exploit:
    """Member `run_id` gave its weights up and went on from those that `donor` had at `step`."""

    run_id: str
    donor: str
    step: int
    time: float
    """When it happened, in any unit that orders the copies of a sweep."""
    values: dict[str, Any]
    """Values after the copy, as recorded."""
    reason: str = ""
    """Why, where the decision gave a reason."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Updates start < step <= stop in one life of a member: a part of an ancestry."""

    run_id: str
    life: int
    """How many times the member had copied before."""
    start: int
    stop: int


def exploits(runs: Sequence[Run]) -> list[Exploit]:
    """Return all copies of weights, in the order in which they happened."""
    found = []
    for run in runs:
        rows = run.events
        for index in np.flatnonzero(rows["event"].astype(str) == "exploit"):
            donor_step, stamp = float(rows["donor_step"][index]), float(rows["time_unix"][index])
            step = int(donor_step) if math.isfinite(donor_step) else int(rows["step"][index])
            detail = _detail(rows["detail"][index])
            reason, values = str(detail.pop("reason", "")), detail.get("values")
            found.append(
                Exploit(
                    run_id=run.run_id,
                    donor=str(rows["donor"][index]),
                    step=step,
                    time=stamp if math.isfinite(stamp) else float(step),
                    values=values if isinstance(values, dict) else detail,
                    reason=reason,
                )
            )
    return sorted(found, key=lambda one: (one.time, one.step, one.run_id))


def ancestry(copies: Sequence[Exploit], winner: str, end: int) -> list[Segment]:
    """Return where the weights of `winner` at step `end` were at every update, oldest segment first.

    >>> copy = Exploit(run_id="b", donor="a", step=10, time=1.0, values={})
    >>> [(s.run_id, s.life, s.start, s.stop) for s in ancestry([copy], "b", 30)]
    [('a', 0, 0, 10), ('b', 1, 10, 30)]
    """
    segments: list[Segment] = []
    member, stop, before = winner, end, math.inf
    while True:
        # what the donor copied after it was copied from is not part of these weights
        own = [one for one in copies if one.run_id == member and one.time < before and one.step <= stop]
        start = own[-1].step if own else 0
        segments.append(Segment(run_id=member, life=len(own), start=start, stop=stop))
        if not own:
            return segments[::-1]
        member, stop, before = own[-1].donor, own[-1].step, own[-1].time


def ancestry_lr(runs: Mapping[str, Run], segments: Sequence[Segment]) -> tuple[Floats, Floats]:
    """Return (steps, learning rates) of the updates that the surviving weights went through, in order."""
    return _along(runs, segments, "all_steps", "lr")


def ancestry_evals(runs: Mapping[str, Run], segments: Sequence[Segment]) -> tuple[Floats, Floats]:
    """Return (steps, held-out losses) of the evaluations of the surviving weights, in order."""
    return _along(runs, segments, "evals", "loss_nats")


def _along(
    runs: Mapping[str, Run], segments: Sequence[Segment], rows: Literal["all_steps", "evals"], column: str
) -> tuple[Floats, Floats]:
    """Return (steps, values) of the rows that belong to an ancestry."""
    steps, values = [np.zeros(0)], [np.zeros(0)]
    for segment in segments:
        if segment.run_id not in runs:
            continue
        run = runs[segment.run_id]
        table = getattr(run, rows)
        step = np.asarray(table["step"], dtype=np.float64)
        # what is there before the first update belongs to the weights as they were drawn
        after = (step > segment.start) | ((segment.start == 0) & (step == 0))
        inside = (run.lives_of(table) == segment.life) & after & (step <= segment.stop)
        steps.append(step[inside])
        values.append(np.asarray(table[column], dtype=np.float64)[inside])
    return np.concatenate(steps), np.concatenate(values)


def _detail(text: Any) -> dict[str, Any]:
    try:
        loaded = json.loads(text) if isinstance(text, str) else {}
    except json.JSONDecodeError:
        return {}
    return loaded if isinstance(loaded, dict) else {}
