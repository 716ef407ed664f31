"""A store in PostgreSQL behaves as one in SQLite, directly and behind a server. The cluster is the tests' own."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy

from landscape_ray.tracking import server
from landscape_ray.tracking.collect import collect, collect_mlflow
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import Projector

PASSWORD = "tr0ub4dor-hunter2"
POINTS = (
    "SELECT t.value, m.key, m.timestamp, m.step, m.value FROM metrics m"
    " JOIN runs r ON r.run_uuid = m.run_uuid AND r.lifecycle_stage = 'active'"
    " JOIN tags t ON t.run_uuid = m.run_uuid AND t.key = 'landscape_ray.trial_id'"
)


def _programs() -> Path | None:
    """Return the folder of PostgreSQL's programs; Debian keeps them off the path."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((place for place in reversed(places) if (place / "postgres").exists()), None)


def _other_user() -> list[str] | None:
    """Return how to become who may run PostgreSQL, which refuses root; None where nobody is there."""
    if os.geteuid() != 0:
        return []
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        return None
    wanted = ["--reuid=postgres", "--regid=postgres", "--clear-groups"]
    return ["setpriv", *wanted] if shutil.which("setpriv") else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(_programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)"),
    pytest.mark.skipif(_other_user() is None, reason="PostgreSQL refuses root, and there is no user postgres"),
    pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="psycopg is not installed"),
]


