"""A sweep on Ray whose server is away for a minute, comes back empty, and comes back refusing every write."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from tests.tracking.mlflow_server import Server, expected_of, stored_in

AWAY_SECONDS = 60.0
REFUSING_SECONDS = 20.0
NUM_STEPS, STEP_SECONDS, NUM_TRIALS = 8000, 0.025, 2
SPEC = f"""
name = "steady"
commit_steps = 40
[train]
num_steps = {NUM_STEPS}
batch_size = 4
device = "cpu"
data = {{ name = "images", source = "digits" }}
model = {{ name = "tests.tracking.steady:Network", options = {{ seconds = {STEP_SECONDS} }} }}
schedule = {{ name = "constant", peak_lr = 0.01 }}
eval = {{ every_steps = 100, num_batches = 1, batch_size = 16 }}
[space]
"schedule.peak_lr" = {{ log_uniform = [1e-3, 1e-2] }}
[search]
num_trials = {NUM_TRIALS}
sampler = "random"
[resources]
cpus_per_trial = 0.5
"""
WRITTEN = ("metrics", "params", "tags", "runs", "latest_metrics")


@contextlib.contextmanager
def refusing(database: Path) -> Iterator[None]:
    """Make a store refuse every write, as one whose disk is full or read-only does."""
    names = [f"no_{action}_{table}" for table in WRITTEN for action in ("INSERT", "UPDATE")]
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for name in names:
            _, action, table = name.split("_", 2)
            connection.execute(
                f"CREATE TRIGGER {name} BEFORE {action} ON {table} BEGIN SELECT RAISE(FAIL, 'read only'); END"
            )
    yield
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for name in names:
            connection.execute(f"DROP TRIGGER {name}")


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_server_that_is_away_for_a_minute_costs_a_sweep_nothing(
    mlflow_http: Server, results: Path, store_template: Path, make: SimpleNamespace
) -> None:
    database = results / "mlflow.db"
    (results / "steady.toml").write_text(SPEC)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "landscape_ray.cli", *arguments, "--results", str(results)]

    def steps() -> dict[str, int]:
        path = results / "sweep"
        if not (path / "sweep.json").exists():
            return {}
        return {t.trial_id: s.step for t in SweepFolder.open(path).trials() if (s := t.summary()) is not None}

    def wait(ready: Callable[[], bool], seconds: float) -> None:
        patience = time.monotonic() + seconds
        while not ready():
            assert driver.poll() is None, (results / "driver.log").read_text()
            assert time.monotonic() < patience, (steps(), stored_in(database, make).total())
            time.sleep(0.2)

    def pass_by(seconds: float) -> float:
        """Let time pass by the clock and return how many updates a second the trials made of it."""
        begun, before = time.monotonic(), steps()
        while time.monotonic() - begun < seconds:
            assert driver.poll() is None, "the sweep must outlast the server"
            time.sleep(0.2)
        return sum(steps()[name] - before[name] for name in before) / (time.monotonic() - begun)

    def points() -> Counter[tuple[str, str, int, int, float]]:
        found = stored_in(database, make)
        return Counter({point: n for point, n in found.items() if not point[1].startswith("hyperparameter/")})

    with open(results / "driver.log", "wb") as log:
        launched = command("sweep", "steady.toml", "--name", "sweep", "--tracking-uri", mlflow_http.uri)
        driver = subprocess.Popen(
            launched, cwd=results, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait(lambda: len(steps()) == NUM_TRIALS and min(steps().values()) > 100, 120)
        wait(lambda: points().total() > 0, 60)
        usual = pass_by(10.0)

        mlflow_http.kill()
        away = pass_by(AWAY_SECONDS)
        shutil.copy(store_template, database)
        for name in ("mlflow.db-wal", "mlflow.db-shm"):
            (results / name).unlink(missing_ok=True)
        mlflow_http.start()  # with nothing that it had
        wait(lambda: len({point[0] for point in points()}) == NUM_TRIALS, 100)

        mlflow_http.kill()
        with refusing(database):
            before = points()
            mlflow_http.start()
            refused = pass_by(REFUSING_SECONDS)
            mlflow_http.kill()
            assert points() == before, "it did refuse"
        mlflow_http.start()
        assert driver.wait(timeout=400) == 0, (results / "driver.log").read_text()
    finally:
        driver.kill()  # its Ray notices
        driver.wait()
    folder = SweepFolder.open(results / "sweep")
    rows = [row for row in collect(folder).records.to_pylist() if row["kind"] == "step"]
    made = Counter((row["run_id"], row["step"]) for row in rows)
    assert made == Counter((trial, step) for trial in ("t0000", "t0001") for step in range(1, NUM_STEPS + 1))
    synced = subprocess.run(command("sync", "sweep"), env=environment, capture_output=True, text=True, timeout=200)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    assert points() == expected_of(folder), "every point exactly once"
    runs = make.active_runs(database)
    assert {name: run["status"] for name, run in runs.items()} == dict.fromkeys(("", "t0000", "t0001"), "FINISHED")
    print(f"updates a second: {usual:.1f} usual, {away:.1f} away, {refused:.1f} refusing; {points().total()} points")
    assert away > 0.8 * usual
    assert refused > 0.7 * usual, "while two interpreters of the server start on the same processors"
