"""What a member is told to do: a decision of the strategy, with its number and the weights that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from landscape_ray.populations.decisions import Decision, decision_from_json, decision_to_json
from landscape_ray.tracking.folder import TrialFolder


class Weights(NamedTuple):
    """Which weights: those that a member had when it reported about one of its orders."""

    member: int
    serial: int
    """Of the order."""

    def path(self, folder: TrialFolder) -> Path:
        """Return where in the folder of the member they wait to be copied."""
        return folder.checkpoint_path / f"observed-{self.serial:06d}.pt"


class Order(NamedTuple):
    """One decision about one member.

    Attributes:
        serial: counts the decisions about this member from 0, so that everybody knows which have been carried out.
        decision: what to do.
        source: whose weights to take; None for the member's own, or fresh ones at the start.
        abandoned: how many orders just before this one the member failed under. Nobody completes them: it may stand
            anywhere in them, and has reported about none.
    """

    serial: int
    decision: Decision
    source: Weights | None = None
    abandoned: int = 0

    @property
    def last_reported(self) -> int:
        """The serial of the order that the member last reported about; -1 where there is none."""
        return self.serial - 1 - self.abandoned

    @property
    def stops(self) -> bool:
        """Whether the member is to end."""
        return self.decision.action == "stop"

    def to_json(self) -> dict[str, Any]:
        """Return the order as JSON can hold it."""
        source = None if self.source is None else list(self.source)
        row = {"serial": self.serial, "decision": decision_to_json(self.decision), "source": source}
        return row | ({"abandoned": self.abandoned} if self.abandoned else {})

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Order:
        """Return the order that `to_json` wrote."""
        source = None if row["source"] is None else Weights(*row["source"])
        return cls(row["serial"], decision_from_json(row["decision"]), source, row.get("abandoned", 0))
