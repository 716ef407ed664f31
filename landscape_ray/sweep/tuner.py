"""A sweep on Ray Tune.

Ray runs the trials and keeps nothing: what is proposed, done and open is in the sweep's folder. Resuming therefore
starts a fresh Tuner on what is left, instead of restoring Ray's pickled experiment state.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import cloudpickle, tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from rich.console import Console

from landscape_ray.errors import UserError
from landscape_ray.signals import termination_as_interrupt
from landscape_ray.sweep.cluster import check_nodes, private_token, runtime_env
from landscape_ray.sweep.display import Dashboard
from landscape_ray.sweep.lean import NoProgress, lean_trials
from landscape_ray.sweep.limits import hang_path
from landscape_ray.sweep.placement import check_resources, num_places, request
from landscape_ray.sweep.population.book import PopulationBook
from landscape_ray.sweep.population.exchange import open_exchange, weights_limit
from landscape_ray.sweep.population.scheduler import PopulationScheduler
from landscape_ray.sweep.population.trainable import MemberTrainable
from landscape_ray.sweep.reuse import careful_reuse
from landscape_ray.sweep.run import trial_id_of
from landscape_ray.sweep.searching.book import Book
from landscape_ray.sweep.searching.searcher import OBJECTIVE, OptunaSearcher, SearchScheduler, StoppingScheduler
from landscape_ray.sweep.session import (
    Outcome,
    conclude,
    first_config,
    next_attempt,
    projected,
    reason,
    settle_stopped,
)
from landscape_ray.sweep.spec import SweepSpec, spec_of
from landscape_ray.sweep.storing import driver_mirror, stopping
from landscape_ray.sweep.trainable import SweepTrainable
from landscape_ray.tracking.driver_mirror import DriverMirror
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.uris import resolve_tracking_uri

CONNECT_SECONDS = 5.0


def drive(
    folder: SweepFolder,
    console: Console,
    address: str | None = None,
    tracking_uri: str | None = None,
    storage_uri: str | None = None,
) -> Outcome:
    """Run what is left of a sweep on Ray.

    Args:
        folder: a new sweep, or one that an earlier driver left unfinished.
        console: where progress is shown.
        address: of a Ray cluster; None starts Ray on this machine.
        tracking_uri: overrides the one that the sweep was made with.
        storage_uri: of the sweep's storage, None for none.

    Raises:
        UserError: another driver runs the sweep, the cluster can't be reached or is too small, or the tracking server
            doesn't answer.
    """
    check_address(address)
    spec = spec_of(folder)
    mirror = driver_mirror(folder, storage_uri)
    started = time.monotonic()
    with stopping(mirror), projected(folder, spec, tracking_uri) as projector, termination_as_interrupt():
        console.print(
            f"[dim]starting Ray {'at ' + address if address else 'on this machine'} ...[/dim]", highlight=False
        )
        with _ray(address, spec), termination_as_interrupt():  # once more: Ray sets handlers of its own
            attempt = next_attempt(folder)
            if mirror is not None:
                mirror.publish()
            for warning in check_nodes(folder, storage_uri):
                console.print(f"[yellow]{warning}[/yellow]", highlight=False, soft_wrap=True)
            if mirror is not None:
                mirror.start()
            uri = resolve_tracking_uri(tracking_uri, folder.path.parent, folder.meta.get("tracking_uri"))
            failures, num_left, halt = _fit(folder, spec, console, attempt, uri, storage_uri, mirror)
        return conclude(folder, spec, projector, failures, started, spec.num_trials, num_left, mirror, halt)


def _fit(
    folder: SweepFolder,
    spec: SweepSpec,
    console: Console,
    attempt: int,
    tracking_uri: str,
    storage_uri: str | None,
    mirror: DriverMirror | None,
) -> tuple[dict[str, BaseException], int, str]:
    """Run Ray Tune on the trials that are left.

    Returns:
        Why trials failed, how many of a search are still left, and why the sweep was paused, if it was.
    """
    known = {trial.trial_id: s for trial in folder.trials() if (s := trial.summary()) is not None}
    shutil.rmtree(folder.ray_path, ignore_errors=True)  # Ray's scratch of an earlier driver; nothing is read from it
    fixed = {
        "sweep_path": str(folder.path),
        "num_threads": spec.resources.num_threads,
        "attempt": attempt,
        "max_report_seconds": spec.resources.max_report_seconds,
        "storage": storage_uri,
    }
    tune_config: dict[str, Any] = {
        "metric": OBJECTIVE,
        "mode": "min",
        "reuse_actors": True,
        "trial_name_creator": _name_of,
        "trial_dirname_creator": _name_of,
    }
    param_space: dict[str, Any] = {}
    trainable: type[tune.Trainable] = SweepTrainable
    book: Book | None = None
    population: PopulationBook | None = None
    exchange: Any = None
    scheduler: PopulationScheduler | None = None
    if spec.search is not None:
        book = Book(spec, folder, tracking_uri)
        searcher = OptunaSearcher(book, fixed, lambda: num_places(spec.resources))
        stops = spec.search.stopping is not None
        tune_config |= {"search_alg": searcher, "num_samples": -1}
        tune_config |= {"scheduler": StoppingScheduler(searcher) if stops else SearchScheduler()}
        if book.num_left() == 0:
            return {}, 0, ""
    else:
        population = PopulationBook(spec, folder)
        population.reopen()
        if not population.open:
            return {}, 0, ""
        name = f"population-{folder.meta['sweep_id']}-{attempt}"
        exchange, trainable = open_exchange(name), MemberTrainable
        members = [
            {"trial_id": trial_id_of(member), "values": population.orders[member].decision.values}
            for member in population.open
        ]
        fixed |= {"exchange": name, "weights_limit": weights_limit(len(members))}
        param_space = {**fixed, "trial": tune.grid_search(members)}

        def failed(trial: Any) -> str:
            why = reason(_error_of(trial))
            if mirror is None:  # else the folder may be another machine's
                folder.trial(str(trial)).set_status("failed", why)
            return why

        scheduler = PopulationScheduler(population, exchange, num_places(spec.resources), failed)
        tune_config |= {"scheduler": scheduler}

    with Dashboard(console, folder.path.name, spec.num_trials, first_config(spec).num_steps) as dashboard:
        for summary in known.values():
            dashboard.known(summary)
        standing = book.standing if book is not None else {}
        _show(standing, dashboard)
        callback = DashboardCallback(dashboard, standing, mirror)
        tuner = Tuner(
            tune.with_resources(trainable, request(spec.resources)),
            param_space=param_space,
            tune_config=TuneConfig(**tune_config),
            run_config=RunConfig(
                name="tune",
                storage_path=str(folder.ray_path),
                callbacks=[callback, NoProgress()],
                verbose=0,
                failure_config=FailureConfig(max_failures=spec.resources.max_failures),
                # trials are durable by themselves
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            with careful_reuse(), lean_trials() if book is not None else contextlib.nullcontext():
                tuner.fit()
        except KeyboardInterrupt:
            why = f"{dashboard.halt}; " if dashboard.halt else ""
            dashboard.note = f"{why}stopping; work up to the last checkpoint of each trial is safe"
        finally:
            if scheduler is not None:
                try:
                    scheduler.close()
                finally:
                    ray.kill(exchange)
        _show(standing, dashboard)  # those that waited to the end are stopped by now
    shutil.rmtree(folder.ray_path, ignore_errors=True)
    if mirror is not None:
        mirror.gather()
        settle_stopped(folder, standing)
    if book is not None:
        book.close()
    num_left = len(population.open) if population is not None else book.num_left() if book is not None else 0
    return callback.failures, num_left, dashboard.halt


def _show(standing: Mapping[str, str], dashboard: Dashboard) -> None:
    """Give trials that a search has taken off their status in the table."""
    for trial_id, status in standing.items():
        if trial_id in dashboard.rows:
            dashboard.rows[trial_id].status = status


class DashboardCallback(Callback):
    """Feeds Ray Tune's events to the dashboard, and keeps the reason why a trial failed.

    Args:
        dashboard: where trials are shown.
        standing: what trials are that a search has taken off before their end.
        mirror: of the sweep's storage.
    """

    def __init__(
        self,
        dashboard: Dashboard,
        standing: Mapping[str, str] | None = None,
        mirror: DriverMirror | None = None,
    ) -> None:
        self._mirror = mirror
        self._dashboard, self._standing = dashboard, standing if standing is not None else {}
        self.failures: dict[str, BaseException] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles the callback into its experiment state, which is never read."""
        return {}

    def _update(self, trial: Any, status: str, result: Mapping[str, Any] | None = None) -> None:
        """Show the trial, or each trial of a cohort: one that has ended before the others is said to."""
        results = (result or {}).get("members", {})
        for each in members_of(trial):
            news = results.get(each["trial_id"], {}) if results else result or {}
            ended = "diverged" if news.get("diverged") else "finished" if news.get("ended") else status
            values = dict(news.get("values", ())) or each["values"]  # those of a population change
            self._dashboard.update(each["trial_id"], values, ended if results else status, news)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show the trial as running."""
        if self.failures.pop(str(trial), None) is not None:  # a member of a population, with its next order
            donor = trial.config["trial"].get("donor")
            self._dashboard.warn(f"{trial} goes on" + ("" if donor is None else f" as a copy of {trial_id_of(donor)}"))
        self._update(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show progress, and stop the sweep where it cannot go on."""
        self._update(trial, "running", result)
        self._dashboard.heed(result, self._mirror)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show the end of a trial."""
        result = trial.last_result or {}
        ended = "diverged" if result.get("diverged") else "finished" if result.get("ended") else "waiting"
        self._update(trial, self._standing.get(str(trial), ended), result)
        # Ray keeps running statistics of every number that a trial reports, 25 kB a trial, for a summary of its own
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show the failure; called once, when no attempt is left."""
        error = _error_of(trial)
        self.failures |= {each["trial_id"]: error for each in members_of(trial)}
        self._update(trial, "failed", trial.last_result)
        self._dashboard.warn(f"{trial} failed: {reason(error)}")


