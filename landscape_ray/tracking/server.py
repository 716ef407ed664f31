"""MLflow as this project uses it: explicit addresses, bounded requests, our tags, and text for parameters."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.service_pb2 import LogBatch
from mlflow.store.tracking.rest_store import RestStore
from sqlalchemy.exc import SQLAlchemyError

from landscape_ray.config import flatten
from landscape_ray.errors import UserError
from landscape_ray.tracking import database
from landscape_ray.tracking.uris import MASK, is_postgres, mask_secrets, masked, sqlite_path

SWEEP_ID: Final = "landscape_ray.sweep_id"
TRIAL_ID: Final = "landscape_ray.trial_id"
KIND: Final = "landscape_ray.kind"
"""sweep (the parent run) or trial."""
STATUS: Final = "landscape_ray.status"
SUMMARY: Final = "landscape_ray.summary"
NUM_REWINDS: Final = "landscape_ray.num_rewinds"
NUM_PARTS: Final = "landscape_ray.num_parts"
"""How many parts of the trial the run holds: what makes a projection go on where it, or another one, stopped."""
EVENTS: Final = "landscape_ray.events"
DATASET: Final = "landscape_ray.dataset"
CHECKPOINT: Final = "landscape_ray.checkpoint"
MODEL: Final = "landscape_ray.model"
"""Identity of the best model that was sent."""
MODEL_URI: Final = "landscape_ray.model_uri"
"""What `mlflow.pytorch.load_model` takes."""
FOLDER: Final = "landscape_ray.folder"
ARTIFACTS: Final = "landscape_ray.artifacts"
"""What the artifacts of the sweep's run were made of, by name; not sent again while that is unchanged."""
PARENT: Final = "mlflow.parentRunId"
DESCRIPTION: Final = "mlflow.note.content"
EXPERIMENT_KIND: Final = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment whose runs the UI opens in its view for training; without it, in the one for agents."""

# Limits of MLflow's REST interface.
MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
_MAX_PARAM_BYTES = 400_000  # of the 1 MB that a request may have; 1,000 points of the longest names take 400 kB

_CHECK_SECONDS = 5.0
_CHECK_DATABASE_SECONDS = 60.0  # on a machine that is busy training MLflow loads slowly, and may have to make tables
_BAD_KEY_CHARACTERS = re.compile(r"[^\w.\-/ :]")

# MLflow reads these at every request, from the environment only; hence one user of them at a time.
_HTTP_LOCK = threading.RLock()


@contextlib.contextmanager
def bounded_http(timeout_seconds: float, max_retries: int = 0) -> Iterator[None]:
    """Bound MLflow's requests inside the block; its default against a dead server is four minutes for each.

    No retries by default: whoever sends repeats the whole in its own time, and a `create_run` that is repeated
    blindly makes a second run when the first answer was lost.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout_seconds))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(max_retries),
    }
    with _HTTP_LOCK:
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class Client(MlflowClient):  # type: ignore[misc]
    """MLflow's client, with the one request that carries nearly everything written ten times as fast.

    MLflow makes a protocol buffer of each point and takes it apart again for the JSON text that it sends: two thirds
    of the processor time of a full request.
    """

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> None:
        """Send one request; the points must be finite numbers, and all of it within MLflow's limits."""
        store = self._tracking_client.store
        if not isinstance(store, RestStore):
            super().log_batch(run_id, metrics, params, tags, synchronous=True)
            return
        content = {
            "run_id": run_id,
            "metrics": [{"key": m.key, "value": m.value, "timestamp": m.timestamp, "step": m.step} for m in metrics],
            "params": [{"key": param.key, "value": param.value} for param in params],
            "tags": [{"key": tag.key, "value": tag.value} for tag in tags],
        }
        store._call_endpoint(LogBatch, json.dumps(content, allow_nan=False))

    @property
    def writes_runs(self) -> bool:
        """Whether the store is a database that :meth:`write_runs` knows."""
        return database.is_known(self._tracking_client.store)

    def write_runs(self, experiment: Experiment, writes: Sequence[database.RunWrite]) -> set[str]:
        """Write many runs at once; see `database.write_runs`."""
        return database.write_runs(self._tracking_client.store, experiment, writes)

    def runs_of(self, experiment: str, sweep_id: str) -> Iterator[tuple[Run, bool]]:
        """Yield the runs of a sweep, oldest first, and whether parameters and metrics are with them."""
        if self.writes_runs:
            found = database.find_runs(self._tracking_client.store, experiment, SWEEP_ID, sweep_id)
            yield from ((run, False) for run in found)
        else:
            yield from ((run, True) for run in _pages(self, experiment, sweep_id))


