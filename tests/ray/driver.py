"""Drivers of sweeps, as processes of their own that a test may kill or interrupt."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from landscape_ray.records import RunSummary
from landscape_ray.tracking.folder import SweepFolder

PATIENCE_SECONDS = 250.0
"""For each of two waits; tests that wait have a timeout beyond both."""


@contextlib.contextmanager
def launch(here: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command line in a group of its own, where a signal meets nobody else; it does not outlive the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "landscape_ray.cli", *arguments]
    driver = subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield driver
    finally:
        driver.kill()  # its Ray notices
        driver.wait()
        if driver.stdout is not None:
            driver.stdout.close()


def summaries(path: Path) -> dict[str, RunSummary]:
    if not (path / "sweep.json").exists():
        return {}
    return {t.trial_id: s for t in SweepFolder.open(path).trials() if (s := t.summary()) is not None}


def wait_until(driver: subprocess.Popen[str], path: Path, ready: Callable[[dict[str, RunSummary]], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if driver.poll() is not None:
            pytest.fail(f"the driver ended before it could be stopped: {driver.communicate()[0]}")
        if ready(summaries(path)):
            return
        time.sleep(0.05)
    pytest.fail(f"not ready within {PATIENCE_SECONDS} s: {summaries(path)}")


def finish(driver: subprocess.Popen[str]) -> str:
    try:
        out, _ = driver.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        driver.kill()
        pytest.fail(f"hangs: {driver.communicate()[0]}")
    return out
