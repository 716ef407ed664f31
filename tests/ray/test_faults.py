"""The fault matrix of README, row by row, as far as it needs Ray: trials end whole, every step recorded once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.sweep.population.book import population_of
from landscape_ray.sweep.run import trial_id_of
from landscape_ray.sweep.session import Outcome, exit_status, outcome_text, reason
from landscape_ray.sweep.spec import spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from tests.ray.test_sweep import check_mlflow, drive, start

SweepText = Callable[..., str]

STEPS = 12
pytestmark = [pytest.mark.usefixtures("ray_session", "ready_store")]


def sweep(
    write: SweepText, path: Path, orders: list[str], num_trials: int = 2, **resources: Any
) -> tuple[SweepFolder, Outcome, str]:
    """Run trials of a model that obeys the orders."""
    text = write(search={"num_trials": num_trials, "sampler": "random"}, **obedient(path, orders), **given(resources))
    folder = start(text, path)
    outcome, shown = drive(folder)
    return folder, outcome, shown


def given(resources: dict[str, Any]) -> dict[str, Any]:
    return {"commit_steps": 2, "resources": {"cpus_per_trial": 1, **resources}}


def obedient(path: Path, orders: list[str]) -> dict[str, Any]:
    """Write the orders; return the tables of a sweep whose model obeys them."""
    (path / "orders").mkdir()
    for order in orders:
        (path / "orders" / order).touch()
    train = {
        "num_steps": STEPS,
        "batch_size": 4,
        "data": {"name": "images"},
        "model": {"name": "tests.ray.faulty:Network", "options": {"orders": str(path / "orders")}},
        "schedule": {"peak_lr": 0.01},
        "eval": {"every_steps": 6, "num_batches": 1, "batch_size": 4},
    }
    return {"train": train, "space": {"schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]}}}


def check_steps(folder: SweepFolder) -> None:
    collected = collect(folder.path)
    assert collected.warnings == []
    rows = collected.records.to_pylist()
    for run in collected.runs:
        steps = [row["step"] for row in rows if row["run_id"] == run.run_id and row["kind"] == "step"]
        assert steps == list(range(1, STEPS + 1)), run.run_id


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "orders",
    [
        ["die.1", "raise.1"],
        pytest.param(["memory.1", "raise.1", "die.1", "die.2"], marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_trials_that_raise_or_die_go_on(orders: list[str], sweep_text: SweepText, tmp_path: Path) -> None:
    folder, outcome, _ = sweep(sweep_text, tmp_path, orders, max_failures=5)
    assert outcome.counts == {"finished": 2}
    assert list((tmp_path / "orders").iterdir()) == [], "all faults have happened"
    check_steps(folder)


POPULATION = {"num_members": 3, "interval_steps": 6, "synchronous": True}


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("room", [3, 1])
def test_a_synchronous_population_goes_on_without_a_member_that_fails(
    sweep_text: SweepText, tmp_path: Path, room: int
) -> None:
    """One member fails for good in the middle of its first interval: the others do not wait for it."""
    resources = given({"max_failures": 0, "cpus_per_trial": 2 / room})
    folder = start(
        sweep_text("population", population=POPULATION, **obedient(tmp_path, ["raise.1"]), **resources), tmp_path
    )
    outcome, shown = drive(folder)
    assert outcome.counts == {"finished": 3}
    assert (outcome.status, outcome.failures, exit_status(outcome)) == ("finished", {}, 0)
    (failure,) = population_of(spec_of(folder), folder).failures
    name = trial_id_of(failure.member)
    assert (failure.step, failure.donor_step) == (0, 6)
    became = f"replaced by a copy of {trial_id_of(failure.donor or 0)} at step 6"
    assert f"{name} failed after step 0, {became}: RuntimeError: a faulty batch" in outcome_text(outcome)
    assert f"{name} failed: RuntimeError: a faulty batch\n" in shown, "as soon as it is known"
    assert f"{name} goes on as a copy of {trial_id_of(failure.donor or 0)}\n" in shown
    rows = [row for row in collect(folder.path).records.to_pylist() if row["run_id"] == name]
    # committed at step 2, failed at step 4, then those after the weights that it took
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, *range(7, STEPS + 1)]
    (copied,) = (row for row in rows if row["event"] == "exploit" and row["donor_step"] == 6)
    assert json.loads(copied["detail"])["reason"] == "failed: RuntimeError: a faulty batch"
    check_mlflow(folder, 3)
    assert drive(folder)[0].counts == {"finished": 3}, "nothing is left to do"


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_population_whose_members_all_fail_goes_on_when_the_cause_is_gone(
    sweep_text: SweepText, tmp_path: Path
) -> None:
    orders = [f"raise.{number}" for number in range(9)]
    resources = given({"max_failures": 0, "cpus_per_trial": 0.5})
    folder = start(sweep_text("population", population=POPULATION, **obedient(tmp_path, orders), **resources), tmp_path)
    outcome, _ = drive(folder)
    assert outcome.counts == {"failed": 3}
    assert (outcome.status, exit_status(outcome)) == ("incomplete", 1)
    assert outcome_text(outcome).count("failed: RuntimeError: a faulty batch") == 3
    assert len(list((tmp_path / "orders").iterdir())) == 6, "nobody was good enough to be copied"
    for order in (tmp_path / "orders").iterdir():
        order.unlink()
    outcome, _ = drive(folder)
    assert outcome.counts == {"finished": 3}
    check_mlflow(folder, 3)
    for member in range(3):
        path = population_of(spec_of(folder), folder).lineage.path(member)
        assert [(segment.start_step, segment.stop_step) for segment in path] == [(0, 6), (6, 12)]


@pytest.mark.slow
@pytest.mark.acceptance
def test_workers_that_die_between_two_trials_cost_an_attempt(
    sweep_text: SweepText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune alone gives the trial up that an actor is reset for, however many attempts are left."""
    from landscape_ray.sweep import tuner
    from tests.ray.faulty import DiesBetweenTrials

    monkeypatch.setattr(tuner, "SweepTrainable", DiesBetweenTrials)
    folder, outcome, _ = sweep(sweep_text, tmp_path, ["die.1"], num_trials=4, max_failures=5)
    assert outcome.counts == {"finished": 4}
    assert list((tmp_path / "orders").iterdir()) == [], "the fault has happened"
    check_steps(folder)


