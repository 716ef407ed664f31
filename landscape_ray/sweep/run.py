"""One trial and its folder: records to Parquet, checkpoints beside them, nothing lost and nothing twice."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from landscape_ray.data import Data
from landscape_ray.errors import UserError
from landscape_ray.records import EventRecord, Record, RunStatus, RunSummary, StepRecord
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.training import TrainState, read_checkpoint, train

CHECKPOINT = "state.pt"


def trial_id_of(index: int) -> str:
    """Return the identifier of trial number `index`.

    >>> trial_id_of(7)
    't0007'
    """
    return f"t{index:04d}"


def index_of(trial_id: str) -> int:
    """Return the number of the trial with this identifier.

    >>> index_of("t0007")
    7
    """
    return int(trial_id[1:])


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


class TrialRun:
    """One trial and its folder. Used by the Ray trainable and by `landscape-ray train` alike.

    Args:
        spec: the sweep.
        folder: the trial's folder; a checkpoint found there is continued.
        index: number of the trial.
        values: searched values, which win over those of a checkpoint.
        attempt: counts the drivers that this sweep has had; a trial continued by another one is noted as resumed.
        data: what the trial is trained on, where it is open already.

    Attributes:
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
    ) -> None:
        self.spec, self.folder, self.values, self.attempt = spec, folder, values, attempt
        self.config = spec.train_config(values, index)
        self.lr = math.nan
        self.adopted = ""
        self.write_state: Callable[..., None] = lambda path, **extra: self.state.save(path, **extra)
        checkpoint = folder.checkpoint_path / CHECKPOINT
        if checkpoint.exists():
            self.state, extra = TrainState.load(checkpoint, self.config, data)
            self.adopted = str(extra["adopted"])
            self.writer = PartWriter(folder, int(extra["num_parts"]))
            # Nothing is committed here: mutated values become durable together with the weights that they came with.
            if self.state.finished:
                self.commit()  # its last commit may have been cut off after the checkpoint
            elif extra["attempt"] != attempt:
                self._event("resume")
        else:
            self.state = TrainState.create(self.config, data)
            self.writer = PartWriter(folder)
            self.commit()

    @property
    def finished(self) -> bool:
        """Whether the trial has ended."""
        return self.state.finished

    def advance(self) -> None:
        """Train to the next commit and make it durable."""
        until = self.next_stop()
        for record in train(self.state, until):
            self.note(record)
        self.commit()

    def note(self, record: Record) -> None:
        """Keep a record for the next commit."""
        self.writer.append(record)
        if isinstance(record, StepRecord):
            self.lr = record.lr

    def next_stop(self) -> int:
        """Return the step of the next commit: a multiple of commit_steps or of the population's interval."""
        strides = [self.spec.commit_steps]
        if self.spec.population is not None:
            strides.append(self.spec.population.interval_steps)
        return min((self.state.step // stride + 1) * stride for stride in strides)

    def commit(self) -> None:
        """Make everything so far durable: rows, then the checkpoint that counts them, then the summary.

        A crash in between leaves rows that no checkpoint counts; they are dropped on resume and made again.
        """
        self._check_driver()
        num_parts = self.writer.flush()
        self.save(self.folder.checkpoint_path / CHECKPOINT, num_parts)
        self.folder.commit(self.summary(), num_parts)

    def _check_driver(self) -> None:
        """Raise if another driver has taken over the sweep: this process was cut off and must not write any more."""
        latest = SweepFolder(self.folder.path.parents[1]).meta.get("attempts", 0)
        if latest > self.attempt:
            raise RuntimeError(f"driver {self.attempt} of this sweep was superseded by driver {latest}")

    def save(self, path: Path, num_parts: int = 0) -> None:
        """Write the state with what a continuation or a copy needs to know about its origin."""
        self.write_state(
            path, num_parts=num_parts, run_id=self.folder.trial_id, adopted=self.adopted, attempt=self.attempt
        )

    def adopt(self, checkpoint: Path, exploit: str) -> None:
        """Continue from another member's checkpoint under this trial's own values; the lineage is recorded.

        The donor's name and step come from the checkpoint itself, so they are those of the weights. An exploit that
        was carried out before changes nothing: after a pause or a crash Ray hands out some checkpoint again, and the
        durable state in the trial's folder is at least as far.

        Args:
            checkpoint: written by `save`.
            exploit: serial of the exploit in this sweep; empty before a member's first one under this driver, when
                every checkpoint that Ray has of it is its own.
        """
        if exploit in ("", self.adopted):
            return
        payload = read_checkpoint(checkpoint)
        donor, donor_step = str(payload["extra"]["run_id"]), int(payload["counters"]["step"])
        self.adopted = exploit
        own = self.state
        clocks = {name: getattr(own, name) for name in ("elapsed_seconds", "eval_seconds", "probe_seconds")}
        own.restore(payload)
        for name, seconds in clocks.items():  # time is this trial's own, weights and steps are the donor's
            setattr(own, name, seconds)
        self._event("exploit", donor=donor, donor_step=donor_step)
        self.commit()

    def _event(self, event: str, **lineage: Any) -> None:
        state = self.state
        self.writer.append(
            EventRecord(
                step=state.step,
                num_tokens=state.num_tokens,
                flops=state.flops,
                elapsed_seconds=state.elapsed_seconds,
                time_unix=time.time(),
                event=event,
                detail=json.dumps(self.values),
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
            message=state.diverged or "",
        )

    def result(self) -> dict[str, Any]:
        """Return what the driver needs to know."""
        state = self.state
        return {
            "loss_nats": state.loss_nats if not state.diverged else math.nan,
            "loss_unit": state.objective.unit,
            "step": state.step,
            "lr": self.lr,
            "diverged": state.diverged is not None,
            "done": state.finished,
        }
