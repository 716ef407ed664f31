"""What every driver of a sweep does around the training itself: check, make the folder, keep MLflow current, sum up.

Needs neither Ray nor Optuna, so that a single run can be trained where they are not installed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from landscape_ray import __version__
from landscape_ray.config import config_id
from landscape_ray.data import Data, open_data
from landscape_ray.errors import UserError
from landscape_ray.models import build_model
from landscape_ray.records import RunSummary
from landscape_ray.signals import termination_as_interrupt
from landscape_ray.sweep.best_model import keep_best_model
from landscape_ray.sweep.display import Dashboard, duration
from landscape_ray.sweep.extension import text_id
from landscape_ray.sweep.notes import description_of, tags_of
from landscape_ray.sweep.population.book import failure_text, failures_of
from landscape_ray.sweep.provenance import git_state, packages
from landscape_ray.sweep.run import TrialRun, trial_id_of
from landscape_ray.sweep.spec import NAME, SweepSpec, spec_of
from landscape_ray.sweep.storing import check_new, driver_mirror, stopping, sweep_storage
from landscape_ray.sweep.trunk import thin_trunks
from landscape_ray.tracking.driver_mirror import DriverMirror
from landscape_ray.tracking.folder import SweepFolder, exists_message
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.tracking.projector import Projector, SyncReport
from landscape_ray.tracking.uris import default_tracking_uri, mask_secrets, resolve_tracking_uri
from landscape_ray.training import Objective, TrainConfig, build_optimizer
from landscape_ray.training.parallel import check_module

FREE_BYTES_FLOOR = 256 * 2**20
"""A sweep doesn't start with less free space than this."""


MAX_REPLACED = 8
"""Members that were replaced, of which the outcome speaks one by one."""