@pytest.mark.slow
@pytest.mark.acceptance
def test_short_trials_have_all_the_workers_that_there_is_room_for(
    sweep_text: SweepText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune alone sends the second worker away as long as trials end before it has loaded."""
    from landscape_ray.sweep import tuner
    from tests.ray.faulty import SlowToStart

    monkeypatch.setattr(tuner, "SweepTrainable", SlowToStart)
    folder, outcome, _ = sweep(sweep_text, tmp_path, [], num_trials=24)
    assert outcome.counts == {"finished": 24}
    assert len(list((tmp_path / "workers").iterdir())) == 2
    check_steps(folder)


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_trial_that_hangs_is_ended_and_goes_on(sweep_text: SweepText, tmp_path: Path) -> None:
    folder, outcome, _ = sweep(sweep_text, tmp_path, ["hang.1"], max_failures=1, max_report_seconds=20.0)
    assert outcome.counts == {"finished": 2}
    check_steps(folder)
    assert list((folder.path / "hangs").iterdir()) == [], "a hang that was overcome is no news"


@pytest.mark.slow
@pytest.mark.acceptance
def test_faults_that_come_back_are_said(sweep_text: SweepText, tmp_path: Path) -> None:
    orders = ["hang.1", "hang.2"]
    folder, outcome, shown = sweep(sweep_text, tmp_path, orders, max_failures=0, max_report_seconds=20.0)
    assert outcome.counts == {"failed": 2}
    for error in outcome.failures.values():
        assert "no commit within resources.max_report_seconds = 20.0; where it hung is in" in reason(error)
    assert "faulty.py" in (folder.path / "hangs" / "t0000.txt").read_text()
    assert "failed" in shown
    resumed, _ = drive(folder)
    assert resumed.counts == {"finished": 2}
    check_steps(folder)


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("memory", "lower train.batch_size"),
        ("die", "its process died or its node was lost"),
        ("raise", "a faulty batch"),
    ],
)
def test_what_a_trial_failed_of(order: str, said: str, sweep_text: SweepText, tmp_path: Path) -> None:
    folder, outcome, _ = sweep(sweep_text, tmp_path, [f"{order}.1"], max_failures=0)
    assert outcome.counts == {"finished": 1, "failed": 1}
    ((name, error),) = outcome.failures.items()
    assert said in reason(error)
    summary = folder.trial(name).summary()
    assert summary is not None
    assert said in summary.message


@pytest.mark.acceptance
@pytest.mark.slow
def test_a_finished_search_is_extended(sweep_text: SweepText, tmp_path: Path) -> None:
    from landscape_ray.sweep.extension import extend

    folder, outcome, _ = sweep(sweep_text, tmp_path, [])
    assert outcome.counts == {"finished": 2}
    before = {trial.trial_id: trial.summary() for trial in folder.trials()}
    extend(folder, num_trials=4)
    longer, _ = drive(folder)
    assert longer.counts == {"finished": 4}
    assert longer.sync.error == ""
    check_steps(folder)
    assert {name: folder.trial(name).summary() for name in before} == before, "finished trials are not run again"


FULL_STORE = """
import io, json, sys, numpy as np, ray
from pathlib import Path
from rich.console import Console
from landscape_ray.sweep.tuner import drive
from landscape_ray.tracking.folder import SweepFolder
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
kept = [ray.put(np.zeros(10 * 2**20, dtype=np.uint8)) for _ in range(12)]  # 120 MiB: some of it on the disk already
outcome = drive(SweepFolder.open(Path(sys.argv[1])), Console(file=io.StringIO()))
print(json.dumps(outcome.counts), len(kept))
"""


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_full_object_store_holds_nobody(sweep_text: SweepText, tmp_path: Path) -> None:
    """Trials give nothing big to Ray's object store: state goes to the folder."""
    folder = start(sweep_text(), tmp_path)
    command = [sys.executable, "-c", FULL_STORE, str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1].rpartition(" ")[0]) == {"finished": 5}


