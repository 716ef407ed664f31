"""Sweep folders with known rows, and MLflow stores that are ready in milliseconds."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from landscape_ray import records
from landscape_ray.records import EvalRecord, EventRecord, ProbeRecord, Record, RunSummary, StepRecord, to_row
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.parts import PartWriter
from tests.tracking.mlflow_server import Server

SPEC = 'name = "quick"\n[train.model]\nname = "gpt"\ndepth = 2\n[search.lr]\nlow = 1e-4\nhigh = 1e-1\n'


@pytest.fixture
def results(tmp_path: Path, store_template: Path) -> Path:
    path = tmp_path / "my results"  # a space, because users have them
    path.mkdir()
    shutil.copy(store_template, path / "mlflow.db")
    return path


@pytest.fixture
def uri(results: Path) -> str:
    return f"sqlite:///{results / 'mlflow.db'}"


@pytest.fixture
def folder(results: Path) -> SweepFolder:
    return SweepFolder.create(results / "quick", spec_text=SPEC, meta={"seed": 0})


@pytest.fixture
def global_address() -> Iterator[None]:
    """For tests that tell MLflow a global address, as its users do: it is forgotten, also by the environment."""
    from mlflow.tracking._tracking_service import utils

    before = utils._tracking_uri
    try:
        yield
    finally:
        utils._tracking_uri = before
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # not there either when the tests begin


def summary(trial_id: str, **changes: Any) -> RunSummary:
    fields: dict[str, Any] = {
        "status": "running",
        "config": {"model": {"name": "gpt", "depth": 2, "tied": True}, "lr": 0.01, "betas": [0.9, 0.95], "note": "1"},
        "varied": {"optimizer.lr": 0.01, "schedule.name": "wsd"},
        "num_steps": 100,
        "num_params": 1234,
    }
    return RunSummary(run_id=trial_id, **(fields | changes))


def rows(first: int, last: int, base: float = 1.7e9, seed: int = 0) -> list[Record]:
    """Steps first .. last: a step record each, an evaluation every fifth, a probe every tenth, one event."""
    made: list[Record] = []
    for step in range(first, last + 1):
        loss = 2.0 + 1.0 / (step + seed + 1)
        place: dict[str, Any] = {
            "step": step,
            "num_tokens": 512 * step,
            "flops": 6e6 * step,
            "elapsed_seconds": 0.25 * step,
        }
        common = place | {"time_unix": base + 0.25 * step}
        made.append(
            StepRecord(
                **common,
                cost_seconds=0.2,
                loss_nats=loss,
                grad_norm=math.nan if step % 7 == 0 else loss / 3,
                lr=1e-3 / step,
                weight_decay=0.1,
                momentum=0.9,
            )
        )
        if step % 5 == 0:
            made.append(EvalRecord(**common, cost_seconds=0.01, loss_nats=loss + 0.01))
        if step % 10 == 0:
            made.append(
                ProbeRecord(
                    **common, cost_seconds=0.5, probe="sharpness", value=30.0 / loss, standard_error=0.1, num_matvecs=8
                )
            )
        if step == 3:
            made.append(EventRecord(**common, event="mutate", detail='{"lr": 0.02}'))
    return made


def write(trial: TrialFolder, first: int, last: int, *, part_rows: int = 12, commit: bool = True, **fields: Any) -> int:
    """Append steps first .. last to a trial in parts of `part_rows` records and commit them; return the number."""
    writer = PartWriter(trial, trial.num_parts())
    for count, record in enumerate(rows(first, last, seed=int(trial.trial_id.strip("t"))), 1):
        writer.append(record)
        if count % part_rows == 0:
            writer.flush()
    writer.flush()
    if commit:
        trial.commit(summary(trial.trial_id, step=last, **fields), writer.num_parts)
    return writer.num_parts


def expected_points(last_steps: dict[str, int]) -> Counter[tuple[str, str, int, int, float]]:
    """The points that MLflow must hold when trial -> last step is committed, from the records themselves."""
    expected: Counter[tuple[str, str, int, int, float]] = Counter()
    for trial_id, last in last_steps.items():
        made = rows(1, last, seed=int(trial_id.strip("t")))
        first = round(made[0].time_unix * 1000)
        expected[trial_id, "hyperparameter/optimizer.lr", first, 0, 0.01] += 1
        for record in made:
            place = (round(record.time_unix * 1000), record.step)
            if isinstance(record, EventRecord):
                expected[trial_id, "hyperparameter/lr", *place, 0.02] += 1
            for key, value in records.metrics(to_row(trial_id, record)).items():
                expected[trial_id, key, *place, value] += 1
    return expected


def same_rows(left: Any, right: Any) -> bool:
    """Whether two tables hold the same rows; to Arrow a nan is unequal to itself."""
    return left.schema.equals(right.schema) and str(left.to_pylist()) == str(right.to_pylist())


def query(database: Path, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def stored_points(database: Path) -> Counter[tuple[str, str, int, int, float]]:
    """Every point of every active trial run in the store, read from the database behind MLflow's back."""
    return Counter(
        query(
            database,
            "SELECT t.value, m.key, m.timestamp, m.step, m.value FROM metrics m"
            " JOIN runs r ON r.run_uuid = m.run_uuid AND r.lifecycle_stage = 'active'"
            " JOIN tags t ON t.run_uuid = m.run_uuid AND t.key = 'landscape_ray.trial_id'",
        )
    )