ENDED = ("finished", "diverged", "stopped")
"""Statuses of trials that nothing is left to do for."""


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        folder: where everything is.
        status: finished (every trial ended), interrupted (by the user) or incomplete (some trials failed).
        counts: number of trials by status.
        failures: for each failed trial, what it failed of.
        best: the run with the lowest final held-out loss, None if none has one.
        sync: what the tracking server has received.
        seconds: wall-clock time of this driver.
        halt: why the sweep was paused, empty for one that was not.
        num_not_stored: trials that the storage does not have up to their last commit.
        storage_problem: why; empty where all is stored, or there is no storage.
        replaced: members of a population that had failed and were replaced, one line each, since the sweep began.
    """

    folder: SweepFolder
    status: str
    counts: dict[str, int]
    failures: dict[str, BaseException]
    best: RunSummary | None
    sync: SyncReport
    seconds: float
    halt: str = ""
    num_not_stored: int = 0
    storage_problem: str = ""
    replaced: tuple[str, ...] = ()


def new_sweep(
    spec: SweepSpec,
    text: str,
    results: Path,
    name: str | None,
    tracking_uri: str | None,
    storage_uri: str | None = None,
) -> SweepFolder:
    """Return the folder of a new sweep, after checking everything that can be checked beforehand.

    Raises:
        UserError: the data can't be opened, no space, the tracking server doesn't answer, the folder exists, the
            storage can't be written or has a sweep of this name.
    """
    name = name or f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not NAME.fullmatch(name):
        raise UserError(f"--name must be letters, digits, '.', '_' or '-', got '{name}'; --results chooses the folder")
    path = results / name
    if path.exists():
        raise UserError(exists_message(path))
    check_space(results)
    uri = resolve_tracking_uri(tracking_uri, results)
    results.mkdir(parents=True, exist_ok=True)
    Projector.check(uri)
    if storage_uri is not None:
        check_new(storage_uri, name)
    corpus_id = check_data(spec, progress=sys.stderr.isatty())
    meta = {
        "name": name,
        "seed": spec.seed,
        # the default store is found beside the sweeps, so that a results folder can be moved
        "tracking_uri": None if uri == default_tracking_uri(results) else uri,
        "storage": None if storage_uri is None else mask_secrets(storage_uri),
        "experiment": spec.experiment,
        "launched_in": str(Path.cwd()),
        "spec_id": config_id(spec),
        "spec_text_id": text_id(text),
        "num_trials": spec.num_trials,
        "corpus_id": corpus_id,
        "status": "pending",
        "attempts": 0,
        "versions": versions(),
        "hardware": hardware(),
        "packages": packages(),
        "git": git_state(Path.cwd()),
    }
    return SweepFolder.create(path, spec_text=text, meta=meta)


def first_config(spec: SweepSpec) -> TrainConfig:
    """Return the configuration of a run at the first extreme of every domain."""
    return spec.train_config(spec.first_values(), 0)


def check_data(spec: SweepSpec, progress: bool = False) -> str:
    """Return the identity of the first trial's corpus, after checking that data, model, loss and optimizer go together.

    Every corpus of the sweep is opened as its trials will open it, and every network is built, without memory for its
    weights, as far as the extremes of the domains show them.

    Raises:
        UserError: a corpus can't be opened, or is too small for the evaluation or the probe that is asked for; or the
            model does not suit the data.
    """
    first = spec.first_values()
    choices: list[dict[str, Any]] = [first]
    for name, domain in spec.space.items():
        if name.startswith(("data.", "eval.", "model.", "loss.", "optimizer.")):
            choices += [spec.point_with(name, value) for value in domain.extremes]
    opened: dict[str, Data] = {}
    identities = []
    for values in choices:
        config = spec.train_config(values, 0)
        data = opened.get(key := config.data.model_dump_json())
        if data is None:
            data = opened[key] = open_data(config.data, progress=progress)
        data.validation_batches(config.eval.limit, config.eval.batch_size)
        data.batch(config.seed, 0, config.batch_size)
        for name in config.eval.shifts:
            data.shift_batches(name, config.eval.limit, config.eval.batch_size)
        Objective(config.loss, data.signature)
        foreign = config.model.name == "transformers" or ":" in config.model.name  # these choose their own device
        with contextlib.nullcontext() if foreign else torch.device("meta"):
            module = build_model(config.model, data.signature, torch.Generator("cpu").manual_seed(0))
        check_module(module, spec.resources.workers)
        build_optimizer(module, config.optimizer, peak_lr=config.schedule.peak_lr)
        identities.append(data.corpus_id)
    return identities[0]


def check_space(results: Path) -> None:
    """Raise if the disk is all but full.

    Raises:
        UserError: names the folder, what is free and what is needed.
    """
    existing = next(p for p in (results, *results.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES_FLOOR:
        raise UserError(
            f"no space left for {results}: {free / 2**20:.0f} MiB free, at least {FREE_BYTES_FLOOR / 2**20:.0f} MiB "
            "needed; free some space or choose another --results folder"
        )


def versions() -> dict[str, str]:
    """Return the versions of what determines results."""
    packages = ("torch", "ray", "optuna", "mlflow-skinny", "pyarrow", "numpy", "scipy")
    found = {"landscape_ray": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def hardware() -> dict[str, Any]:
    """Return what the driver's machine is."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "gpus": gpus, "machine": platform.machine(), "system": platform.system()}


def check_alone(spec: SweepSpec) -> None:
    """Raise for a run over several processes, which Ray would have to start.

    Raises:
        UserError: more than one worker.
    """
    if (workers := spec.resources.workers) > 1:
        raise UserError(
            f"resources.workers must be 1 for a run in this process, got {workers}; lower it (losses are the same), or "
            "use `landscape-ray sweep`"
        )


def train_one(
    folder: SweepFolder, console: Console, tracking_uri: str | None = None, storage_uri: str | None = None
) -> Outcome:
    """Run the [train] table as a single run in this process, without Ray; continues where a checkpoint is."""
    spec = spec_of(folder)
    check_alone(spec)
    mirror = driver_mirror(folder, storage_uri)
    started = time.monotonic()
    with stopping(mirror), projected(folder, spec, tracking_uri) as projector, termination_as_interrupt():
        values = spec.first_values() if spec.space else {}
        trial_id = trial_id_of(0)
        torch.set_num_threads(spec.resources.num_threads)
        with Dashboard(console, folder.path.name, 1, first_config(spec).num_steps) as dashboard:
            attempt = next_attempt(folder)
            if mirror is not None:
                mirror.publish()
                mirror.start()
            uploads = None if storage_uri is None else Mirror(sweep_storage(storage_uri, folder.path.name))
            run = TrialRun(spec, folder.trial(trial_id), 0, values, attempt, mirror=uploads)
            dashboard.known(run.summary())
            try:
                while not run.state.finished:
                    result = run.result()
                    dashboard.update(trial_id, values, "running", result)
                    dashboard.heed(result, mirror)
                    run.advance()
                dashboard.update(trial_id, values, run.summary().status, run.result())
            except KeyboardInterrupt:
                pass  # everything up to the last commit is durable; the outcome says how to go on
            if uploads is not None:
                uploads.close()
        return conclude(folder, spec, projector, {}, started, 1, mirror=mirror, halt=dashboard.halt)