@pytest.mark.acceptance
def test_the_doctor_asks_ray(tmp_path: Path) -> None:
    from landscape_ray.sweep.doctor_ray import check_ray

    found = {each.name: each for each in check_ray(tmp_path / "runs", None)}
    assert found["Ray"].status == "ok"
    assert "1 node(s), 2 CPUs" in found["Ray"].found
    (node,) = (each for name, each in found.items() if name.startswith("node "))
    assert node.found == "runs tasks, sees the results folder, has the same versions"
    assert list((tmp_path / "runs").glob(".doctor*")) == []
    (wrong,) = check_ray(tmp_path / "runs", "127.0.0.1:1")
    assert wrong.status == "error"
    assert "no Ray cluster answers at '127.0.0.1:1'" in wrong.found


def test_nodes_that_see_another_folder_are_refused(
    sweep_text: SweepText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from landscape_ray.errors import UserError
    from landscape_ray.sweep import cluster

    folder = start(sweep_text(), tmp_path)
    monkeypatch.setattr(cluster, "nodes_alive", lambda: [{}, {}])
    sound = {**cluster.versions(), "content": folder.meta_path.read_text()}

    def answer(content: object) -> None:
        monkeypatch.setattr(cluster, "ask_nodes", lambda *_: {"10.0.0.1": content})

    answer(sound)
    assert cluster.check_nodes(folder) == []
    answer({**sound, "torch": "1.0"})
    (warning,) = cluster.check_nodes(folder)
    assert "node 10.0.0.1 has torch 1.0, this machine" in warning
    answer({**sound, "content": "No such file"})
    with pytest.raises(UserError, match=r"node 10.0.0.1 does not see the sweep.*that all nodes share"):
        cluster.check_nodes(folder)
    answer("it cannot run landscape_ray: no torch")
    with pytest.raises(UserError, match=r"node 10.0.0.1 cannot take trials \(it cannot run"):
        cluster.check_nodes(folder)


def test_a_resource_that_an_autoscaler_will_start_is_waited_for(
    sweep_text: SweepText, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tomllib

    import ray
    from ray.core.generated import autoscaler_pb2

    from landscape_ray.config import parse
    from landscape_ray.errors import UserError
    from landscape_ray.sweep.placement import check_resources
    from landscape_ray.sweep.spec import SweepSpec

    spec = parse(SweepSpec, tomllib.loads(sweep_text(resources={"gpus_per_trial": 1})), "file")
    with pytest.raises(UserError, match=r"resources.gpus_per_trial must fit on one node"):
        check_resources(spec.resources)
    group = autoscaler_pb2.NodeGroupConfig(name="gpu", resources={"CPU": 8, "GPU": 2}, max_count=1)
    config = autoscaler_pb2.ClusterConfig(node_group_configs=[group])
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: config)
    check_resources(spec.resources)
