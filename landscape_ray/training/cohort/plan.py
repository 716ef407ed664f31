"""Which program computes which rows; the choice of the fastest by measurement.

Candidates are every route that the members can take, on chunks of 2, 4, 8 ... members for the joint ones, and `single`,
which is always among them. Several threads share out the programs where these can run side by side, and each kernel
elsewhere: the chunk of all members stands for that. What is measured is the time of one gradient for each member, on
the members' own weights and batches; nothing of the members changes. A joint route must also give the gradients of
`single`, or it is out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from landscape_ray.data import Batch
from landscape_ray.errors import UserError
from landscape_ray.training.cohort.buffers import Buffers
from landscape_ray.training.cohort.memory import zeros
from landscape_ray.training.cohort.routes import ROUTES, Program, why_not
from landscape_ray.training.cohort.updates import Updater
from landscape_ray.training.cohort.workers import Workers
from landscape_ray.training.state import TrainState

MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 20, 1.0
"""How often each candidate is measured: more often than the minimum while all of it takes less than this time. The
fastest time counts, since disturbances only add."""

HOPELESS = 1.3
"""A route is not tried on larger chunks once one of `LARGE` members takes this much longer than the best so far: the
memory of its intermediate values is in proportion to the chunk."""

LARGE = 8

CLEARLY = 0.97
"""A joint route is taken if its time is at most this share of the single one's: within the noise of the measurement,
single has no risk."""

WINDOW = 0.05
"""Seconds that a measurement goes on for at least, where the members suffice: with shorter ones for small chunks than
for large ones, the shortest of many would favour the small."""

AFTER_KERNELS = 0.01
"""Seconds after which the threads of a kernel have let go of their processors."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest distance of two routes' gradients of one member, relative to the norm."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way through a step, and how it was found.

    Attributes:
        route: recorded, stacked, vmap or single; alone where members cannot share memory.
        chunk: members that a program covers; recorded programs of some of the members run side by side on the threads.
        seconds: measured time of one update for each member, by `route` or `route/chunk`; empty where the route was
            given.
        excluded: reasons why routes were not measured, by route.
    """

    route: str
    chunk: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)


Result = TypeVar("Result")

Each = tuple[Program, Updater]


class Plan:
    """Programs that cover all rows, with what updates the rows from their gradients.

    Several threads share the programs out, where these can run side by side; else they share each kernel.

    Attributes:
        lanes: for each share the programs that are computed one after the other, of neighbouring rows.
    """

    def __init__(
        self,
        buffers: Buffers,
        members: Sequence[TrainState],
        route: str,
        chunk: int,
        gradients: Tensor | None = None,
    ) -> None:
        """Cut the rows into chunks. Those of a lane use the same memory, one after the other.

        Args:
            buffers: of the cohort.
            members: all of them.
            route: a name in `ROUTES`.
            chunk: members in a program; the last one may have fewer.
            gradients: like the weights, zero in the gaps; by default made here, as large as needed.
        """
        starts = range(0, len(members), chunk)
        count = min(torch.get_num_threads(), len(starts)) if ROUTES[route].side_by_side else 1
        self._workers = Workers(count) if count > 1 else None
        self.lanes: list[list[Each]] = []
        for own in np.array_split(starts, count):
            first, stop = int(own[0]), min(int(own[-1]) + chunk, len(members))
            place = slice(first, min(first + chunk, stop))
            if gradients is None:
                memory = zeros(place.stop - first, buffers.weights.shape[1], device=buffers.weights.device)
            else:
                memory = gradients[place]
            lane: list[Each] = []
            for start in range(first, stop, chunk):
                rows = slice(start, min(start + chunk, stop))
                program = ROUTES[route](buffers, members, rows, memory[: rows.stop - start])
                if lane:
                    program.follow(lane[0][0])
                lane.append((program, Updater(buffers, members, rows, program.gradients)))
            self.lanes.append(lane)

    @property
    def programs(self) -> list[Program]:
        """All of them, in the order of the rows."""
        return [program for lane in self.lanes for program, _ in lane]

    def each(self, function: Callable[[Program, Updater], Result], lanes: Sequence[list[Each]] = ()) -> list[Result]:
        """Call a function on every program (or on those given, of each lane some) on the thread of its lane.

        Returns:
            What the calls returned, lane by lane, which is the order of the rows.
        """

        def of(lane: list[Each]) -> list[Result]:
            return [function(program, update) for program, update in lane]

        calls = [functools.partial(of, lane) for lane in lanes or self.lanes]
        found = [call() for call in calls] if self._workers is None else self._workers.run(calls)
        return [result for results in found for result in results]

    def aside(self, function: Callable[[], Result]) -> Result:
        """Call a function on the thread of the first lane.

        What takes kernels and comes before `each` belongs here: threads that shared a kernel keep their processors for
        some milliseconds, to be ready for the next one.
        """
        return function() if self._workers is None else self._workers.run([function])[0]


def choose(buffers: Buffers, members: Sequence[TrainState], batch: Batch) -> Choice:
    """Return the fastest route and chunk for these members.

    Args:
        buffers: of the cohort.
        members: all of them.
        batch: one training batch of each, stacked (K, B, ...).
    """
    with _nothing_moves(buffers, members):
        return _measured(buffers, members, batch)


@contextlib.contextmanager
def _nothing_moves(buffers: Buffers, members: Sequence[TrainState]) -> Iterator[None]:
    """Let whole updates be timed: learning rates are 0 in the block, and what the updates leave behind is undone."""
    groups = [group for member in members for part in member.optimizer.parts for group in part.param_groups]
    rates = [group["lr"] for group in groups]
    tensors = [buffer for member in members for buffer in member.module.buffers()]
    tensors += [buffers.weights, buffers.updates, *(t for states in buffers.states for t in states.values())]
    kept = [tensor.clone() for tensor in tensors]
    for group in groups:
        group["lr"] = 0.0  # weights stay, so that the gradients of one route can be compared with those of another
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)


def _measured(buffers: Buffers, members: Sequence[TrainState], batch: Batch) -> Choice:
    excluded = {name: reason for name in ROUTES if (reason := why_not(name, members)) is not None}
    if "stacked" not in excluded:
        excluded["vmap"] = "the model takes stacked parameters itself, which was never slower"
    gradients = zeros(*buffers.weights.shape, device=buffers.weights.device)
    single = _Candidate(Plan(buffers, members, "single", 1, gradients), batch)
    try:
        single.measure()
    except RuntimeError as error:  # a parameter has no part in the loss, most likely
        return Choice(route="alone", excluded={"all": _line(error)})
    candidates = {"single": single}
    reference = single.gradients()
    for name in ROUTES:
        if name == "single" or name in excluded or len(members) == 1:
            continue
        threads = torch.get_num_threads() if ROUTES[name].side_by_side else 1
        for chunk in _chunks(len(members), threads):
            try:
                candidate = _Candidate(Plan(buffers, members, name, chunk, gradients), batch)
                distance = candidate.distance(reference)
            except (RuntimeError, NotImplementedError, torch.OutOfMemoryError) as error:
                # what vmap cannot do and what does not fit into memory is found out by trying
                excluded[f"{name}/{chunk}"] = _line(error)
                break
            if not distance <= TOLERANCE[members[0].config.precision]:
                excluded[name] = f"its gradients differ from those of the members alone by {distance:.1e}"
                break
            candidate.measure()
            candidates[f"{name}/{chunk}"] = candidate
            best = min(each.seconds for each in candidates.values())
            if chunk >= LARGE and candidate.seconds > HOPELESS * best:
                break
        if name == "recorded" and not any(key.startswith(name) for key in excluded):
            excluded["stacked"] = "a recording does the same in less time"
    start = time.perf_counter()
    for number in range(1, MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        best = min(each.seconds for each in candidates.values())
        for candidate in candidates.values():
            if candidate.seconds <= 1.5 * best:
                candidate.measure()
    key = min(candidates, key=lambda name: candidates[name].seconds * (CLEARLY if name == "single" else 1.0))
    route, _, size = key.partition("/")
    return Choice(
        route=route,
        chunk=int(size or 1),
        seconds={name: candidate.seconds for name, candidate in candidates.items()},
        excluded=excluded,
    )


def given(route: str, chunk: int | None, members: Sequence[TrainState]) -> Choice:
    """Return the choice that a user made.

    Raises:
        UserError: there is no such route, or these members cannot take it.
    """
    if route not in ROUTES:
        raise UserError(f"route must be auto, alone or one of {', '.join(ROUTES)}, got '{route}'; use 'auto'")
    if (reason := why_not(route, members)) is not None:
        raise UserError(f"route must suit the members, got '{route}' where {reason}; use 'auto'")
    if chunk is not None and not 1 <= chunk <= len(members):
        raise UserError(f"chunk must be between 1 and the number of members, {len(members)}, got {chunk}")
    return Choice(route=route, chunk=1 if route == "single" else chunk or len(members))


def _chunks(num_members: int, num_threads: int) -> list[int]:
    """Return 2, 4, 8 ..., the members of each of so many threads, and the number of members itself."""
    powers = [2**i for i in range(1, num_members.bit_length())]
    shares = [-(-num_members // num_threads)] if num_threads > 1 else []
    return sorted({*(size for size in powers + shares if size < num_members), num_members})


class _Candidate:
    """A plan, a batch, and the shortest time that an update took so far, for each member."""

    def __init__(self, plan: Plan, batch: Batch) -> None:
        self._plan = plan
        self._inputs, self._targets = batch
        self._next = 0
        self.seconds = math.inf

    @property
    def name(self) -> str:
        """The route."""
        return self._plan.programs[0].name

    @property
    def chunk(self) -> int:
        """Members that a program covers."""
        return len(self._plan.programs[0].members)

    def measure(self) -> None:
        """Time some programs, others each time as long as there are others; the first call is a warm-up."""
        lanes = self._plan.lanes
        if self.seconds == math.inf:
            self._plan.each(self._update, [lane[:1] for lane in lanes])
        # single programs are short: some of them, so that the weights do not all lie in the cache
        longest = max(map(len, lanes))
        enough = max(LARGE, math.ceil(WINDOW / self.seconds))  # the first time, nothing is known: LARGE
        count = min(longest, max(1, enough // (self.chunk * len(lanes))))
        chosen = [[lane[(self._next + i) % len(lane)] for i in range(min(count, len(lane)))] for lane in lanes]
        self._next += count
        if len(lanes) > 1:
            time.sleep(AFTER_KERNELS)
        clock = _clock(self._inputs.device)
        start = clock()
        self._plan.each(self._update, chosen)
        seconds = (clock() - start) / sum(len(program.members) for lane in chosen for program, _ in lane)
        if count < longest:  # what is left out takes longer by what the lanes differ in
            seconds *= longest * len(lanes) / sum(map(len, lanes))
        self.seconds = min(self.seconds, seconds)

    def gradients(self) -> Tensor:
        """Return the gradients of all members, (K, P)."""

        def found(program: Program, _: Updater) -> Tensor:
            self._run(program)
            return program.gradients.clone()  # the next one uses the same memory

        return torch.cat(self._plan.each(found))

    def distance(self, reference: Tensor) -> float:
        """Return the largest distance of a member's gradient from its row of the reference, (K, P)."""

        def distance(program: Program, _: Updater) -> float:
            self._run(program)
            return _distance(program.gradients, reference[program.rows])

        found = self._plan.each(distance)
        return math.nan if any(map(math.isnan, found)) else max(found)

    def _update(self, program: Program, update: Updater) -> None:
        losses = self._run(program)
        update(losses.isfinite() & torch.linalg.vector_norm(program.gradients, dim=1).isfinite())

    def _run(self, program: Program) -> Tensor:
        rows = program.rows
        return program.gradient(self._inputs[rows], self._targets[rows], [member.step for member in program.members])


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest relative distance of two gradients of a member, over those where the second is finite.

    One that is not finite tells nothing, and joint routes may well have other values there.
    """
    norms = torch.linalg.vector_norm(theirs, dim=1)
    distances = torch.linalg.vector_norm(ours - theirs, dim=1) / norms.clamp(min=1e-30)
    return float(torch.where(norms.isfinite(), distances, 0.0).max())


def _clock(device: torch.device) -> Callable[[], float]:
    """Return what tells the time: on one thread of a CPU its own seconds, so that other programs do not count."""
    if device.type == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def after_all() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return after_all
