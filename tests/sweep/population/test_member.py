"""One member and its folder: weights taken over under new values, from memory or from the durable copy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.errors import UserError
from landscape_ray.populations import Decision, Restart
from landscape_ray.sweep.population.member import MemberRun
from landscape_ray.sweep.population.orders import Order, Weights
from landscape_ray.sweep.run import CHECKPOINT, PREVIOUS
from landscape_ray.sweep.spec import SweepSpec, spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.training import read_checkpoint
from tests.sweep.population.local import make

LR, DECAY = "schedule.peak_lr", "optimizer.weight_decay"
DONOR = {LR: 0.01, DECAY: 0.0}
OWN = {LR: 0.03, DECAY: 0.1}
MUTATED = {LR: 0.05, DECAY: 0.2}

Text = Callable[..., str]


def start(member: int, values: dict[str, Any], until: int = 5) -> Order:
    return Order(0, Decision(member, "start", dict(values), until))


def copy(serial: int = 1, values: dict[str, Any] = MUTATED, until: int = 10, **decision: Any) -> Order:
    told = {"donor": 0, "donor_step": 5} | decision
    return Order(serial, Decision(1, "exploit", dict(values), until, **told), Weights(0, 0))


def to_the_end(run: MemberRun) -> MemberRun:
    while not run.reached:
        run.advance()
    return run


def weights(run: MemberRun) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.state.module.parameters()])


def moments(found: Any) -> list[torch.Tensor]:
    """Return all first moments in what an optimizer saves."""
    if not isinstance(found, dict):
        return [tensor for each in found for tensor in moments(each)] if isinstance(found, list | tuple) else []
    own = [found["exp_avg"].clone()] if "exp_avg" in found else []
    return own + [tensor for each in found.values() for tensor in moments(each)]


def events(folder: SweepFolder, name: str) -> list[dict[str, Any]]:
    return [r for r in collect(folder.path).records.to_pylist() if r["run_id"] == name and r["kind"] == "event"]


@pytest.fixture
def two(text: Text, tmp_path: Path) -> tuple[SweepFolder, SweepSpec, MemberRun, MemberRun]:
    """A donor and a member that have carried out their first orders."""
    folder = make(tmp_path / "s", text())
    spec = spec_of(folder)
    donor = to_the_end(MemberRun(spec, folder.trial("t0000"), start(0, DONOR)))
    member = to_the_end(MemberRun(spec, folder.trial("t0001"), start(1, OWN)))
    return folder, spec, donor, member


@pytest.mark.acceptance
@pytest.mark.parametrize("lost", [False, True], ids=["from memory", "from the durable copy"])
def test_copied_weights_are_those_that_were_reported(two: Any, lost: bool) -> None:
    """The donor has long gone on: neither way gives what it has now."""
    folder, _, donor, member = two
    reported, content = weights(donor).clone(), donor.take_content()
    assert content is not None
    assert donor.take_content() is None
    donor.begin(Order(1, Decision(0, "continue", DONOR, 10)))
    to_the_end(donor)
    member.begin(copy(), None if lost else content)
    assert torch.equal(weights(member), reported)
    assert not torch.equal(weights(donor), reported)
    assert member.state.step == 5
    to_the_end(member)
    (event,) = events(folder, "t0001")
    assert (event["event"], event["step"], event["donor"], event["donor_step"]) == ("exploit", 5, "t0000", 5)
    steps = [r for r in collect(folder.path).records.to_pylist() if r["run_id"] == "t0001" and r["kind"] == "step"]
    assert [r["step"] for r in steps] == [*range(1, 6), *range(6, 11)]
    assert [r["weight_decay"] for r in steps] == [0.1] * 5 + [0.2] * 5
    built = member.config.schedule.build(20)
    assert [r["lr"] for r in steps[5:]] == [float(built(k)) for k in range(5, 10)]
    assert member.config.schedule.peak_lr == 0.05
    assert member.config.seed != donor.config.seed


def test_an_order_is_durable_with_the_next_commit_only(two: Any) -> None:
    """Killed in between, the member begins it again."""
    folder, spec, _, member = two
    before = folder.trial("t0001").summary()
    member.begin(copy())
    assert folder.trial("t0001").summary() == before
    again = MemberRun(spec, folder.trial("t0001"), copy())
    assert torch.equal(weights(again), weights(member))
    for run in (member, again):
        assert (run.state.step, run.values) == (5, MUTATED)
    to_the_end(again)
    assert [event["event"] for event in events(folder, "t0001")] == ["exploit"]
    reopened = MemberRun(spec, folder.trial("t0001"), copy(), attempt=1)
    assert reopened.reached, "done already; it reports the same again"
    assert reopened.collector.state_dict() == again.collector.state_dict()
    assert reopened.take_content() is not None
    assert [event["event"] for event in events(folder, "t0001")] == ["exploit", "resume"]


@pytest.mark.parametrize(
    ("values", "in_place"), [({LR: 0.07, DECAY: 0.3}, True), ({LR: 0.07, DECAY: 0.3, "optimizer.beta2": 0.9}, False)]
)
def test_other_values_without_a_copy_go_on_from_the_own_weights(two: Any, values: Any, in_place: bool) -> None:
    folder, _, _, member = two
    state, before = member.state, weights(member).clone()
    old = moments(member.state.optimizer.state_dict())
    assert old
    member.begin(Order(1, Decision(1, "explore", values, 10)))
    assert (member.state is state) == in_place
    assert torch.equal(weights(member), before)
    new = moments(member.state.optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    to_the_end(member)
    assert [event["event"] for event in events(folder, "t0001")] == ["mutate"]


def test_a_restart_mixes_weights_and_keeps_the_step(two: Any) -> None:
    folder, _, donor, member = two
    reported = weights(donor).clone()
    member.begin(copy(restart=Restart(1.0, 0.0)))
    assert torch.equal(weights(member), reported)
    assert member.state.step == 5
    assert not any(moment.any() for moment in moments(member.state.optimizer.state_dict()))
    member.begin(Order(2, Decision(1, "restart", MUTATED, 10, restart=Restart(0.0, 1.0))))
    assert not torch.equal(weights(member), reported)
    to_the_end(member)
    assert [event["event"] for event in events(folder, "t0001")] == ["exploit", "restart", "restart"]


@pytest.mark.acceptance
@pytest.mark.parametrize("kind", ["explore", "explore anew", "exploit"])
def test_a_lost_last_checkpoint_is_made_again_under_the_values_that_it_was_made_under(two: Any, kind: str) -> None:
    """The one before is of step 3: training from there under the values of the next order would be another history."""
    folder, spec, _, member = two
    reported, points = weights(member).clone(), member.collector.state_dict()
    (folder.trial("t0001").checkpoint_path / CHECKPOINT).write_bytes(b"lost")  # and with it its other names
    values = MUTATED | ({"optimizer.beta2": 0.9} if kind == "explore anew" else {})
    order = copy(values=values) if kind == "exploit" else Order(1, Decision(1, "explore", values, 10))
    found = MemberRun(spec, folder.trial("t0001"), order)
    assert (found.state.step, found.values, found.config) == (5, values, spec.train_config(values, 1))
    durable = read_checkpoint(Weights(1, 0).path(folder.trial("t0001")))
    assert json.loads(durable["extra"]["points"]) == points, "what it reports again, should the driver have died too"
    saved = torch.cat([durable["module"][name].flatten() for name, _ in found.state.module.named_parameters()])
    assert torch.equal(saved, reported)
    assert torch.equal(weights(found), reported) == (kind != "exploit")
    to_the_end(found)
    rows = [row for row in collect(folder.path).records.to_pylist() if row["run_id"] == "t0001"]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["weight_decay"] for row in steps] == [0.1] * 5 + [0.2] * 5
    told = [(row["event"], row["step"]) for row in rows if row["kind"] == "event"]
    assert told == [("fallback", 3), ("exploit" if kind == "exploit" else "mutate", 5)]


def test_wrong_orders_are_refused(two: Any) -> None:
    folder, spec, _, member = two
    with pytest.raises(RuntimeError, match="decision names step 4 of weights that are of step 5"):
        member.begin(copy(donor_step=4))
    with pytest.raises(RuntimeError, match="checkpoint of order 0 cannot be continued by order 2"):
        MemberRun(spec, folder.trial("t0001"), copy(serial=2))
    with pytest.raises(RuntimeError, match=r"must end where the member is evaluated, got step 6; .* multiples"):
        to_the_end(MemberRun(spec, folder.trial("t0002"), start(2, OWN, until=6)))
    for name in (CHECKPOINT, PREVIOUS):
        (folder.trial("t0001").checkpoint_path / name).unlink()
    with pytest.raises(UserError, match=r"state.pt must be there to go on, got no such file; restore it"):
        MemberRun(spec, folder.trial("t0001"), copy())


def test_without_hard_links_weights_are_copied(text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    folder = make(tmp_path / "s", text())
    run = to_the_end(MemberRun(spec_of(folder), folder.trial("t0000"), start(0, DONOR)))
    path = run.observed.path(run.folder)
    assert path.read_bytes() == (run.folder.checkpoint_path / CHECKPOINT).read_bytes()
