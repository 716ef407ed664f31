"""A real MLflow server: is it there, does it die in the middle, is everything there when it is back."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from landscape_ray.errors import UserError
from landscape_ray.tracking import server
from landscape_ray.tracking.collect import collect, collect_mlflow
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import Projector
from landscape_ray.tracking.uris import mask_secrets
from tests.tracking.mlflow_server import Server, expected_of, free_port, stored_in

# ---- the check before a sweep


def test_check_accepts_a_store_that_works(uri: str, tmp_path: Path) -> None:
    Projector.check(uri)
    fresh = tmp_path / "new" / "deeper" / "mlflow.db"
    Projector.check(f"sqlite:///{fresh}")
    assert fresh.parent.is_dir()


@pytest.mark.parametrize("address", ["./mlruns", "file:///mlruns", "databricks", "mysql://u:s3cret@host/db", ""])
def test_check_refuses_addresses_that_are_not_supported(address: str) -> None:
    with pytest.raises(
        UserError, match="tracking_uri must begin with http://, https://, postgresql:// or sqlite:///"
    ) as caught:
        Projector.check(address)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("driver", "said"), [("+psycopg2", "psycopg2"), ("+no_such_one", "Can't load plugin")])
def test_check_names_the_driver_that_a_database_needs(monkeypatch: pytest.MonkeyPatch, driver: str, said: str) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # not here, even where it is installed
    with pytest.raises(UserError, match=rf"whose driver is installed, .*{said}.*landscape_ray\[postgres\]") as caught:
        Projector.check(f"postgresql{driver}://u:s3cret@127.0.0.1/db")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("address", ["sqlite:///", "sqlite:///:memory:"])
def test_check_refuses_a_store_without_a_file(address: str) -> None:
    with pytest.raises(UserError, match="tracking_uri must name a file"):
        Projector.check(address)


def test_check_asks_for_the_password_that_was_not_written_down() -> None:
    kept = mask_secrets("http://ada:s3cret@127.0.0.1:5000")
    with pytest.raises(UserError, match=r"tracking_uri must hold its user and password, .*--tracking-uri"):
        Projector.check(kept)


def test_check_refuses_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must lie in a folder that can be written"):
        Projector.check(f"sqlite:///{tmp_path}/file/mlflow.db")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="must lie in a folder that can be written"):
        Projector.check(f"sqlite:///{tmp_path}/mlflow.db")


def test_check_refuses_a_file_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, whatever its name is")
    with pytest.raises(UserError, match=r"does not answer: .*; start it, correct the tracking URI"):
        Projector.check(f"sqlite:///{tmp_path}/mlflow.db")


def test_check_of_a_dead_server_is_quick_and_keeps_the_password() -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"http://\*\*\*@127.0.0.1:\d+ does not answer") as caught:
        Projector.check(f"http://ada:s3cret@127.0.0.1:{free_port()}")
    assert time.monotonic() - begun < 6
    assert "s3cret" not in str(caught.value)
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_check_of_a_server_that_accepts_and_never_answers_is_bounded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(UserError, match="does not answer"):
            Projector.check(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - begun < 6.5


def test_check_is_bounded_even_when_the_name_lookup_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(server, "_CHECK_SECONDS", 0.2)
    monkeypatch.setattr(server, "open_client", lambda _: release.wait(30))
    with pytest.raises(UserError, match="nothing within 0 seconds"):
        Projector.check("http://127.0.0.1:1")
    release.set()
    for thread in threading.enumerate():  # it still holds the environment
        if thread.name == "landscape_ray-check":
            thread.join(30)


def test_bounded_http_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    seen: list[str] = []

    def inside() -> None:
        with server.bounded_http(3.4):
            seen.extend((os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert seen == ["3", "0"]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_telemetry_is_off_and_no_address_is_printed() -> None:
    names = ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")
    code = f"import landscape_ray.tracking, os; print(*[os.environ[name] for name in {names}])"
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "true true\n"


# ---- a server that dies


@pytest.mark.acceptance
def test_a_server_that_dies_in_mid_sweep_costs_nothing(
    mlflow_http: Server, results: Path, folder: SweepFolder, make: SimpleNamespace
) -> None:
    database = results / "mlflow.db"
    Projector.check(mlflow_http.uri)
    make.write(folder.trial("t1"), 1, 20)
    projector = Projector(folder, mlflow_http.uri, "exp")
    assert projector.sync().error == ""
    child = make.active_runs(database)["t1"]["run_id"]
    server.open_client(mlflow_http.uri).set_tag(child, "landscape_ray.num_parts", "0")
    again = Projector(folder, mlflow_http.uri, "exp").sync()
    assert (again.error, again.points) == ("", sum(make.expected_points({"t1": 20}).values()))
    assert make.stored_points(database) == make.expected_points({"t1": 20}), "idempotent over HTTP as well"

    mlflow_http.kill()
    make.write(folder.trial("t1"), 21, 40)
    make.write(folder.trial("t2"), 1, 10, status="finished")
    begun = time.monotonic()
    dead = projector.sync()
    assert time.monotonic() - begun < 15
    assert "failed with exception" in dead.error
    assert dead.behind > 0
    assert projector.close(timeout_seconds=2.0).behind == dead.behind

    mlflow_http.start()
    report_file = results / "report.html"
    report_file.write_text("<html></html>")
    projector.log_artifacts([report_file])
    back = projector.close()
    assert (back.error, back.behind) == ("", 0)
    assert make.stored_points(database) == make.expected_points({"t1": 40, "t2": 10})
    runs = make.active_runs(database)
    assert {name: run["status"] for name, run in runs.items()} == {"": "KILLED", "t1": "KILLED", "t2": "FINISHED"}
    client = server.open_client(mlflow_http.uri)
    assert {item.path for item in client.list_artifacts(runs[""]["run_id"])} >= {
        "spec.toml",
        "report.html",
        "environment.json",
    }
    direct = collect_mlflow(f"sqlite:///{database}", "exp", route="bulk")
    assert [run.run_id for run in direct.runs] == ["t1", "t2"]
    for route in ("bulk", "history"):
        assert collect_mlflow(mlflow_http.uri, "exp", route=route).records.equals(direct.records)


class _Strange(http.server.BaseHTTPRequestHandler):
    """Something that answers, and is no MLflow server."""

    status, body, delay = 200, b"", 0.0

    def _answer(self) -> None:
        time.sleep(self.delay)
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked may have given up
            self.wfile.write(self.body)

    do_GET = do_POST = do_PATCH = do_PUT = _answer  # noqa: N815  # names of the standard library

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("status", "body", "delay"),
    [
        (200, b"<html>Welcome</html>", 0.0),
        (200, b"{}", 0.0),
        (404, b"nothing here", 0.0),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "read only"}', 0.0),
        (500, b"", 0.0),
        (503, b"busy", 0.0),
        (200, b"{}", 3.0),
    ],
)
def test_a_wrong_or_slow_server_is_an_entry_in_the_report(
    folder: SweepFolder, uri: str, results: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
    status: int, body: bytes, delay: float,
) -> None:  # fmt: skip
    from landscape_ray.tracking import projector as module

    monkeypatch.setattr(module, "_REQUEST_SECONDS", 1.0)
    handler = type("Handler", (_Strange,), {"status": status, "body": body, "delay": delay})
    make.write(folder.trial("t1"), 1, 10)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as strange:
        thread = threading.Thread(target=strange.serve_forever, daemon=True)
        thread.start()
        projector = Projector(folder, f"http://127.0.0.1:{strange.server_port}", "exp", interval_seconds=0.05)
        projector.start()
        make.write(folder.trial("t1"), 11, 20)
        begun = time.monotonic()
        report = projector.close(timeout_seconds=3.0)
        assert time.monotonic() - begun < 20
        strange.shutdown()
        thread.join()
    assert report.error != ""
    assert report.behind == folder.trial("t1").num_parts()
    assert Projector(folder, uri, "exp").close().error == ""
    assert make.stored_points(results / "mlflow.db") == make.expected_points({"t1": 20})


# ---- a driver that dies, and a server that comes back empty


DRIVER_SPEC = """
name = "quick"
commit_steps = 20
[train]
num_steps = 3000
batch_size = 8
device = "cpu"
data = { name = "images", source = "digits" }
model = { name = "mlp", depth = 1, width = 16 }
schedule = { name = "constant", peak_lr = 0.01 }
eval = { every_steps = 50, num_batches = 1, batch_size = 16 }
"""


class _Trial:
    """A trial as Ray's callback sees it."""

    config: dict[str, float] = {"lr": 0.1}

    def __str__(self) -> str:
        return "t0"


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_a_driver_and_a_server_that_are_killed_lose_nothing(
    mlflow_http: Server,
    results: Path,
    store_template: Path,
    make: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    global_address: None,
) -> None:
    """The server dies in mid-sweep; the driver with unsent rows; the server is set up anew; the sweep is resumed."""
    from mlflow.exceptions import MlflowException
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    database = results / "mlflow.db"
    (results / "quick.toml").write_text(DRIVER_SPEC)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    peer = MLflowLoggerCallback(tracking_uri=mlflow_http.uri, experiment_name="peer")
    peer.setup()
    trial = _Trial()
    peer.log_trial_start(trial)

    def launch(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "landscape_ray.cli", *arguments, "--results", str(results)]
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # the callback has left it there
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def steps(folder: SweepFolder) -> int:
        summary = folder.trial("t0000").summary()
        return summary.step if summary else 0

    def wait(driver: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        patience = time.monotonic() + 200
        while not ready():
            assert driver.poll() is None, "the driver ended too early"
            assert time.monotonic() < patience
            time.sleep(0.05)

    driver = launch("train", str(results / "quick.toml"), "--name", "quick", "--tracking-uri", mlflow_http.uri)
    try:
        wait(driver, lambda: (results / "quick" / "sweep.json").exists())
        folder = SweepFolder.open(results / "quick")
        wait(driver, lambda: len(stored_in(database, make)) > 0)
        mlflow_http.kill()
        with pytest.raises(MlflowException, match="failed with exception"):
            peer.log_trial_result(1, trial, {"loss": 1.0, "training_iteration": 1})
        reached = steps(folder)
        wait(driver, lambda: steps(folder) > reached + 200)  # it trains on
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    committed = expected_of(folder)
    assert sum(committed.values()) > sum(stored_in(database, make).values()), "there are unsent rows"
    shutil.copy(store_template, database)
    for name in ("mlflow.db-wal", "mlflow.db-shm"):
        (results / name).unlink(missing_ok=True)
    mlflow_http.start()
    assert launch("sync", "quick").wait(timeout=120) == 0
    assert stored_in(database, make) == committed
    assert launch("sync", "quick").wait(timeout=120) == 0
    assert stored_in(database, make) == committed, "twice changes nothing"
    begun = {name: run["run_id"] for name, run in make.active_runs(database).items()}
    assert launch("resume", "quick").wait(timeout=200) == 0
    assert steps(folder) == 3000
    assert stored_in(database, make) == expected_of(folder)
    runs = make.active_runs(database)
    assert {name: (run["run_id"], run["status"]) for name, run in runs.items()} == {
        name: (run_id, "FINISHED") for name, run_id in begun.items()
    }
    assert make.same_rows(collect_mlflow(mlflow_http.uri, "landscape_ray").records, collect(folder).records)
    folder.path.rename(results / "away")
    copy = collect_mlflow(mlflow_http.uri, "landscape_ray")
    assert make.same_rows(copy.records, collect(results / "away").records), "from the Parquet copy on the server"
