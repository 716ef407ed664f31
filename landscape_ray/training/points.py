"""From the records of a run to the points that a population's strategy decides on."""

from __future__ import annotations

import math
from typing import Any

from landscape_ray.populations import Point
from landscape_ray.populations.decisions import points_from_json, points_to_json
from landscape_ray.records import EvalRecord, EventRecord, Record, StepRecord, VariantRecord
from landscape_ray.training.config import TrainConfig


class PointCollector:
    """Collects one run's evaluations, each with the mean learning rate of the updates since the one before.

    Attributes:
        points: since the last `clear`.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._sum, self._count = 0.0, 0

    def add(self, record: Record, config: TrainConfig) -> None:
        """Take a record in; `config` is that of the run."""
        if isinstance(record, StepRecord):
            self._sum, self._count = self._sum + record.lr, self._count + 1
        elif isinstance(record, VariantRecord):
            if config.averaging is not None and record.variant == config.averaging.name and self.points:
                self.points[-1] = self.points[-1]._replace(averaged=record.loss_nats)
        elif isinstance(record, EvalRecord):
            if self._count:  # one that was made before any update says nothing about the values
                self._append(record.step, record.loss_nats, self._sum / self._count)
        elif isinstance(record, EventRecord) and record.event == "diverged":
            last = config.schedule.build(config.num_steps)(record.step)
            self._append(record.step, math.inf, self._sum / self._count if self._count else float(last))

    def _append(self, step: int, loss: float, lr: float) -> None:
        self.points.append(Point(step, loss, lr))
        self._sum, self._count = 0.0, 0

    def clear(self) -> None:
        """Forget the points that have been reported."""
        self.points = []

    def restart(self) -> None:
        """Forget everything: the weights are others now."""
        self.points, self._sum, self._count = [], 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return {"points": points_to_json(tuple(self.points)), "sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the collector that `state_dict` described."""
        self.points = list(points_from_json(state["points"]))
        self._sum, self._count = state["sum"], state["count"]
