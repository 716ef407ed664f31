"""System metrics: what is sampled, how often, what it costs, and where it is seen."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.sweep.cohort import CohortRun
from landscape_ray.sweep.run import TrialRun
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.sweep.system import SystemSampler
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import Projector

VALUES = {"schedule.name": "linear", "schedule.peak_lr": 0.02}
LINUX = {
    "process_cpu_percentage",
    "cpu_utilization_percentage",
    "process_memory_bytes",
    "system_memory_usage_percentage",
}


@pytest.fixture
def sampled_spec(sweep_text: Callable[..., str]) -> SweepSpec:
    return parse(SweepSpec, tomllib.loads(sweep_text("search", system_seconds=1e-6)), "sampled")


def test_a_sample_tells_what_this_process_does() -> None:
    sampler = SystemSampler(1e-6)
    begun = time.process_time()
    while time.process_time() - begun < 0.05:
        pass
    found = sampler.sample()
    assert set(found) >= LINUX
    assert 5 < found["process_cpu_percentage"] <= 100.0 * torch.get_num_threads() + 50
    assert 0 < found["cpu_utilization_percentage"] <= 100
    assert 0 < found["system_memory_usage_percentage"] < 100
    before = found["process_memory_bytes"]
    held = bytearray(b"x") * 2**26
    assert sampler.sample()["process_memory_bytes"] - before > 2**25
    del held


def test_samples_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sampler, never = SystemSampler(10.0), SystemSampler(0)
    assert not sampler.due
    now += 10.0
    assert sampler.due
    sampler.sample()
    assert not sampler.due
    now += 9.9
    assert not sampler.due
    now += 1e9
    assert sampler.due
    assert not never.due


@pytest.mark.acceptance
def test_sampling_costs_less_than_a_thousandth_of_the_time() -> None:
    """In processor time, which other processes don't lengthen: of a sample each ten seconds, and of asking for it."""
    sampler = SystemSampler(10.0)
    begun = time.thread_time()
    for _ in range(50):
        sampler.sample()
    assert (time.thread_time() - begun) / 50 < 1e-3 * 10.0
    begun = time.thread_time()
    for _ in range(1000):
        assert not sampler.due
    assert (time.thread_time() - begun) / 1000 < 1e-5, "an update of the smallest network takes a hundred times that"


@pytest.mark.parametrize("library", [True, False])
def test_a_device_is_told_of_where_it_is_used(monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    def refuse() -> float:
        raise ModuleNotFoundError("pynvml does not seem to be installed or it can't be imported.")

    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * gib, 40 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * gib)
    monkeypatch.setattr(torch.cuda, "utilization", (lambda: 87) if library else refuse)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 250_000)
    found = SystemSampler(1.0).sample()
    wanted = {"process_gpu_memory_bytes": 5.0 * gib, "gpu_0_memory_usage_percentage": 25.0}
    if library:
        wanted |= {"gpu_0_utilization_percentage": 87.0, "gpu_0_power_usage_watts": 250.0}
    assert {name: value for name, value in found.items() if "gpu" in name} == wanted


@pytest.mark.acceptance
def test_samples_of_a_trial_are_system_metrics_in_mlflow(
    sampled_spec: SweepSpec, folder: SweepFolder, tmp_path: Path, store_template: Path
) -> None:
    """Named `system/...`, by which MLflow tells them from others, and at the updates at which they were taken."""
    run = TrialRun(sampled_spec, folder.trial("t0000"), 0, VALUES)
    while not run.finished:
        run.advance()
    rows = [row for row in collect(folder.path).records.to_pylist() if row["kind"] == "system"]
    assert {row["probe"] for row in rows} >= LINUX
    assert {row["step"] for row in rows} == set(range(1, 11)), "one sample at each update, at this distance"
    database = tmp_path / "mlflow.db"
    database.write_bytes(store_template.read_bytes())
    assert Projector(folder, f"sqlite:///{database}", "e").close().error == ""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        stored = connection.execute("SELECT key, step, value, timestamp FROM metrics WHERE key LIKE 'system/%'")
        points = sorted(point for point in stored if point[0].removeprefix("system/") in LINUX)
    made = [(f"system/{row['probe']}", row["step"], row["value"], round(1000 * row["time_unix"])) for row in rows]
    assert points == sorted(point for point in made if point[0].removeprefix("system/") in LINUX)


def test_none_are_taken_where_none_are_wanted(search_spec: SweepSpec, folder: SweepFolder) -> None:
    assert search_spec.system_seconds == 0
    run = TrialRun(search_spec, folder.trial("t0000"), 0, VALUES)
    while not run.finished:
        run.advance()
    assert "system" not in collect(folder.path).records["kind"].to_pylist()


def test_a_cohort_is_one_process_and_sampled_once(sampled_spec: SweepSpec, folder: SweepFolder) -> None:
    members = [{"trial_id": f"t000{k}", "values": {**VALUES, "schedule.peak_lr": 0.01 * (k + 1)}} for k in range(2)]
    run = CohortRun(sampled_spec, folder, members, attempt=0)
    while not run.finished:
        run.advance()
    rows = [row for row in collect(folder.path).records.to_pylist() if row["kind"] == "system"]
    assert {row["run_id"] for row in rows} == {"t0000"}
    assert {row["step"] for row in rows} == set(range(1, 11))
