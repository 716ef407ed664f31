"""A real MLflow server that a test may kill, and what its store must hold of a sweep."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from landscape_ray.records import metrics
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`mlflow server` with one worker on a port of its own."""

    def __init__(self, results: Path):
        self.uri = f"http://127.0.0.1:{free_port()}"
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


def expected_of(folder: SweepFolder) -> Counter[tuple[str, str, int, int, float]]:
    """What the store must hold of the rows on disk, by the rules of the documentation."""
    collected, found = collect(folder), Counter[tuple[str, str, int, int, float]]()
    num_steps = collected.runs[0].num_steps
    stride = -(-num_steps // 500)
    for row in collected.records.to_pylist():
        shown = row["step"] % stride == 0 or row["step"] in (1, num_steps)
        if (row["kind"] == "step" and not shown) or row["kind"] == "system":
            continue
        named = metrics(row)
        if row["kind"] == "eval" and (row["step"] == 0 or not shown):
            named |= {f"progress/{key}": float(row[key]) for key in ("num_tokens", "flops", "elapsed_seconds")}
        for key, value in named.items():
            found[row["run_id"], key, round(1000 * row["time_unix"]), row["step"], value] += 1
    return found


def stored_in(database: Path, make: SimpleNamespace) -> Counter[tuple[str, str, int, int, float]]:
    points = make.stored_points(database)
    return Counter({point: number for point, number in points.items() if not point[1].startswith("system/")})
