"""One trial and its folder: records to Parquet, checkpoints beside them, nothing lost and nothing twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from landscape_ray.data import Data
from landscape_ray.errors import UserError
from landscape_ray.records import (
    EvalRecord,
    EventRecord,
    ProbeRecord,
    Progress,
    Record,
    RunStatus,
    RunSummary,
    StepRecord,
    SystemRecord,
)
from landscape_ray.sweep.disk import DiskBound
from landscape_ray.sweep.memory import peak_bytes, reset_peak
from landscape_ray.sweep.searching.measures import measures
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.sweep.system import SystemSampler
from landscape_ray.sweep.trunk import Trunk
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.training import TrainState, read_checkpoint, train

CHECKPOINT = "state.pt"
Loop: TypeAlias = Callable[[TrainState, int], Iterator[Record]]
"""What trains a state up to a step: `train`, or the same over several processes."""

PREVIOUS = "previous.pt"
"""The checkpoint before, kept while a trial runs: where the last one turns out damaged, it goes on from there."""


def trial_id_of(index: int, level: int = 0) -> str:
    """Return the identifier of trial number `index`; `level` counts the runs that repeat it at a higher fidelity.

    >>> trial_id_of(7), trial_id_of(7, 2)
    ('t0007', 't0007r2')
    """
    return f"t{index:04d}r{level}" if level else f"t{index:04d}"


def index_of(trial_id: str) -> int:
    """Return the number of the trial with this identifier.

    >>> index_of("t0007"), index_of("t0007r2")
    (7, 7)
    """
    return int(trial_id[1:].partition("r")[0])


def checkpoint_of(folder: SweepFolder, run_id: str | None = None) -> tuple[str, Path]:
    """Return a run and its last checkpoint; without a name the run with the lowest final loss.

    Raises:
        UserError: no such run, or it has no checkpoint.
    """
    there = {trial.trial_id: trial for trial in folder.trials() if (trial.checkpoint_path / CHECKPOINT).is_file()}
    if not there:
        raise UserError(f"no run of {folder.path.name} has a checkpoint yet; wait for the first, or resume the sweep")
    if run_id is None:
        summaries = {name: trial.summary() for name, trial in there.items()}
        known = {
            n: s.final_loss_nats for n, s in summaries.items() if s is not None and math.isfinite(s.final_loss_nats)
        }
        run_id = min(known, key=lambda name: known[name]) if known else next(iter(there))
    if run_id not in there:
        raise UserError(f"--run must be a run with a checkpoint ({', '.join(sorted(there)[:8])}), got '{run_id}'")
    return run_id, there[run_id].checkpoint_path / CHECKPOINT


def set_aside(checkpoint: Path, previous: Path) -> None:
    """Give a checkpoint another name too, in place of what had it; there is one under its own all the time."""
    temporary = previous.with_name(f".{previous.name}.tmp")
    temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the first commit, or a file system without hard links, which keeps one only
        os.link(checkpoint, temporary)
        os.replace(temporary, previous)


class TrialRun:
    """One trial and its folder. Used by the Ray trainable and by `landscape-ray train` alike.

    Args:
        spec: the sweep.
        folder: the trial's folder; a checkpoint found there is continued.
        index: number of the trial.
        values: searched values, which win over those of a checkpoint.
        attempt: counts the drivers that this sweep has had; a trial continued by another one is noted as resumed.
        data: what the trial is trained on, where it is open already.
        note: what was changed about the searched values before they came here; each entry becomes an event.
        mirror: uploads what is committed, and has brought here what was stored of the trial; None without a storage.
        loop: trains the state, and yields its records.

    Attributes:
        evals: step and held-out loss of the evaluations since the last result.
        probes: last value of each probe, since this object was made.
        first_probes: first finite value of each.
        system: says when what the process does is sampled, and how.
        write_state: saves the state to a path with a few extra values; a cohort puts its own in here.
    """

    def __init__(
        self,
        spec: SweepSpec,
        folder: TrialFolder,
        index: int,
        values: dict[str, Any],
        attempt: int = 0,
        data: Data | None = None,
        note: Mapping[str, Any] | None = None,
        mirror: Mirror | None = None,
        loop: Loop = train,
    ) -> None:
        self.mirror = mirror
        self._loop = loop
        if mirror is not None:
            mirror.take_over(folder)  # first: what is there of the trial may have been made elsewhere
        self.spec, self.folder, self.values, self.attempt = spec, folder, values, attempt
        self.config = spec.train_config(values, index)
        self.lr = math.nan
        self.evals: list[tuple[int, float]] = []
        self.probes: dict[str, float] = {}
        self.first_probes: dict[str, float] = {}
        self.disk = DiskBound(spec, SweepFolder(folder.path.parents[1]))
        self._disk_full = ""
        self.trunk = Trunk(spec, folder.path.parents[1], self.config)
        before = folder.summary()
        self._tracking_seconds = before.tracking_seconds if before is not None else 0.0
        self._peak_bytes = before.peak_memory_bytes if before is not None else math.nan
        reset_peak()
        self.system = SystemSampler(spec.system_seconds)
        self.write_state: Callable[..., None] = lambda path, **extra: self.state.save(path, **extra)
        checkpoint, previous = folder.checkpoint_path / CHECKPOINT, folder.checkpoint_path / PREVIOUS
        if checkpoint.exists() or previous.exists():
            self.state, extra, damage = self._load(checkpoint, data)
            self.writer = PartWriter(folder, int(extra["num_parts"]))
            self._reopened(extra)
            if damage:
                self._event("fallback", {"reason": damage})
        else:
            self._begin_anew(data, note or {})

    def _begin_anew(self, data: Data | None, note: Mapping[str, Any]) -> None:
        """Begin where nothing is to be continued."""
        self.state = TrainState.create(self.config, data)
        self.writer = PartWriter(self.folder)
        for event, detail in note.items():
            self._event(event, detail)
        self._branch_off()
        self.commit()

    def _reopened(self, extra: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with the extra values that were saved in it."""
        if self.state.finished:
            self.commit()  # its last commit may have been cut off after the checkpoint
        elif extra["attempt"] != self.attempt:
            self._event("resume")

    @property
    def finished(self) -> bool:
        """Whether the trial has ended."""
        return self.state.finished

    def _load(self, checkpoint: Path, data: Data | None) -> tuple[TrainState, dict[str, Any], str]:
        """Return the state of the last checkpoint, its extra values, and why it is the one before where it is."""
        previous = checkpoint.with_name(PREVIOUS)
        try:
            return *TrainState.load(checkpoint, self.config, data), ""
        except UserError as error:
            if not previous.exists():
                raise
            try:
                found = TrainState.load(previous, self.config, data)
            except UserError:
                raise error from None
            os.replace(previous, checkpoint)  # else the next commit would keep the damaged one as the one before
            return *found, str(error)

    def advance(self) -> None:
        """Train to the next commit and make it durable."""
        until = self.next_stop()
        for record in self._loop(self.state, until):
            self.note(record)
        self.commit()

    def note(self, record: Record) -> None:
        """Keep a record for the next commit."""
        self.writer.append(record)
        if isinstance(record, StepRecord):
            self.lr = record.lr
            if self.system.due:
                self._sample(record)
        elif isinstance(record, EvalRecord):
            self.evals.append((record.step, record.loss_nats))
        elif isinstance(record, ProbeRecord):
            self.probes[record.probe] = record.value
            if math.isfinite(record.value):
                self.first_probes.setdefault(record.probe, record.value)

    def _sample(self, record: StepRecord) -> None:
        """Keep what the process and the machine are doing, at the place of an update."""
        started = time.perf_counter()
        place = {field.name: getattr(record, field.name) for field in dataclasses.fields(Progress)}
        for name, value in self.system.sample().items():
            self.writer.append(SystemRecord(**place, probe=name, value=value))
        self._tracking_seconds += time.perf_counter() - started

    def next_stop(self) -> int:
        """Return the step of the next commit.

        That is a multiple of commit_steps, a step at which a verdict is due, or one of a checkpoint for other trials.
        """
        stops = [(self.state.step // self.spec.commit_steps + 1) * self.spec.commit_steps]
        stops += [step for step in self.spec.milestones if step > self.state.step]
        if (leave := self.trunk.next_stop(self.state.step)) is not None:
            stops.append(leave)
        return min(stops)

    def commit(self) -> None:
        """Make everything so far durable: rows, then the checkpoint that counts them, then the summary.

        A crash in between leaves rows that no checkpoint counts; they are dropped on resume and made again. Where there
        is a storage, the upload follows in the background; away from the driver it is waited for before a decision.
        """
        self._check_driver()
        self._make_durable()
        self._disk_full = self.disk.check()
        if self.mirror is not None:
            self.mirror.committed(self.folder, ended=self.state.finished)
            if self.decisive and not self.mirror.home:
                self.mirror.flush()

    @property
    def decisive(self) -> bool:
        """Whether the driver decides on the present state, and not only shows it."""
        return self.state.finished or self.state.step in self.spec.milestones

    def _make_durable(self) -> None:
        """Write rows, checkpoint and summary, in this order."""
        started = time.perf_counter()
        num_parts = self.writer.flush()
        self._tracking_seconds += time.perf_counter() - started
        checkpoint = self.folder.checkpoint_path / CHECKPOINT
        previous = checkpoint.with_name(PREVIOUS)
        set_aside(checkpoint, previous)
        self.save(checkpoint, num_parts)
        started = time.perf_counter()
        self.folder.commit(self.summary(), num_parts)
        self._tracking_seconds += time.perf_counter() - started
        if self.state.finished:
            previous.unlink(missing_ok=True)  # nothing is left to train: one checkpoint a trial is what stays
        if self.state.diverged is None and (path := self.trunk.wants(self.state.step)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.save(path)

    def _branch_off(self) -> None:
        """Begin at the last checkpoint of a trunk that this trial may share, where there is one."""
        checkpoint = self.trunk.find()
        if checkpoint is None:
            return
        try:
            payload = read_checkpoint(checkpoint)
        except UserError:
            if checkpoint.exists():
                raise
            return  # it went for lack of space just now: these updates are made again
        self._take_over(payload)
        donor, step = str(payload["extra"]["run_id"]), self.state.step
        self._event("branch", {"stable_steps": self.trunk.stable_steps}, donor=donor, donor_step=step)

    def _take_over(self, payload: Mapping[str, Any]) -> None:
        """Restore another trial's state; time is this trial's own, weights and steps are the other's."""
        clocks = {name: getattr(self.state, name) for name in ("elapsed_seconds", "eval_seconds", "probe_seconds")}
        self.state.restore(payload)
        for name, seconds in clocks.items():
            setattr(self.state, name, seconds)

    def _check_driver(self) -> None:
        """Raise if another driver has taken over the sweep: this process was cut off and must not write any more."""
        latest = SweepFolder(self.folder.path.parents[1]).meta.get("attempts", 0)
        if latest > self.attempt:
            raise RuntimeError(f"driver {self.attempt} of this sweep was superseded by driver {latest}")
        if self.mirror is not None:
            self.mirror.check(self.folder)

    def save(self, path: Path, num_parts: int = 0) -> None:
        """Write the state with what a continuation or a copy needs to know about its origin."""
        self.write_state(path, num_parts=num_parts, run_id=self.folder.trial_id, attempt=self.attempt, **self._extra())

    def _extra(self) -> dict[str, str | int]:
        """Return what else to save with the state."""
        return {}

    def _event(self, event: str, detail: Mapping[str, Any] | None = None, **lineage: Any) -> None:
        """Record an event; without a detail it is the searched values."""
        state = self.state
        self.writer.append(
            EventRecord(
                step=state.step,
                num_tokens=state.num_tokens,
                flops=state.flops,
                elapsed_seconds=state.elapsed_seconds,
                time_unix=time.time(),
                event=event,
                detail=json.dumps(self.values if detail is None else detail),
                **lineage,
            )
        )

    def summary(self) -> RunSummary:
        """Return the trial's row as it stands."""
        state = self.state
        status: RunStatus = "diverged" if state.diverged else "finished" if state.finished else "running"
        return RunSummary(
            run_id=self.folder.trial_id,
            status=status,
            config=self.config.model_dump(mode="json"),
            varied=dict(self.values),
            step=state.step,
            num_steps=self.config.num_steps,
            num_tokens=state.num_tokens,
            flops=state.flops,
            num_params=state.module.num_params(),
            num_params_non_embedding=state.module.num_params(embedding=False),
            final_loss_nats=state.loss_nats,
            final_accuracy=state.accuracy,
            unit=state.data.signature.unit,
            loss_unit=state.objective.unit,
            bytes_per_token=getattr(state.data, "bytes_per_token", None),
            best_loss_nats=state.best_loss_nats,
            elapsed_seconds=state.elapsed_seconds,
            probe_seconds=state.probe_seconds,
            eval_seconds=state.eval_seconds,
            tracking_seconds=self._tracking_seconds,
            peak_memory_bytes=self._peak(),
            message=state.diverged or "",
        )

    def _peak(self) -> float:
        known = [value for value in (self._peak_bytes, peak_bytes()) if math.isfinite(value)]
        return max(known, default=math.nan)

    def result(self) -> dict[str, Any]:
        """Return what the driver needs to know: where the trial stands, and the evaluations since the last call."""
        state, evals = self.state, self.evals
        self.evals = []
        return {
            "loss_nats": state.loss_nats if not state.diverged else math.nan,
            "loss_unit": state.objective.unit,
            "step": state.step,
            "lr": self.lr,
            "diverged": state.diverged is not None,
            "done": state.finished,
            "ended": state.finished,  # Ray says done also of a trial that it takes off
            # lists of pairs, because Ray would take dictionaries apart
            "evals": evals,
            "measures": list(measures(self.summary(), self.probes).items()),
            "first_probes": list(self.first_probes.items()),
            "disk_full": self._disk_full,
        }
