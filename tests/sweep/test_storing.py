"""Trials beside a storage: nodes without a common folder, nodes that are lost, and drivers that come to an end."""

from __future__ import annotations

import io
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.population.member import MemberRun
from landscape_ray.sweep.population.orders import Order
from landscape_ray.sweep.run import CHECKPOINT, PREVIOUS, TrialRun, trial_id_of
from landscape_ray.sweep.session import Outcome, new_sweep, outcome_text, settle_stopped, train_one
from landscape_ray.sweep.spec import SweepSpec, spec_of
from landscape_ray.sweep.storing import (
    bring_up_to_date,
    check_new,
    driver_mirror,
    open_for_trial,
    send_sweep,
    sweep_storage,
)
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.driver_mirror import DriverMirror
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import SyncReport
from landscape_ray.tracking.storage import Storage
from landscape_ray.tracking.unit import SupersededError
from tests.sweep.population.local import Local, history, make
from tests.tracking.storages import faulty

VALUES: dict[str, Any] = {"schedule.name": "linear", "schedule.peak_lr": 0.02}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def steps(folder: SweepFolder, run_id: str) -> list[int]:
    rows = collect(folder).records.to_pylist()
    return [row["step"] for row in rows if row["run_id"] == run_id and row["kind"] == "step"]


@pytest.mark.acceptance
def test_a_trial_of_a_lost_node_goes_on_elsewhere_to_the_bit(
    search_spec: SweepSpec, folder: SweepFolder, tmp_path: Path, uri: str
) -> None:
    alone = TrialRun(search_spec, folder.trial("t0001"), 0, VALUES)
    while not alone.finished:
        alone.advance()
    shutil.rmtree(folder.trial("t0001").path)
    folder.update_meta(attempts=1)
    driver = driver_mirror(folder, uri)
    assert driver is not None
    driver.publish()

    def on(node: str) -> TrialRun:
        there, mirror = open_for_trial(tmp_path / node / folder.path.name, uri, 1)
        return TrialRun(spec_of(there), there.trial("t0000"), 0, VALUES, attempt=1, mirror=mirror)

    lost = on("node1")
    lost.advance()
    assert lost.mirror is not None
    assert lost.mirror.flush()
    shutil.rmtree(tmp_path / "node1")  # and its disk with it
    run = on("node2")
    assert run.state.step == 5
    while not run.finished:
        run.advance()
    assert run.state.loss_nats == alone.state.loss_nats
    shutil.copytree(tmp_path / "node2", tmp_path / "node1")  # it comes back, too late
    with pytest.raises(SupersededError, match="t0000 was taken over by another process, so this one ends"):
        lost.advance()
    driver.gather()
    assert steps(folder, "t0000") == list(range(1, 11))
    assert [s.status for t in folder.trials() if (s := t.summary())] == ["finished"]
    assert driver.settle() == 0
    for each in (lost, run):
        assert each.mirror is not None
        each.mirror.close()


class Scattered(Local):
    """Every member on a node of its own, without a common folder; what one copies of another comes from the storage."""

    def __init__(self, folder: SweepFolder, uri: str, places: Path) -> None:
        super().__init__(folder, memory=False)
        self.uri, self.places = uri, places
        self.driver = DriverMirror(folder, sweep_storage(uri, folder.path.name))
        self.driver.publish()

    def open(self, member: int, order: Order, weights: bytes | None) -> MemberRun:
        there, mirror = open_for_trial(self.places / str(member) / self.folder.path.name, self.uri, 0)
        trial = there.trial(trial_id_of(member))
        return MemberRun(self.spec, trial, order, self.attempt, self.data, weights, mirror)

    def step(self, member: int) -> dict[str, Any] | None:
        result = super().step(member)
        if result is not None:
            needed = self.book.needed()
            self.runs[member].forget([weights.serial for weights in needed if weights.member == member])
        return result

    def move(self, member: int, node: str) -> None:
        """Lose a member's node, and let it go on at another."""
        self.runs.pop(member)
        shutil.rmtree(self.places / str(member))


