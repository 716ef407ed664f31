"""What passes between a population and whoever runs it: observations in, decisions out. Plain data, JSON-able.

Steps are those of the weights: updates completed since they were drawn, along the lineage. They do not go back, except
where diverged weights are given up for those of an earlier step.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from landscape_ray.domains import Value

Values: TypeAlias = dict[str, Value]

Action: TypeAlias = Literal["start", "continue", "exploit", "explore", "restart", "stop"]


class Point(NamedTuple):
    """One evaluation of some weights."""

    step: int
    """Updates completed when it was made."""
    loss: float
    """Held-out loss, lower is better; nan or inf where the run has diverged."""
    lr: float = math.nan
    """Mean learning rate of the updates since the point before; nan where there is none to speak of."""
    averaged: float = math.nan
    """Held-out loss of weights averaged over the last updates; nan where nobody averages."""

    @property
    def annealed(self) -> float:
        """What is known of the loss without the noise of the learning rate: the lower one of both losses."""
        return self.averaged if self.averaged < self.loss else self.loss


class Restart(NamedTuple):
    """Weights become shrink * weights + perturb * fresh ones, under a fresh optimizer (Ash and Adams 2020)."""

    shrink: float
    perturb: float


@dataclass(frozen=True)
class Observation:
    """A member has reached the step that it was sent to, or has diverged on the way.

    Attributes:
        member: which.
        points: evaluations since its last decision, in order, at least one; the last is what decisions are made on.
        num_tokens: units of data that the weights have seen.
    """

    member: int
    points: tuple[Point, ...]
    num_tokens: int = 0

    @property
    def step(self) -> int:
        """Updates completed."""
        return self.points[-1].step

    @property
    def loss(self) -> float:
        """The last held-out loss."""
        return self.points[-1].loss


@dataclass(frozen=True)
class Decision:
    """What a member does next.

    An executor keeps the weights of each member's last observation until its next one. Decisions that come together
    refer to the weights from before any of them. Each is carried out in this order: take the weights of the donor's
    last observation, if there is a donor; restart, if asked; apply `values`, which win over whatever came with the
    weights; train until `until_step`, evaluate, and report.

    Attributes:
        member: which.
        action: start (fresh weights), continue, exploit (a donor's weights), explore (own weights, other values),
            restart, stop.
        values: hyperparameters from here on.
        until_step: where to report next.
        donor: whose weights are taken.
        donor_step: the step of these weights, always that of the donor's last observation.
        restart: how weights are shrunk and perturbed.
        reason: a few words for the log.
    """

    member: int
    action: Action
    values: Values
    until_step: int
    donor: int | None = None
    donor_step: int | None = None
    restart: Restart | None = None
    reason: str = ""


class Failure(NamedTuple):
    """A member could not come to the end of what it was told to do, and what became of it."""

    member: int
    step: int
    """Updates behind its last observation; what it made after that is given up, unless it is tried again."""
    why: str
    """In one line."""
    donor: int | None = None
    """Whose copy took its place; None where it was left out."""
    donor_step: int | None = None
    """The step of the weights copied."""


@dataclass(frozen=True)
class Choice:
    """A strategy's answer for one member, before it becomes a decision. Without a donor the weights stay.

    Attributes:
        values: hyperparameters from here on; None for the same as before.
        donor: whose weights are taken.
        restart: how weights are shrunk and perturbed.
        reason: a few words for the log.
    """

    values: Values | None = None
    donor: int | None = None
    restart: Restart | None = None
    reason: str = ""


def encode(value: float) -> float | str:
    """Return a number as JSON can hold it: what is not finite becomes its name.

    >>> encode(0.5), encode(math.inf), decode(encode(math.inf))
    (0.5, 'inf', inf)
    """
    return value if math.isfinite(value) else repr(value)


def decode(value: Any) -> float:
    """Return the number that `encode` made JSON-able."""
    return float(value)


def points_to_json(points: tuple[Point, ...]) -> list[list[Any]]:
    """Return points as lists that JSON can hold."""
    return [[p.step, *map(encode, p[1:])] for p in points]


def points_from_json(rows: list[list[Any]]) -> tuple[Point, ...]:
    """Return the points that `points_to_json` wrote."""
    return tuple(Point(int(step), *map(decode, rest)) for step, *rest in rows)


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """Return a decision as a dictionary that JSON can hold."""
    return dataclasses.asdict(decision) | {"restart": None if decision.restart is None else list(decision.restart)}


def decision_from_json(row: dict[str, Any]) -> Decision:
    """Return the decision that `decision_to_json` wrote."""
    return Decision(**row | {"restart": None if row["restart"] is None else Restart(*row["restart"])})
