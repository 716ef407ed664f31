"""A population on several hosts, one of which is lost and another of which joins, in the middle."""

import importlib.util
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.sweep.run import TrialRun
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from tests.ray.driver import summaries
from tests.ray.hosts import hosts

STEPS = 160

WHERE = """
import ray, logging
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from landscape_ray.sweep.cluster import code_env, nodes_alive
ray.init(address="auto", runtime_env=code_env(), log_to_driver=False, logging_level=logging.ERROR)
@ray.remote(num_cpus=0)
def where():
    import landscape_ray
    return landscape_ray.__file__
for node in nodes_alive():
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    print(node["NodeManagerAddress"], ray.get(where.options(scheduling_strategy=there).remote()))
"""


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(470)
@pytest.mark.usefixtures("ready_store")
def test_a_host_is_lost_and_another_joins(sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path) -> None:
    text = sweep_text(
        "population",
        train={**tiny, "num_steps": STEPS, "batch_size": 32},
        population={"num_members": 3, "interval_steps": 40, "quantile_fraction": 0.34, "synchronous": True},
        commit_steps=10,
        resources={"cpus_per_trial": 1, "max_failures": 5},
    )
    (tmp_path / "p.toml").write_text(text)
    path = tmp_path / "runs" / "many"
    with hosts(4) as cluster:
        cluster.start_node(0, 0)
        for index in (1, 2):
            cluster.start_node(index, 2 if index == 1 else 1)
        cluster.wait_for_nodes(3)
        places = dict(line.split() for line in cluster.ask(WHERE).splitlines())
        assert set(places) == {cluster.address(index) for index in range(3)}
        assert all("/py_modules_files/" in place for place in places.values()), places  # the driver's code travels
        out = tmp_path / "driver.txt"
        words = [sys.executable, "-m", "landscape_ray.cli", "sweep", "p.toml", "--name", "many"]
        with open(out, "wb") as file:
            driver = cluster.launch(
                0, *words, "--address", cluster.head_address, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 300
        joined = lost = False
        while driver.poll() is None and time.monotonic() < deadline:
            known = summaries(path)
            if not lost and len(known) == 3 and any(20 <= each.step < STEPS for each in known.values()):
                cluster.kill_host(1)
                lost = True
                cluster.start_node(3, 2)
                joined = True
            time.sleep(0.1)
        assert driver.poll() == 0, out.read_text()[-4000:]
        assert lost
        assert joined
    collected = collect(path)
    assert collected.warnings == []
    assert Counter(run.status for run in collected.runs) == {"finished": 3}
    rows = collected.records.to_pylist()
    for run in collected.runs:
        steps = [row["step"] for row in rows if row["run_id"] == run.run_id and row["kind"] == "step"]
        assert steps == list(range(1, STEPS + 1)), run.run_id


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ready_store")
def test_a_sweep_is_handed_in_as_a_job(sweep_text: Callable[..., str], tmp_path: Path) -> None:
    """What README says: the working directory goes along, the results come to the shared folder."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("jobs need ray[default]")
    work = tmp_path / "work"
    work.mkdir()
    (work / "s.toml").write_text(sweep_text(search={"num_trials": 2}, resources={"cpus_per_trial": 1}))
    with hosts(1) as cluster:
        cluster.start_node(0, 2, dashboard=True)
        cluster.wait_for_nodes(1)
        ray = str(Path(sys.executable).with_name("ray"))
        sweep = [sys.executable, "-m", "landscape_ray.cli", "sweep", "s.toml", "--name", "job", "--address", "auto"]
        words = [sys.executable, ray, "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", str(work)]
        done = subprocess.run(
            cluster.command(0, *words, "--", *sweep, "--results", str(tmp_path / "runs")),
            env=cluster.environment, cwd="/", capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    assert "2 finished" in done.stdout
    assert {run.status for run in collect(tmp_path / "runs" / "job").runs} == {"finished"}


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.timeout(560)
@pytest.mark.usefixtures("ready_store")
def test_one_model_is_trained_over_two_hosts(
    sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path
) -> None:
    """Each of two hosts of the same zone holds one worker; a third one, of another zone, is left alone."""
    resources = {"cpus_per_trial": 2, "workers": 2, "placement": "strict_spread", "labels": {"zone": "in(eu, uk)"}}
    text = sweep_text(search={"num_trials": 1, "sampler": "random"}, resources=resources)
    (tmp_path / "s.toml").write_text(text)
    words = [sys.executable, "-m", "landscape_ray.cli", "sweep", "s.toml", "--name", "two"]
    with hosts(4) as cluster:
        cluster.start_node(0, 0)
        cluster.start_node(1, 1, "--labels=zone=us")
        cluster.start_node(2, 2, "--labels=zone=eu")
        cluster.wait_for_nodes(3)
        command = cluster.command(0, *words, "--address", cluster.head_address)
        given: dict[str, Any] = {"env": cluster.environment, "cwd": tmp_path, "capture_output": True, "text": True}
        refused = subprocess.run(command, timeout=240, **given)
        assert refused.returncode == 2, refused.stdout
        said = "resources.workers must fit on the cluster, got 2 with placement 'strict_spread' and 1 CPU each"
        assert said in " ".join((refused.stdout + refused.stderr).split())
        cluster.start_node(3, 1, "--labels=zone=uk")
        cluster.wait_for_nodes(4)
        command = cluster.command(
            0, sys.executable, "-m", "landscape_ray.cli", "resume", "two", "--address", cluster.head_address
        )
        done = subprocess.run(command, timeout=300, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = collect(tmp_path / "runs" / "two").runs
    spec = parse(SweepSpec, tomllib.loads(text), "s.toml")
    alone = TrialRun(
        spec, SweepFolder.create(tmp_path / "alone", spec_text="", meta={}).trial("t0000"), 0, run.varied, 1
    )
    while not alone.finished:
        alone.advance()
    assert run.final_loss_nats == pytest.approx(alone.summary().final_loss_nats, rel=1e-4)
