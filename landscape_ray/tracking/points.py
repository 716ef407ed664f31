"""What a trial looks like in MLflow: its rows as metric points, its summary as a tag, its status in MLflow's words."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from mlflow.entities import Metric

from landscape_ray.records import TERMINAL_STATUSES, RunSummary, metrics
from landscape_ray.tracking.server import MAX_TAG_CHARACTERS, clean_key

MAX_TRAIN_POINTS = 500


def train_stride(num_steps: int) -> int:
    """Return n such that every n-th step is charted: about :data:`MAX_TRAIN_POINTS` of them a run.

    >>> train_stride(300), train_stride(24_000)
    (1, 48)
    """
    return max(1, math.ceil(num_steps / MAX_TRAIN_POINTS))


def to_points(table: pa.Table, num_steps: int) -> list[Metric]:
    """Return the metric points of the rows, those of steps thinned by step number (first and last are kept).

    Args:
        table: rows of one run.
        num_steps: the length of the run, which sets the stride; 0 when it is not known: nothing is thinned.
    """
    step = table["step"].to_numpy()
    keep = (step % train_stride(num_steps) == 0) | (step == 1) | (step == num_steps)
    keep |= ~np.asarray(pc.equal(table["kind"], "step").combine_chunks().to_numpy(zero_copy_only=False), dtype=bool)
    return [
        Metric(clean_key(key), value, round(row["time_unix"] * 1000), row["step"])
        for row in table.filter(pa.array(keep)).to_pylist()
        for key, value in metrics(row).items()
    ]


def summary_text(summary: RunSummary) -> str:
    """Return the summary without its configuration as JSON, short enough for a tag: the message gives way first."""
    content = dataclasses.asdict(summary)
    del content["config"]
    changes: tuple[dict[str, object], ...] = ({}, {"message": summary.message[:500]}, {"varied": {}})
    for change in changes:
        content |= change
        text = json.dumps(content, default=str)
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
