"""A population on disk: what is decided is carried out, and a crash at any instant changes nothing of the history."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.config import with_values
from landscape_ray.errors import UserError
from landscape_ray.sweep.extension import extend
from landscape_ray.sweep.population.book import PopulationBook, population_of
from landscape_ray.sweep.population.orders import Weights
from landscape_ray.sweep.run import CHECKPOINT, trial_id_of
from landscape_ray.sweep.spec import spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.training import TrainConfig, TrainState, read_checkpoint, train
from tests.sweep.population.local import Local, make

LR = "schedule.peak_lr"

Text = Callable[..., str]

SLOW = pytest.mark.slow


class Killed(BaseException):
    pass


def rows(folder: SweepFolder, member: int, kind: str) -> list[dict[str, Any]]:
    table = collect(folder.path).records.to_pylist()
    return [row for row in table if row["run_id"] == trial_id_of(member) and row["kind"] == kind]


def essence(folder: SweepFolder) -> dict[int, list[Any]]:
    """Return what every member has done, without times, and without notes of crashes."""
    keys = ("kind", "step", "loss_nats", "lr", "weight_decay", "event", "donor", "donor_step", "detail")
    found: dict[int, list[Any]] = {}
    for row in collect(folder.path).records.to_pylist():
        if row["event"] != "resume":
            found.setdefault(int(row["run_id"][1:]), []).append([repr(row[key]) for key in keys])
    return found


def state(folder: SweepFolder) -> Any:
    return json.loads(folder.population_path.read_text())


@pytest.mark.acceptance
@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_decisions_are_carried_out_to_the_letter(text: Text, tmp_path: Path, synchronous: bool) -> None:
    """The donor's step is that of the weights, values stay in their domains and are what is applied from there on."""
    folder = make(tmp_path / "s", text(synchronous=synchronous, quantile_fraction=0.5))
    run = Local(folder).run()
    schedule = run.runs[0].config.schedule
    copies = 0
    for member in range(4):
        own = collect(folder.path).records.to_pylist()
        own = [row for row in own if row["run_id"] == trial_id_of(member)]
        values: dict[str, Any] = {}
        for position, row in enumerate(own):
            if row["event"] in ("exploit", "mutate"):
                values = json.loads(row["detail"])
                assert 1e-3 <= values[LR] <= 1e-1
            if row["event"] == "exploit":
                copies += 1
                assert row["donor"] != row["run_id"]
                assert row["step"] == row["donor_step"]
                following = next(r for r in own[position:] if r["kind"] == "step")
                assert following["step"] == row["donor_step"] + 1
            if row["kind"] == "step" and values:
                peak = schedule.model_copy(update={"peak_lr": values[LR]}).build(20)
                assert row["lr"] == pytest.approx(float(peak(row["step"] - 1)), rel=1e-12)
                assert row["weight_decay"] == values["optimizer.weight_decay"]
    assert copies >= 2
    assert {folder.trial(trial_id_of(k)).summary().status for k in range(4)} == {"finished"}  # type: ignore[union-attr]
    assert not list(folder.path.glob("trials/*/checkpoint/observed-*")), "nobody will copy these any more"


@pytest.mark.acceptance
@pytest.mark.parametrize(("synchronous", "memory"), [(True, False), (False, True)], ids=["sync", "async"])
def test_a_crash_after_any_step_continues_the_same_history(
    text: Text, tmp_path: Path, synchronous: bool, memory: bool
) -> None:
    """Every process dies after every single step; decisions, weights and rows come out as if none had."""
    written = text(synchronous=synchronous, quantile_fraction=0.5, strategy="truncation")
    whole, broken = make(tmp_path / "whole", written), make(tmp_path / "broken", written)
    Local(whole).run()
    attempt, done = 0, False

    def die(count: int) -> None:
        if count == (5 if synchronous else 2):  # in synchrony, four report again what they had reported
            raise Killed

    while not done:
        attempt += 1
        assert attempt < 100
        broken.update_meta(attempts=attempt)
        try:
            Local(broken, attempt, memory).run(die)
            done = True
        except Killed:
            pass
    assert attempt > 5
    if synchronous:  # the order of reports is the order in which members are trained, which crashes change
        assert state(broken) == state(whole)
        assert essence(broken) == essence(whole)
        for member in range(4):
            ours, theirs = (
                read_checkpoint(folder.trial(trial_id_of(member)).checkpoint_path / CHECKPOINT)
                for folder in (broken, whole)
            )
            for name, tensor in theirs["module"].items():
                assert torch.equal(tensor, ours["module"][name])
    for member in range(4):
        steps = rows(broken, member, "step")
        assert steps[-1]["step"] == 20
        assert all(math.isfinite(row["loss_nats"]) for row in steps)


