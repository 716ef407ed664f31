"""A real MLflow server: is it there, does it die in the middle, is everything there when it is back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from landscape_ray.errors import UserError
from landscape_ray.tracking import server
from landscape_ray.tracking.collect import collect_mlflow
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import Projector
from landscape_ray.tracking.uris import mask_secrets


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- the check before a sweep


def test_check_accepts_a_store_that_works(uri: str, tmp_path: Path) -> None:
    Projector.check(uri)
    fresh = tmp_path / "new" / "deeper" / "mlflow.db"
    Projector.check(f"sqlite:///{fresh}")
    assert fresh.parent.is_dir()


@pytest.mark.parametrize("address", ["./mlruns", "file:///mlruns", "databricks", "postgresql://u:s3cret@host/db", ""])
def test_check_refuses_addresses_that_are_not_supported(address: str) -> None:
    with pytest.raises(UserError, match="tracking_uri must begin with http://, https:// or sqlite:///") as caught:
        Projector.check(address)
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
        Projector.check(f"http://ada:s3cret@127.0.0.1:{_free_port()}")
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


def test_telemetry_is_off() -> None:
    code = "import landscape_ray.tracking, os; print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "true\n"


# ---- a server that dies


class _Server:
    """`mlflow server` with one worker on a port of its own."""

    def __init__(self, results: Path):
        self.uri = f"http://127.0.0.1:{_free_port()}"
        self._results = results
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", self.uri.rpartition(":")[2]]
        command += ["--backend-store-uri", f"sqlite:///{self._results / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self._results / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self._results / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | quiet, stdout=log, stderr=log, cwd=self._results, start_new_session=True
            )
        patience = time.monotonic() + 120
        while time.monotonic() < patience:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, (self._results / "server.log").read_text()
                time.sleep(0.2)
        raise AssertionError("the server did not start: " + (self._results / "server.log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads its own group: itself and its worker
            self._process.wait()
            self._process = None


@pytest.fixture
def http(results: Path) -> Iterator[_Server]:
    mlflow_server = _Server(results)
    try:
        mlflow_server.start()
        yield mlflow_server
    finally:
        mlflow_server.kill()


@pytest.mark.acceptance
def test_a_server_that_dies_in_mid_sweep_costs_nothing(
    http: _Server, results: Path, folder: SweepFolder, make: SimpleNamespace
) -> None:
    database = results / "mlflow.db"
    Projector.check(http.uri)
    make.write(folder.trial("t1"), 1, 20)
    projector = Projector(folder, http.uri, "exp")
    assert projector.sync().error == ""
    folder.notes_path.unlink()
    again = Projector(folder, http.uri, "exp").sync()
    assert (again.error, again.points) == ("", sum(make.expected_points({"t1": 20}).values()))
    assert make.stored_points(database) == make.expected_points({"t1": 20}), "idempotent over HTTP as well"

    http.kill()
    make.write(folder.trial("t1"), 21, 40)
    make.write(folder.trial("t2"), 1, 10, status="finished")
    begun = time.monotonic()
    dead = projector.sync()
    assert time.monotonic() - begun < 15
    assert "failed with exception" in dead.error
    assert dead.behind > 0
    assert projector.close(timeout_seconds=2.0).behind == dead.behind

    http.start()
    report_file = results / "report.html"
    report_file.write_text("<html></html>")
    projector.log_artifacts([report_file])
    back = projector.close()
    assert (back.error, back.behind) == ("", 0)
    assert make.stored_points(database) == make.expected_points({"t1": 40, "t2": 10})
    runs = make.active_runs(database)
    assert {name: run["status"] for name, run in runs.items()} == {"": "KILLED", "t1": "KILLED", "t2": "FINISHED"}
    client = server.open_client(http.uri)
    assert {item.path for item in client.list_artifacts(runs[""]["run_id"])} == {"spec.toml", "report.html"}
    through_http = collect_mlflow(http.uri, "exp")
    assert [run.run_id for run in through_http.runs] == ["t1", "t2"]
    direct = collect_mlflow(f"sqlite:///{database}", "exp")
    assert through_http.records.equals(direct.records)