def members_of(trial: Any) -> list[dict[str, Any]]:
    """Return `trial_id` and `values` of the trials that one trial of Ray's stands for."""
    given = trial.config["trial"]
    return given.get("members") or [{"trial_id": str(trial), "values": given["values"]}]


def _error_of(trial: Any) -> BaseException:
    """Return what a trial failed of, from the file that Ray keeps on this machine; it reaches the storage later."""
    hang = hang_path(Path(trial.config["sweep_path"]), str(trial))
    if hang.exists() and hang.stat().st_size:
        limit = trial.config.get("max_report_seconds")
        return RuntimeError(f"no commit within resources.max_report_seconds = {limit}; where it hung is in {hang}")
    path = trial.pickled_error_file
    error: Any = None
    if path is not None and os.path.exists(path):
        with open(path, "rb") as file:
            error = cloudpickle.load(file)  # written by this very process
    if isinstance(error, OutOfMemoryError):
        return RuntimeError(
            "Ray ended it because its node ran out of memory; set resources.memory_gib_per_trial, so that fewer trials "
            "share a node, or make the trials smaller"
        )
    if error is None or isinstance(error, RayActorError):
        return RuntimeError("its process died or its node was lost; is there enough memory?")
    return error if isinstance(error, BaseException) else RuntimeError(str(error))


