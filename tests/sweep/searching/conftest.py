"""A search without Ray and without training: trials whose losses are a formula, committed to real folders."""

import math
import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.records import EvalRecord, ProbeRecord, RunSummary
from landscape_ray.search import Verdict
from landscape_ray.sweep.searching.book import Book, Job
from landscape_ray.sweep.searching.measures import measures
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter

Loss = Callable[[dict[str, Any], int], float]


class FakeRun:
    """One run: its loss after every evaluation is `loss(values, step)`; everything is committed, as by a real one."""

    clock: Iterator[int] = count(1)

    def __init__(self, spec: SweepSpec, folder: SweepFolder, job: Job, loss: Loss, probes: dict[str, float]) -> None:
        self.spec, self.job, self.loss, self.probes = spec, job, loss, probes
        self.folder = folder.trial(job.trial_id)
        self.config = spec.train_config(job.values, job.number)
        commit = self.folder.read()
        self.step = commit.summary.step if commit is not None else 0
        self.writer = PartWriter(self.folder, commit.num_parts if commit is not None else 0)
        if commit is None:
            self.commit("running", math.nan)

    def commit(self, status: Any, loss: float) -> RunSummary:
        summary = RunSummary(
            run_id=self.job.trial_id,
            status=status,
            config=self.config.model_dump(mode="json"),
            varied=self.job.values,
            step=self.step,
            num_steps=self.config.num_steps,
            final_loss_nats=loss,
        )
        self.folder.commit(summary, self.writer.flush())
        return summary

    def advance(self) -> tuple[list[tuple[int, float]], RunSummary]:
        """Train to the next evaluation and commit it; return it with the summary."""
        self.step += self.config.eval.every_steps
        loss = self.loss(self.job.values, self.step)
        base = {
            "step": self.step,
            "num_tokens": self.step,
            "flops": float(self.step),
            "elapsed_seconds": 0.0,
            "time_unix": time.time() + next(self.clock),
            "cost_seconds": 0.0,
        }
        self.writer.append(EvalRecord(**base, loss_nats=loss))
        for name, value in self.probes.items():
            self.writer.append(ProbeRecord(**base, probe=name, value=value, standard_error=0.0, num_matvecs=1))
        status = "diverged" if math.isnan(loss) else "finished" if self.step >= self.config.num_steps else "running"
        return [(self.step, loss)], self.commit(status, loss)


class Driver:
    """Runs a book's jobs one evaluation at a time, in turn, on so many workers; may die at any instant."""

    def __init__(
        self,
        spec: SweepSpec,
        path: Path,
        loss: Loss,
        num_workers: int = 1,
        probes: Callable[[dict[str, Any]], dict[str, float]] = lambda values: {},
    ) -> None:
        self.spec, self.folder, self.loss, self.probes = spec, SweepFolder(path), loss, probes
        path.mkdir(parents=True, exist_ok=True)
        self.num_workers = num_workers
        self.book = Book(spec, self.folder)
        self.running: list[FakeRun] = []
        self.order: list[Job] = []
        self.num_evals = 0

    def run(self, max_evals: int = 100_000) -> "Driver":
        """Go on to the end, or until so many evaluations were made."""
        over = False
        deadline = time.monotonic() + 60
        while self.num_evals < max_evals and time.monotonic() < deadline:
            while not over and len(self.running) < self.num_workers:
                jobs = self.book.next()
                if jobs is None:
                    over = True
                elif jobs:
                    self.order += jobs
                    run = FakeRun(self.spec, self.folder, jobs[0], self.loss, self.probes(jobs[0].values))
                    self.running.append(run)
                else:
                    if self.running:
                        time.sleep(0.001)
                        if not self.book.proposals.under_way:  # nothing to wait for but the trials that run
                            break
            if not self.running:
                break
            self._serve(self.running.pop(0))
        return self

    def _serve(self, run: FakeRun) -> None:
        evals, summary = run.advance()
        self.num_evals += 1
        number = run.job.number
        if summary.status == "running":
            self.book.learn(number, run.probes)
            verdict: Verdict = self.book.observe(number, evals)
            if verdict == "continue":
                self.running.append(run)
            else:
                self.book.taken_off(number)
        else:
            self.book.note(number, evals)
            self.book.learn(number, run.probes)
            measured = measures(summary, run.probes)
            self.book.ended(number, measured)

    def close(self) -> None:
        self.book.close()

    @property
    def proposals(self) -> dict[int, dict[str, Any]]:
        """The values of every proposal, as they are in the journal."""
        return {trial.number: trial.params for trial in self.book.study.get_trials(deepcopy=False)}


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driver]]:
    """Return a function that makes a driver in a folder of its name; all of them are closed in the end."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # drivers die here, machines don't
    made: list[Driver] = []

    def make(spec: SweepSpec, loss: Loss, name: str = "sweep", **options: Any) -> Driver:
        made.append(Driver(spec, tmp_path / name, loss, **options))
        return made[-1]

    yield make
    for driver in made:
        driver.close()