@pytest.mark.acceptance
@pytest.mark.parametrize("place", ["write", "link", *(pytest.param(p, marks=SLOW) for p in ("begin", "report"))])
def test_a_crash_inside_a_step_changes_nothing(
    text: Text, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from landscape_ray.sweep.population import book, member

    written = text(synchronous=True, quantile_fraction=0.5)
    whole, broken = make(tmp_path / "whole", written), make(tmp_path / "broken", written)
    Local(whole).run()
    targets: dict[str, tuple[Any, str]] = {
        "write": (book.PopulationBook, "save"),
        "begin": (member.MemberRun, "begin"),
        "link": (member, "link_or_copy"),
        "report": (book.PopulationBook, "report"),
    }
    owner, name = targets[place]
    original = getattr(owner, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return original(*args, **kwargs)

    for attempt in range(1, 9):
        calls = 0
        broken.update_meta(attempts=attempt)
        monkeypatch.setattr(owner, name, dying if attempt < 8 else original)
        try:
            Local(broken, attempt).run()
            break
        except Killed:
            continue
    assert attempt > 1
    assert state(broken) == state(whole)
    assert essence(broken) == essence(whole)


@pytest.mark.acceptance
def test_a_diverged_member_is_rescued(text: Text, tmp_path: Path) -> None:
    initial = [{LR: lr, "optimizer.weight_decay": 0.0} for lr in (1e-2, 2e-2, 1e-1, 5e-3)]
    folder = make(tmp_path / "s", text(initial=initial, resample_probability=0.0))
    run = Local(folder)
    run.step(2)
    for parameter in run.runs[2].state.module.parameters():
        parameter.data.fill_(math.nan)
    run.run()
    rescued = [decision for decision in run.decisions if decision.reason == "diverged"]
    assert [decision.member for decision in rescued] == [2]
    assert rescued[0].donor is not None
    events = [row["event"] for row in rows(folder, 2, "event")]
    assert events[:2] == ["diverged", "exploit"]
    summary = folder.trial("t0002").summary()
    assert summary is not None
    assert (summary.status, summary.step) == ("finished", 20)
    assert math.isfinite(summary.final_loss_nats)


def test_what_a_killed_driver_may_still_copy_is_kept(text: Text, tmp_path: Path) -> None:
    """A member reports, goes on and diverges before anybody else has reported: it waits for somebody to copy.

    The saved book knows nothing of that: to the next driver its earlier weights are as good as any.
    """
    folder = make(tmp_path / "s", text(quantile_fraction=0.5))
    run = Local(folder)
    while run.book.orders[0].serial == 0:
        run.step(0)
    run.step(0)
    for parameter in run.runs[0].state.module.parameters():
        parameter.data.fill_(math.nan)
    while not run.book.waits(0):
        run.step(0)
    assert run.runs[0].state.diverged
    assert Weights(0, 0).path(folder.trial("t0000")).exists()
    folder.update_meta(attempts=2)
    Local(folder, attempt=2).run()
    assert {trial.summary().status for trial in folder.trials()} == {"finished"}  # type: ignore[union-attr]


@pytest.mark.acceptance
def test_a_member_that_never_exploited_is_replayed_bit_for_bit(text: Text, tmp_path: Path) -> None:
    """Its schedule, exported from the folder, trains the same weights from scratch."""
    folder = make(tmp_path / "s", text(strategy="independent"))
    Local(folder).run()
    spec = spec_of(folder)
    lineage = population_of(spec, folder).lineage
    (member,) = (m for m in lineage.members if lineage.path(m)[-1].stop_step == 20)
    summary = folder.trial(trial_id_of(member)).summary()
    assert summary is not None
    config = spec.train_config(summary.varied, member)
    table = lineage.replay(member, LR, config.schedule.build(20))
    assert [change.num_tokens for change in lineage.changes(member, LR)] == [0]
    schedule = {"name": "table", "peak_lr": table.peak, "points": [list(point) for point in table.points]}
    data = with_values(config.model_dump(mode="json"), {}) | {"schedule": schedule}
    alone = TrainState.create(TrainConfig.model_validate(data))
    for _ in train(alone):
        pass
    saved = read_checkpoint(folder.trial(trial_id_of(member)).checkpoint_path / CHECKPOINT)
    for name, tensor in alone.module.state_dict().items():
        assert torch.equal(tensor, saved["module"][name])


@pytest.mark.parametrize(
    ("strategy", "options", "members"),
    [
        ("ipbt", {"patience": 1, "tolerance": 0.9}, 4),
        ("forecast", {}, 4),
        pytest.param("pb2", {}, 4, marks=SLOW),
        pytest.param("fire", {}, 8, marks=SLOW),
        pytest.param("mf_pbt", {"frequencies": [1, 2]}, 6, marks=SLOW),
        pytest.param("significance", {"num_points": 2, "significance": 0.5}, 4, marks=SLOW),
    ],
)
def test_strategies_run(text: Text, tmp_path: Path, strategy: str, options: dict[str, Any], members: int) -> None:
    written = text(strategy=strategy, options=options, num_members=members, synchronous=True)
    if strategy == "forecast":
        written = written.replace('"optimizer.weight_decay" = { "uniform" = [0.0, 0.3] }', "").replace(",  }", " }")
    folder = make(tmp_path / "s", written)
    run = Local(folder).run()
    assert population_of(run.spec, folder).finished
    if strategy == "ipbt":
        events = [row["event"] for k in range(members) for row in rows(folder, k, "event")]
        assert "restart" in events


def test_initial_values_come_from_an_optuna_sampler(text: Text, tmp_path: Path) -> None:
    """Those that are given first, then those of the sampler: the same at every start."""
    given = {LR: 0.05, "optimizer.weight_decay": 0.1}
    books = []
    for name in "ab":
        folder = make(tmp_path / name, text(initial=[given], initialiser={"sampler": "qmc"}))
        books.append(PopulationBook(spec_of(folder), folder))
    values = [[order.decision.values for order in book.orders.values()] for book in books]
    assert values[0] == values[1]
    assert values[0][0] == given
    assert len({value[LR] for value in values[0]}) == 4


def test_a_report_is_heard_once(text: Text, tmp_path: Path) -> None:
    folder = make(tmp_path / "s", text())
    run = Local(folder)
    while run.book.orders[0].serial == 0:
        result = run.step(0)
    assert result is not None
    before = state(folder)
    from landscape_ray.populations.decisions import points_from_json

    assert run.book.report(0, 0, points_from_json(result["points"]), result["num_tokens"]) == []
    assert state(folder) == before


def test_what_cannot_be_continued_is_refused(text: Text, tmp_path: Path) -> None:
    folder = make(tmp_path / "s", text())
    spec = spec_of(folder)
    with pytest.raises(UserError, match=r"must hold a population, got no population.json; run the sweep first"):
        population_of(spec, folder)
    folder.trial("t0000").set_status("running")
    with pytest.raises(UserError, match=r"begun by an earlier version .* no population.json; start a new sweep"):
        PopulationBook(spec, folder)
    folder.population_path.write_text("{")
    with pytest.raises(UserError, match=r"population.json is damaged .*; restore it from a copy"):
        PopulationBook(spec, folder)
    folder.population_path.write_text('{"version": 9}')
    with pytest.raises(UserError, match=r"has version 9, this landscape_ray reads 1; use the version that wrote it"):
        PopulationBook(spec, folder)
    with pytest.raises(UserError, match=r"has no \[population\] table; add one"):
        PopulationBook(spec.model_copy(update={"population": None}), folder)


@pytest.mark.acceptance
@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_a_population_goes_on_to_a_later_end(text: Text, tmp_path: Path, synchronous: bool) -> None:
    """Members that had ended train on, copy each other's last weights, and every step is recorded once."""
    folder = make(tmp_path / "s", text(synchronous=synchronous, quantile_fraction=0.5))
    Local(folder).run()
    assert PopulationBook(spec_of(folder), folder).open == []
    assert extend(folder, num_steps=40) == {"train.num_steps": 40}
    later = Local(folder, attempt=2, memory=False).run()
    assert {decision.until_step for decision in later.decisions if decision.action != "stop"} <= {30, 35, 40}
    assert {folder.trial(trial_id_of(k)).summary().step for k in range(4)} == {40}  # type: ignore[union-attr]
    for member in range(4):
        steps = [row["step"] for row in rows(folder, member, "step")]
        assert steps[-1] == 40
        assert len(steps) >= 40
    if synchronous:
        path = later.book.strategy.lineage.path(0)
        assert [(segment.start_step, segment.stop_step) for segment in path] == [(k, k + 5) for k in range(0, 40, 5)]
