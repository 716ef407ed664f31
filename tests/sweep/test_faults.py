"""The fault matrix of README, row by row, as far as it needs no Ray: checkpoints, disks, clocks, file systems."""

import contextlib
import os
import random
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.run import CHECKPOINT, PREVIOUS, TrialRun
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder

SweepText = Callable[..., str]
STEPS = 20


@pytest.fixture
def spec(tiny: dict[str, Any], sweep_text: SweepText) -> SweepSpec:
    train = {**tiny, "num_steps": STEPS, "probes": {}, "data": {"name": "images"}, "model": {"name": "mlp", "width": 8}}
    return parse(SweepSpec, tomllib.loads(sweep_text(train=train)), "file")


@pytest.fixture
def sweep(tmp_path: Path, sweep_text: SweepText) -> SweepFolder:
    return SweepFolder.create(tmp_path / "sweep", spec_text=sweep_text(), meta={"experiment": "e"})


VALUES = {"schedule.name": "constant", "schedule.peak_lr": 0.01}


def run_of(spec: SweepSpec, sweep: SweepFolder) -> TrialRun:
    return TrialRun(spec, sweep.trial("t0000"), 0, dict(VALUES), attempt=1)


def steps(sweep: SweepFolder) -> list[int]:
    return [row["step"] for row in collect(sweep.path).records.to_pylist() if row["kind"] == "step"]


def finish(run: TrialRun) -> None:
    while not run.finished:
        run.advance()


@pytest.mark.acceptance
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_costs_the_updates_since_the_one_before(
    damage: str, spec: SweepSpec, sweep: SweepFolder
) -> None:
    run = run_of(spec, sweep)
    run.advance()
    run.advance()
    assert run.state.step == 10
    path = sweep.trial("t0000").checkpoint_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        from landscape_ray.training import read_checkpoint

        weights = read_checkpoint(path)["module"]["head.weight"].numpy().tobytes()
        content[bytes(content).index(weights[:16])] ^= 0x40  # a weight that is wrong, and nothing else
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    again = run_of(spec, sweep)
    assert again.state.step == 5
    finish(again)
    assert steps(sweep) == list(range(1, STEPS + 1))
    events = [row["event"] for row in collect(sweep.path).records.to_pylist() if row["kind"] == "event"]
    assert events == ["fallback"]
    assert not path.with_name(PREVIOUS).exists(), "one checkpoint stays of a trial that ended"


def test_two_damaged_checkpoints_are_the_user_s_to_decide(spec: SweepSpec, sweep: SweepFolder) -> None:
    run = run_of(spec, sweep)
    run.advance()
    run.advance()
    for name in (CHECKPOINT, PREVIOUS):
        (sweep.trial("t0000").checkpoint_path / name).write_bytes(b"rubbish")
    with pytest.raises(UserError, match=rf"{CHECKPOINT} cannot be read .* delete it to start this run anew"):
        run_of(spec, sweep)


def test_a_file_system_without_links_keeps_one_checkpoint(
    spec: SweepSpec, sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    run = run_of(spec, sweep)
    run.advance()
    run.advance()
    assert not (sweep.trial("t0000").checkpoint_path / PREVIOUS).exists()
    finish(run)
    assert steps(sweep) == list(range(1, STEPS + 1))


@pytest.mark.acceptance
def test_a_clock_that_jumps_changes_nothing_but_time_stamps(
    spec: SweepSpec, sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + generator.uniform(-1e8, 1e8))
    run = run_of(spec, sweep)
    run.advance()
    finish(run_of(spec, sweep))
    rows = collect(sweep.path).records.to_pylist()
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, STEPS + 1))
    seconds = [row["elapsed_seconds"] for row in rows]
    assert seconds == sorted(seconds), "durations come from a clock that cannot be set"
    assert 0 < seconds[-1] < 1e4
    stamps = [row["time_unix"] for row in rows]
    assert stamps != sorted(stamps), "the clock did jump"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as filler:
        while True:
            filler.write(b"0" * 4096)


@pytest.mark.acceptance
def test_a_full_disk_stops_a_trial_that_goes_on_when_there_is_room(
    spec: SweepSpec, sweep_text: SweepText, small_disk: Path
) -> None:
    sweep = SweepFolder.create(small_disk / "sweep", spec_text=sweep_text(), meta={"experiment": "e"})
    run = run_of(spec, sweep)
    run.advance()
    assert run.state.step == 5
    fill(small_disk / "filler")
    with pytest.raises(UserError, match=r"no space left.*free some space and run `landscape-ray resume`"):
        run.advance()
    (small_disk / "filler").unlink()
    finish(run_of(spec, sweep))
    assert steps(sweep) == list(range(1, STEPS + 1))
    assert shutil.disk_usage(small_disk).free > 0
