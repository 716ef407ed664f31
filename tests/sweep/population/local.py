"""A population of a sweep carried out in this process, member by member: what Ray does, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from landscape_ray.populations import Decision
from landscape_ray.populations.decisions import points_from_json
from landscape_ray.sweep.population.book import PopulationBook
from landscape_ray.sweep.population.member import MemberRun
from landscape_ray.sweep.population.orders import Order
from landscape_ray.sweep.run import trial_id_of
from landscape_ray.sweep.spec import SweepSpec, spec_of
from landscape_ray.tracking.folder import SweepFolder


class Local:
    """Every member trains to its next commit, in turn; what it copies comes from memory where `memory` says so."""

    def __init__(self, folder: SweepFolder, attempt: int = 1, memory: bool = True) -> None:
        self.folder, self.attempt, self.memory = folder, attempt, memory
        self.spec: SweepSpec = spec_of(folder)
        self.book = PopulationBook(self.spec, folder)
        self.book.reopen()
        self.decisions: list[Decision] = []
        self.runs: dict[int, MemberRun] = {}
        self.contents: dict[Any, bytes] = {}
        self.lost: dict[int, int] = {}
        """The order that each member has failed of last."""
        self.orders: dict[int, Order] = {member: self.book.orders[member] for member in self.book.open}
        self.data: Any = None

    def open(self, member: int, order: Order, weights: bytes | None) -> MemberRun:
        """Let a member begin, or go on."""
        folder = self.folder.trial(trial_id_of(member))
        return MemberRun(self.spec, folder, order, self.attempt, self.data, weights)

    def step(self, member: int) -> dict[str, Any] | None:
        """Let a member train to its next commit, and report; None while it waits or when it has ended."""
        order = self.orders[member]
        if self.lost.get(member) == order.serial:
            return None
        weights = self.contents.get(order.source) if self.memory else None
        if member not in self.runs:
            self.runs[member] = self.open(member, order, weights)
            self.data = self.runs[member].state.data
        run = self.runs[member]
        if run.order.serial < order.serial:
            if order.stops:
                return None
            run.begin(order, weights)
        if self.book.waits(member):
            return None
        if not run.reached:
            run.advance()
        if run.reached and (content := run.take_content()) is not None:
            self.contents[run.observed] = content
        result = run.result()
        self.book.begun(member, result["serial"])
        if result["reached"]:
            points = points_from_json(json.loads(json.dumps(result["points"])))
            made = self.book.report(member, result["serial"], points, result["num_tokens"])
            if made:
                self.hear(made)
        return result

    def hear(self, made: list[Order]) -> None:
        """Save the book, then tell members what it says."""
        self.book.save(self.book.draft())
        self.decisions += [each.decision for each in made]
        self.orders |= {each.decision.member: each for each in made}

    def fail(self, member: int, why: str) -> None:
        """Lose the process of a member that has no attempt left."""
        self.runs.pop(member, None)
        self.lost[member] = self.orders[member].serial
        self.hear(self.book.fail(member, why))

    def run(self, after: Callable[[int], None] = lambda count: None) -> Local:
        """Go on to the end; `after` is called with the number of steps so far and may raise."""
        count, before = 0, -1
        while count > before:
            before = count
            for member in sorted(self.orders):
                if self.step(member) is not None:
                    count += 1
                    after(count)
        self.book.clear()
        return self


def history(folder: SweepFolder) -> dict[str, Any]:
    """Return what a population has become, whatever order its members reported in."""
    book = PopulationBook(spec_of(folder), folder)
    strategy = book.strategy
    paths = {
        member: [(s.member, s.start_step, s.stop_step, s.values, repr(s.points)) for s in strategy.lineage.path(member)]
        for member in strategy.lineage.members
    }
    generator = strategy.generator.bit_generator.state
    return {"orders": book.orders, "members": strategy.members, "paths": paths, "generator": generator}


def make(path: Path, text: str) -> SweepFolder:
    return SweepFolder.create(path, spec_text=text, meta={"experiment": "e", "attempts": 0})
