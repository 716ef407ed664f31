"""Runs that know nothing of each other: what every population has to beat at the same number of updates."""

from __future__ import annotations

from typing import Any, ClassVar

from landscape_ray.populations.decisions import Choice, Observation
from landscape_ray.populations.strategy import Strategy


class Independent(Strategy):
    """Random search: each member keeps its values to the end. Only the best lineage is remembered after it ended."""

    rescues: ClassVar[bool] = False

    name: ClassVar[str] = "independent"

    def __init__(self, *args: Any, synchronous: bool = False, **options: Any) -> None:
        super().__init__(*args, synchronous=synchronous, **options)
        self._kept: int | None = None

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Let everybody go on."""
        return {}

    def rescue(self, number: int) -> Choice:
        """Let a diverged member end, and leave out one that has failed."""
        return Choice(reason="diverged")

    def learn(self, observation: Observation) -> None:
        """Forget the history of a member that has ended, unless it is the best so far."""
        member = self.members[observation.member]
        if member.sound and member.step < self.num_steps:
            return
        if member.sound and (self._kept is None or member.loss < self.members[self._kept].loss):
            forgotten, self._kept = self._kept, observation.member
        else:
            forgotten = observation.member
        if forgotten is not None:
            self.lineage.forget(forgotten)

    def extra_state(self) -> dict[str, Any]:
        """Return the best member that has ended."""
        return {"kept": self._kept}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._kept = state["kept"]
