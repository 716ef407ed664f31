"""Many points from several writers at the same time, and many runs at once."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from landscape_ray.records import ProbeRecord
from landscape_ray.tracking import database
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.tracking.projector import Projector

SCRIPTS = Path(__file__).parents[2] / "scripts"


def _write(trial: TrialFolder, num_rows: int, make: SimpleNamespace) -> None:
    writer = PartWriter(trial)
    for step in range(1, num_rows + 1):
        place = {"step": step, "num_tokens": step, "flops": 1.0, "elapsed_seconds": 0.1 * step}
        probe = {"probe": "sharpness", "value": 0.5 * step, "standard_error": 0.25, "num_matvecs": 1}
        writer.append(ProbeRecord(**place, time_unix=1.7e9 + 0.1 * step, cost_seconds=0.0, **probe))
        if step % 500 == 0:
            status = "finished" if step == num_rows else "running"
            trial.commit(make.summary(trial.trial_id, step=step, status=status, varied={}), writer.flush())


@pytest.mark.parametrize("by_requests", [True, False], ids=["requests", "transactions"])
def test_four_writers_at_the_same_time_lose_nothing(
    folder: SweepFolder,
    uri: str,
    results: Path,
    make: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    by_requests: bool,
) -> None:
    """And no request is larger than a server takes, whatever is waiting."""
    from mlflow import MlflowClient

    if by_requests:  # as to a server
        monkeypatch.setattr(database, "is_known", lambda store: False)
    sizes: list[int] = []
    original = MlflowClient.log_batch

    def log_batch(self: Any, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), **more: Any) -> Any:
        sizes.append(len(metrics) + len(params) + len(tags))
        return original(self, run_id, metrics, params, tags, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    projector = Projector(folder, uri, "exp", interval_seconds=0.01, batch_seconds=0.0)
    writers = [threading.Thread(target=_write, args=(folder.trial(f"t{k}"), 1500, make)) for k in range(4)]
    for writer in writers:
        writer.start()
    projector.start()
    for writer in writers:
        writer.join()
    report = projector.close()
    assert (report.error, report.behind) == ("", 0)
    stored = make.stored_points(results / "mlflow.db")
    expected: Counter[Any] = Counter()
    for trial in range(4):
        for step in range(1, 1501):
            at = round(1000 * (1.7e9 + 0.1 * step))
            expected[f"t{trial}", "probe/sharpness", at, step, 0.5 * step] += 1
            expected[f"t{trial}", "probe/sharpness_standard_error", at, step, 0.25] += 1
    assert stored == expected
    assert max(sizes) <= 1000
    assert (max(sizes) > 500) == by_requests, "what has come together goes together"


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(1500)
def test_a_million_points_from_four_processes() -> None:
    command = [sys.executable, str(SCRIPTS / "bench_tracking.py"), "--part", "million", "--points", "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1400)
    numbers = re.search(r"points: asked, sent, stored, distinct\s+([\d, ]+?)\s*$", done.stdout, re.MULTILINE)
    assert numbers is not None, done.stdout
    asked, _, stored, distinct = (int(text.replace(",", "")) for text in numbers[1].split())
    assert (asked, stored, distinct) == (1_000_000, 1_000_000, 1_000_000)
    memory = re.search(r"peak memory of the driver above its start\s+([\d.,e+]+) MiB", done.stdout)
    assert memory is not None, done.stdout
    assert float(memory[1].replace(",", "")) < 500


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_thousand_results_cost_less_than_a_hundred_requests() -> None:
    """Of a population of four on Ray, tracked by a server; and less than five milliseconds of processor time each."""
    command = [sys.executable, str(SCRIPTS / "bench_tracking.py"), "--part", "lengths", "--lengths", "500", "2500"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=800)
    ended = re.findall(r"^([\d,]+) results in [\d,]+ s: how it ended\s+(\S+)\s*$", done.stdout, re.MULTILINE)
    assert [how for _, how in ended] == ["finished", "finished"], done.stdout
    assert int(ended[1][0].replace(",", "")) > 900
    requests = re.findall(r"^requests a result\s+([\d.e-]+)\s*$", done.stdout, re.MULTILINE)
    milliseconds = re.findall(r"^CPU of tracking, a result\s+([\d.e-]+) ms\s*$", done.stdout, re.MULTILINE)
    assert float(requests[1]) < 0.1, done.stdout
    assert float(milliseconds[1]) < 5.0, done.stdout
