"""Sweeps in a storage: nothing lost, nothing twice, whatever the storage does and whoever writes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow import fs

from landscape_ray.errors import UserError
from landscape_ray.tracking.cache import Mark, bring_sweep, bring_unit, read_mark, stored_meta, write_mark
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.driver_mirror import DriverMirror, send, storage_line
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.tracking.storage import Manifest, Storage, Stored, digest_of, open_storage
from landscape_ray.tracking.unit import SupersededError, Unit, is_behind
from tests.tracking.storages import Faults, faulty, s3


@pytest.fixture
def folder(tmp_path: Path, make: SimpleNamespace) -> SweepFolder:
    """A sweep whose results folder has no MLflow store, which takes long to make."""
    return SweepFolder.create(tmp_path / "my results" / "quick", spec_text=make.spec, meta={"seed": 0})


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "file":
        yield open_storage(f"file://{tmp_path}/store").at("quick")
    else:
        with s3() as place:
            yield place.at("quick")


@pytest.fixture
def broken(tmp_path: Path) -> tuple[Storage, Faults]:
    storage, switch = faulty(tmp_path / "behind")
    return storage.at("quick"), switch


def train(make: SimpleNamespace, trial: TrialFolder, first: int, last: int, **fields: object) -> None:
    """Commit steps and a checkpoint that says so."""
    trial.checkpoint_path.mkdir(parents=True, exist_ok=True)
    (trial.checkpoint_path / "new.pt").write_text(f"state at {last}")
    (trial.checkpoint_path / "new.pt").rename(trial.checkpoint_path / "state.pt")
    make.write(trial, first, last, **fields)


def elsewhere(path: Path) -> SweepFolder:
    """Return a place for the sweep on another machine."""
    return SweepFolder(path / "quick")


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.01)


def objects(store: Storage, trial: str = "t0000") -> int:
    return len(store.names(f"trials/{trial}/objects"))


@pytest.mark.acceptance
def test_a_sweep_comes_back_from_its_storage_alone(
    store: Storage, folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    driver, mirror = DriverMirror(folder, store), Mirror(store)
    driver.publish()
    for name in ("t0000", "t0001"):
        trial = folder.trial(name)
        mirror.take_over(trial)
        for last in (20, 40, 60):
            train(make, trial, last - 19, last, status="finished" if last == 60 else "running")
            mirror.committed(trial, ended=last == 60)
    assert mirror.flush()
    assert mirror.behind == 0
    folder.update_meta(status="finished")
    assert driver.settle() == 0
    assert driver.problem == ""
    before = collect(folder)
    shutil.rmtree(folder.path)
    back = bring_sweep(store, tmp_path / "there" / "quick")
    after = collect(back)
    assert make.same_rows(after.records, before.records)
    assert after.runs == before.runs
    assert after.warnings == []
    assert back.meta["status"] == "finished"
    assert back.spec_text == make.spec
    assert not (back.trial("t0000").checkpoint_path / "state.pt").exists()  # results need none
    steps: list[tuple[int, int]] = []
    bring_sweep(store, back.path, checkpoints=True, progress=lambda done, of: steps.append((done, of)))
    assert (back.trial("t0001").checkpoint_path / "state.pt").read_text() == "state at 60"
    assert steps == [(1, 2), (2, 2)]
    mirror.close()


def test_an_ended_trial_leaves_one_manifest_and_what_it_names(
    store: Storage, folder: SweepFolder, make: SimpleNamespace
) -> None:
    mirror, trial = Mirror(store), folder.trial("t0000")
    mirror.take_over(trial)
    for last in (20, 40, 60):
        train(make, trial, last - 19, last)
        mirror.committed(trial, ended=False)
        assert mirror.flush()
    assert store.at("trials/t0000").versions() == [(1, 2), (1, 3)]  # the last one and a fallback
    parts = trial.num_parts()
    assert objects(store) == parts + 2 * 2
    trial.set_status("finished")
    mirror.committed(trial, ended=True)
    assert mirror.flush()
    assert store.at("trials/t0000").versions() == [(1, 4)]
    assert objects(store) == parts + 2
    assert list(trial.checkpoint_path.glob(".stored-*")) == []
    assert not is_behind(trial)
    mirror.close()


def test_weights_of_an_exploit_stay_as_long_as_they_are_there(
    store: Storage, folder: SweepFolder, make: SimpleNamespace
) -> None:
    mirror, trial = Mirror(store), folder.trial("t0000")
    mirror.take_over(trial)
    train(make, trial, 1, 20)
    (trial.checkpoint_path / "observed-000000.pt").hardlink_to(trial.checkpoint_path / "state.pt")
    mirror.committed(trial, ended=False)
    assert mirror.flush()
    files = store.at("trials/t0000").latest().files  # type: ignore[union-attr]
    assert files["checkpoint/observed-000000.pt"] == files["checkpoint/state.pt"]  # one object
    assert mirror.read(trial, "checkpoint/observed-000000.pt") == b"state at 20"
    (trial.checkpoint_path / "observed-000000.pt").unlink()
    for last in (40, 60):
        train(make, trial, last - 19, last)
        mirror.committed(trial, ended=False)
        assert mirror.flush()
    with pytest.raises(UserError, match=r"observed-000000.pt cannot be read \(not there\); restore it"):
        mirror.read(trial, "checkpoint/observed-000000.pt", patience_seconds=0.0)
    mirror.close()


@pytest.mark.acceptance
def test_a_dead_storage_costs_nothing_and_gets_the_rest_later(
    broken: tuple[Storage, Faults], folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    store, switch = broken
    driver, mirror, trial = DriverMirror(folder, store), Mirror(store), folder.trial("t0000")
    switch.down = True
    begun = time.monotonic()
    driver.publish()
    mirror.take_over(trial)
    for last in (20, 40, 60):
        train(make, trial, last - 19, last)
        mirror.committed(trial, ended=False)
        assert not mirror.flush()
    assert time.monotonic() - begun < 5
    assert "no route" in mirror.problem
    assert "s3cret" not in mirror.problem + driver.problem
    assert mirror.behind == 1  # of three commits the last one counts
    assert len(list(trial.checkpoint_path.glob(".stored-*"))) == 1
    assert not mirror.close()
    assert list(trial.checkpoint_path.glob(".stored-*")) == []
    folder.update_meta(storage=store.shown)
    assert driver.settle() == 1
    assert storage_line(folder).startswith(
        "storage faults://store/quick: 1 trials are not stored up to their last commit (faults://store/quick does not"
    )
    switch.down = False
    late = DriverMirror(folder, store)
    late.publish()
    assert late.settle() == 0
    assert storage_line(folder) == "storage faults://store/quick: up to date"
    back = bring_sweep(store, tmp_path / "there" / "quick", checkpoints=True)
    assert make.same_rows(collect(back).records, collect(folder).records)
    assert (back.trial("t0000").checkpoint_path / "state.pt").read_text() == "state at 60"


def test_a_storage_that_comes_back_is_found_by_the_thread(
    broken: tuple[Storage, Faults], folder: SweepFolder, make: SimpleNamespace
) -> None:
    store, switch = broken
    mirror, trial = Mirror(store), folder.trial("t0000")
    mirror.take_over(trial)
    switch.down = True
    train(make, trial, 1, 20)
    mirror.committed(trial, ended=False)
    until(lambda: bool(mirror.problem))
    switch.down = False
    until(lambda: mirror.behind == 0)
    assert mirror.problem == ""
    assert not is_behind(trial)
    mirror.close()


def test_a_slow_storage_gets_the_last_of_several_commits(
    broken: tuple[Storage, Faults], folder: SweepFolder, make: SimpleNamespace
) -> None:
    store, switch = broken
    mirror, trial = Mirror(store), folder.trial("t0000")
    mirror.take_over(trial)
    switch.seconds = 0.1
    begun = time.monotonic()
    for last in range(2, 22, 2):
        train(make, trial, last - 1, last)
        mirror.committed(trial, ended=False)
    assert time.monotonic() - begun < 1.0  # training did not wait
    assert mirror.behind <= 2
    switch.seconds = 0.0
    assert mirror.flush()
    assert store.at("trials/t0000").versions()[-1][1] < 10
    assert mirror.read(trial, "checkpoint/state.pt") == b"state at 20"
    mirror.close()


@pytest.mark.acceptance
@pytest.mark.parametrize("cut_after", range(9))
def test_a_write_that_is_cut_off_hurts_nobody(
    broken: tuple[Storage, Faults], folder: SweepFolder, make: SimpleNamespace, tmp_path: Path, cut_after: int
) -> None:
    """At every write of a second commit: the first is there until the second is, and orphans go."""
    store, switch = broken
    trial = folder.trial("t0000")
    unit = Unit(store.at("trials/t0000"), trial.path)
    unit.take_over()
    driver = DriverMirror(folder, store)
    driver.publish()
    train(make, trial, 1, 20)
    send(store, trial)
    train(make, trial, 21, 40)
    switch.cut_after = cut_after
    try:
        send(store, trial)
        whole = True
    except OSError:
        whole = False
    there = bring_sweep(store, tmp_path / "there" / "quick", checkpoints=True)
    step = there.trial("t0000").summary().step  # type: ignore[union-attr]
    assert step == (40 if whole else 20)
    assert (there.trial("t0000").checkpoint_path / "state.pt").read_text() == f"state at {step}"
    assert collect(there).warnings == []
    switch.cut_after = -1
    send(store, trial)
    bring_sweep(store, there.path, checkpoints=True)
    assert make.same_rows(collect(there).records, collect(folder).records)
    used = {name for manifest in store.at("trials/t0000").manifests() for name in manifest.objects()}
    assert {f"objects/{name}" for name in store.names("trials/t0000/objects")} == used


@pytest.mark.acceptance
def test_a_trial_that_moves_to_another_node_goes_on_there(
    store: Storage, folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    driver = DriverMirror(folder, store)
    driver.publish()
    first, here = Mirror(store, home=False), elsewhere(tmp_path / "node1").trial("t0000")
    first.take_over(here)
    train(make, here, 1, 20)
    first.committed(here, ended=False)
    assert first.flush()
    # the first node is gone for its peers, and still at it
    second, there = Mirror(store, home=False), elsewhere(tmp_path / "node2").trial("t0000")
    second.take_over(there)
    assert (there.checkpoint_path / "state.pt").read_text() == "state at 20"
    assert there.summary().step == 20  # type: ignore[union-attr]
    train(make, here, 21, 30)
    first.committed(here, ended=False)
    first.flush()
    with pytest.raises(SupersededError, match="was taken over by another process, so this one ends"):
        first.check(here)
    train(make, there, 21, 40, status="finished")
    second.committed(there, ended=True)
    assert second.flush()
    second.check(there)
    # the driver, on a third machine, has the rows of the second and no checkpoint
    driver.gather()
    assert make.same_rows(collect(folder).records, collect(SweepFolder(there.path.parents[1])).records)
    assert not folder.trial("t0000").checkpoint_path.exists()
    driver.fetch_checkpoint(folder.trial("t0000"))
    assert (folder.trial("t0000").checkpoint_path / "state.pt").read_text() == "state at 40"
    # and what it says of the trial keeps the checkpoint that it may not have
    shutil.rmtree(folder.trial("t0000").checkpoint_path)
    folder.trial("t0000").set_status("stopped", "by the driver")
    assert is_behind(folder.trial("t0000"))
    assert driver.settle() == 0
    back = bring_sweep(store, tmp_path / "back" / "quick", checkpoints=True)
    assert back.trial("t0000").summary().status == "stopped"  # type: ignore[union-attr]
    assert (back.trial("t0000").checkpoint_path / "state.pt").read_text() == "state at 40"


def test_what_was_done_here_is_not_overwritten_by_what_is_stored(
    store: Storage, folder: SweepFolder, make: SimpleNamespace
) -> None:
    mirror, trial = Mirror(store), folder.trial("t0000")
    DriverMirror(folder, store).publish()
    mirror.take_over(trial)
    train(make, trial, 1, 20)
    mirror.committed(trial, ended=False)
    assert mirror.flush()
    train(make, trial, 21, 40)  # committed, not uploaded
    bring_sweep(store, folder.path, checkpoints=True)
    assert trial.summary().step == 40  # type: ignore[union-attr]
    assert (trial.checkpoint_path / "state.pt").read_text() == "state at 40"
    again = Mirror(store)
    again.take_over(trial)  # as after a crash on the same machine
    assert trial.summary().step == 40  # type: ignore[union-attr]
    again.committed(trial, ended=False)
    assert again.flush()
    assert again.read(trial, "checkpoint/state.pt") == b"state at 40"
    for each in (mirror, again):
        each.close()


def test_a_blind_start_ends_when_the_storage_turns_out_to_be_further(
    broken: tuple[Storage, Faults], folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    store, switch = broken
    first, here = Mirror(store, home=False), folder.trial("t0000")
    first.take_over(here)
    train(make, here, 1, 40)
    first.committed(here, ended=False)
    assert first.flush()
    switch.down = True
    blind, there = Mirror(store, home=False), elsewhere(tmp_path / "node2").trial("t0000")
    blind.take_over(there)  # nothing is here, and nobody says that there was something
    train(make, there, 1, 20)
    blind.committed(there, ended=False)
    switch.down = False
    blind.flush()
    with pytest.raises(SupersededError, match="taken over"):
        blind.check(there)
    blind.take_over(there)  # started again
    assert there.summary().step == 40  # type: ignore[union-attr]
    for each in (first, blind):
        each.close()


def test_damaged_objects_fall_back_to_the_manifest_before(
    store: Storage, folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    mirror, trial = Mirror(store), folder.trial("t0000")
    DriverMirror(folder, store).publish()
    mirror.take_over(trial)
    for last in (20, 40):
        train(make, trial, last - 19, last)
        mirror.committed(trial, ended=False)
        assert mirror.flush()
    unit = store.at("trials/t0000")
    newest = unit.latest()
    assert newest is not None
    state = newest.files["checkpoint/state.pt"].object_name("checkpoint/state.pt")
    unit.put(state, b"state at 4O")
    there = elsewhere(tmp_path / "there").trial("t0000")
    there.path.mkdir(parents=True)
    assert bring_unit(unit, there.path) is not None
    assert (there.checkpoint_path / "state.pt").read_text() == "state at 20"
    assert there.summary().step == 20  # type: ignore[union-attr]
    unit.delete([state])
    for manifest in list(unit.manifests())[1:]:
        unit.delete([manifest.name])
    shutil.rmtree(there.path)
    there.path.mkdir()
    with pytest.raises(
        UserError, match=r"store/quick/trials/t0000 cannot be brought here: .*(Failed to open|No such file)"
    ):
        bring_unit(unit, there.path)
    mirror.close()


def test_two_drivers_on_two_machines(store: Storage, folder: SweepFolder, tmp_path: Path) -> None:
    first = DriverMirror(folder, store)
    first.publish()
    there = bring_sweep(store, tmp_path / "there" / "quick")
    second = DriverMirror(there, store)
    second.publish()
    there.update_meta(attempts=2)
    second.publish()
    folder.update_meta(attempts=7)
    first.publish()
    assert first.superseded
    assert "taken over" in first.problem
    assert not second.superseded
    assert stored_meta(store)["attempts"] == 2  # type: ignore[index]


def test_the_driver_s_thread_does_both_ways(
    store: Storage, folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    driver = DriverMirror(folder, store, interval_seconds=0.02)
    driver.publish()
    driver.start()
    mirror, there = Mirror(store, home=False), elsewhere(tmp_path / "node").trial("t0003")
    mirror.take_over(there)
    train(make, there, 1, 20)
    mirror.committed(there, ended=False)
    folder.update_meta(attempts=5)
    until(lambda: stored_meta(store).get("attempts") == 5 and folder.trial("t0003").summary() is not None)  # type: ignore[union-attr]
    mirror.close()
    assert driver.settle() == 0


def test_sweeps_that_cannot_be_brought(
    store: Storage, folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no sweep at .*://.*/store/quick; give STORAGE/NAME"):
        bring_sweep(store, tmp_path / "there")
    DriverMirror(folder, store).publish()
    other = SweepFolder.create(tmp_path / "other", spec_text=make.spec, meta={})
    with pytest.raises(UserError, match=r"holds another sweep than .*; choose another --results folder"):
        bring_sweep(store, other.path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"is in the way of .*; choose another --results folder"):
        bring_sweep(store, tmp_path / "mine")
    store.put("trials/..evil/manifests/000001-000001.json", b"x")  # no trial's name: left alone
    assert bring_sweep(store, tmp_path / "there").trials() == []
    meta = store.latest()
    assert meta is not None
    store.put(meta.files["sweep.json"].object_name("sweep.json"), b"[]")
    with pytest.raises(UserError, match=r"is damaged \(sweep.json: its checksum differs\); restore it"):
        bring_sweep(store, tmp_path / "there")


def test_a_storage_that_is_away_while_a_sweep_is_brought(broken: tuple[Storage, Faults], tmp_path: Path) -> None:
    store, switch = broken
    switch.down = True
    with pytest.raises(UserError, match=r"faults://store/quick cannot be read \(no route .*\); check address"):
        bring_sweep(store, tmp_path / "there")


def test_marks_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    mark = Mark(Manifest(3, 4, {}), done=True, copied=False)
    write_mark(tmp_path, mark)
    assert read_mark(tmp_path) == mark
    for content in ("", "[]", '{"generation": 1}', '{"files": {"a": 3}}'):
        (tmp_path / "stored.json").write_text(content)
        assert read_mark(tmp_path) is None


def test_a_sweep_in_the_memory_of_an_object_store(folder: SweepFolder, make: SimpleNamespace, tmp_path: Path) -> None:
    store = Storage(fs.FileSystem.from_uri("mock:///")[0], "bucket/quick", "mock://bucket/quick")
    driver = DriverMirror(folder, store)
    train(make, folder.trial("t0000"), 1, 20)
    driver.publish()
    assert driver.settle() == 0
    assert collect(bring_sweep(store, tmp_path / "quick")).runs == collect(folder).runs


def test_a_trial_that_was_elsewhere_does_not_begin_anew_because_the_storage_is_dead(
    broken: tuple[Storage, Faults], folder: SweepFolder, make: SimpleNamespace, tmp_path: Path
) -> None:
    """The driver's machine has its rows; its checkpoint is in the storage alone."""
    store, switch = broken
    remote, there = Mirror(store, home=False), elsewhere(tmp_path / "node").trial("t0000")
    remote.take_over(there)
    train(make, there, 1, 20)
    remote.committed(there, ended=False)
    assert remote.flush()
    DriverMirror(folder, store).gather()
    switch.down = True
    here = Mirror(store)
    with pytest.raises(UserError, match=r"t0000 has the checkpoint of this trial, and cannot be read \(.*resume"):
        here.take_over(folder.trial("t0000"))
    switch.down = False
    here.take_over(folder.trial("t0000"))
    assert (folder.trial("t0000").checkpoint_path / "state.pt").read_text() == "state at 20"
    for each in (remote, here):
        each.close()