def next_attempt(folder: SweepFolder) -> int:
    """Count a driver in, and return its number."""
    attempt = int(folder.meta.get("attempts", 0)) + 1
    folder.update_meta(status="running", attempts=attempt)
    return attempt


def settle_stopped(folder: SweepFolder, standing: Mapping[str, str]) -> None:
    """Write into folders of trials which of them a rule has stopped: what came from another node may not know it."""
    for trial_id, stand in standing.items():
        summary = folder.trial(trial_id).summary()
        if stand == "stopped" and summary is not None and summary.status not in ENDED:
            folder.trial(trial_id).set_status("stopped", f"stopped at step {summary.step}")


def conclude(
    folder: SweepFolder,
    spec: SweepSpec,
    projector: Projector,
    failures: dict[str, BaseException],
    started: float,
    num_trials: int,
    num_left: int = 0,
    mirror: DriverMirror | None = None,
    halt: str = "",
) -> Outcome:
    """Settle statuses on disk, bring the tracking server up to date, and sum up. No trial may be running any more.

    Args:
        folder: of the sweep.
        spec: the sweep.
        projector: what keeps its tracking server up to date.
        failures: why trials failed, by identifier.
        started: when the driver was, by the monotonic clock.
        num_trials: how many must have ended for the sweep to be finished.
        num_left: proposals of a search that are not settled, though that many runs may have ended.
        mirror: of the sweep's storage, where it has one; everything that is stored is here by now.
        halt: why the sweep was paused; empty for one that was not.
    """
    # of a cohort, some may have ended; so may a member of a population whose process died while it waited for others
    failures = {trial_id: error for trial_id, error in failures.items() if not _ended(folder, trial_id)}
    for trial_id, error in failures.items():
        folder.trial(trial_id).set_status("failed", reason(error))
    summaries = []
    for trial in folder.trials():
        summary = trial.summary()
        if summary is not None and summary.status == "running":
            trial.set_status("pending", f"interrupted at step {summary.step}")
            summary = trial.summary()
        if summary is not None:
            summaries.append(summary)
    counts: dict[str, int] = {}
    for summary in summaries:
        counts[summary.status] = counts.get(summary.status, 0) + 1
    ended = sum(counts.get(status, 0) for status in ENDED)
    status = "finished" if ended >= num_trials and num_left == 0 else "incomplete" if failures else "interrupted"
    folder.update_meta(status=status, ended_unix=time.time())
    if status == "finished":
        thin_trunks(folder.path)
    finished = [s for s in summaries if s.status == "finished" and _counts(spec, s)]
    best = min(finished, key=lambda s: s.final_loss_nats, default=None)
    projector.set_parent(
        metrics={"sweep/best_loss_nats": best.final_loss_nats, "sweep/num_trials": float(ended)} if best else {},
        tags={"landscape_ray.status": status, **tags_of(spec, summaries)},
        description=description_of(spec, folder.path.name, summaries, best),
    )
    if best is not None and status == "finished":
        # The sweep is done, and its checkpoint is there: a network that cannot be pickled undoes nothing.
        with contextlib.suppress(Exception):
            if mirror is not None:
                mirror.fetch_checkpoint(folder.trial(best.run_id))
            keep_best_model(folder, best.run_id)
    sync = projector.close(timeout_seconds=30.0)
    behind = mirror.settle() if mirror is not None else 0
    problem = mirror.problem if mirror is not None else ""
    seconds = time.monotonic() - started
    replaced = tuple(failure_text(failure) for failure in failures_of(folder) if failure.donor is not None)
    return Outcome(folder, status, counts, failures, best, sync, seconds, halt, behind, problem, replaced)


