"""What every stopping rule is: observations in, verdicts out, with a state that can be written down."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias

from landscape_ray.errors import UserError

Verdict: TypeAlias = Literal["continue", "pause", "stop"]
"""continue: train on. pause: wait at this checkpoint; the rule may promote the trial later. stop: never again."""


class StoppingRule(ABC):
    """Decides which trials of a search are worth their compute, from held-out losses alone.

    A trial is a number. Its observations come with increasing steps; trials come in any order. A rule draws nothing at
    random and looks at no clock: the same observations in the same order give the same verdicts, and an observation
    that is repeated changes nothing. What a dead driver knew is therefore rebuilt by observing the rows on disk again,
    in the order in which they were made.
    """

    name: ClassVar[str]

    def milestones(self) -> tuple[int, ...]:
        """Return the steps at which a trial has to report a fresh held-out loss and wait for the verdict."""
        return ()

    def begin(self, trial: int, lr: Sequence[float], warmup_steps: int) -> None:  # noqa: B027 - most rules need not know
        """Take note of a trial and its schedule, the learning rate of every update; before its first observation."""

    @abstractmethod
    def observe(self, trial: int, step: int, loss: float) -> Verdict:
        """Return what becomes of a trial whose held-out loss after `step` updates is `loss`; nan is a diverged one."""

    @abstractmethod
    def end(self, trial: int, loss: float) -> None:
        """Take note that a trial ended by itself: with its final loss, or nan if it diverged."""

    def promotable(self) -> list[int]:
        """Return the paused trials that have earned to go on, the most urgent first."""
        return []

    def promote(self, trial: int) -> None:
        """Take note that a paused trial goes on.

        Raises:
            UserError: it is not paused.
        """
        raise UserError(f"trial must be paused to be promoted, got {trial}; rule '{self.name}' pauses none")

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything that later verdicts depend on, as JSON values."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Become the rule that `state()` was taken of."""
