"""What a sweep takes of a disk, what may go, and in which order."""

from __future__ import annotations

import io
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from landscape_ray.config import parse
from landscape_ray.records import RunSummary
from landscape_ray.sweep.disk import DiskBound, expendable, usage_of, usage_text
from landscape_ray.sweep.display import Dashboard, Halt
from landscape_ray.sweep.run import TrialRun
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.sweep.status import status_of
from landscape_ray.tracking.folder import SweepFolder

SIZE = 2**20


def bounded(sweep_text: Callable[..., str], mib: float, kind: str = "search", **changes: object) -> SweepSpec:
    text = sweep_text(kind, resources={"max_disk_gib": mib / 2**10}, **changes)
    return parse(SweepSpec, tomllib.loads(text), "file")


def put(folder: SweepFolder, name: str, status: str, loss: float, **varied: object) -> Path:
    """Make a trial with a checkpoint of one MiB."""
    trial = folder.trial(name)
    summary = RunSummary(
        run_id=name,
        status=status,  # type: ignore[arg-type]
        config={},
        varied=dict(varied),
        final_loss_nats=loss,
    )
    trial.commit(summary, 0)
    trial.checkpoint_path.mkdir(parents=True)
    (trial.checkpoint_path / "state.pt").write_bytes(os.urandom(SIZE))
    return trial.checkpoint_path / "state.pt"


@pytest.fixture
def crowded(folder: SweepFolder) -> tuple[SweepFolder, dict[str, Path]]:
    """Five finished trials, one of each other kind, and a trunk."""
    files = {f"t000{k}": put(folder, f"t000{k}", "finished", 2.0 + k) for k in range(5)}
    files["t0005"] = put(folder, "t0005", "diverged", float("nan"))
    files["t0006"] = put(folder, "t0006", "stopped", 9.0)
    files["t0007"] = put(folder, "t0007", "running", 1.0)
    files["t0008"] = put(folder, "t0008", "failed", 1.0)
    files["previous"] = files["t0007"].with_name("previous.pt")
    files["previous"].write_bytes(os.urandom(SIZE))
    files["trunk"] = folder.path / "trunks" / "abc" / "8.pt"
    files["trunk"].parent.mkdir(parents=True)
    files["trunk"].write_bytes(os.urandom(SIZE))
    return folder, files


def test_usage_counts_a_file_with_two_names_once(folder: SweepFolder) -> None:
    state = put(folder, "t0000", "running", 1.0)
    before = usage_of(folder.path)
    os.link(state, state.with_name("previous.pt"))
    assert usage_of(folder.path) == before
    assert before.checkpoints == SIZE
    assert before.records == 0
    assert before.total == before.checkpoints + before.other
    assert usage_text(before).startswith("disk: 1.0 MiB (checkpoints 1.0 MiB, records 0.0 MiB, other 0.0 MiB)")


@pytest.mark.acceptance
def test_what_goes_first_is_what_nobody_needs(
    sweep_text: Callable[..., str], crowded: tuple[SweepFolder, dict[str, Path]]
) -> None:
    folder, files = crowded
    order = [*("t0005", "t0006", "trunk", "t0004", "t0003", "previous")]
    spec = bounded(sweep_text, 1)
    there = [path for path in expendable(spec, folder) if path.exists()]
    assert there == [files[name] for name in order]
    for count in range(1, 7):  # no more goes than must
        allowed = usage_of(folder.path).total / SIZE - 0.9
        assert DiskBound(bounded(sweep_text, allowed), folder).check() == ""
        assert [name for name in order if not files[name].exists()] == order[:count]
    message = DiskBound(bounded(sweep_text, 2), folder).check()
    assert (
        "takes 5.0 MiB, over resources.max_disk_gib = 0.00195312, and nothing of it may go; raise the bound" in message
    )
    assert all(files[name].exists() for name in ("t0000", "t0001", "t0002", "t0007", "t0008"))


