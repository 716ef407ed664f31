"""The choice is the fastest of what was measured and is right, and measuring changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from landscape_ray.training.cohort import Cohort, plan, recording
from landscape_ray.training.cohort.plan import Choice
from landscape_ray.training.cohort.routes import Stacked

from .conftest import Configs, Threads, memory


@pytest.fixture(autouse=True)
def one_thread(threads: Threads) -> None:
    """With several, more routes are measured."""
    threads(1)


def chosen(configs: Configs, **shared: Any) -> tuple[Cohort, Choice]:
    """Return a cohort that made one update, and its choice."""
    cohort = Cohort.create(configs(**shared))
    list(cohort.train(1))
    assert cohort.choice is not None
    return cohort, cohort.choice


@pytest.mark.acceptance
def test_one_by_one_is_always_measured_and_the_fastest_wins(configs: Configs) -> None:
    _, choice = chosen(configs)
    assert choice.seconds.keys() == {"single", "recorded/2", "recorded/3"}
    name = choice.route if choice.route == "single" else f"{choice.route}/{choice.chunk}"
    assert choice.seconds[name] <= min(choice.seconds.values()) / plan.CLEARLY
    assert min(choice.seconds.values()) > 0


@pytest.mark.parametrize(("fastest", "expected"), [("single", ("single", 1)), ("recorded", ("recorded", 2))])
def test_the_measured_times_decide(
    configs: Configs, monkeypatch: pytest.MonkeyPatch, fastest: str, expected: tuple[str, int]
) -> None:
    def measure(candidate: Any) -> None:
        program = candidate._programs[0]
        candidate.seconds = (1.0 if program.name == fastest else 2.0) + 0.1 * len(program.members)

    monkeypatch.setattr(plan._Candidate, "measure", measure)
    _, choice = chosen(configs)
    assert (choice.route, choice.chunk) == expected


def test_a_joint_route_must_be_clearly_faster(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(candidate: Any) -> None:
        candidate.seconds = 1.0 if candidate._programs[0].name == "single" else 0.98

    monkeypatch.setattr(plan._Candidate, "measure", measure)
    assert chosen(configs)[1].route == "single"


def test_what_is_left_behind_gives_its_memory_back(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measure(candidate: Any) -> None:
        candidate.seconds = 1.0 if candidate._programs[0].name == "single" else 2.0
        seen.append(candidate)

    monkeypatch.setattr(plan._Candidate, "measure", measure)
    assert chosen(configs)[1].route == "single"
    assert {bool(each._programs) for each in seen if each.seconds == 1.0} == {True}
    assert {bool(each._programs or each._pairs or each._plan.programs) for each in seen if each.seconds == 2.0} == {
        False
    }


def test_large_chunks_are_not_tried_where_small_ones_are_slow(
    configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(candidate: Any) -> None:
        candidate.seconds = 1.0 if candidate._programs[0].name == "single" else 2.0

    monkeypatch.setattr(plan._Candidate, "measure", measure)
    cohort = Cohort.create([config for _ in range(7) for config in configs()][:20])
    list(cohort.train(1))
    assert cohort.choice is not None
    assert cohort.choice.seconds.keys() == {"single", "recorded/2", "recorded/4", "recorded/8"}


def test_what_cannot_be_recorded_is_stacked(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    _, choice = chosen(configs)
    assert choice.excluded["stacked"] == "'recorded' does the same in less time"
    monkeypatch.setattr(recording, "LIMIT", 0)
    _, choice = chosen(configs)
    assert choice.seconds.keys() == {"single", "stacked/2", "stacked/3"}
    assert "makes more than 0 MB" in choice.excluded["recorded/2"]


def test_a_route_with_other_gradients_is_out(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Stacked.losses
    monkeypatch.setattr(Stacked, "losses", lambda self, x, y: 1.01 * right(self, x, y))
    _, choice = chosen(configs)
    assert choice.route == "single"
    assert "differ from those of the members alone by 1.0e-02" in choice.excluded["stacked"]


def test_a_route_with_another_gradient_of_one_member_is_out(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Stacked.losses

    def losses(program: Stacked, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return right(program, x, y) * torch.tensor([1.01 if m.config.seed == 2 else 1.0 for m in program.members])

    monkeypatch.setattr(Stacked, "losses", losses)
    _, choice = chosen(configs)
    assert choice.route == "single"
    assert "differ from those of the members alone by 1.0e-02" in choice.excluded["stacked"]


@pytest.mark.parametrize("row", [0, 1])
def test_a_gradient_that_is_not_finite_counts_only_where_it_should_be(row: int) -> None:
    theirs = torch.ones(2, 4)
    ours = theirs.clone()
    ours[row] = math.nan
    assert not plan._distance(ours, theirs) <= 1.0
    theirs[row] = math.inf
    assert plan._distance(ours, theirs) == 0.0


def test_a_route_that_fails_is_out(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left\nat all")

    monkeypatch.setattr(Stacked, "losses", fail)
    _, choice = chosen(configs)
    assert choice.route == "single"
    assert choice.excluded["stacked/2"] == "no memory left"


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_measuring_changes_nothing(configs: Configs, norm: str) -> None:
    settings = configs(model={"name": "cnn", "width": 8, "depth": 2, "norm": norm})
    cohort = Cohort.create(settings)
    assert cohort._buffers is not None
    before = [memory(cohort, k) for k in range(3)]
    plan.choose(cohort._buffers, cohort.members, cohort._batch())
    for k in range(3):
        assert all(map(torch.equal, before[k], memory(cohort, k)))


def test_measuring_leaves_the_histories_of_norms_alone(configs: Configs) -> None:
    cohort = Cohort.create(configs(clipping__name="auto"))
    assert cohort._buffers is not None
    plan.choose(cohort._buffers, cohort.members, cohort._batch())
    assert [int(member.clipper.state_dict()["count"]) for member in cohort.members] == [0, 0, 0]


@pytest.mark.parametrize(
    ("members", "number", "chunks"), [(6, 2, [2, 3]), (2, 2, [1]), (9, 4, [2, 3]), (32, 2, [2, 4, 8, 16])]
)
def test_programs_side_by_side_have_their_share_at_most(
    threads: Threads, members: int, number: int, chunks: list[int]
) -> None:
    threads(number)
    assert plan._chunks(plan._share("abreast", members)) == chunks
    assert plan._share("recorded", members) == members


def test_with_several_threads_programs_side_by_side_are_measured_too(configs: Configs, threads: Threads) -> None:
    assert chosen(configs)[1].excluded["abreast"] == "there is one thread"
    threads(2)
    cohort = Cohort.create(configs(clipping__name="auto"))
    assert cohort._buffers is not None
    before = [memory(cohort, k) for k in range(3)]
    choice = plan.choose(cohort._buffers, cohort.members, cohort._batch())
    assert choice.seconds.keys() == {"single", "recorded/2", "recorded/3", "abreast/2"}
    for k in range(3):
        assert all(map(torch.equal, before[k], memory(cohort, k)))
        assert int(cohort.members[k].clipper.state_dict()["count"]) == 0