class Cluster:
    """PostgreSQL on 127.0.0.1, with a password and without waiting for disks."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"postgresql+psycopg://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        self._folder, self._process = folder, None
        as_user, programs = _other_user(), _programs()
        assert as_user is not None
        assert programs is not None
        self._as_user, self._programs = as_user, programs
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if as_user:
            for path in (folder, secret):
                shutil.chown(path, "postgres")
        command = [*as_user, programs / "initdb", "-D", folder / "data", "-U", "postgres", "--no-sync"]
        command += ["-A", "scram-sha-256", "--pwfile", secret, "-E", "UTF8", "--locale=C"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)

    def start(self) -> None:
        command: list[Any] = [*self._as_user, self._programs / "postgres", "-D", self._folder / "data"]
        command += ["-h", "127.0.0.1", "-p", str(self.port), "-k", self._folder, "-F"]
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        patience = time.monotonic() + 60
        while True:
            try:
                self.rows("SELECT 1")
                return
            except sqlalchemy.exc.OperationalError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()
                assert time.monotonic() < patience
                time.sleep(0.1)

    def kill(self) -> None:
        """End it at once: connections are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        engine = sqlalchemy.create_engine(self.uri, poolclass=sqlalchemy.pool.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(sql))]

    def points(self) -> Counter[tuple[Any, ...]]:
        return Counter(self.rows(POINTS))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="lr-postgres-"))
    made = None
    try:
        made = Cluster(folder)
        made.start()
        server.open_client(made.uri).search_experiments(max_results=1)  # makes the tables
        yield made
    finally:
        if made is not None:
            made.kill()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def http(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """`mlflow server` before the database; its address and what it printed."""
    place = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = os.environ | quiet | {"MLFLOW_BACKEND_STORE_URI": cluster.uri}
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--artifacts-destination", str(place / "artifacts")]
    with open(place / "log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=place, start_new_session=True)
    try:
        patience = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                assert process.poll() is None, (place / "log").read_text()
                assert time.monotonic() < patience
                time.sleep(0.2)
        yield SimpleNamespace(uri=f"http://127.0.0.1:{port}", log=place / "log")
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it leads its own group: itself and its worker
        process.wait()


@pytest.fixture
def store(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    return cluster.uri if request.param == "direct" else str(request.getfixturevalue("http").uri)


def expected(make: SimpleNamespace, before: Counter[Any], last_steps: dict[str, int]) -> Counter[Any]:
    """What must have come to what other tests left there."""
    return before + make.expected_points(last_steps)


@pytest.mark.acceptance
@pytest.mark.parametrize("store", ["direct", "http"], indirect=True)
def test_every_point_once_however_often_it_is_sent(
    store: str, cluster: Cluster, folder: SweepFolder, results: Path, uri: str, make: SimpleNamespace
) -> None:
    Projector.check(store)
    before = cluster.points()
    make.write(folder.trial("t1"), 1, 30)
    make.write(folder.trial("t2"), 1, 12, status="finished")
    name = f"once {store[:4]}"
    projector = Projector(folder, store, name)
    assert (projector.sync().error, projector.report.behind) == ("", 0)
    assert cluster.points() == expected(make, before, {"t1": 30, "t2": 12})
    assert Projector(folder, store, name).sync().points == 0, "the runs say how far they are"
    client = server.open_client(store)
    experiment = client.get_experiment_by_name(name)
    for run in client.search_runs([experiment.experiment_id]):
        client.set_tag(run.info.run_id, server.NUM_PARTS, "0")
    make.write(folder.trial("t1"), 31, 47, status="finished")
    folder.update_meta(status="finished")
    again = Projector(folder, store, name).close()
    assert (again.error, again.points) == ("", sum(make.expected_points({"t1": 47, "t2": 12}).values()))
    assert cluster.points() == expected(make, before, {"t1": 47, "t2": 12})
    found = {run.data.tags.get(server.TRIAL_ID, ""): run for run in client.search_runs([experiment.experiment_id])}
    assert {trial: run.info.status for trial, run in found.items()} == dict.fromkeys(("", "t1", "t2"), "FINISHED")
    assert {item.path for item in client.list_artifacts(found[""].info.run_id)} >= {"spec.toml", "records.parquet"}

    assert Projector(folder, uri, "exp").close().error == ""
    same = collect_mlflow(uri, "exp", route="bulk").records
    for route in ("bulk", "history"):
        assert collect_mlflow(store, name, route=route).records.equals(same), "as from SQLite"
    assert make.same_rows(collect_mlflow(store, name).records, collect(folder).records)


@pytest.mark.acceptance
def test_killed_at_any_call_then_resumed_nothing_is_lost_or_doubled(
    cluster: Cluster,
    results: Path,
    make: SimpleNamespace,
    faults: Callable[..., SimpleNamespace],
    killed: type[BaseException],
) -> None:
    """The projector's contract of the SQLite store, at each call and on either side of it."""
    calls, case = 1, 0
    while case < 2 * calls:
        folder = SweepFolder.create(results / f"case{case}", spec_text=make.spec, meta={})
        before, name = cluster.points() if case else Counter(), f"case{case}"
        make.write(folder.trial("t1"), 1, 10, status="finished")
        make.write(folder.trial("t2"), 1, 5)
        if case == 0:
            counted = faults()
            assert Projector(folder, cluster.uri, name).close().error == ""
            calls = len(counted.calls)
            assert calls >= 6
        else:
            faults(case // 2, "before" if case % 2 else "after")
            with pytest.raises(killed):
                Projector(folder, cluster.uri, name).close()
            faults()
            make.write(folder.trial("t2"), 6, 7)
            assert Projector(folder, cluster.uri, name).close().error == ""
            assert cluster.points() == expected(make, before, {"t1": 10, "t2": 7})
        case += 1


@pytest.mark.acceptance
def test_a_database_that_dies_costs_nothing_and_no_password_is_shown(
    cluster: Cluster,
    http: SimpleNamespace,
    folder: SweepFolder,
    make: SimpleNamespace,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = cluster.points()
    make.write(folder.trial("t1"), 1, 20)
    folder.update_meta(tracking_uri=cluster.uri)
    projector = Projector(folder, cluster.uri, "dies")
    assert projector.sync().error == ""
    cluster.kill()
    make.write(folder.trial("t1"), 21, 40)
    dead = projector.sync()
    assert dead.error != ""
    assert dead.behind > 0
    with pytest.raises(Exception, match=r"does not answer") as caught:
        Projector.check(cluster.uri)
    through = Projector(folder, http.uri, "dies").sync()
    assert through.error != ""
    cluster.start()
    assert projector.close().error == ""
    assert cluster.points() == expected(make, before, {"t1": 40})
    out, err = capfd.readouterr()
    shown = [out, err, caplog.text, dead.error, through.error, str(caught.value), http.log.read_text()]
    shown += [path.read_text() for path in folder.path.rglob("*") if path.suffix in (".json", ".toml")]
    shown += [str(row) for row in cluster.rows("SELECT value FROM tags UNION ALL SELECT value FROM params")]
    assert not [text for text in shown if PASSWORD in text]