def test_without_a_bound_nothing_goes(search_spec: SweepSpec, crowded: tuple[SweepFolder, dict[str, Path]]) -> None:
    folder, files = crowded
    assert DiskBound(search_spec, folder).check() == ""
    assert all(path.exists() for path in files.values())


def test_a_population_keeps_every_member(sweep_text: Callable[..., str], folder: SweepFolder) -> None:
    state = put(folder, "t0000", "finished", 1.0)
    assert list(expendable(bounded(sweep_text, 1, "population"), folder)) == []
    assert DiskBound(bounded(sweep_text, 0.5, "population"), folder).check() != ""
    assert state.exists()


def test_the_highest_fidelity_is_kept(sweep_text: Callable[..., str], folder: SweepFolder) -> None:
    search = {"num_trials": 4, "fidelity": {"name": "num_steps", "values": [5, 10]}}
    low = [put(folder, f"t000{k}", "finished", 1.0, num_steps=5) for k in range(3)]
    high = [put(folder, f"t000{k}r1", "finished", 5.0, num_steps=10) for k in range(3)]
    spec = bounded(sweep_text, 1, search=search)
    assert set(expendable(spec, folder)) == set(low)
    assert DiskBound(spec, folder).check() != ""
    assert all(path.exists() for path in high)


def test_the_disk_is_not_looked_at_all_the_time(sweep_text: Callable[..., str], folder: SweepFolder) -> None:
    bound = DiskBound(bounded(sweep_text, 0.5), folder)
    assert bound.check() == ""
    put(folder, "t0000", "running", 1.0)
    assert bound.check() == ""  # within five seconds
    bound._next = 0.0
    said = bound.check()
    assert said != ""
    assert bound.check() == said  # what was found stands until the next look


@pytest.mark.acceptance
def test_a_sweep_over_its_bound_pauses_and_says_why(sweep_text: Callable[..., str], folder: SweepFolder) -> None:
    run = TrialRun(bounded(sweep_text, 0.01), folder.trial("t0000"), 0, {})
    result = run.result()
    assert "over resources.max_disk_gib" in result["disk_full"]
    run.advance()
    assert run.result()["disk_full"] == result["disk_full"]  # the driver hears of it with the first report
    assert (run.folder.checkpoint_path / "state.pt").exists()
    dashboard = Dashboard(Console(file=io.StringIO()), "s", 1, 10)
    with pytest.raises(Halt, match="nothing of it may go; raise the bound and go on with `landscape-ray resume --spec"):
        dashboard.heed(result)
    assert dashboard.halt == result["disk_full"]
    dashboard.heed({"disk_full": ""})


def test_a_storage_that_is_behind_is_shown_once_and_another_driver_stops_this_one() -> None:
    class Mirror:
        problem = "no route"
        superseded = False

    out = io.StringIO()
    dashboard = Dashboard(Console(file=out, width=200), "s", 1, 10)
    for _ in range(3):
        dashboard.heed({}, Mirror())
    assert out.getvalue() == "the storage is behind: no route\n"
    Mirror.problem, Mirror.superseded = "", True
    with pytest.raises(Halt, match="another driver has taken the sweep over"):
        dashboard.heed({}, Mirror())
    assert dashboard.note == ""


def test_status_shows_the_disk_and_its_bound(sweep_text: Callable[..., str], tmp_path: Path) -> None:
    text = sweep_text(resources={"max_disk_gib": 0.5})
    folder = SweepFolder.create(tmp_path / "s", spec_text=text, meta={"storage": "s3://bucket"})
    put(folder, "t0000", "running", 1.0)
    console = Console(file=io.StringIO(), width=200)
    console.print(status_of(folder)[1])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "disk: 1.0 MiB (checkpoints 1.0 MiB" in shown
    assert ", of at most 0.5 GiB" in shown
    assert "storage s3://bucket: 1 trials are not stored up to their last commit" in shown
