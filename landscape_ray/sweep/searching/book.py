"""The book of a search: what was proposed, what is open, what came out; in a journal file that survives the driver.

Two studies of Optuna hold the same trials. The journal (`study.journal`, which optuna-dashboard reads) is the durable
one: a line is appended when a trial is handed out and when something becomes of it, and nothing else is written there.
The other lives in memory and is what samplers see: `proposals.py` makes proposals on it while trials run.

A killed driver leaves open trials. The next one reads the journal and the committed rows of the trials' folders: it
settles those that ended, observes every evaluation again in the order in which they were made, which puts the paused
ones back on their rungs, and hands out the rest under their old numbers.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import optuna

from landscape_ray.domains import Value
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.search import StoppingRule, Verdict
from landscape_ray.sweep.run import trial_id_of
from landscape_ray.sweep.searching.history import History, committed
from landscape_ray.sweep.searching.journal import Journal, outcome_of
from landscape_ray.sweep.searching.measures import measures, objective_values, violations
from landscape_ray.sweep.searching.proposals import Proposals
from landscape_ray.sweep.searching.proposer import Outcome
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder, TrialFolder

Standing: TypeAlias = Literal["paused", "stopped"]
"""What a trial is that was taken off before its end."""


class Job(NamedTuple):
    """A run to make."""

    number: int
    """Of the proposal in this sweep."""
    trial_id: str
    values: dict[str, Value]
    note: dict[str, Any]
    """What was changed about the proposal before it was handed out; empty for nothing."""


@dataclasses.dataclass(slots=True)
class _Entry:
    """What the book knows of one proposal."""

    values: dict[str, Value]
    note: dict[str, Any] = dataclasses.field(default_factory=dict)
    level: int = 0
    """Index of its present value in [search.fidelity]."""
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    """Held-out loss by step, or under [search.fidelity] the final one by value."""
    observed: int = -1
    """Last step that the stopping rule has seen."""


class Book:
    """The trials of one search.

    Args:
        spec: the sweep; must have a [search] table.
        folder: of the sweep; its journal is created when absent.
        tracking_uri: of the MLflow server that [search.warm_start] may name.

    Raises:
        UserError: no [search] table, a sampler or warm start that does not work, or a journal that cannot be read.
    """

    def __init__(self, spec: SweepSpec, folder: SweepFolder, tracking_uri: str = "") -> None:
        if spec.search is None:
            raise UserError(f"sweep '{spec.name}' has no [search] table; add one")
        self.spec, self.folder, self.search = spec, folder, spec.search
        self.proposals = Proposals(spec)
        self.rule = _rule_of(spec)
        self.standing: dict[str, Standing] = {}
        """Trials that were taken off, by identifier; for whoever shows them."""
        self._entries: dict[int, _Entry] = {}
        self._settled: set[int] = set()
        """Numbers of the proposals of which is known what became of them; what it was is in the journal."""
        self._open: set[int] = set()
        self._paused: set[int] = set()
        self._verdicts: dict[int, Verdict] = {}
        self._reissue: deque[int] = deque()
        self._alone = 0
        self._failed: set[int] = set()
        self._ready: deque[int] = deque()
        self._journal = Journal(spec, folder.study_path, tracking_uri)
        for index, trial in enumerate(self._journal.own):
            self._entries[index] = _Entry(dict(trial.params), trial.user_attrs.get("note", {}))
            if trial.state.is_finished():
                self._settled.add(index)
                self.proposals.tell(index, outcome_of(trial))
        self.proposals.load(self._journal)
        self._catch_up()

    @property
    def study(self) -> optuna.Study:
        """The durable study, to read from."""
        return self._journal.study

    def _settle(self, index: int, outcome: Outcome) -> None:
        """Append to the journal what became of a proposal; the proposer hears of it when it next begins."""
        self._journal.settle(index, outcome)
        self._settled.add(index)
        self.proposals.tell(index, outcome)
        self._paused.discard(index)
        self._entries[index].losses.clear()

    # --- after a driver that is gone ------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Settle, pause or hand out again what an earlier driver left open."""
        unsettled = [index for index in self._entries if index not in self._settled]
        if self.rule is not None:
            self._observe_again(self.rule)
        failed, unfinished = [], []
        for index in unsettled:
            trial = self._folder(index)
            summary = trial.summary()
            if self.rule is None:
                self.note(index, [(step, loss) for step, loss, _ in History(trial).evals])
            if summary is not None and summary.status in ("finished", "diverged") and not self._goes_on(index, summary):
                self._settle(index, self._outcome(index, measures(summary, History(trial).probes)))
            elif (summary is not None and summary.status == "stopped") or self._verdicts.get(index) == "stop":
                self._stop(index)
            elif self._verdicts.get(index) == "pause":
                self._paused.add(index)
                self.standing[self._trial_id(index)] = "paused"
            elif summary is not None and summary.status == "failed":
                failed.append(index)
            else:
                unfinished.append(index)
            self._verdicts.pop(index, None)
        # Those that failed come first and one by one: in a cohort, one of them took the others along.
        self._alone = len(failed)
        self._reissue.extend(failed + unfinished)
        if self.proposals.guarded:
            for index in self._entries:
                self.learn(index, History(self._folder(index)).first)

    def _goes_on(self, index: int, summary: RunSummary) -> bool:
        """Return whether a run that ended is only the first of several of its proposal; its level is set then."""
        fidelity = self.search.fidelity
        if fidelity is None or summary.status == "diverged" or self._is_last(self._entries[index].level):
            return False
        if self._verdicts.get(index) != "pause":  # promoted when it ended: the next run is to be made
            self._verdicts.pop(index, None)
            self._entries[index].level += 1
        return True

    def _is_last(self, level: int) -> bool:
        fidelity = self.search.fidelity
        return fidelity is None or level == len(fidelity.values) - 1

    def _observe_again(self, rule: StoppingRule) -> None:
        """Rebuild what the rule knew, from committed rows, in the order in which they were made."""
        levels = self.search.fidelity.values if self.search.fidelity is not None else []
        known = committed(self.folder, self._entries, levels)
        for index, level in known.levels.items():
            self._entries[index].level = level
        for index in self._entries if not levels else ():
            self._begin(rule, index)
        for _, index, step, loss in known.evals:
            self._entries[index].losses[step] = loss
            self._entries[index].observed = step
            verdict = rule.observe(index, step, loss)
            if verdict == "continue":
                self._verdicts.pop(index, None)
            else:
                self._verdicts[index] = verdict
        for index, loss in known.ended.items():
            rule.end(index, loss)
            if not levels:
                self._verdicts.pop(index, None)
        for index, entry in self._entries.items():
            if levels and levels[entry.level] not in entry.losses and self._verdicts.pop(index, None) == "pause":
                rule.promote(index)  # its next run has begun

    def _begin(self, rule: StoppingRule, index: int) -> None:
        config = self.spec.train_config(self._entries[index].values, index)
        rule.begin(index, config.schedule.build(config.num_steps).values().tolist(), config.schedule.warmup_steps)

    # --- handing out ----------------------------------------------------------------------------------------------

    def _trial_id(self, index: int) -> str:
        return trial_id_of(index, self._entries[index].level)

    def _folder(self, index: int) -> TrialFolder:
        return self.folder.trial(self._trial_id(index))

    def num_left(self) -> int:
        """Return how many proposals are not settled: to be made, to be handed out again, paused or running."""
        return max(self.search.num_trials, len(self._entries)) - len(self._settled)

    def next(self, size: int = 1) -> list[Job] | None:
        """Return the next runs to make, at most `size`.

        Returns:
            An empty list while there is nothing to do now, but may be later; None at the end.
        """
        if self._alone:
            size, self._alone = 1, self._alone - 1
        again: list[int] = []
        while len(again) < size and (index := self._again()) is not None:
            again.append(index)
        new = self._propose(size - len(again)) if len(again) < size and not self._all_proposed() else []
        if again and self.proposals.under_way and size > 1:  # a cohort waits for all of its members
            self._reissue.extendleft(reversed(again))
            return []
        if again or new:
            return [self._hand_out(index) for index in again + new]
        if self.proposals.under_way or (self._open and (self.rule is not None or not self._all_proposed())):
            return []
        if self._all_proposed() and not self._failed:  # else another driver goes on from here
            for index in sorted(self._paused):
                self._stop(index)
        self.close()
        return None

    def _all_proposed(self) -> bool:
        return len(self._entries) >= self.search.num_trials

    def close(self) -> None:
        """End the thread that makes proposals."""
        self.proposals.close()

    def _again(self) -> int | None:
        """Return a trial that was handed out before: promoted, or left open by a driver that is gone."""
        if self._ready:
            return self._ready.popleft()
        for index in self.rule.promotable() if self.rule is not None and self._paused else ():
            if index in self._paused and self.rule is not None:
                self.rule.promote(index)
                self._promoted(index)
                return index
        return self._reissue.popleft() if self._reissue else None

    def _promoted(self, index: int) -> None:
        self._paused.discard(index)
        self.standing.pop(self._trial_id(index), None)
        if self.search.fidelity is not None:
            self._entries[index].level += 1

    def _hand_out(self, index: int) -> Job:
        entry = self._entries[index]
        self._open.add(index)
        values = dict(entry.values)
        if self.search.fidelity is not None:
            values[self.search.fidelity.name] = self.search.fidelity.values[entry.level]
        return Job(index, self._trial_id(index), values, entry.note)

    def _propose(self, size: int) -> list[int]:
        """Return up to `size` new proposals if they are there; else see to it that they are being made.

        Where no trial is running that needs the driver, they are waited for.
        """
        if not self.proposals.under_way:
            first = len(self._entries)
            count = min(size, self.search.num_trials - first)
            known = self._known_before(first + count - 1)
            if self.search.lag is not None and any(index not in self._settled for index in range(known)):
                return []  # a result that is needed is outstanding
            self.proposals.begin(first, count, known)
        if self._open and not self.proposals.ready:
            return []
        new = []
        for made in self.proposals.take():
            self._entries[made.number] = _Entry(made.values, made.note)
            if self.rule is not None and self.search.fidelity is None:
                self._begin(self.rule, made.number)
            new.append(made.number)
        return new

    def _known_before(self, last: int) -> int:
        """Return how many of the first trials proposal `last` may know the results of."""
        return len(self._entries) if self.search.lag is None else max(last - self.search.lag + 1, 0)

    # --- what comes back ------------------------------------------------------------------------------------------

    def note(self, index: int, evals: Sequence[tuple[int, float]]) -> None:
        """Take note of evaluations of a running trial: steps and held-out losses."""
        if self.search.fidelity is None:  # there, what compares is the loss at the end of every run
            self._entries[index].losses.update(evals)

    def observe(self, index: int, evals: Sequence[tuple[int, float]]) -> Verdict:
        """Return what becomes of a running trial after new evaluations: steps and held-out losses."""
        self.note(index, evals)
        if self.rule is None or self.search.fidelity is not None:
            return "continue"
        verdict: Verdict = "continue"
        for step, loss in evals:
            verdict = self.rule.observe(index, step, loss)
            self._entries[index].observed = step
            if verdict == "stop":
                break
        if verdict != "continue":
            self._verdicts[index] = verdict
        return verdict

    def learn(self, index: int, probes: Mapping[str, float]) -> None:
        """Take note of what a run's probes have measured first."""
        self.proposals.learn(index, self._entries[index].values, probes)

    def taken_off(self, index: int) -> None:
        """Take note that a trial is no longer running and has not ended: by the last verdict, or interrupted."""
        self._open.discard(index)
        verdict = self._verdicts.pop(index, None)
        if verdict == "stop":
            self._stop(index)
        elif verdict == "pause":
            self._pause(index)

    def _pause(self, index: int) -> None:
        self._paused.add(index)
        self.standing[self._trial_id(index)] = "paused"
        self._journal.write(index, self._entries[index].losses)
        # samplers may learn from what is known of it; told again when more is
        self.proposals.tell(index, Outcome(state="pruned", intermediate=dict(self._entries[index].losses)))

    def _stop(self, index: int) -> None:
        """Settle a trial as stopped, in its folder first: what the journal says is then true whenever this is cut."""
        trial = self._folder(index)
        summary = trial.summary()
        if summary is not None and summary.status not in ("finished", "diverged", "stopped"):
            assert self.rule is not None
            trial.set_status("stopped", f"stopped by rule '{self.rule.name}' at step {summary.step}")
        self.standing[self._trial_id(index)] = "stopped"
        self._settle(index, Outcome(state="pruned", intermediate=dict(self._entries[index].losses)))

    def ended(self, index: int, measured: Mapping[str, float]) -> None:
        """Take note that a run ended by itself.

        Args:
            index: number of its proposal.
            measured: see `measures`; a loss that is not finite is a divergence.
        """
        self._open.discard(index)
        self._verdicts.pop(index, None)
        outcome = self._outcome(index, measured)
        entry, loss = self._entries[index], measured.get("loss_nats", float("nan"))
        fidelity = self.search.fidelity
        if fidelity is not None and outcome.state == "complete" and not self._is_last(entry.level):
            assert self.rule is not None
            entry.losses[fidelity.values[entry.level]] = loss
            if self.rule.observe(index, fidelity.values[entry.level], loss) == "continue":
                self._promoted(index)
                self._ready.append(index)
            else:
                self._pause(index)
            return
        if self.rule is not None:
            if fidelity is None:  # those that came with the end, as a new driver would see them on disk
                for step in sorted(step for step in entry.losses if step > entry.observed):
                    self.rule.observe(index, step, entry.losses[step])
            self.rule.end(index, loss if outcome.state == "complete" else float("nan"))
        self._settle(index, outcome)

    def failed(self, index: int) -> None:
        """Take note that a run failed: it stays open, and the next driver tries it again."""
        self._open.discard(index)
        self._failed.add(index)
        self._verdicts.pop(index, None)

    def _outcome(self, index: int, measured: Mapping[str, float]) -> Outcome:
        values = objective_values(self.search.objectives, measured)
        losses = dict(self._entries[index].losses)
        if values is None:
            return Outcome(state="failed", intermediate=losses)
        return Outcome(
            state="complete",
            values=tuple(values),
            intermediate=losses,
            constraints=violations(self.search.constraints, measured),
        )


def _rule_of(spec: SweepSpec) -> StoppingRule | None:
    assert spec.search is not None
    if spec.search.fidelity is not None:
        return spec.search.fidelity.build()
    if spec.search.stopping is not None:
        return spec.search.stopping.build(spec.num_steps)
    return None
