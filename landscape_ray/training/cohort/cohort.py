"""K runs of one architecture in one process, trained as one program."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape_ray.config import parse
from landscape_ray.data import Batch, Data, open_data
from landscape_ray.data.prefetch import Prefetcher
from landscape_ray.errors import UserError
from landscape_ray.records import Record, StepRecord
from landscape_ray.training import loop, probing
from landscape_ray.training.cohort.buffers import Buffers, why_not
from landscape_ray.training.cohort.eligibility import untrained
from landscape_ray.training.cohort.eligibility import why_not as no_route
from landscape_ray.training.cohort.evaluation import evaluations, held_out
from landscape_ray.training.cohort.folder import read_folder, write_folder
from landscape_ray.training.cohort.plan import Choice, Plan, choose, given
from landscape_ray.training.cohort.routes import Program
from landscape_ray.training.cohort.shared import check_shared
from landscape_ray.training.cohort.updates import Updater
from landscape_ray.training.config import TrainConfig
from landscape_ray.training.loop import Measured
from landscape_ray.training.state import TrainState, read_checkpoint
from landscape_ray.training.values import Values


class Cohort:
    """K runs that advance together.

    Each member is a `TrainState` like that of a run alone, and can be evaluated, probed, read and saved as one. Their
    weights and optimizer states are rows of common matrices, from which gradients and updates of many members are
    computed at once; `choice` says how. Where that is impossible (its route is "alone"), each makes its own updates.

    A member that diverges keeps the weights from before the update that could not be made, and touches no other.

    Attributes:
        choice: the way through a step, and what was measured to find it; None before the first update with "auto".
    """

    def __init__(self, members: Sequence[TrainState], route: str = "auto", chunk: int | None = None) -> None:
        """Put runs together; see `create`. From here on the cohort owns them."""
        if not members:
            raise UserError("configs must hold at least one configuration, got none; give one for each member")
        for index, member in enumerate(members):
            check_shared(members[0].config, member.config, index)
        self._members = list(members)
        self._values = [Values(member) for member in members]
        first = members[0]
        self._loader = Prefetcher(first.data, first.device)
        self._units = first.config.batch_size * first.data.signature.units_per_example
        self._flops = first.module.flops_per_unit() * self._units
        for member in members:
            self._share(member)
        self._buffers: Buffers | None = None
        self._plan: Plan | None = None
        self.choice: Choice | None = None
        if (reason := why_not(members)) is not None:
            if route not in ("auto", "alone"):
                raise UserError(f"route must suit the members, got '{route}' where {reason}; use 'auto'")
            self.choice = Choice(route="alone", excluded={"all": reason})
        else:
            self._buffers = Buffers(members)
            if route == "alone":
                self.choice = Choice(route="alone")
            elif route != "auto":
                self.choice = given(route, chunk, members)

    @classmethod
    def create(
        cls,
        configs: Sequence[TrainConfig],
        data: Data | None = None,
        *,
        route: str = "auto",
        chunk: int | None = None,
    ) -> Cohort:
        """Return K runs at step 0.

        Args:
            configs: one for each member; `shared.SHARED_FIELDS` are equal in all.
            data: what `configs[0].data` describes, where it is open already.
            route: recorded, abreast, graphed, stacked, vmap, single or alone; auto measures at the first which is the
                fastest. Different routes differ in the last bits of the weights, so that a run is repeated to the bit
                only where the route is given (or comes from a checkpoint).
            chunk: members that one program covers, but for single and alone; all by default.

        Raises:
            UserError: configurations that do not go together, or a route that the members cannot take.
        """
        members: list[TrainState] = []
        for index, config in enumerate(configs):
            check_shared(configs[0], config, index)
            data = open_data(config.data) if data is None else data
            members.append(TrainState(config, data))
        return cls(members, route, chunk)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def members(self) -> tuple[TrainState, ...]:
        """The runs. Their weights may be read at any time, and written in place."""
        return tuple(self._members)

    @property
    def finished(self) -> bool:
        """Whether every member is."""
        return all(member.finished for member in self._members)

    # training

    def train(self, until_step: int | None = None) -> Iterator[tuple[int, Record]]:
        """Advance all members, yielding (member, record) for everything that happens to one.

        The records of a member are those that `landscape_ray.training.train` yields for it alone, up to rounding, but
        for the times: what members do together is charged to each in equal parts.

        Args:
            until_step: members stop when they have completed this many updates; None for the end of each run.
        """
        yield from self._observe()
        while active := self._active(until_step):
            yield from self._update(active)
            yield from self._observe()

    def _active(self, until_step: int | None) -> list[int]:
        end = math.inf if until_step is None else until_step
        return [
            k
            for k, m in enumerate(self._members)
            if m.diverged is None and m.step < end and m.step < m.config.num_steps
        ]

    def _update(self, active: list[int]) -> Iterator[tuple[int, Record]]:
        """Do one update of these members."""
        start = time.perf_counter()
        if self._buffers is not None and self.choice is None:
            self.choice = choose(self._buffers, self._members, self._batch())
            start = time.perf_counter()  # a measurement is not part of a run
        if self.choice is not None and self.choice.route == "alone":
            for k in active:
                yield k, loop.update(self._members[k], self._values[k])
            return
        values = [self._values[k].apply() for k in active]
        probed = [k for k in active if self._members[k].monitor.probes]
        before = {k: probing.weights_before(self._members[k]) for k in probed}
        losses, norms = self._apply(active)
        cost, now = (time.perf_counter() - start) / len(active), time.time()
        units, flops = self._units, self._flops
        for k, (lr, momentum) in zip(active, values, strict=True):
            member, loss, norm = self._members[k], losses[k], norms[k]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                how = f"loss {loss}, gradient norm {norm} in update {member.step + 1}"
                yield k, loop.diverge(member, how, lr=lr)
                continue
            if k in before:
                probing.remember_update(member, before[k])
            member.step += 1
            if member.averager is not None:
                member.averager.update(member.module, member.step)
            member.num_tokens += units
            member.flops += flops
            member.elapsed_seconds += cost
            yield (
                k,
                StepRecord(
                    step=member.step,
                    num_tokens=member.num_tokens,
                    flops=member.flops,
                    elapsed_seconds=member.elapsed_seconds,
                    time_unix=now,
                    cost_seconds=cost,
                    loss_nats=loss,
                    grad_norm=norm,
                    lr=lr,
                    weight_decay=member.config.optimizer.weight_decay,
                    momentum=momentum,
                ),
            )

    def _apply(self, active: list[int]) -> tuple[list[float], list[float]]:
        """Update the active members; return loss and gradient norm of each member, as they were for those."""
        moving = [False] * len(self)
        for k in active:
            moving[k] = True
        plan = self._programs()
        with plan.sharing():
            inputs, targets = self._batch()
            seen = torch.zeros(2, len(self), device=inputs.device)

            def one(program: Program, update: Updater) -> None:
                rows = program.rows
                if any(moving[rows]):
                    losses = program.gradient(inputs[rows], targets[rows], [member.step for member in program.members])
                    seen[0, rows], seen[1, rows] = losses, update(losses, moving[rows])

            # to and fro: what an update came to last may still be in the cache
            plan.each(one, backwards=self._members[active[0]].step % 2 == 1)
            self._loader.prepare()
            # one transfer: on a GPU each one waits for everything before it
            losses_and_norms: list[list[float]] = seen.tolist()
        return losses_and_norms[0], losses_and_norms[1]

    def _programs(self) -> Plan:
        assert self._buffers is not None
        assert self.choice is not None
        if self._plan is None:
            self._plan = Plan(self._buffers, self._members, self.choice.route, self.choice.chunk)
        return self._plan

    def _batch(self) -> Batch:
        """Return the batches of all members' next updates, stacked (K, B, ...)."""
        size = self._members[0].config.batch_size
        steps = [member.step for member in self._members]
        if len(set(steps)) == 1:
            return self._loader.get([member.config.seed for member in self._members], steps[0], size)
        pairs = [member.loader.get(member.config.seed, member.step, size) for member in self._members]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    # observing

    def _observe(self) -> Iterator[tuple[int, Record]]:
        """Yield the evaluations and probes that are due."""
        waiting = [k for k, m in enumerate(self._members) if m.observed_step < m.step and m.diverged is None]
        due = [k for k in waiting if loop.due(self._members[k], self._members[k].config.eval.every_steps)]
        losses = self._evaluate(due) if due else {}
        for k in waiting:
            member = self._members[k]
            if k not in due and not member.monitor.probes:  # asking costs a small network a share of its update
                member.observed_step = member.step
                continue
            for record in loop.observe(member, losses.get(k)):
                yield k, record

    def _evaluate(self, due: list[int]) -> dict[int, Measured]:
        """Return the evaluations of these members by their places, where they are evaluated together."""
        if self.choice is None or self.choice.route in ("alone", "single"):
            return {}
        if len(set(map(held_out, self._members))) > 1:
            return {}
        return evaluations([program for program, _ in self._programs().programs], due)

    # members

    def read(self, k: int) -> dict[str, Tensor]:
        """Return a copy of a member's weights and buffers, by their names in its module."""
        return {name: tensor.clone() for name, tensor in self._members[k].module.state_dict().items()}

    def write(self, k: int, weights: dict[str, Tensor]) -> None:
        """Replace a member's weights and buffers by those that `read` returned; its optimizer stays.

        Raises:
            UserError: other values of what is not trained, which members that are computed together have in common.
        """
        if self.choice is not None and self.choice.route not in ("alone", "single"):
            for name, tensor in untrained(self._members[k]).items():
                if name in weights and not torch.equal(weights[name].to(tensor), tensor):
                    raise UserError(
                        f"'{name}' must stay as it is with route '{self.choice.route}', got other values for member "
                        f"{k}; it is not trained, and one for all members: make the cohort with route = 'single'"
                    )
        self._members[k].module.load_state_dict(weights)

    def copy(self, source: int, target: int, config: TrainConfig | None = None) -> None:
        """Replace one member by another: weights, optimizer state, clipping history, averages, probes and counters.

        What `TrainState.load` does through a file, in memory. The configuration (seed, learning rate ...) stays the
        target's own, or becomes `config`.

        Raises:
            UserError: `config` does not go with those of the other members or with the route, or has other averaging.
        """
        self._replace(target, config or self._members[target].config, self._members[source].content())

    def restore(self, k: int, content: dict[str, Any], config: TrainConfig | None = None) -> None:
        """Replace a member by what `TrainState.content` held: weights, optimizer state, averages and counters.

        Raises:
            UserError: as for `copy`.
        """
        self._replace(k, config or self._members[k].config, content)

    def configure(self, k: int, config: TrainConfig) -> None:
        """Let a member go on under other hyperparameters, from the next update on.

        Raises:
            UserError: `config` does not go with those of the other members or with the route, or has other averaging.
        """
        self._replace(k, config, self._members[k].content())

    def enter(self, k: int, path: Path, config: TrainConfig | None = None) -> None:
        """Replace a member by the run of a checkpoint that `TrainState.save` or `leave` wrote.

        Args:
            k: which member.
            path: the file.
            config: go on under these values instead of the saved ones.

        Raises:
            UserError: not a checkpoint, or of a run that does not go with the other members.
        """
        payload = read_checkpoint(path)
        self._replace(k, config or parse(TrainConfig, payload["config"], f"checkpoint {path}"), payload)

    def leave(self, k: int, path: Path, **extra: str | int) -> None:
        """Write a member's checkpoint, which `TrainState.load` continues as a run alone; the member stays."""
        with self._apart(k):
            self._members[k].save(path, **extra)

    def _replace(self, k: int, config: TrainConfig, payload: dict[str, Any]) -> None:
        check_shared(self._members[k - 1].config, config, k)
        member = TrainState(config, self._members[k].data)
        member.restore(payload)
        self._check_route([*self._members[:k], member, *self._members[k + 1 :]], k)
        self._share(member)
        self._members[k], self._values[k] = member, Values(member)
        if self._buffers is not None:
            self._buffers.adopt(k, member)
        self._plan = None  # programs know their members

    def _check_route(self, members: Sequence[TrainState], k: int) -> None:
        """Check that the members can be computed as they are so far, with a new one at place k."""
        route = "auto" if self.choice is None else self.choice.route
        if route == "alone":
            return
        reason = why_not(members)
        if reason is None and route != "auto":
            reason = no_route(route, members)
        if reason is not None:
            raise UserError(
                f"member {k} must suit the route '{route}' of its cohort, got one where {reason}; "
                "leave that as it is, or make a cohort with route = 'alone'"
            )

    def _share(self, member: TrainState) -> None:
        """Have the held-out data of equal evaluations in memory once."""
        first = self._members[0]
        if held_out(member) == held_out(first):
            member.validation = first.validation

    def _apart(self, k: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._buffers is None else self._buffers.apart(self._members[k])

    # checkpoints

    def save(self, folder: Path, **extra: str | int) -> None:
        """Write a checkpoint: one file for each member, as `leave` writes it, and what holds them together.

        An older checkpoint in the same folder is there until the new one is complete.

        Args:
            folder: made when missing.
            extra: small values that `load` hands back.

        Raises:
            UserError: no space left, or no permission.
        """
        choice = None if self.choice is None else {"route": self.choice.route, "chunk": self.choice.chunk}
        write_folder(folder, len(self), self.leave, {"choice": choice, "extra": extra})

    @classmethod
    def load(
        cls, folder: Path, configs: Sequence[TrainConfig] | None = None, *, route: str | None = None
    ) -> tuple[Cohort, dict[str, Any]]:
        """Return the cohort saved in `folder` and the extra values saved with it.

        Args:
            folder: written by `save`.
            configs: go on under these values instead of the saved ones.
            route: as in `create`; by default the one that the cohort had, so that it goes on to the bit, or auto where
                the device of this machine cannot take that.

        Raises:
            UserError: missing, damaged or foreign files, an unknown version, or another number of configurations.
        """
        payloads, manifest = read_folder(folder)
        if configs is None:
            configs = [parse(TrainConfig, payload["config"], f"checkpoint {folder}") for payload in payloads]
        if len(configs) != len(payloads):
            raise UserError(
                f"configs must be {len(payloads)}, one for each member of {folder}, got {len(configs)}; "
                "leave them out to continue as saved"
            )
        data = open_data(configs[0].data)
        members = [TrainState(config, data) for config in configs]
        for member, payload in zip(members, payloads, strict=True):
            member.restore(payload)
        choice = manifest["choice"]
        # saved on another kind of device, which some routes are for
        moved = choice is not None and choice["route"] != "alone" and no_route(choice["route"], members) is not None
        if route is None and choice is not None and not moved:
            return cls(members, choice["route"], choice["chunk"]), manifest["extra"]
        return cls(members, route or "auto"), manifest["extra"]