def _ended(folder: SweepFolder, trial_id: str) -> bool:
    summary = folder.trial(trial_id).summary()
    return summary is not None and summary.status in ENDED


def _counts(spec: SweepSpec, summary: RunSummary) -> bool:
    """Return whether a finished run may be the best: one at a lower fidelity is not what was asked for."""
    fidelity = spec.search.fidelity if spec.search is not None else None
    return fidelity is None or summary.varied.get(fidelity.name) == fidelity.values[-1]


@contextlib.contextmanager
def projected(folder: SweepFolder, spec: SweepSpec, tracking_uri: str | None) -> Iterator[Projector]:
    """Hold the sweep's lock, with a projector running in the background.

    Only an address that the user has just given is checked: a server that died since keeps nobody from training.
    """
    with folder.lock():
        uri = resolve_tracking_uri(tracking_uri, folder.path.parent, folder.meta.get("tracking_uri"))
        if tracking_uri is not None:
            Projector.check(uri)
        if (known := folder.meta.get("corpus_id")) is not None and check_data(spec) != known:
            raise UserError(
                f"the data of sweep '{folder.path.name}' changed since its launch; restore it, or start a new sweep"
            )
        projector = Projector(folder, uri, spec.experiment)
        projector.set_parent({}, tags_of(spec), spec.description)
        projector.start()
        try:
            yield projector
        except BaseException:
            folder.update_meta(status="interrupted")
            projector.close(timeout_seconds=5.0)
            raise


def reason(error: BaseException) -> str:
    """Return in one line why a trial failed: the innermost error, without the traceback."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return mask_secrets(str(cause))
    lines = [line for line in mask_secrets(str(cause)).strip().splitlines() if line.strip()]
    text = f"{type(cause).__name__}: {lines[-1].strip()}" if lines else type(cause).__name__
    if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
        text += "; lower train.batch_size or the model's size, or let fewer trials share a device"
    return text


def exit_status(outcome: Outcome) -> int:
    """Return what the command ends with: 0 done, 130 interrupted, 2 what the user can mend, 1 other failures."""
    if outcome.status in ("finished", "interrupted"):
        return 0 if outcome.status == "finished" else 130
    causes = [getattr(error, "cause", None) or error for error in outcome.failures.values()]
    return 2 if all(isinstance(cause, UserError) for cause in causes) else 1


def outcome_text(outcome: Outcome) -> str:
    """Return how a sweep ended, for the terminal: result, failures, and what to do next."""
    name = outcome.folder.path.name
    counts = ", ".join(f"{number} {status}" for status, number in sorted(outcome.counts.items())) or "no trial started"
    lines = [f"sweep {name} {outcome.status} in {duration(outcome.seconds)}: {counts}"]
    if outcome.best is not None:
        best = outcome.best
        also = f" ({best.final_loss_nats / math.log(2):.4f} bits)" if best.loss_unit == "nats/token" else ""
        also += f", {best.final_accuracy:.2%} right" if best.final_accuracy is not None else ""
        lines.append(f"best: {best.run_id}, {best.final_loss_nats:.4f} {best.loss_unit}{also}")
    lines += outcome.replaced[:MAX_REPLACED]
    if (more := len(outcome.replaced) - MAX_REPLACED) > 0:
        lines.append(f"... and {more} more were replaced; `landscape-ray report {name}` shows each")
    lines += [f"{trial_id} failed: {reason(error)}" for trial_id, error in sorted(outcome.failures.items())]
    if outcome.sync.error:
        lines.append(f"tracking server is behind ({outcome.sync.error}); `landscape-ray sync {name}` sends the rest")
    if outcome.num_not_stored or outcome.storage_problem:
        why = outcome.storage_problem or f"{outcome.num_not_stored} trials"
        lines.append(f"the storage is behind ({why}); `landscape-ray sync {name}` sends the rest")
    if outcome.halt:
        lines.append(f"paused: {outcome.halt}")
    if outcome.status == "finished":
        lines.append(f"next: landscape-ray report {name}")
    else:
        lines.append(f"to go on: landscape-ray resume {name}")
    return "\n".join(lines)