def test_names_that_no_manifest_may_hold_stay_here(store: Storage, folder: SweepFolder) -> None:
    folder.fits_path.mkdir()
    for name in ("annealing.json", "my fit.json", ".annealing.json"):
        (folder.fits_path / name).write_text("{}")
    driver = DriverMirror(folder, store)
    driver.publish()
    assert driver.problem == ""
    manifest = store.latest()
    assert manifest is not None
    assert set(manifest.files) == {"spec.toml", "sweep.json", "fits/annealing.json"}


def decided(store: Storage) -> str:
    """Return what the stored journal says; nothing where there is none."""
    root = store.latest()
    assert root is not None
    stored = root.files.get("study.journal")
    return "" if stored is None else store.get(stored.object_name("study.journal")).decode()


@pytest.mark.acceptance
def test_decisions_are_not_stored_before_what_they_are_about(
    broken: tuple[Storage, Faults], folder: SweepFolder, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("landscape_ray.tracking.driver_mirror.FOLLOW_SECONDS", 3.0)
    store, switch = broken
    mirror, trial = Mirror(store), folder.trial("t0000")
    mirror.take_over(trial)
    driver = DriverMirror(folder, store, interval_seconds=0.01)
    driver.publish()
    train(make, trial, 1, 10)
    folder.study_path.write_text("about step 10")
    driver.start()
    rounds = len(switch.calls)
    time.sleep(0.3)
    assert len(switch.calls) > rounds  # it is at it
    assert decided(store) == ""  # and waits for what is not uploaded yet
    mirror.committed(trial, ended=False)
    until(lambda: decided(store) == "about step 10")
    # a trial that always has something new holds it up no longer than two uploads
    folder.study_path.write_text("about step 20")
    last = 10
    while decided(store) != "about step 20":
        assert last < 1000
        train(make, trial, last + 1, last + 2)
        last += 2
        mirror.committed(trial, ended=False)
    mirror.close()
    assert driver.settle() == 0
    assert driver.problem == ""


def test_a_trial_without_a_process_holds_nobody_up(
    store: Storage, folder: SweepFolder, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("landscape_ray.tracking.driver_mirror.FOLLOW_SECONDS", 0.2)
    driver = DriverMirror(folder, store, interval_seconds=0.01)
    driver.publish()
    train(make, folder.trial("t0000"), 1, 10)  # and nobody uploads it
    folder.update_meta(attempts=3)
    driver.start()
    until(lambda: stored_meta(store).get("attempts") == 3)  # type: ignore[union-attr]
    assert store.at("trials/t0000").latest() is None
    assert driver.settle() == 0
    assert store.at("trials/t0000").latest() is not None


@pytest.mark.parametrize(
    ("content", "reason"), [(b"[]", "not a JSON object"), (b"{", "Expecting"), (None, "'sweep.json'")]
)
def test_a_stored_sweep_json_that_is_none(tmp_path: Path, content: bytes | None, reason: str) -> None:
    store = open_storage(f"file://{tmp_path}/store").at("quick")
    files = {} if content is None else {"sweep.json": digest_of(content)}
    if content is not None:
        store.put(files["sweep.json"].object_name("sweep.json"), content)
    manifest = Manifest(1, 1, files)
    store.put(manifest.name, manifest.to_bytes())
    with pytest.raises(
        UserError, match=rf"store/quick is damaged \(sweep.json: .*{reason}.*\); restore it from a copy"
    ):
        stored_meta(store)


def test_a_damaged_file_of_another_trial_is_not_read(
    store: Storage, folder: SweepFolder, make: SimpleNamespace
) -> None:
    mirror, trial = Mirror(store), folder.trial("t0000")
    mirror.take_over(trial)
    train(make, trial, 1, 20)
    mirror.committed(trial, ended=False)
    assert mirror.flush()
    manifest = store.at("trials/t0000").latest()
    assert manifest is not None
    state = manifest.files["checkpoint/state.pt"].object_name("checkpoint/state.pt")
    store.at("trials/t0000").put(state, b"state at 21")
    with pytest.raises(UserError, match=r"checkpoint/state.pt cannot be read \(its checksum differs\); restore it"):
        mirror.read(trial, "checkpoint/state.pt", patience_seconds=0.0)
    mirror.close()


def test_deleting_that_is_cut_off_leaves_nothing_dangling_and_is_made_up_for(
    store: Storage, folder: SweepFolder, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same content comes back after its object was deleted, by a deletion that then failed."""
    trial = folder.trial("t0000")
    unit = Unit(store.at("trials/t0000"), trial.path)
    unit.take_over()

    def files(text: bytes) -> dict[str, bytes | Path | Stored]:
        return {"trial.json": text, "checkpoint/state.pt": b"state " + text}

    unit.publish(files(b"1"))
    unit.publish(files(b"2"))
    delete = Storage.delete

    def cut_off(self: Storage, names: Iterable[str]) -> None:
        delete(self, list(names)[:1])
        raise OSError("connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", cut_off)
        with pytest.raises(OSError, match="reset by peer"):
            unit.publish(files(b"3"))  # one of the two objects of 1 is gone
    unit.publish(files(b"1"))
    there = elsewhere(folder.path.parent / "there").trial("t0000").path
    there.mkdir(parents=True)
    assert bring_unit(store.at("trials/t0000"), there) is not None
    assert (there / "checkpoint/state.pt").read_bytes() == b"state 1"
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", cut_off)
        with pytest.raises(OSError, match="reset by peer"):
            unit.publish(files(b"4"), ended=True)
    unit.publish(files(b"4"), ended=True)  # nothing is new, but something is left to delete
    assert len(store.names("trials/t0000/objects")) == 2
    assert len(store.at("trials/t0000").versions()) == 1