def _name_of(trial: Any) -> str:
    """Return our identifier of a Ray trial, which Ray keeps through every change of its configuration."""
    return str(trial.config["trial"]["trial_id"])


def check_address(address: str | None) -> None:
    """Raise if nobody listens where the cluster should be; Ray itself would wait for minutes.

    Args:
        address: as for `drive`; `auto`, `local` and None are Ray's to find. A Ray Client address (ray://) is refused:
            the driver must be on a node of the cluster, where the results folder is.

    Raises:
        UserError: no answer within a few seconds, or not an address.
    """
    if address in (None, "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(
            f"--address must be host:port or auto, got '{address}'; start the sweep on a node of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(_no_cluster(address, error)) from None


def _no_cluster(address: str | None, error: BaseException) -> str:
    return f"no Ray cluster answers at '{address}' ({error}); check --address, or leave it out to run here"


@contextlib.contextmanager
def _ray(address: str | None, spec: SweepSpec) -> Iterator[None]:
    """Start Ray on this machine or attach to a cluster; a session that is up already is used and left up.

    Raises:
        UserError: the cluster doesn't answer, or no node can hold a trial.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our records replace Ray's CSV, JSON and TensorBoard files
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: state is durable, nothing needs to be saved first
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Ray's experiment state is never read
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_MAX_PENDING_TRIALS_PG": "200",  # as without a searcher; ours bounds them by the room that there is
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    started_here = not ray.is_initialized()
    if started_here:
        try:
            options = {"include_dashboard": False} if address is None else {"runtime_env": runtime_env(spec)}
            with private_token():
                ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(_no_cluster(address, error)) from None
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are in the outcome, in one line each
    try:
        check_resources(spec.resources)
        yield
    finally:
        if started_here:
            ray.shutdown()
