"""What a trial looks like in MLflow: its rows as metric points, its summary as a tag, its status in MLflow's words."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from mlflow.entities import Metric

from landscape_ray.records import TERMINAL_STATUSES, RunSummary, metrics, progress
from landscape_ray.tracking.server import MAX_TAG_CHARACTERS, clean_key
from landscape_ray.tracking.uris import masked

MAX_TRAIN_POINTS = 500
HYPERPARAMETER = "hyperparameter/"
"""Group of the metrics that hold searched values; each change during training is a point."""

_SLICE_ROWS = 2000
_PROGRESS = ("step", "num_tokens", "flops", "elapsed_seconds", "time_unix")
EVENT_COLUMNS = (*_PROGRESS, "event", "donor", "donor_step", "detail")
"""What :func:`to_event` reads."""
_VALUES = ("loss_nats", "accuracy", "variant", "grad_norm", "lr", "probe", "value", "standard_error")
_COLUMNS = ("kind", *EVENT_COLUMNS, *_VALUES)


def train_stride(num_steps: int) -> int:
    """Return n such that every n-th step is charted: about :data:`MAX_TRAIN_POINTS` of them a run.

    >>> train_stride(300), train_stride(24_000)
    (1, 48)
    """
    return max(1, math.ceil(num_steps / MAX_TRAIN_POINTS))


def charted_rows(table: pa.Table, num_steps: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows that MLflow is told of, a few thousand at a time: all but the steps that are thinned out.

    Args:
        table: rows of one run.
        num_steps: the length of the run, which sets the stride; 0 when it is not known: nothing is thinned.
    """
    for start in range(0, len(table), _SLICE_ROWS):
        piece = table.slice(start, _SLICE_ROWS).select(_COLUMNS)
        keep = charted(piece["step"].to_numpy(), num_steps) | (np.asarray(piece["kind"].to_pylist()) != "step")
        piece = piece.filter(pa.array(keep))
        columns = [piece[name].to_pylist() for name in _COLUMNS]
        yield [dict(zip(_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]


def charted(step: Any, num_steps: int) -> Any:
    """Return whether the updates of these numbers are charted; the first and the last one are.

    By number alone, so that it does not depend on how rows fall into parts.
    """
    return (step % train_stride(num_steps) == 0) | (step == 1) | (step == num_steps)


def to_points(rows: list[dict[str, Any]], num_steps: int) -> list[Metric]:
    """Return the metric points of rows; of a run's `num_steps`, see :func:`charted_rows`.

    Tokens, FLOPs and seconds come with the updates that are charted, and with an evaluation between two of them, so
    that every curve can be drawn over each of them. A value that an event changed is a point of its own.
    """
    points = []
    for row in rows:
        named = metrics(row)
        if row["kind"] == "eval" and (row["step"] == 0 or not charted(row["step"], num_steps)):
            named |= {key: float(value) for key, value in progress(row).items() if value is not None}
        elif row["kind"] == "event":
            named = value_metrics(to_event(row)["values"])
        time_ms, step = round(row["time_unix"] * 1000), row["step"]
        points += [Metric(clean_key(key), value, time_ms, step) for key, value in named.items()]
    return points


def value_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among hyperparameters under the names of metrics.

    >>> value_metrics({"schedule.peak_lr": 0.01, "schedule.name": "wsd", "tied": True})
    {'hyperparameter/schedule.peak_lr': 0.01}
    """
    return {
        HYPERPARAMETER + key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def to_event(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event row as a plain object: where, what, whose weights, the values it set, and why.

    Why is the `reason` in its detail, where the decision gave one.
    """
    try:
        detail = json.loads(row["detail"] or "{}")
    except ValueError:
        detail = {"text": row["detail"]}
    detail = detail if isinstance(detail, dict) else {"text": detail}
    values = detail.get("values")
    if not isinstance(values, dict):  # the searched values stand in the detail itself
        changes = row["event"] in ("exploit", "mutate", "restart", "explore")
        values = {key: value for key, value in detail.items() if key != "reason"} if changes else {}
    event = {name: row[name] for name in (*_PROGRESS, "event")}
    known = {"donor": row["donor"], "donor_step": row["donor_step"], "reason": detail.get("reason")}
    event |= {key: value for key, value in known.items() if value is not None}
    return event | {"values": values} | ({"detail": detail} if detail and not values else {})


def events_text(events: list[dict[str, Any]]) -> str:
    """Return the newest events as JSON, as many as a tag holds."""
    kept = [json.dumps(masked(event), separators=(",", ":"), default=str) for event in events]
    size = 2 + sum(len(text) + 1 for text in kept)
    dropped = 0
    while size > MAX_TAG_CHARACTERS and dropped < len(kept):
        size -= len(kept[dropped]) + 1
        dropped += 1
    return "[" + ",".join(kept[dropped:]) + "]"


def closing_metrics(summary: RunSummary) -> dict[str, float]:
    """Return what a trial cost in the end; what is not known or nothing is left out."""
    training = summary.elapsed_seconds - summary.eval_seconds - summary.probe_seconds
    values = {
        "system/elapsed_seconds": summary.elapsed_seconds,
        "system/eval_seconds": summary.eval_seconds,
        "system/probe_seconds": summary.probe_seconds,
        "system/peak_memory_bytes": summary.peak_memory_bytes,
        "system/tokens_per_second": summary.num_tokens / training if training > 0 else math.nan,
    }
    return {key: float(value) for key, value in values.items() if math.isfinite(value) and value > 0}


def summary_text(summary: RunSummary) -> str:
    """Return the summary without its configuration as JSON, short enough for a tag: the message gives way first."""
    names = [field.name for field in dataclasses.fields(summary) if field.name != "config"]
    content: dict[str, object] = {name: getattr(summary, name) for name in names}
    changes: tuple[dict[str, object], ...] = ({}, {"message": summary.message[:500]}, {"varied": {}})
    for change in changes:
        content |= change
        text = json.dumps(masked(content), default=str)
        if len(text) <= MAX_TAG_CHARACTERS:
            break
    return text


def mlflow_status(status: str, closing: bool) -> str:
    """Return MLflow's word for ours. A diverged run is FINISHED: where training breaks down is a result.

    >>> mlflow_status("diverged", closing=False), mlflow_status("running", closing=True)
    ('FINISHED', 'KILLED')
    """
    if status in TERMINAL_STATUSES:
        return "FAILED" if status == "failed" else "FINISHED"
    return "KILLED" if closing else "RUNNING"
