"""What the members of a cohort have in common."""

from __future__ import annotations

from typing import Any

from landscape_ray.errors import UserError
from landscape_ray.training.config import TrainConfig

SHARED_FIELDS = (
    "data",
    "model",
    "loss",
    "batch_size",
    "accumulation_steps",
    "optimizer.name",
    "device",
    "precision",
    "simulated_precision",
    "compile",
)
"""What all members have in common, but for the rate of dropout in the model. All else may be each member's own."""

SHARED_BY_MUON = ("optimizer.nesterov", "optimizer.ns_steps")
"""What members with Muon have in common too: they are orthogonalised together."""


def check_shared(first: TrainConfig, other: TrainConfig, index: int) -> None:
    """Check that two configurations can be in one cohort.

    Raises:
        UserError: names the first field that differs, and both values.
    """
    for field in SHARED_FIELDS + (SHARED_BY_MUON if first.optimizer.name == other.optimizer.name == "muon" else ()):
        here, there = _shared(first, field), _shared(other, field)
        if here != there:
            raise UserError(
                f"{field} must be the same for all members of a cohort, got {here!r} and for member {index} {there!r}; "
                "train such runs in another cohort"
            )


def _shared(config: Any, field: str) -> Any:
    for name in field.split("."):
        config = getattr(config, name)
    if field == "model" and "dropout" in type(config).model_fields:
        return config.model_copy(update={"dropout": 0.0})
    return config
