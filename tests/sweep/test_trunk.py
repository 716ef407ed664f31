"""Branches of one trunk: the same to the bit as trials of their own, for fewer updates."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.schedules import Schedule
from landscape_ray.sweep.run import CHECKPOINT, TrialRun, trial_id_of
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.sweep.trunk import stable_steps, thin_trunks
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.training import read_checkpoint

SPACE = {
    "schedule.peak_lr": {"choices": [0.01, 0.02]},
    "schedule.cooldown_fraction": {"uniform": [0.1, 0.9]},
    "schedule.cooldown_shape": {"choices": ["linear", "sqrt"]},
    "schedule.final_ratio": {"uniform": [0.0, 0.5]},
}
BRANCHES = [
    (0.01, 0.3, "linear", 0.0),
    (0.01, 0.4, "sqrt", 0.1),
    (0.01, 0.8, "linear", 0.0),
    (0.02, 0.3, "linear", 0.0),
]


def values(branch: tuple[float, float, str, float]) -> dict[str, Any]:
    return dict(zip(SPACE, branch, strict=True))


@pytest.fixture
def make(sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    def sweep(name: str, **search: Any) -> tuple[SweepSpec, SweepFolder]:
        train = {**tiny, "num_steps": 20, "schedule": {"name": "wsd", "warmup_steps": 2}}
        text = sweep_text(train=train, space=SPACE, search={"num_trials": 4, **search}, commit_steps=7)
        meta = {"experiment": "e", "attempts": 0}
        return parse(SweepSpec, tomllib.loads(text), name), SweepFolder.create(
            tmp_path / name, spec_text=text, meta=meta
        )

    return sweep


def train_all(spec: SweepSpec, folder: SweepFolder) -> list[TrialRun]:
    runs = []
    for index, branch in enumerate(BRANCHES):
        run = TrialRun(spec, folder.trial(trial_id_of(index)), index, values(branch))
        while not run.finished:
            run.advance()
        runs.append(run)
    return runs


@pytest.mark.acceptance
def test_branches_are_bit_for_bit_what_they_would_have_been_alone(make: Any) -> None:
    alone = train_all(*make("alone"))
    spec, folder = make("shared", trunk={"every_steps": 4})
    shared = train_all(spec, folder)
    for one, other in zip(alone, shared, strict=True):
        assert one.state.loss_nats == other.state.loss_nats
        for a, b in zip(one.state.module.parameters(), other.state.module.parameters(), strict=True):
            assert torch.equal(a, b)
        assert one.state.num_tokens == other.state.num_tokens
        assert one.state.flops == other.state.flops
    rows = collect(folder.path).records.to_pylist()
    made = {run: [r["step"] for r in rows if r["run_id"] == run and r["kind"] == "step"] for run in ("t0000", "t0001")}
    assert made["t0000"] == list(range(1, 21))
    assert made["t0001"] == list(range(13, 21))  # cooldown from 12 on, which is a multiple of 4
    branches = {r["run_id"]: (r["donor"], r["donor_step"]) for r in rows if r["event"] == "branch"}
    assert branches == {"t0001": ("t0000", 12), "t0002": ("t0000", 4)}  # another peak has a trunk of its own
    assert json.loads(next(r for r in rows if r["event"] == "branch")["detail"]) == {"stable_steps": 12}


def test_a_branch_that_is_killed_goes_on_from_its_own_checkpoint(make: Any) -> None:
    spec, folder = make("shared", trunk={"every_steps": 4})
    first = train_all(spec, folder)[1]
    trial = folder.trial("t0009")
    TrialRun(spec, trial, 9, values(BRANCHES[1])).advance()
    again = TrialRun(spec, trial, 9, values(BRANCHES[1]))
    while not again.finished:
        again.advance()
    assert again.state.loss_nats == first.state.loss_nats
    events = [r["event"] for r in collect(folder.path).records.to_pylist() if r["run_id"] == "t0009" and r["event"]]
    assert events == ["branch"]
    assert read_checkpoint(trial.checkpoint_path / CHECKPOINT)["counters"]["step"] == 20


@pytest.mark.parametrize(("name", "expected"), [("constant", 100), ("wsd", 70), ("cosine", 0), ("linear", 0)])
def test_what_can_be_shared(name: str, expected: int) -> None:
    schedule = Schedule(name=name, peak=1.0, num_steps=100, warmup_steps=10, cooldown_fraction=0.3)
    assert stable_steps(schedule) == expected


@pytest.mark.acceptance
def test_what_was_changed_about_a_proposal_is_an_event(make: Any) -> None:
    spec, folder = make("noted")
    note = {"clamp": {"name": "schedule.peak_lr", "proposed": 0.02, "held": 0.01}}
    run = TrialRun(spec, folder.trial("t0000"), 0, values(BRANCHES[0]), note=note)
    run.advance()
    (event,) = [r for r in collect(folder.path).records.to_pylist() if r["kind"] == "event"]
    assert (event["event"], event["step"]) == ("clamp", 0)
    assert json.loads(event["detail"]) == note["clamp"]


def test_a_trunk_needs_a_stable_phase(sweep_text: Callable[..., str], tiny: dict[str, Any]) -> None:
    train = {**tiny, "schedule": {"name": "cosine"}}
    text = sweep_text(train=train, space={}, search={"num_trials": 4, "trunk": {"every_steps": 4}})
    with pytest.raises(UserError, match=r"search.trunk needs schedules with a stable phase, got \['cosine'\]"):
        parse(SweepSpec, tomllib.loads(text), "trunk")


def test_a_finished_search_keeps_the_end_of_each_trunk(make: Any) -> None:
    spec, folder = make("shared", trunk={"every_steps": 4})
    train_all(spec, folder)
    before = sorted(int(path.stem) for path in folder.path.glob("trunks/*/*.pt"))
    thin_trunks(folder.path)
    trunks = [sorted(path.iterdir()) for path in (folder.path / "trunks").iterdir()]
    assert [len(trunk) for trunk in trunks] == [1] * len(trunks)
    assert len(before) > len(trunks)
    assert max(before) == max(int(path.stem) for (path,) in trunks)


def test_a_trunk_that_went_is_made_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found, and gone before it is read: the trial makes these updates itself."""
    spec, folder = make("shared", trunk={"every_steps": 4})
    train_all(spec, folder)
    gone = folder.path / "trunks" / "gone.pt"
    monkeypatch.setattr("landscape_ray.sweep.trunk.Trunk.find", lambda self: gone)
    run = TrialRun(spec, folder.trial("t0009"), 9, values(BRANCHES[1]))
    assert run.state.step == 0
    gone.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"gone.pt cannot be read"):
        TrialRun(spec, folder.trial("t0010"), 10, values(BRANCHES[1]))
