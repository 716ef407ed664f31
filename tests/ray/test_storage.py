"""Sweeps on hosts that share no folder: what they have in common is a storage, and what is lost comes from there."""

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.tracking.cache import bring_sweep
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.storage import open_storage
from tests.ray.driver import summaries
from tests.ray.hosts import Hosts, hosts

STEPS = 160


def disturb(cluster: Hosts, driver: "subprocess.Popen[bytes]", path: Path, num_trials: int) -> bool:
    """Lose the first worker, with its disk, when every trial has begun, and let another join; wait for the end."""
    deadline, lost = time.monotonic() + 280, False
    while driver.poll() is None and time.monotonic() < deadline:
        known = summaries(path)
        if not lost and len(known) >= num_trials and any(20 <= each.step < STEPS for each in known.values()):
            cluster.kill_host(1)
            shutil.rmtree(cluster.disk(1))
            lost = True
            cluster.start_node(3, 2)
        time.sleep(0.1)
    return lost


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(470)
def test_a_host_is_lost_with_its_disk(
    sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path, store_template: Path
) -> None:
    text = sweep_text(
        "population",
        train={**tiny, "num_steps": STEPS, "batch_size": 32},
        population={"num_members": 3, "interval_steps": 40, "quantile_fraction": 0.34, "synchronous": True},
        commit_steps=10,
        resources={"cpus_per_trial": 1, "max_failures": 5},
    )
    (tmp_path / "p.toml").write_text(text)
    (tmp_path / "runs").mkdir()
    uri = f"file://{tmp_path}/store"
    with hosts(4, private=tmp_path / "runs") as cluster:
        shutil.copy(store_template, cluster.disk(0) / "mlflow.db")
        cluster.start_node(0, 0)
        for index in (1, 2):
            cluster.start_node(index, 2 if index == 1 else 1)
        cluster.wait_for_nodes(3)
        out = tmp_path / "driver.txt"
        words = [sys.executable, "-m", "landscape_ray.cli", "sweep", "p.toml", "--name", "many", "--storage", uri]
        with open(out, "wb") as file:
            driver = cluster.launch(
                0, *words, "--address", cluster.head_address, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT
            )
        lost = disturb(cluster, driver, cluster.disk(0) / "many", 3)
        assert driver.poll() == 0, out.read_text()[-4000:]
        assert lost
        assert not (cluster.disk(0) / "many" / "trials" / "t0001" / "checkpoint" / "previous.pt").exists()
    assert list((tmp_path / "runs").iterdir()) == []  # the hosts had nothing in common but the storage
    collected = collect(bring_sweep(open_storage(uri).at("many"), tmp_path / "back" / "many", checkpoints=True))
    assert collected.warnings == []
    assert Counter(run.status for run in collected.runs) == {"finished": 3}
    rows = collected.records.to_pylist()
    for run in collected.runs:
        steps = [row["step"] for row in rows if row["run_id"] == run.run_id and row["kind"] == "step"]
        assert steps == list(range(1, STEPS + 1)), run.run_id
    assert "resume" not in out.read_text()