def open_client(tracking_uri: str) -> Client:
    """Return a client for exactly this address; MLflow's global address is neither read nor set."""
    # Otherwise the making of a new store's tables is announced in the middle of a live display.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if is_postgres(tracking_uri):
        _connect(tracking_uri)
    return Client(tracking_uri=tracking_uri)


def _connect(tracking_uri: str) -> None:
    """Raise unless the database answers; MLflow itself would try again and again, for an hour and more."""
    engine = sqlalchemy.create_engine(
        tracking_uri, connect_args={"connect_timeout": round(_CHECK_SECONDS)}, poolclass=sqlalchemy.NullPool
    )
    with engine.connect():
        pass


def check_server(tracking_uri: str) -> None:
    """Raise unless runs can be written to this address; bounded to about six seconds, a minute for a database.

    Raises:
        UserError: unsupported or masked address, no answer, no MLflow server, no access, or no folder to write to.
    """
    shown = mask_secrets(tracking_uri)
    if f"://{MASK}@" in tracking_uri:
        raise UserError(
            f"tracking_uri must hold its user and password, got {shown}, from which they were removed when it was "
            "written down; give it again with --tracking-uri or MLFLOW_TRACKING_URI"
        )
    database = sqlite_path(tracking_uri)
    if database is not None:
        if str(database) in (".", ":memory:"):
            raise UserError(f"tracking_uri must name a file, got {shown}; write sqlite:////absolute/path/mlflow.db")
        _check_writable(database.parent)
        if not database.exists():
            return  # made at the first sync
    elif is_postgres(tracking_uri):
        _check_driver(tracking_uri)
    elif not tracking_uri.startswith(("http://", "https://")):
        raise UserError(
            f"tracking_uri must begin with http://, https://, postgresql:// or sqlite:///, got {shown}; for another "
            "store run `mlflow server --backend-store-uri ...` and give its http address"
        )
    problem = _ask(tracking_uri, _CHECK_SECONDS if tracking_uri.startswith("http") else _CHECK_DATABASE_SECONDS)
    if problem:
        raise UserError(
            f"the MLflow store {shown} does not answer: {problem}; start it, correct the tracking URI (credentials "
            "belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), or leave it out to use a local file"
        )


def _check_driver(tracking_uri: str) -> None:
    try:
        sqlalchemy.make_url(tracking_uri).get_dialect().import_dbapi()
    except (ImportError, SQLAlchemyError) as error:
        raise UserError(
            f"tracking_uri must name a database whose driver is installed, got {mask_secrets(tracking_uri)} "
            f"({describe(error)}); `pip install landscape_ray[postgres]`, or give the http address of an MLflow server"
        ) from None


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"tracking_uri must lie in a folder that can be written, got {folder}; choose another place")


def _ask(tracking_uri: str, seconds: float) -> str:
    """Return why the store does not answer one small question, "" when it does."""
    outcome = [f"nothing within {seconds:.0f} seconds"]

    def ask() -> None:
        try:
            with bounded_http(seconds - 1):
                open_client(tracking_uri).search_experiments(max_results=1)
            outcome[0] = ""
        except Exception as error:
            outcome[0] = describe(error)

    # In a thread, because looking up a host name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True, name="landscape_ray-check")
    thread.start()
    thread.join(seconds)
    return outcome[0]