@pytest.mark.acceptance
def test_a_population_needs_no_common_folder(
    sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path, uri: str
) -> None:
    """Exploits across nodes, with one lost on the way, are those of one machine; old weights go."""
    population = {"num_members": 3, "interval_steps": 5, "quantile_fraction": 0.4}
    text = sweep_text("population", train={**tiny, "num_steps": 15, "probes": {}}, population=population)
    together = Local(make(tmp_path / "together" / "s", text)).run()
    assert any(decision.donor is not None for decision in together.decisions)
    apart = Scattered(make(tmp_path / "apart" / "s", text), uri, tmp_path / "nodes")
    lost = False

    def after(count: int) -> None:
        nonlocal lost
        if not lost and count == 5:
            lost = True
            apart.move(1, "other")

    apart.run(after)
    apart.driver.gather()
    assert apart.driver.settle() == 0
    here, there = history(together.folder), history(apart.folder)
    assert {member: len(path) for member, path in here["paths"].items()} == {
        member: len(path) for member, path in there["paths"].items()
    }
    assert here["orders"] == there["orders"]
    for member in range(3):
        assert steps(apart.folder, trial_id_of(member)) == steps(together.folder, trial_id_of(member))
        left = list((tmp_path / "nodes" / str(member)).rglob("observed-*.pt"))
        assert len(left) <= 3, left
        unit = sweep_storage(uri, "s").at(f"trials/{trial_id_of(member)}")
        assert len([name for name in unit.names("objects") if name.endswith(".pt")]) <= 5


def test_a_member_without_its_checkpoint_is_told(sweep_text: Callable[..., str], tmp_path: Path, uri: str) -> None:
    folder = make(tmp_path / "s", sweep_text("population"))
    order = Local(folder).orders[0]._replace(serial=3)
    with pytest.raises(UserError, match=r"state.pt must be there to go on, got no such file; restore it"):
        MemberRun(spec_of(folder), folder.trial("t0000"), order)


def test_a_damaged_checkpoint_falls_back_though_there_is_a_storage(
    search_spec: SweepSpec, folder: SweepFolder, uri: str
) -> None:
    there, mirror = open_for_trial(folder.path, uri, 0)
    run = TrialRun(search_spec, there.trial("t0000"), 0, VALUES, mirror=mirror)
    run.advance()
    assert (run.folder.checkpoint_path / PREVIOUS).exists()
    (run.folder.checkpoint_path / CHECKPOINT).write_bytes(b"")
    assert run.mirror is not None
    run.mirror.close()
    again = TrialRun(search_spec, there.trial("t0000"), 0, VALUES, mirror=open_for_trial(folder.path, uri, 0)[1])
    while not again.finished:
        again.advance()
    assert again.mirror is not None
    assert again.mirror.flush()
    assert steps(there, "t0000") == list(range(1, 11))


def dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a storage that does not answer behind every address."""
    storage, switch = faulty(tmp_path / "behind")
    switch.down = True
    monkeypatch.setattr("landscape_ray.sweep.storing.open_storage", lambda uri: storage)


def test_homes_and_copies(folder: SweepFolder, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.update_meta(attempts=1)
    with pytest.raises(UserError, match=r"no sweep at file://.*, and none in .*; has its driver reached"):
        open_for_trial(tmp_path / "node" / folder.path.name, uri, 1)  # nothing is stored yet
    driver = driver_mirror(folder, uri)
    assert driver is not None
    driver.publish()
    there, mirror = open_for_trial(tmp_path / "node" / folder.path.name, uri, 1)
    assert there.meta["sweep_id"] == folder.meta["sweep_id"]
    assert there.trials() == []
    assert open_for_trial(there.path, uri, 1, mirror)[1] is mirror  # one a process
    folder.update_meta(attempts=2)
    driver.publish()
    assert open_for_trial(there.path, uri, 2)[0].meta["attempts"] == 2  # a copy of the last driver's is renewed
    assert open_for_trial(folder.path, None, 2)[1] is None
    assert driver_mirror(folder, None) is None
    with pytest.raises(UserError, match="--storage must be an address"):
        open_for_trial(there.path, "nowhere", 3)
    dead(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"cannot be read \(.*\); is the storage up\?"):
        open_for_trial(tmp_path / "node3" / folder.path.name, uri, 2)


def test_a_new_sweep_needs_a_storage_that_works_and_a_name_of_its_own(
    folder: SweepFolder, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_new(uri, folder.path.name)
    driver = driver_mirror(folder, uri)
    assert driver is not None
    driver.publish()
    message = rf"{uri}/{folder.path.name} exists; use another --name, or `landscape-ray resume {uri}/"
    with pytest.raises(UserError, match=message):
        check_new(uri, folder.path.name)
    dead(tmp_path, monkeypatch)
    with pytest.raises(
        UserError, match=r"the storage faults://store cannot be used \(no route .*\); check the address"
    ):
        check_new(uri, "name")
    monkeypatch.setattr(Storage, "check", lambda self: None)  # it dies just after
    with pytest.raises(
        UserError, match=r"the storage faults://store cannot be used \(no route .*\); check the address"
    ):
        check_new(uri, "name")


def test_what_a_rule_has_stopped_is_said_of_what_came_from_elsewhere(folder: SweepFolder) -> None:
    folder.trial("t0000").set_status("running")
    folder.trial("t0001").set_status("finished")
    settle_stopped(folder, {"t0000": "stopped", "t0001": "stopped", "t0002": "stopped", "t0003": "paused"})
    assert [s.status for t in folder.trials() if (s := t.summary())] == ["stopped", "finished"]


def test_an_outcome_says_that_the_storage_is_behind(folder: SweepFolder) -> None:
    done = Outcome(folder, "interrupted", {}, {}, None, SyncReport(), 1.0, "the disk is full", 2, "no route")
    text = outcome_text(done)
    assert "the storage is behind (no route); `landscape-ray sync sweep` sends the rest" in text
    assert "paused: the disk is full" in text


@pytest.mark.acceptance
def test_a_run_goes_on_on_another_machine_from_the_storage_alone(
    sweep_text: Callable[..., str], tmp_path: Path, uri: str, store_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, stop, lose the machine, resume elsewhere: every step once; a dead storage is said and made up for."""
    text = sweep_text(space={}, search={"num_trials": 1}, commit_steps=2)
    console, homes = Console(file=io.StringIO()), [tmp_path / "one", tmp_path / "two"]
    for home in homes:
        home.mkdir()
        shutil.copy(store_template, home / "mlflow.db")
    spec = parse(SweepSpec, tomllib.loads(text), "file")
    folder = new_sweep(spec, text, homes[0], "s", None, f"{uri}?")
    assert folder.meta["storage"] == f"{uri}?"
    advance = TrialRun.advance

    def interrupted(run: TrialRun) -> None:
        if run.state.step >= 6:
            raise KeyboardInterrupt
        advance(run)

    monkeypatch.setattr(TrialRun, "advance", interrupted)
    ended = train_one(folder, console, storage_uri=uri)
    assert (ended.status, ended.num_not_stored, ended.storage_problem) == ("interrupted", 0, "")
    shutil.rmtree(folder.path)
    monkeypatch.setattr(TrialRun, "advance", advance)
    from landscape_ray.cli.shared import open_sweep

    there = open_sweep(f"{uri}/s", homes[1])
    assert there.path == homes[1] / "s"
    assert bring_up_to_date(there, uri) == ""
    assert train_one(there, console, storage_uri=uri).status == "finished"
    assert steps(there, "t0000") == list(range(1, 11))
    send_sweep(there, uri)
    there.trial("t0000").set_status("finished", "touched")
    dead(tmp_path, monkeypatch)
    assert "no route" in bring_up_to_date(there, uri)
    with pytest.raises(UserError, match=r"sweep 's' is not fully stored \(.*\); run the command again"):
        send_sweep(there, uri)
