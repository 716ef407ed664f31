"""A population in one process: the members of a cohort, copied and mutated in memory as a strategy decides.

The same strategies run on Ray Tune trials and in the simulator; here weights never leave the process. Members advance
together, a stretch at a time, and report in their order.

A population is saved between two stretches and goes on to the bit: a process that is killed loses at most the stretch
that it was in.
"""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape_ray.config import parse, with_values
from landscape_ray.data import Data, open_data
from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic, write_atomic_with
from landscape_ray.populations import Decision, Observation, Restart, Strategy
from landscape_ray.populations.decisions import decision_from_json, decision_to_json
from landscape_ray.records import Record, StepRecord
from landscape_ray.training.cohort import Cohort
from landscape_ray.training.config import TrainConfig
from landscape_ray.training.manifest import read_manifest
from landscape_ray.training.points import PointCollector
from landscape_ray.training.state import TrainState

POPULATION_VERSION = 1

MANIFEST, SNAPSHOTS = "population.json", "snapshots.pt"

FRESH_STREAM = 1
"""Second entry of the seed of weights that are mixed in at a restart; 0 seeds the first weights of the members."""


class CohortPopulation:
    """Carries a strategy's decisions out on a cohort.

    Attributes:
        strategy: who decides.
        cohort: the members.
        decisions: all decisions so far.
        num_updates: updates made by all members together.
    """

    def __init__(
        self,
        train: Mapping[str, Any],
        strategy: Strategy,
        *,
        seed: int = 0,
        vary_seed: bool = True,
        data: Data | None = None,
        route: str = "auto",
    ) -> None:
        """Draw the members at step 0.

        Args:
            train: the table [train] that all members share, without a seed.
            strategy: a new one; its names are dotted names in the table.
            seed: of the members' weights and data.
            vary_seed: whether members differ in weights and order of data.
            data: what the table describes, where it is open already.
            route: as for `Cohort.create`.

        Raises:
            UserError: values that the table can't hold, or members that don't go together.
        """
        self._train, self._seed, self._vary = dict(train), seed, vary_seed
        self.strategy = strategy
        self.decisions: list[Decision] = []
        self.num_updates = 0
        start = strategy.start()
        configs = [self._config(decision) for decision in start]
        data = open_data(configs[0].data) if data is None else data
        self.cohort = Cohort.create(configs, data, route=route)
        self._until: dict[int, int] = {}
        self._collectors = {d.member: PointCollector() for d in start}
        self._snapshots: dict[int, dict[str, Any]] = {}
        self._restarts = 0
        self._between = True
        self._note(start)

    @property
    def finished(self) -> bool:
        """Whether nobody trains any more."""
        return not self._until

    def run(self) -> Iterator[tuple[int, Record]]:
        """Train to the end, yielding (member, record) for everything that happens to one."""
        while not self.finished:
            yield from self.stretch()

    def stretch(self) -> Iterator[tuple[int, Record]]:
        """Train until a member reports and has been decided about, yielding (member, record)."""
        self._between = False
        for member, record in self.cohort.train(min(self._until.values())):
            self._collect(member, record)
            yield member, record
        reached = [
            k
            for k, until in sorted(self._until.items())
            if self.cohort.members[k].step >= until or self.cohort.members[k].diverged is not None
        ]
        for k in reached:
            del self._until[k]
            self._carry_out(self.strategy.observe(self._observation(k)))
        self._between = True

    # saving

    def save(self, folder: Path) -> None:
        """Write a checkpoint of everything: weights, optimizers, the strategy, what has been decided so far.

        One that is in the folder already is there until the new one is complete.

        Args:
            folder: made when missing.

        Raises:
            UserError: a stretch has been begun and not been taken to its end, no space left, or no permission.
        """
        if not self._between:
            raise UserError(
                "population must be between two stretches to be saved, got one whose members are under way; "
                "take the records of stretch() to their end first"
            )
        part = f"part-{uuid.uuid4().hex[:8]}"
        self.cohort.save(folder / part)
        write_atomic_with(folder / part / SNAPSHOTS, lambda file: torch.save(self._snapshots, file))
        manifest = {
            "version": POPULATION_VERSION,
            "part": part,
            "train": self._train,
            "seed": self._seed,
            "vary_seed": self._vary,
            "strategy": self.strategy.state_dict(),
            "decisions": [decision_to_json(decision) for decision in self.decisions],
            "num_updates": self.num_updates,
            "num_restarts": self._restarts,
            "until": list(self._until.items()),
            "collectors": [[k, collector.state_dict()] for k, collector in self._collectors.items()],
        }
        write_atomic(folder / MANIFEST, json.dumps(manifest, allow_nan=False))
        for old in folder.glob("part-*"):
            if old.name != part:
                shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, strategy: Strategy) -> CohortPopulation:
        """Return the population saved in `folder`, which goes on as the saved one would have, to the bit.

        Args:
            folder: written by `save`.
            strategy: a new one, made with the same arguments; it takes the saved state over.

        Raises:
            UserError: missing, damaged or foreign files, an unknown version, or another strategy.
        """
        manifest = read_manifest(
            folder / MANIFEST, POPULATION_VERSION, of="a population", writer="a folder that was saved to"
        )
        part = folder / manifest["part"]
        strategy.load_state_dict(manifest["strategy"])
        self = cls.__new__(cls)
        self._train, self._seed, self._vary = manifest["train"], manifest["seed"], manifest["vary_seed"]
        self.strategy = strategy
        self.decisions = [decision_from_json(row) for row in manifest["decisions"]]
        self.num_updates, self._restarts = manifest["num_updates"], manifest["num_restarts"]
        self.cohort, _ = Cohort.load(part)
        self._until = dict(manifest["until"])
        self._collectors = {k: PointCollector() for k, _ in manifest["collectors"]}
        for k, state in manifest["collectors"]:
            self._collectors[k].load_state_dict(state)
        self._snapshots = _read_snapshots(part / SNAPSHOTS)
        self._between = True
        return self

    # observing

    def _observation(self, k: int) -> Observation:
        member = self.cohort.members[k]
        if not self.strategy.synchronous:
            # another member may take these weights when this one has gone on
            self._snapshots[k] = _copied(member.content())
        points = tuple(self._collectors[k].points)
        self._collectors[k].clear()
        return Observation(k, points, member.num_tokens)

    def _collect(self, k: int, record: Record) -> None:
        """Turn records into points."""
        if k not in self._until:
            return
        self.num_updates += isinstance(record, StepRecord)
        self._collectors[k].add(record, self.cohort.members[k].config)

    # carrying decisions out

    def _carry_out(self, decisions: list[Decision]) -> None:
        """Copy, restart, and apply values; all weights are those from before the first of these decisions."""
        donors = {d.donor for d in decisions if d.donor is not None}
        before = {k: self._snapshots[k] if k in self._snapshots else self._content(k) for k in donors}
        for decision in decisions:
            k = decision.member
            if decision.action == "stop":
                continue
            content = self.cohort.members[k].content() if decision.donor is None else before[decision.donor]
            step = content["counters"]["step"]
            if decision.donor_step not in (None, step):
                raise RuntimeError(f"decision names step {decision.donor_step} of weights that are of step {step}")
            config = self._config(decision)
            if decision.restart is not None:
                content = self._mixed(content, decision, decision.restart)
            if decision.donor is not None or decision.restart is not None:
                self.cohort.restore(k, content, config)
                if not self.strategy.synchronous:
                    self._snapshots[k] = _copied(content)
            elif config != self.cohort.members[k].config:
                self.cohort.configure(k, config)
        self._note(decisions)

    def _content(self, k: int) -> dict[str, Any]:
        content: dict[str, Any] = _copied(self.cohort.members[k].content())
        return content

    def _mixed(self, content: dict[str, Any], decision: Decision, restart: Restart) -> dict[str, Any]:
        """Return a state whose weights are mixed with fresh ones, with the counters of the old one."""
        self._restarts += 1
        seed = int(np.random.SeedSequence([self._seed, FRESH_STREAM, self._restarts]).generate_state(1)[0])
        config = self._config(decision)
        data = self.cohort.members[0].data
        return restarted(content, restart, TrainState(config.model_copy(update={"seed": seed}), data))

    def _note(self, decisions: list[Decision]) -> None:
        self.decisions += decisions
        self._until |= {d.member: d.until_step for d in decisions if d.action != "stop"}

    def _config(self, decision: Decision) -> TrainConfig:
        index = decision.member if self._vary else 0
        seed = int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0])
        data = with_values(self._train, {**decision.values, "seed": seed})
        return parse(TrainConfig, data, f"member {decision.member}")


def restarted(content: Mapping[str, Any], restart: Restart, fresh: TrainState) -> dict[str, Any]:
    """Return what `TrainState.restore` takes: weights mixed with fresh ones, a fresh optimizer, the old counters.

    Args:
        content: what `TrainState.content` returned of the old weights.
        restart: the shares of both.
        fresh: a run at step 0.
    """
    new: dict[str, Any] = _copied(fresh.content())
    old: Mapping[str, Tensor] = content["module"]
    new["module"] = {
        name: restart.shrink * old[name].to(tensor.device) + restart.perturb * tensor
        if tensor.is_floating_point()
        else tensor
        for name, tensor in new["module"].items()
    }
    return new | {"counters": content["counters"]}


def _copied(content: Any) -> Any:
    """Return a copy of nested dictionaries and lists with tensors of its own."""
    if isinstance(content, Tensor):
        return content.detach().clone()
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_copied(value) for value in content)
    return copy.deepcopy(content)


def _read_snapshots(path: Path) -> dict[int, dict[str, Any]]:
    try:
        snapshots: dict[int, dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read ({reason}); delete its folder to start anew") from None
    return snapshots
