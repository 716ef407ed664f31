"""Which program computes which rows; the choice of the fastest by measurement.

Candidates are every route that the members can take, on chunks of 2, 4, 8 ... members for the joint ones, and `single`,
which is always among them. What is measured is the time of one update of each member, on the members' own weights
and batches; nothing of the members changes. A joint route must also give the gradients of `single`, or it is out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from landscape_ray.data import Batch
from landscape_ray.errors import UserError
from landscape_ray.training.cohort.buffers import Buffers
from landscape_ray.training.cohort.eligibility import why_not
from landscape_ray.training.cohort.memory import zeros
from landscape_ray.training.cohort.routes import ROUTES, Program
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

BEHIND = 1.5
"""A candidate that takes this much longer than the best so far is measured no more, and gives its memory back."""

CLEARLY = 0.97
"""A joint route is taken if its time is at most this share of the single one's: within the noise of the measurement,
single has no risk."""

WINDOW = 0.05
"""Seconds that a measurement goes on for at least, where the members suffice: with shorter ones for small chunks than
for large ones, the shortest of many would favour the small."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest distance of two routes' gradients of one member, relative to the norm."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way through a step, and how it was found.

    Attributes:
        route: recorded, abreast, graphed, stacked, vmap or single; alone where members cannot share memory.
        chunk: members that a program covers.
        seconds: measured time of one update for each member, by `route` or `route/chunk`; empty where the route was
            given.
        excluded: reasons why routes were not measured, by route.
    """

    route: str
    chunk: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)


Pair = tuple[Program, Updater]


class Plan:
    """Programs that cover all rows, with what updates the rows from their gradients.

    Attributes:
        lanes: programs that are run one after the other; lanes side by side, where the route does that.
    """

    def __init__(
        self,
        buffers: Buffers,
        members: Sequence[TrainState],
        route: str,
        chunk: int,
        gradients: Tensor | None = None,
    ) -> None:
        """Cut the rows into chunks; those of a lane use the same memory.

        Args:
            buffers: of the cohort.
            members: all of them.
            route: a name in `ROUTES`.
            chunk: members in a program; the last one may have fewer.
            gradients: at least (chunk, P), zero in the gaps; made here by default, and for all lanes but the first.
        """
        starts = range(0, len(members), chunk)
        count = min(torch.get_num_threads(), len(starts)) if ROUTES[route].side_by_side else 1
        self._workers = Workers(count) if count > 1 else None
        size, device = buffers.weights.shape[1], buffers.weights.device
        self.lanes: list[list[Pair]] = [[] for _ in range(count)]
        for number, lane in enumerate(self.lanes):
            first, stop = (len(starts) * i // count for i in (number, number + 1))
            memory = gradients if gradients is not None and number == 0 else zeros(chunk, size, device=device)
            for start in starts[first:stop]:
                rows = slice(start, min(start + chunk, len(members)))
                own = memory[: rows.stop - rows.start]
                program = ROUTES[route](buffers, members, rows, own)
                update = Updater(buffers, members, rows, own)
                if lane:
                    program.follow(lane[0][0])
                    update.follow(lane[0][1])
                lane.append((program, update))

    @property
    def programs(self) -> list[Pair]:
        """All of them, in the order of their rows."""
        return [pair for lane in self.lanes for pair in lane]

    def sharing(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for whatever takes kernels, from the batches of an update to its end."""
        return contextlib.nullcontext() if self._workers is None else self._workers.sharing()

    def each(self, function: Callable[[Program, Updater], None], *, backwards: bool = False) -> None:
        """Call a function on every pair, in the order of the rows of a lane or the other way round."""

        def go(lane: list[Pair]) -> None:
            for program, update in reversed(lane) if backwards else lane:
                function(program, update)

        if self._workers is None:
            go(self.lanes[0])
        else:
            self._workers.run([functools.partial(go, lane) for lane in self.lanes])


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
    clippers = [member.clipper for member in members]
    for member in members:
        member.clipper = copy.deepcopy(member.clipper)  # some remember norms
    for group in groups:
        group["lr"] = 0.0  # weights stay, so that the gradients of one route can be compared with those of another
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for member, clipper in zip(members, clippers, strict=True):
            member.clipper = clipper
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)


