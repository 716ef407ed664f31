"""What a search may optimise or bound: measures of a run, from its summary and its last probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.registry import suggest

PROBE = "probe/"
"""Prefix of the measures that are the last value of a probe."""

MEASURES: dict[str, str] = {
    "loss_nats": "minimize",
    "best_loss_nats": "minimize",
    "accuracy": "maximize",
    "flops": "minimize",
    "num_tokens": "minimize",
    "num_params": "minimize",
    "elapsed_seconds": "minimize",
    "memory_bytes": "minimize",
}
"""Measures by name, and which way each is optimised; those of probes are minimised."""


def check_measure(name: str, field: str) -> None:
    """Check that there is such a measure.

    Raises:
        UserError: there is none.
    """
    if name not in MEASURES and not (name.startswith(PROBE) and len(name) > len(PROBE)):
        raise UserError(
            f"{field} must name a measure or probe/<name>, got '{name}'; {suggest(name, [*MEASURES, PROBE + '<name>'])}"
        )


def direction(name: str) -> str:
    """Return minimize or maximize.

    >>> direction("accuracy"), direction("probe/sharpness")
    ('maximize', 'minimize')
    """
    return MEASURES.get(name, "minimize")


def measures(summary: RunSummary, probes: Mapping[str, float]) -> dict[str, float]:
    """Return all measures of a run as it stands; those that are not known are nan or left out."""
    accuracy = summary.final_accuracy
    return {
        "loss_nats": math.nan if summary.status == "diverged" else summary.final_loss_nats,
        "best_loss_nats": summary.best_loss_nats,
        "accuracy": math.nan if accuracy is None else accuracy,
        "flops": summary.flops,
        "num_tokens": float(summary.num_tokens),
        "num_params": float(summary.num_params),
        "elapsed_seconds": summary.elapsed_seconds,
        "memory_bytes": summary.peak_memory_bytes,
        **{PROBE + name: value for name, value in probes.items()},
    }


def violations(constraints: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Return for each constraint by how much it is violated; what was not measured counts as violated without end.

    Optuna calls a trial feasible when all of these are at most 0.

    >>> violations({"probe/sharpness": 10.0}, {"probe/sharpness": 8.0})
    {'probe/sharpness': -2.0}
    """
    found = {name: measured.get(name, math.nan) - bound for name, bound in constraints.items()}
    return {name: math.inf if math.isnan(value) else value for name, value in found.items()}


def objective_values(objectives: Sequence[str], measured: Mapping[str, float]) -> list[float] | None:
    """Return the values of the objectives; None where one is not finite, as after a divergence."""
    values = [measured.get(name, math.nan) for name in objectives]
    return values if all(math.isfinite(value) for value in values) else None
