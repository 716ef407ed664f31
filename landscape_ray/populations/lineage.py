"""Where a member's weights come from: the chain of segments of training that made them, across members.

A segment is what one member did between two decisions. Its parent made the weights that it began with: the member's
own last segment, or after an exploit the donor's. The chain of a member is therefore the history of its weights, not of
the process that trained them, and the values along it are the schedule that one run from scratch has to follow to get
the same weights: every member has one, also one that never exploited.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import (
    Decision,
    Observation,
    Point,
    Restart,
    Values,
    points_from_json,
    points_to_json,
)
from landscape_ray.schedules import Schedule

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """Training of some weights by one member under one set of values.

    Attributes:
        parent: the segment that made the weights at its start; None for fresh ones.
        member: who did it.
        start_step: updates completed at its start.
        stop_step: updates completed at its end.
        start_tokens: units of data seen at its start.
        stop_tokens: units of data seen at its end.
        values: hyperparameters.
        points: evaluations made in it.
        restart: how the parent's weights were changed first.
    """

    parent: int | None
    member: int
    start_step: int
    stop_step: int
    start_tokens: int
    stop_tokens: int
    values: Values
    points: tuple[Point, ...]
    restart: Restart | None = None


class Change(NamedTuple):
    """One row of an exported schedule: the value from this moment on."""

    step: int
    num_tokens: int
    value: Any
    member: int
    """Who trained under it."""


class Lineage:
    """The segments that living members descend from.

    What no member descends from any more is forgotten, so that memory grows with the members and the length of their
    histories, not with the number of weights that were given up.
    """

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._uses: dict[int, int] = {}
        """How many segments and members descend from each."""
        self._heads: dict[int, int | None] = {}
        self._open: dict[int, tuple[Values, Restart | None]] = {}
        self._next = 0

    # growing

    def begin(self, decisions: Sequence[Decision]) -> None:
        """Note that members start segments, each from its own weights or its donor's, as they are before this call."""
        heads = {
            d.member: self._heads[d.donor] if d.donor is not None else self._heads.get(d.member) for d in decisions
        }
        for number in heads.values():  # first, so that nothing is forgotten that another one continues
            if number is not None:
                self._uses[number] += 1
        for decision in decisions:
            self._release(self._heads.get(decision.member))
            self._heads[decision.member] = heads[decision.member]
            self._open[decision.member] = dict(decision.values), decision.restart

    def end(self, observation: Observation) -> None:
        """Note that a member has finished the segment that it was in."""
        member = observation.member
        values, restart = self._open.pop(member)
        parent = self._heads[member]
        before = None if parent is None else self._segments[parent]
        segment = Segment(
            parent=parent,
            member=member,
            start_step=0 if before is None else before.stop_step,
            stop_step=observation.step,
            start_tokens=0 if before is None else before.stop_tokens,
            stop_tokens=observation.num_tokens,
            values=values,
            points=observation.points,
            restart=restart,
        )
        number, self._next = self._next, self._next + 1
        self._segments[number] = segment
        self._uses[number] = 0
        if parent is not None:
            self._uses[parent] += 1
        self._uses[number] += 1
        self._heads[member] = number
        self._release(parent)

    def forget(self, member: int) -> None:
        """Drop a member, and what only it descends from."""
        self._release(self._heads.pop(member))
        self._open.pop(member, None)

    def _release(self, number: int | None) -> None:
        """Count one descendant less of a segment; forget what nobody descends from then."""
        while number is not None:
            self._uses[number] -= 1
            if self._uses[number]:
                return
            del self._uses[number]
            number = self._segments.pop(number).parent

    # reading

    def __len__(self) -> int:
        """Return the number of segments that are known."""
        return len(self._segments)

    @property
    def members(self) -> tuple[int, ...]:
        """Members with a history, in order."""
        return tuple(sorted(self._heads))

    def segments(self) -> dict[int, Segment]:
        """Return all known segments by number: the family tree of the living members."""
        return dict(self._segments)

    def path(self, member: int) -> list[Segment]:
        """Return the segments that made a member's weights, oldest first.

        Raises:
            UserError: no such member.
        """
        if member not in self._heads:
            raise UserError(f"member must be one of {list(self.members)}, got {member}; ask for one that has a history")
        found, number = [], self._heads[member]
        while number is not None:
            found.append(self._segments[number])
            number = found[-1].parent
        return found[::-1]

    def curve(self, member: int) -> list[Point]:
        """Return all evaluations of a member's weights since they were drawn, across members."""
        return [point for segment in self.path(member) for point in segment.points]

    def changes(self, member: int, name: str) -> list[Change]:
        """Return the schedule of one hyperparameter along a member's lineage: a row wherever it changed.

        Raises:
            UserError: no such member, or a name that the population does not set.
        """
        rows: list[Change] = []
        for segment in self.path(member):
            value = self._value(segment, name)
            if not rows or rows[-1].value != value:
                rows.append(Change(segment.start_step, segment.start_tokens, value, segment.member))
        return rows

    def applied(self, member: int, name: str, schedule: Schedule | None = None) -> Array:
        """Return the value in each update of a member's lineage, shape (steps,).

        Args:
            member: whose.
            name: a hyperparameter with numbers as values.
            schedule: what the value is the peak of, where it is one; its own peak is not used.

        Raises:
            UserError: no such member, a name that the population does not set, or values that are not numbers.
        """
        parts: list[Array] = []
        for segment in self.path(member):
            value = self._value(segment, name)
            if isinstance(value, str | bool):
                raise UserError(f"{name} must be a number to be applied, got {value!r}; read `changes` instead")
            steps = np.arange(segment.start_step, segment.stop_step)
            if schedule is None:
                parts.append(np.full(len(steps), float(value)))
            else:
                # one by one, as training asks for them: powers of arrays may differ from those of numbers in a last bit
                own = dataclasses.replace(schedule, peak=float(value))
                parts.append(np.array([own(int(step)) for step in steps]))
        return np.concatenate(parts) if parts else np.empty(0)

    def replay(self, member: int, name: str, schedule: Schedule | None = None) -> Schedule:
        """Return the schedule, as a table, under which one run from scratch repeats a member's lineage.

        Its values are equal to those applied, to the bit.

        Args:
            member: whose.
            name: the hyperparameter, usually the peak learning rate.
            schedule: what the value is the peak of; None for a constant one.

        Raises:
            UserError: as for `applied`; or the member has made no update; or a restart lies on the way.
        """
        if any(segment.restart is not None for segment in self.path(member)):
            raise UserError(
                f"member {member} must descend from one initialisation to be replayed, got a restart on the way; "
                "replay another member"
            )
        return table_of(self.applied(member, name, schedule))

    def _value(self, segment: Segment, name: str) -> Any:
        if name not in segment.values:
            raise UserError(f"name must be one of {sorted(segment.values)}, got '{name}'; the population sets these")
        return segment.values[name]

    # saving

    def state_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        segments = []
        for number, segment in self._segments.items():
            row = {field.name: getattr(segment, field.name) for field in dataclasses.fields(segment)}
            row["points"] = points_to_json(segment.points)
            row["restart"] = None if segment.restart is None else list(segment.restart)
            segments.append([number, row])
        return {
            "next": self._next,
            "segments": segments,
            "heads": [[member, head] for member, head in self._heads.items()],
            "open": [[m, values, None if r is None else list(r)] for m, (values, r) in self._open.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the lineage that `state_dict` described."""
        self._next = state["next"]
        self._segments = {
            number: Segment(
                **row
                | {
                    "points": points_from_json(row["points"]),
                    "restart": None if row["restart"] is None else Restart(*row["restart"]),
                }
            )
            for number, row in state["segments"]
        }
        self._heads = dict(map(tuple, state["heads"]))
        self._open = {m: (values, None if r is None else Restart(*r)) for m, values, r in state["open"]}
        self._uses = dict.fromkeys(self._segments, 0)
        for number in [segment.parent for segment in self._segments.values()] + list(self._heads.values()):
            if number is not None:
                self._uses[number] += 1


def table_of(values: Array) -> Schedule:
    """Return the table schedule whose value in each update equals `values`, shape (num_steps,), to the bit.

    But for values below 1e-300 of the largest, which have no exact share of it.

    Raises:
        UserError: no values, or one that is negative or not finite.

    >>> table_of(np.array([0.1, 0.1, 0.3])).values().tolist()
    [0.1, 0.1, 0.3]
    """
    if not len(values) or not (np.isfinite(values) & (values >= 0)).all():
        raise UserError("values must be finite, >= 0 and at least one; give the value applied in each update")
    # A power of two as the peak: heights are then exact, and so is their product with the peak.
    peak = 2.0 ** math.ceil(math.log2(values.max())) if values.max() > 0 else 1.0
    num_steps = len(values)
    kept = [
        k
        for k in range(num_steps)
        if k in (0, num_steps - 1) or not values[k - 1] == values[k] == values[k + 1]  # corners of a level stretch
    ]
    corners = [(k / num_steps, float(values[k]) / peak) for k in kept]
    corners.append((1.0, corners[-1][1]))
    return Schedule(name="table", peak=peak, num_steps=num_steps, points=tuple(corners))