def _measured(buffers: Buffers, members: Sequence[TrainState], batch: Batch) -> Choice:
    excluded = {name: reason for name in ROUTES if (reason := why_not(name, members)) is not None}
    if torch.get_num_threads() == 1:
        excluded.setdefault("abreast", "there is one thread")
    if "stacked" not in excluded:
        excluded["vmap"] = "the model takes stacked parameters itself, which was never slower"
    gradients = zeros(*buffers.weights.shape, device=buffers.weights.device)
    single = _Candidate(Plan(buffers, members, "single", 1, gradients), batch)
    try:
        single.measure()
    except RuntimeError as error:  # a parameter has no part in the loss, most likely
        return Choice(route="alone", excluded={"all": _line(error)})
    candidates = {"single": single}
    reference = torch.cat([found.clone() for found in single.gradients()])
    for name in ROUTES:
        if name == "single" or name in excluded or len(members) == 1:
            continue
        for chunk in _chunks(_share(name, len(members))):
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
            for each in candidates.values():
                if each.seconds > BEHIND * best:
                    each.release()
            if chunk >= LARGE and candidate.seconds > HOPELESS * best:
                break
        if name in ("recorded", "graphed") and not any(key.startswith(name) for key in excluded):
            excluded["stacked"] = f"'{name}' does the same in less time"
    start = time.perf_counter()
    for number in range(1, MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        best = min(each.seconds for each in candidates.values())
        for candidate in candidates.values():
            if candidate.seconds <= BEHIND * best:
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
    return Choice(route=route, chunk=1 if route == "single" else chunk or _share(route, len(members)))


def _share(route: str, num_members: int) -> int:
    """Return the largest number of members for one program."""
    return -(-num_members // torch.get_num_threads()) if ROUTES[route].side_by_side else num_members


def _chunks(num_members: int) -> list[int]:
    """Return 2, 4, 8 ... and the number of members itself."""
    return [2**i for i in range(1, num_members.bit_length()) if 2**i < num_members] + [num_members]


class _Candidate:
    """A plan, a batch, and the shortest time that an update took so far, for each member."""

    def __init__(self, plan: Plan, batch: Batch) -> None:
        self._plan = plan
        self._pairs = plan.programs
        self._programs = [program for program, _ in plan.programs]
        self._inputs, self._targets = batch
        self._next = 0
        self._backwards = False
        self.seconds = math.inf

    def measure(self) -> None:
        """Time some programs, others each time as long as there are others; the first call is a warm-up."""
        if self.seconds == math.inf:
            with self._plan.sharing():
                self._update(*self._pairs[0])
        # single programs are short: some of them, so that the weights do not all lie in the cache
        size = len(self._programs[0].members)
        enough = max(LARGE, math.ceil(WINDOW / self.seconds))  # the first time, nothing is known: LARGE
        count = max(1, min(len(self._pairs), enough // size))
        chosen = [self._pairs[(self._next + i) % len(self._pairs)] for i in range(count)]
        self._next += count
        clock = _clock(self._inputs.device)
        with self._plan.sharing():
            start = clock()
            if len(self._plan.lanes) > 1 or count == len(self._pairs):
                chosen = self._pairs
                self._backwards = not self._backwards  # as a cohort does
                self._plan.each(self._update, backwards=self._backwards)
            else:
                for program, update in chosen:
                    self._update(program, update)
            seconds = clock() - start
        self.seconds = min(self.seconds, seconds / sum(len(program.members) for program, _ in chosen))

    def release(self) -> None:
        """Give the memory of the programs back; the time stays."""
        self._pairs, self._programs = [], []
        self._plan.lanes.clear()

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradients of all members, (c, P) of each program; the next one uses the same memory."""
        for program in self._programs:
            with self._plan.sharing():
                self._run(program)
            yield program.gradients

    def distance(self, reference: Tensor) -> float:
        """Return the largest distance of a member's gradient from its row of the reference, (K, P)."""
        rows = [program.rows for program in self._programs]
        found = [_distance(ours, reference[own]) for own, ours in zip(rows, self.gradients(), strict=True)]
        return math.nan if any(map(math.isnan, found)) else max(found)

    def _update(self, program: Program, update: Updater) -> None:
        update(self._run(program), [True] * len(program.members))

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
