"""What the schedule says of the updates to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from landscape_ray.schedules import Schedule

if TYPE_CHECKING:
    from landscape_ray.training.state import TrainState

BLOCK = 256
"""Updates for which a schedule is evaluated at once: one by one it takes as long as a small network's forward pass."""


class Values:
    """The hyperparameters of a run's next updates, from its schedule."""

    def __init__(self, state: TrainState, schedule: Schedule | None = None) -> None:
        """Take a run, and another schedule than its own where one is given."""
        self._state = state
        self._schedule = schedule or state.config.schedule.build(state.config.num_steps)
        self._start = 0
        self._block: list[tuple[float, float]] = []
        self._written: tuple[float, float] | None = None

    def apply(self) -> tuple[float, float]:
        """Write the values of the next update into the optimizer; return learning rate and momentum."""
        state = self._state
        if not self._start <= state.step < self._start + len(self._block):
            self._start, base = state.step, state.config.optimizer.momentum
            steps = range(self._start, self._start + BLOCK)
            rates, momenta = self._schedule(steps), self._schedule.momentum(steps, base)
            self._block = list(zip(rates.tolist(), momenta.tolist(), strict=True))  # type: ignore[union-attr]
        lr, momentum = values = self._block[state.step - self._start]
        if values != self._written:
            state.optimizer.set_values(lr=lr, weight_decay=state.config.optimizer.weight_decay, momentum=momentum)
            self._written = values
        return lr, momentum