def describe(error: Exception) -> str:
    """Return an error in one line without secrets."""
    lines = mask_secrets(str(error)).splitlines()
    return (lines[0] if lines else type(error).__name__)[:400]


def is_refusal(error: Exception) -> bool:
    """Return whether the server answered and refused this one thing, so that others may go through."""
    refused = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"}
    return isinstance(error, MlflowException) and error.error_code in refused


def experiment_id(client: MlflowClient, tracking_uri: str, name: str, results: Path) -> str:
    """Return the identifier of the experiment, made when there is none.

    Args:
        client: of the store.
        tracking_uri: its address.
        name: of the experiment.
        results: folder of the sweeps, beside which artifacts go where the store is a database on a server.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_path(tracking_uri)
        # Without MLflow's server the default place of artifacts depends on the working folder.
        place = database.parent if database else None if tracking_uri.startswith("http") else results
        location = (place.absolute() / "mlartifacts").as_uri() if place is not None else None
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another sweep was faster
    if experiment.lifecycle_stage != "active":
        raise UserError(f"experiment '{name}' is deleted in MLflow; restore it there or use another experiment name")
    return str(experiment.experiment_id)


def find_runs(client: MlflowClient, experiment: str, sweep_id: str | None = None) -> list[Run]:
    """Return the runs of an experiment, or of one sweep in it, oldest first; deleted ones are left out."""
    return list(_pages(client, experiment, sweep_id))


def _pages(client: MlflowClient, experiment: str, sweep_id: str | None) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            filter_string=f"tags.`{SWEEP_ID}` = '{sweep_id}'" if sweep_id else "",
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1000,
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def clean_key(name: str) -> str:
    """Return a metric or parameter name that MLflow accepts.

    >>> clean_key("probe/my.module:top*2")
    'probe/my.module:top_2'
    """
    return _BAD_KEY_CHARACTERS.sub("_", name)[:250]


def encode_value(value: Any) -> str:
    """Return a configuration value as the text of a parameter, such that `decode_value` gives it back.

    >>> encode_value("wsd"), encode_value(0.1), encode_value("0.1"), encode_value(None), encode_value([1, 2])
    ('wsd', '0.1', '"0.1"', 'null', '[1, 2]')
    """
    if isinstance(value, str) and value and decode_value(value) == value:
        text = value
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= MAX_PARAM_CHARACTERS else text[: MAX_PARAM_CHARACTERS - 1] + "…"


def decode_value(text: str) -> Any:
    """Return the configuration value behind the text of a parameter; text that is not JSON is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def to_params(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a nested configuration as MLflow parameters under dotted names; passwords inside addresses are masked."""
    return {clean_key(key): encode_value(value) for key, value in flatten(masked(config)).items()}


def param_batches(params: Mapping[str, str]) -> Iterator[list[Param]]:
    """Yield parameters in lists that one request may carry."""
    batch: list[Param] = []
    num_bytes = 0
    for key, value in params.items():
        size = len(json.dumps([key, value]))
        if batch and (len(batch) == MAX_PARAMS or num_bytes + size > _MAX_PARAM_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(Param(key, value))
        num_bytes += size
    if batch:
        yield batch


def run_name(trial_id: str, varied: Mapping[str, Any]) -> str:
    """Return what to call a trial's run: its identifier and what was searched.

    >>> run_name("t0003", {"schedule.name": "wsd", "optimizer.lr": 0.00213})
    't0003 wsd lr=0.00213'
    """
    words = [trial_id]
    for key, value in varied.items():
        short = key.rpartition(".")[2]
        words.append(value if isinstance(value, str) else f"{short}={_short(value)}")
    return " ".join(words)[:120]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