def active_runs(database: Path) -> dict[str, dict[str, str]]:
    """Active runs by trial identifier ("" for the sweep's own): status, name, run_id and tags. Doubles fail here."""
    found: dict[str, dict[str, str]] = {}
    for run_id, status, name in query(
        database, "SELECT run_uuid, status, name FROM runs WHERE lifecycle_stage = 'active'"
    ):
        tags = dict(query(database, f"SELECT key, value FROM tags WHERE run_uuid = '{run_id}'"))
        trial_id = tags.get("landscape_ray.trial_id", "")
        assert trial_id not in found, f"two runs for {trial_id or 'the sweep'}"
        found[trial_id] = tags | {"status": status, "name": name, "run_id": run_id}
    return found


@pytest.fixture
def make() -> SimpleNamespace:
    """The helpers of this file, for tests."""
    return SimpleNamespace(
        spec=SPEC,
        summary=summary,
        rows=rows,
        write=write,
        expected_points=expected_points,
        stored_points=stored_points,
        active_runs=active_runs,
        query=query,
        same_rows=same_rows,
    )


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it and tidy up."""


class FaultyClient:
    """A client whose k-th writing call fails, before it reaches the server or after the server has done it."""

    WRITING = frozenset(
        {
            "create_experiment",
            "create_run",
            "log_batch",
            "set_tag",
            "set_terminated",
            "update_run",
            "delete_run",
            "write_runs",
        }
    )

    def __init__(self, client: Any, state: SimpleNamespace):
        self._client = client
        self._state = state

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in self.WRITING:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self._state.calls.append(name)
            due = len(self._state.calls) - 1 == self._state.fail_at
            if due and self._state.when == "before":
                raise self._state.error
            outcome = method(*args, **kwargs)
            if due:
                raise self._state.error
            return outcome

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SimpleNamespace]]:
    """Arms the MLflow client: `faults(fail_at, when, error)`; returns a state whose `calls` are the calls made."""
    from landscape_ray.tracking import server

    original = server.open_client

    def arm(fail_at: int = -1, when: str = "before", error: BaseException | None = None) -> SimpleNamespace:
        state = SimpleNamespace(calls=[], fail_at=fail_at, when=when, error=error or Killed())
        monkeypatch.setattr(server, "open_client", lambda uri: FaultyClient(original(uri), state))
        return state

    yield arm
    monkeypatch.setattr(server, "open_client", original)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes a database a store whose tables are not known: each request goes through MLflow's own client."""
    from landscape_ray.tracking import database

    return lambda: monkeypatch.setattr(database, "is_known", lambda store: False)


@pytest.fixture
def killed() -> type[BaseException]:
    return Killed


@pytest.fixture
def mlflow_http(results: Path) -> Iterator[Server]:
    mlflow_server = Server(results)
    try:
        mlflow_server.start()
        yield mlflow_server
    finally:
        mlflow_server.kill()
