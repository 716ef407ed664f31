"""A member of a population and its folder: orders carried out, nothing lost and nothing twice."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from landscape_ray.data import Data
from landscape_ray.errors import UserError
from landscape_ray.files import link_or_copy, write_atomic
from landscape_ray.populations import Decision
from landscape_ray.populations.decisions import points_to_json
from landscape_ray.records import Record
from landscape_ray.sweep.population.orders import Order, Weights
from landscape_ray.sweep.run import CHECKPOINT, Loop, TrialRun, set_aside, trial_id_of
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import TrialFolder
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.training import TrainConfig, TrainState, read_checkpoint, train
from landscape_ray.training.points import PointCollector
from landscape_ray.training.population import restarted

FRESH_STREAM = 2
"""Second entry of the seed of weights that are mixed in at a restart."""


class MemberRun(TrialRun):
    """A trial that trains as far as its order says, and then waits for the next one.

    Args:
        spec: the sweep.
        folder: the trial's folder; a checkpoint found there is continued.
        order: what to do. One that the checkpoint was made under is continued; the one after it is begun.
        attempt: counts the drivers that this sweep has had.
        data: what the member is trained on, where it is open already.
        weights: checkpoint of the order's source, where it came with the order.
        mirror: as for `TrialRun`.
        loop: likewise.

    Attributes:
        order: the present one.
    """

    def __init__(
        self,
        spec: SweepSpec,
        folder: TrialFolder,
        order: Order,
        attempt: int = 0,
        data: Data | None = None,
        weights: bytes | None = None,
        mirror: Mirror | None = None,
        loop: Loop = train,
    ) -> None:
        self.order = order
        self.collector = PointCollector()
        self._content: bytes | None = None
        self._serial = order.serial
        """Of the order that the state is of, in memory and, after a commit, on disk."""
        self._until = order.decision.until_step
        """Where that order ends."""
        values = dict(order.decision.values)
        super().__init__(spec, folder, order.decision.member, values, attempt, data, mirror=mirror, loop=loop)
        self.write_state = self._write
        if self._serial != order.serial:
            if self._serial == order.last_reported:
                self._complete()
            self.begin(order, weights)
        elif self.reached:
            # the commit, or what comes after it, may have been cut off
            self.commit()

    def _begin_anew(self, data: Data | None, note: Mapping[str, Any]) -> None:
        if self.order.last_reported >= 0:
            checkpoint = self.folder.checkpoint_path / CHECKPOINT
            raise UserError(f"{checkpoint} must be there to go on, got no such file; restore it, or start a new sweep")
        # fresh weights are of the first order, whichever the present one is; and of no use but to be replaced, if later
        self._serial, self._until = 0, 0 if self.order.serial else self._until
        super()._begin_anew(data, note)

    @property
    def reached(self) -> bool:
        """Whether there is something to report: the order is done, or the run has diverged."""
        return self.state.diverged is not None or self.state.observed_step >= self.order.decision.until_step

    @property
    def observed(self) -> Weights:
        """The weights that a report is about."""
        return Weights(self.order.decision.member, self._serial)

    def _reopened(self, extra: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this order or the one before."""
        self._serial = int(extra["serial"])
        if not self.order.last_reported <= self._serial <= self.order.serial:
            raise RuntimeError(f"checkpoint of order {self._serial} cannot be continued by order {self.order.serial}")
        self._until = int(extra.get("until", 0))
        self.values = json.loads(extra["values"])
        self.collector.load_state_dict(json.loads(extra["points"]))
        if extra["attempt"] != self.attempt and not self.state.finished:
            self._event("resume")

    def _extra(self) -> dict[str, str | int]:
        values, points = json.dumps(self.values), json.dumps(self.collector.state_dict())
        return {"serial": self._serial, "until": self._until, "values": values, "points": points}

    def _complete(self) -> None:
        """Train what is missing of the order before, under its own values, where its last checkpoint was damaged.

        What was reported is made again, to the bit: the next order, and whoever copies these weights, relies on it.
        """
        if self.state.diverged is not None or self.state.observed_step >= self._until:
            return
        after, member = self.order, self.order.decision.member
        self.order = Order(self._serial, Decision(member, "continue", dict(self.values), self._until))
        self._configure(self.spec.train_config(self.values, member))
        while not self.reached:
            self.advance()
        # what waits to be copied may be another name of the damaged file
        set_aside(self.folder.checkpoint_path / CHECKPOINT, self.observed.path(self.folder))
        self.order = after

    def begin(self, order: Order, weights: bytes | None = None) -> None:
        """Take up the next order. It becomes durable with the next commit; until then it can be begun again.

        Args:
            order: the one after the present one.
            weights: checkpoint of the order's source; without it the file in the source's folder is read.
        """
        decision = order.decision
        payload: Mapping[str, Any] | None = None
        if order.source is not None:
            payload = self._weights_of(order.source, weights)
            step = int(payload["counters"]["step"])
            if decision.donor_step != step:
                raise RuntimeError(f"decision names step {decision.donor_step} of weights that are of step {step}")
        before, self.values = self.values, dict(decision.values)
        config = self.spec.train_config(self.values, decision.member)
        if decision.restart is not None:
            old = self.state.content() if payload is None else payload
            entropy = [self.spec.seed, FRESH_STREAM, decision.member, order.serial]
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            fresh = TrainState(config.model_copy(update={"seed": seed}), self.state.data)
            payload = restarted(old, decision.restart, fresh)
        self._configure(config)
        self.order, self._serial, self._until = order, order.serial, decision.until_step
        self.collector.clear()
        if payload is not None:
            self._take_over(payload)
            self.collector.restart()
        if order.source is not None:
            detail = self.values | {"reason": decision.reason} if order.abandoned else None
            self._event("exploit", detail, donor=trial_id_of(order.source.member), donor_step=decision.donor_step)
        elif before != self.values:
            self._event("mutate")
        if decision.restart is not None:
            self._event("restart", decision.restart._asdict())

    def _weights_of(self, source: Weights, content: bytes | None) -> Mapping[str, Any]:
        """Return the checkpoint of other weights: as they came, or the durable copy."""
        donor = TrialFolder(self.folder.path.with_name(trial_id_of(source.member)))
        path = source.path(donor)
        if content is None and self.mirror is not None and not path.exists():  # its member is on another node
            content = self.mirror.read(donor, str(path.relative_to(donor.path)))
        return read_checkpoint(path, content)

    def forget(self, needed: Collection[int]) -> None:
        """Delete weights of this member that nobody will ask for any more; on the driver's machine its book does so.

        Args:
            needed: serials of those that somebody may, but for the latest ones.
        """
        kept = {*needed, self._serial, self._serial - 1}
        for path in self.folder.checkpoint_path.glob("observed-*.pt"):
            if int(path.stem.removeprefix("observed-")) not in kept:
                path.unlink(missing_ok=True)

    def _configure(self, config: TrainConfig) -> None:
        """Let the state go on under other values."""
        if config != self.config or config != self.state.config:
            if applied_while_training(self.state.config, config):
                self.state.config = config
            else:
                state = TrainState(config, self.state.data)
                state.restore(self.state.content())
                self.state = state
        self.config = config

    def note(self, record: Record) -> None:
        """Keep a record for the next commit, and what the strategy will want to know of it."""
        super().note(record)
        self.collector.add(record, self.config)

    def next_stop(self) -> int:
        """Return the step of the next commit, at the latest that of the order."""
        return min(super().next_stop(), self.order.decision.until_step)

    @property
    def decisive(self) -> bool:
        """Whether the driver decides on the present state."""
        return self.reached or self.state.finished

    def _make_durable(self) -> None:
        """Write everything so far; at the end of an order also for those who copy these weights later."""
        super()._make_durable()
        if self.reached:
            if self.collector.points and self.collector.points[-1].step != self.state.step:
                raise RuntimeError(
                    f"an order must end where the member is evaluated, got step {self.state.step}; "
                    "choose intervals that are multiples of train.eval.every_steps"
                )
            link_or_copy(self.folder.checkpoint_path / CHECKPOINT, self.observed.path(self.folder))

    def _write(self, path: Path, **extra: str | int) -> None:
        """Write the checkpoint, and keep its content for those who copy it."""
        file = io.BytesIO()
        torch.save(self.state.payload(**extra), file)
        content = file.getvalue()
        write_atomic(path, content)
        self._content = content if self.reached else None

    def take_content(self) -> bytes | None:
        """Return the checkpoint of the weights that are reported, once; None where it is on disk only."""
        content, self._content = self._content, None
        return content

    def result(self) -> dict[str, Any]:
        """Return what the driver needs to know; a member ends when it is told to, not by itself."""
        points = points_to_json(tuple(self.collector.points)) if self.reached else []
        return {
            **super().result(),
            "done": False,
            "reached": self.reached,
            "serial": self._serial,
            "points": points,
            "num_tokens": self.state.num_tokens,
            "values": list(self.values.items()),
        }


def applied_while_training(before: TrainConfig, after: TrainConfig) -> bool:
    """Return whether the values that differ are such as `train` applies at every update.

    Then the state need not be built anew.
    """
    if getattr(after.optimizer, "decay_coupling", None) == "independent":  # the optimizer remembers the peak
        return False
    optimizer = after.optimizer.model_copy(update={"weight_decay": before.optimizer.weight_decay})
    return after.model_copy(update={"schedule": before.schedule, "optimizer": optimizer}) == before
