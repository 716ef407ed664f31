"""A cohort is its members, each trained alone: to rounding while they advance, to the bit where they stay apart."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape_ray.config import parse, with_values
from landscape_ray.data.text import TextData
from landscape_ray.errors import UserError
from landscape_ray.records import EvalRecord, EventRecord, ProbeRecord, Record, StepRecord, VariantRecord
from landscape_ray.signature import Signature
from landscape_ray.training import TrainConfig, train
from landscape_ray.training.cohort import Choice, Cohort
from landscape_ray.training.cohort.folder import MANIFEST
from landscape_ray.training.state import TrainState

from .conftest import DIGITS, Configs, memory, weights

ROUTES = ("recorded", "stacked", "vmap", "single")

BF16 = 2.0**-8
"""Muon's iterations are in bfloat16: products of other shapes differ by its rounding."""


def alone(configs: list[TrainConfig], data: Any = None) -> list[tuple[TrainState, list[Record]]]:
    """Return the runs of these configurations one after the other, with their records."""
    states = [TrainState.create(config) if data is None else TrainState(config, data) for config in configs]
    return [(state, list(train(state))) for state in states]


def assert_same(cohort: Cohort, ours: list[tuple[int, Record]], theirs: Any, tolerance: float = 1e-5) -> None:
    """Check weights and all records of a cohort against runs alone."""
    for k, (state, records) in enumerate(theirs):
        own = [record for member, record in ours if member == k]
        assert [(r.kind, r.step, r.num_tokens, r.flops) for r in own] == [
            (r.kind, r.step, r.num_tokens, r.flops) for r in records
        ]
        for a, b in zip(own, records, strict=True):
            if isinstance(b, StepRecord):
                assert isinstance(a, StepRecord)
                assert (a.lr, a.weight_decay, a.momentum) == (b.lr, b.weight_decay, b.momentum)
                assert a.grad_norm == pytest.approx(b.grad_norm, rel=20 * tolerance)
            if isinstance(b, EvalRecord | VariantRecord):
                assert isinstance(a, EvalRecord | VariantRecord)
                assert a.accuracy == pytest.approx(b.accuracy, abs=20 * tolerance)
            if isinstance(b, StepRecord | EvalRecord | VariantRecord):
                assert isinstance(a, StepRecord | EvalRecord | VariantRecord)
                assert a.loss_nats == pytest.approx(b.loss_nats, rel=20 * tolerance)
        torch.testing.assert_close(weights(cohort.members[k]), weights(state), rtol=tolerance, atol=tolerance)


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [
        ({"name": "adamw"}, 1e-5),
        ({"name": "adamw", "decay_coupling": "independent", "beta1": 0.8, "eps": 1e-4}, 1e-5),
        ({"name": "sgd", "weight_decay": 0.1}, 1e-5),
        ({"name": "sgd", "nesterov": True, "l2": True, "weight_decay": 0.1}, 1e-5),
        ({"name": "sgd", "momentum": 0.0}, 1e-5),
        ({"name": "muon"}, BF16),
    ],
    ids=["adamw", "adamw-independent", "sgd", "sgd-nesterov-l2", "sgd-plain", "muon"],
)
def test_members_are_what_they_are_alone(
    configs: Configs, route: str, optimizer: dict[str, Any], tolerance: float
) -> None:
    settings = configs(**{f"optimizer__{name}": value for name, value in optimizer.items()})
    cohort = Cohort.create(settings, route=route)
    assert_same(cohort, list(cohort.train()), alone(settings), tolerance)


def test_members_alone_are_equal_to_the_bit(configs: Configs) -> None:
    settings = configs()
    cohort = Cohort.create(settings, route="alone")
    list(cohort.train())
    for member, (state, _) in zip(cohort.members, alone(settings), strict=True):
        assert torch.equal(weights(member), weights(state))


@pytest.mark.parametrize(("route", "chunk"), [("recorded", 1), ("recorded", 2), ("recorded", 3), ("stacked", 2)])
@pytest.mark.parametrize(
    "shared",
    [
        {"model__parametrisation": "mup", "model__base_width": 4, "model__norm": "layer"},
        {"accumulation_steps": 2},
        {"clipping__name": "auto", "clipping__percentile": 50.0},
        {"clipping__name": "coordinate", "clipping__threshold": 0.01},
        {"loss__label_smoothing": 0.1, "loss__z_loss": 0.01},
        {"averaging": {"name": "ema", "decay": 0.5}},
        {"seed": 5},
        {"optimizer__name": "sgd", "optimizer__weight_decay": 0.0, "loss__name": "squared_error"},
    ],
    ids=lambda shared: next(iter(shared)),
)
def test_every_option_is_that_of_a_run_alone(configs: Configs, shared: dict[str, Any], route: str, chunk: int) -> None:
    settings = configs(**shared)
    cohort = Cohort.create(settings, route=route, chunk=chunk)
    assert_same(cohort, list(cohort.train()), alone(settings))


@pytest.mark.parametrize("route", ["recorded", "stacked"])
def test_bfloat16_agrees_to_its_precision(configs: Configs, route: str) -> None:
    settings = configs(precision="bfloat16", optimizer__name="sgd", model__dropout=0.0)
    cohort = Cohort.create(settings, route=route)
    assert_same(cohort, list(cohort.train()), alone(settings), BF16)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_recording_is_what_it_recorded(configs: Configs, threads: int, accumulation_steps: int) -> None:
    settings = configs(accumulation_steps=accumulation_steps)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pair = [Cohort.create(settings, route=route, chunk=2) for route in ("stacked", "recorded")]
        for cohort in pair:
            list(cohort.train())
    finally:
        torch.set_num_threads(before)
    for k in range(3):
        stacked, recorded = (memory(cohort, k) for cohort in pair)
        if threads == 2 or accumulation_steps == 2:  # else gradients of weights are put where they belong one by one
            assert all(map(torch.equal, stacked, recorded))
        torch.testing.assert_close(stacked, recorded, rtol=1e-4, atol=1e-6)


def test_recordings_without_dropout_are_not_for_members_with_it() -> None:
    rates = (0.0, 0.0, 0.5, 0.2, 0.5, 0.0)
    settings = [digits(k, model={"name": "mlp", "width": 8, "dropout": rate}) for k, rate in enumerate(rates)]
    cohort = Cohort.create(settings, route="recorded", chunk=2)
    assert_same(cohort, list(cohort.train()), alone(settings))


def test_a_recording_is_there_for_others_where_its_own_members_are_not_trained() -> None:
    settings = [digits(k) for k in range(4)]
    cohort = Cohort.create(settings, route="recorded", chunk=2)
    with torch.no_grad():
        for member in cohort.members[:2]:
            next(member.module.parameters()).fill_(math.nan)
    list(cohort.train())
    assert [member.step for member in cohort.members] == [0, 0, 6, 6]
    for k in (2, 3):
        torch.testing.assert_close(weights(cohort.members[k]), weights(alone([settings[k]])[0][0]))


def gpt(**values: Any) -> tuple[list[TrainConfig], TextData]:
    shared = {
        "num_steps": 6,
        "batch_size": 2,
        "data": {"context_length": 16},
        "model": {"depth": 2, "width": 16, "num_heads": 2, "dropout": 0.1},
        "eval": {"every_steps": 3, "num_batches": 1, "batch_size": 2},
    }
    tokens = np.random.default_rng(0).integers(256, size=2000, dtype=np.uint8)
    rates = (1e-3, 3e-3, 1e-2)
    settings = [
        parse(TrainConfig, with_values(shared, {"seed": k, "schedule.peak_lr": rate, **values}), "test")
        for k, rate in enumerate(rates)
    ]
    return settings, TextData(tokens[:1500], tokens[1500:], 256, 16)


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tied_head", [True, False])
def test_a_transformer_is_what_it_is_alone(route: str, tied_head: bool) -> None:
    settings, data = gpt(**{"model.tied_head": tied_head})
    cohort = Cohort.create(settings, data, route=route)
    assert_same(cohort, list(cohort.train()), alone(settings, data), 1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_a_convolutional_network_is_what_it_is_alone(configs: Configs, route: str) -> None:
    settings = configs(model={"name": "cnn", "width": 4, "depth": 2, "norm": "group", "num_groups": 2}, num_steps=3)
    cohort = Cohort.create(settings, route=route)
    assert_same(cohort, list(cohort.train()), alone(settings))


class Users(nn.Module):
    """A module that knows nothing of this package."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def plain(signature: Signature) -> nn.Module:
    return Users(0.0)


def random(signature: Signature) -> nn.Module:
    return Users(0.5)


class Idle(Users):
    """One with a parameter that does nothing."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.idle = nn.Parameter(torch.ones(3, 3))


def idle(signature: Signature) -> nn.Module:
    return Idle()


def test_members_with_a_parameter_that_does_nothing_are_trained_alone(configs: Configs) -> None:
    settings = configs(model={"name": f"{__name__}:idle"}, num_steps=4)
    cohort = Cohort.create(settings)
    assert_same(cohort, list(cohort.train()), alone(settings), 0.0)
    assert cohort.choice is not None
    assert cohort.choice.route == "alone"
    assert "appears to not have been used" in cohort.choice.excluded["all"]
    assert all((member.module.state_dict()["module.idle"] == 1).all() for member in cohort.members)


@pytest.mark.parametrize("build", ["plain", "random"])
def test_a_module_of_the_user_goes_by_vmap_unless_it_is_random(configs: Configs, build: str) -> None:
    settings = configs(model={"name": f"{__name__}:{build}"}, num_steps=4)
    cohort = Cohort.create(settings)
    assert_same(cohort, list(cohort.train()), alone(settings))
    assert cohort.choice is not None
    assert ("vmap/2" in cohort.choice.seconds) == (build == "plain")
    assert ("random" in cohort.choice.excluded.get("vmap/2", "")) == (build == "random")
    with pytest.raises(UserError, match="route must suit the members, got 'stacked' where the model does not take"):
        Cohort.create(settings, route="stacked")


def test_batch_statistics_and_other_optimizers_keep_members_apart(configs: Configs) -> None:
    settings = configs(model={"name": "cnn", "width": 4, "depth": 2, "norm": "batch"}, num_steps=4)
    cohort = Cohort.create(settings)
    assert_same(cohort, list(cohort.train()), alone(settings))
    assert cohort.choice is not None
    assert cohort.choice.route == "single"
    assert "statistics" in cohort.choice.excluded["vmap"]

    settings = configs(sam={"rho": 0.05}, num_steps=4)
    cohort = Cohort.create(settings)
    assert_same(cohort, list(cohort.train()), alone(settings))
    assert cohort.choice == Choice(route="alone", excluded={"all": cohort.choice.excluded["all"]})  # type: ignore[union-attr]
    with pytest.raises(UserError, match="route must suit the members, got 'stacked' where sam, sharpness-aware"):
        Cohort.create(settings, route="stacked")


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_member_that_diverges_touches_no_other(configs: Configs, route: str, name: str) -> None:
    settings = configs(optimizer__name=name, optimizer__weight_decay=0.1)
    sound, struck = (Cohort.create(settings, route=route) for _ in range(2))
    list(sound.train(3))
    list(struck.train(3))
    with torch.no_grad():
        next(struck.members[1].module.parameters())[0, 0] = math.nan
    before = memory(struck, 1)
    list(sound.train())
    records = [record for k, record in struck.train() if k == 1]
    assert [type(record) for record in records] == [EventRecord]
    assert isinstance(records[0], EventRecord)
    assert records[0].event == "diverged"
    assert "loss nan" in json.loads(records[0].detail)["how"]
    assert struck.members[1].diverged is not None
    assert struck.members[1].step == 3
    torch.testing.assert_close(memory(struck, 1), before, rtol=0, atol=0, equal_nan=True)
    for k in (0, 2):
        assert all(map(torch.equal, memory(struck, k), memory(sound, k)))
        assert struck.members[k].finished


def test_an_infinite_held_out_loss_ends_a_member(configs: Configs) -> None:
    cohort = Cohort.create(configs(), route="stacked")
    with torch.no_grad():
        list(cohort.members[1].module.parameters())[-1][0] = math.inf
    records = [record for k, record in cohort.train(1) if k == 1]
    assert [record.kind for record in records] == ["eval", "event"]
    assert cohort.members[1].diverged is not None
    assert [m.step for m in cohort.members] == [1, 0, 1]


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("route", "name"),
    [*((route, "adamw") for route in (*ROUTES, "alone", "auto")), ("stacked", "sgd"), ("stacked", "muon")],
)
def test_five_steps_saved_and_five_more_are_ten(configs: Configs, tmp_path: Path, route: str, name: str) -> None:
    settings = configs(optimizer__name=name, probes={"sharpness": {"every_steps": 4, "batch_size": 4}}, num_steps=10)
    first = Cohort.create(settings, route=route)
    list(first.train(5))
    first.save(tmp_path, serial=7)
    second, extra = Cohort.load(tmp_path)
    assert extra == {"serial": 7}
    rest = list(second.train())
    for (k, ours), (j, theirs) in zip(rest, first.train(), strict=True):
        assert (k, ours.kind, ours.step) == (j, theirs.kind, theirs.step)
        if isinstance(ours, StepRecord | EvalRecord):
            assert isinstance(theirs, StepRecord | EvalRecord)
            assert ours.loss_nats == theirs.loss_nats
        if isinstance(ours, ProbeRecord):
            assert isinstance(theirs, ProbeRecord)
            assert ours.value == theirs.value
    for k in range(3):
        assert all(map(torch.equal, memory(first, k), memory(second, k)))


def test_a_checkpoint_can_be_continued_under_other_values(configs: Configs, tmp_path: Path) -> None:
    cohort = Cohort.create(configs(), route="single")
    list(cohort.train(2))
    cohort.save(tmp_path)
    cohort.save(tmp_path)  # in the same place: one set of members stays
    assert len(list(tmp_path.glob("members-*"))) == 1
    other, _ = Cohort.load(tmp_path, configs(schedule__peak_lr=0.5, schedule__name="constant"), route="stacked")
    lrs = {record.lr for _, record in other.train(3) if isinstance(record, StepRecord)}
    assert lrs == {0.5}
    assert other.choice == Choice(route="stacked", chunk=3)
    with pytest.raises(UserError, match=r"configs must be 3, one for each member of .*, got 1; leave them out"):
        Cohort.load(tmp_path, configs()[:1])


def test_what_is_not_a_checkpoint_of_a_cohort_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint of a cohort in"):
        Cohort.load(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"cohort.json cannot be read .*; delete it to start anew"):
        Cohort.load(tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match=r"is not of a cohort; give a folder that Cohort.save wrote"):
        Cohort.load(tmp_path)
    (tmp_path / MANIFEST).write_text('{"version": 99}')
    with pytest.raises(UserError, match="has version 99, this program reads 1; use the version"):
        Cohort.load(tmp_path)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_members_leave_and_enter_as_runs_alone(configs: Configs, tmp_path: Path, name: str) -> None:
    settings = configs(optimizer__name=name)
    cohort = Cohort.create(settings, route="single")
    list(cohort.train(5))
    before = memory(cohort, 1)
    cohort.leave(1, tmp_path / "one.pt", donor="b")
    assert (tmp_path / "one.pt").stat().st_size < 100_000  # its row, not the matrix of all
    state, extra = TrainState.load(tmp_path / "one.pt")
    assert extra == {"donor": "b"}
    assert torch.equal(weights(state), weights(cohort.members[1]))

    list(train(state, 7))
    state.save(tmp_path / "two.pt")
    list(cohort.train(7))
    torch.testing.assert_close(weights(state), weights(cohort.members[1]), rtol=BF16, atol=1e-5)
    others = memory(cohort, 0)
    cohort.enter(1, tmp_path / "two.pt")
    assert torch.equal(weights(state), weights(cohort.members[1]))
    assert all(map(torch.equal, others, memory(cohort, 0)))
    assert cohort.members[1].config == settings[1]
    # one that is at another step goes on from there
    cohort.enter(2, tmp_path / "one.pt", settings[2])
    assert [member.step for member in cohort.members] == [7, 7, 5]
    assert all(map(torch.equal, before, memory(cohort, 2)))
    steps = {k: record.step for k, record in cohort.train(8) if isinstance(record, StepRecord)}
    assert steps == {0: 8, 1: 8, 2: 8}
    for member, (alone_state, _) in zip(cohort.members[:1], alone(settings[:1]), strict=True):
        list(cohort.train())
        torch.testing.assert_close(weights(member), weights(alone_state), rtol=BF16, atol=1e-4)


@pytest.mark.parametrize(
    ("route", "name"),
    [*((route, "adamw") for route in (*ROUTES, "alone")), ("stacked", "sgd"), ("stacked", "muon")],
)
def test_a_copy_is_its_source_under_its_own_values(configs: Configs, route: str, name: str) -> None:
    settings = configs(optimizer__name=name, num_steps=12)
    cohort = Cohort.create(settings, route=route)
    list(cohort.train(4))
    cohort.copy(0, 2)
    assert all(map(torch.equal, memory(cohort, 0), memory(cohort, 2)))
    assert cohort.members[2].config == settings[2]
    kept = memory(cohort, 0)
    with torch.no_grad():
        next(cohort.members[2].module.parameters()).add_(1.0)  # not the same memory
    assert all(map(torch.equal, kept, memory(cohort, 0)))

    cohort.copy(0, 2, settings[0])  # the same seed and values: the same run
    list(cohort.train())
    tolerance = 0 if name != "muon" else BF16
    torch.testing.assert_close(weights(cohort.members[0]), weights(cohort.members[2]), rtol=tolerance, atol=tolerance)
    assert not torch.equal(weights(cohort.members[0]), weights(cohort.members[1]))


def test_a_member_goes_on_under_other_hyperparameters(configs: Configs) -> None:
    settings = configs(schedule__name="constant", schedule__warmup_steps=0)
    cohort = Cohort.create(settings, route="stacked")
    list(cohort.train(3))
    before = memory(cohort, 1)
    cohort.configure(1, parse(TrainConfig, with_values(settings[1].model_dump(), {"schedule.peak_lr": 0.5}), "test"))
    assert all(map(torch.equal, before, memory(cohort, 1)))
    lrs = [record.lr for k, record in cohort.train(5) if k == 1 and isinstance(record, StepRecord)]
    assert lrs == [0.5, 0.5]


def test_weights_are_read_and_written(configs: Configs) -> None:
    cohort = Cohort.create(configs(), route="stacked")
    list(cohort.train(2))
    read = cohort.read(1)
    assert read.keys() == cohort.members[1].module.state_dict().keys()
    list(cohort.train(4))
    assert not torch.equal(read["head.weight"], cohort.read(1)["head.weight"])
    others = memory(cohort, 0)
    cohort.write(1, read)
    assert all(torch.equal(value, cohort.read(1)[name]) for name, value in read.items())
    assert all(map(torch.equal, others, memory(cohort, 0)))
    written = weights(cohort.members[1])
    list(cohort.train(5))
    assert not torch.equal(written, weights(cohort.members[1]))


@pytest.mark.acceptance
def test_sharpness_is_that_of_each_member(configs: Configs) -> None:
    settings = configs(probes={"sharpness": {"every_steps": 6, "batch_size": 8, "tolerance": 1e-3}}, num_steps=6)
    cohort = Cohort.create(settings, route="stacked")
    ours = [(k, r.step, r.value) for k, r in cohort.train() if isinstance(r, ProbeRecord)]
    theirs = [
        (k, r.step, r.value) for k, (_, rs) in enumerate(alone(settings)) for r in rs if isinstance(r, ProbeRecord)
    ]
    assert [(k, step) for k, step, _ in sorted(ours)] == [(k, step) for k, step, _ in sorted(theirs)]
    assert [value for *_, value in sorted(ours)] == pytest.approx([value for *_, value in sorted(theirs)], rel=1e-3)


def test_what_is_done_together_is_charged_in_equal_parts(configs: Configs) -> None:
    cohort = Cohort.create(configs(num_steps=4), route="stacked")
    records = [record for _, record in cohort.train() if isinstance(record, StepRecord)]
    by_step: dict[int, set[float]] = {}
    for record in records:
        by_step.setdefault(record.step, set()).add(record.cost_seconds)
    assert all(len(costs) == 1 for costs in by_step.values())
    for k, member in enumerate(cohort.members):
        assert member.elapsed_seconds >= sum(r.cost_seconds for r in records) / 3 > 0, k
    assert cohort.finished


def test_data_that_is_open_is_used(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = configs()
    data = TrainState.create(settings[0]).data
    monkeypatch.setattr("landscape_ray.training.cohort.cohort.open_data", lambda config: pytest.fail("opened again"))
    cohort = Cohort.create(settings, data)
    assert len(cohort) == 3
    assert all(member.data is data and member.validation is cohort.members[0].validation for member in cohort.members)


def test_compiled_programs_are_the_same(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    calls: list[Any] = []

    def count(module: Any) -> Any:
        calls.append(module)
        return compiled(module, backend="eager")

    monkeypatch.setattr(torch, "compile", count)
    settings = configs(num_steps=3)
    cohort = Cohort.create([config.model_copy(update={"compile": True}) for config in settings], route="stacked")
    assert_same(cohort, list(cohort.train()), alone(settings))
    assert next(calls[3].parameters()).dim() == 3  # after the members' own losses, the stack


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("route", "chunk"), [("graphed", 3), ("graphed", 2), ("stacked", 3), ("vmap", 3)])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_members_on_a_gpu_are_what_they_are_alone(configs: Configs, name: str, route: str, chunk: int) -> None:
    settings = configs(device="cuda", optimizer__name=name)
    cohort = Cohort.create(settings, route=route, chunk=chunk)
    assert_same(cohort, list(cohort.train()), alone(settings), BF16 if name == "muon" else 1e-4)


def test_a_checkpoint_goes_on_where_its_route_is_not_to_be_had(configs: Configs, tmp_path: Path) -> None:
    """As where a cohort moves from a GPU to a machine without one."""
    settings = configs()
    whole = Cohort.create(settings, route="stacked")
    list(whole.train())
    part = Cohort.create(settings, route="stacked")
    list(part.train(5))
    part.save(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["choice"] = {"route": "graphed", "chunk": 3}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    rest, _ = Cohort.load(tmp_path)
    list(rest.train())
    assert rest.choice is not None
    assert rest.choice.route != "graphed"
    for ours, theirs in zip(rest.members, whole.members, strict=True):
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="route must suit the members, got 'graphed' where graphs are for CUDA"):
        Cohort.create(settings, route="graphed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_is_repeated_to_the_bit_over_a_checkpoint(configs: Configs, tmp_path: Path) -> None:
    settings = configs(device="cuda", accumulation_steps=2)
    whole = Cohort.create(settings, route="graphed")
    list(whole.train())
    part = Cohort.create(settings, route="graphed")
    list(part.train(5))
    part.save(tmp_path)
    rest, _ = Cohort.load(tmp_path)
    list(rest.train())
    for ours, theirs in zip(rest.members, whole.members, strict=True):
        assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpt_takes_a_graph_on_a_gpu() -> None:
    tokens = np.random.default_rng(0).integers(256, size=4000, dtype=np.uint8)
    data = TextData(tokens[:3000], tokens[3000:], 256, 16)
    model = {"name": "gpt", "width": 32, "depth": 2, "num_heads": 2}
    values = {"data": {"context_length": 16}, "model": model, "device": "cuda"}
    shared = {key: value for key, value in DIGITS.items() if key not in values}
    settings = [parse(TrainConfig, {**shared, **values, "seed": seed}, "test") for seed in range(3)]
    cohort = Cohort.create(settings, data)
    records = list(cohort.train())
    assert cohort.choice is not None
    assert cohort.choice.route == "graphed", cohort.choice
    assert_same(cohort, records, alone(settings, data), 1e-4)


def config_of(**values: Any) -> TrainConfig:
    return parse(TrainConfig, with_values(DIGITS, values), "test")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"batch_size": 16},
            "batch_size must be the same for all members of a cohort, got 8 and for member 1 16; train",
        ),
        ({"model.width": 8}, "model must be the same for all members of a cohort, got MLPConfig"),
        ({"optimizer.name": "sgd"}, "optimizer.name must be the same for all members of a cohort, got 'adamw' and for"),
        ({"precision": "bfloat16"}, "precision must be the same for all members of a cohort, got 'float32'"),
    ],
)
def test_members_have_things_in_common(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cohort.create([config_of(), config_of(**values)])
    cohort = Cohort.create([config_of(), config_of(seed=1)], route="single")
    with pytest.raises(UserError, match="must be the same for all members"):
        cohort.configure(1, config_of(**values))


def test_muon_members_are_orthogonalised_alike() -> None:
    with pytest.raises(UserError, match=r"optimizer.ns_steps must be the same for all members of a cohort, got 5"):
        Cohort.create([config_of(**{"optimizer.name": "muon", "optimizer.ns_steps": n}) for n in (5, 6)])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UserError, match="configs must hold at least one configuration, got none"):
        Cohort.create([])
    with pytest.raises(
        UserError,
        match="one of recorded, abreast, graphed, stacked, vmap, single, got 'fast'; use 'auto'",
    ):
        Cohort.create([config_of()], route="fast")
    with pytest.raises(UserError, match="chunk must be between 1 and the number of members, 1, got 2"):
        Cohort.create([config_of()], route="stacked", chunk=2)


class Plain(torch.nn.Module):
    """A user's module with a tensor that is neither parameter nor buffer, other in every member."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.mix = torch.nn.Linear(64, 10), torch.randn(64, 64) / 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(x.flatten(1) @ self.mix))
        return out


class Frozen(torch.nn.Module):
    """A user's module with a layer that is not trained, other in every member."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = torch.nn.Linear(64, 16), torch.nn.Linear(16, 10)
        self.proj.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.proj(x.flatten(1))))
        return out


def each_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A user's loss that gives one value for each target."""
    return torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")


def mean_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A user's loss that gives the mean."""
    return torch.nn.functional.cross_entropy(outputs, targets)


def mean_of_one(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One that gives it as a vector."""
    return mean_error(outputs.flatten(0, -2), targets.flatten()).view(1)


def second_axis(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One for outputs (B, classes) only: torch takes the second axis for the classes."""
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


def mixing(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One that looks at all of the first axis."""
    return second_axis((outputs * (1.0 + outputs.mean(0))).flatten(0, -2), targets.flatten())


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which those above can be imported."""
    module = types.ModuleType("a_users_own")
    for each in (Plain, Frozen, each_error, mean_error, mean_of_one, second_axis, mixing):
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, "a_users_own", module)
    return "a_users_own"


ON_DIGITS: dict[str, Any] = {
    "num_steps": 6,
    "batch_size": 8,
    "data": {"name": "images"},
    "model": {"name": "mlp", "width": 8},
}


def digits(seed: int = 0, **changes: Any) -> TrainConfig:
    fixed = {"seed": seed, "eval": {"every_steps": 6, "num_batches": 1, "batch_size": 16}}
    return parse(TrainConfig, ON_DIGITS | fixed | changes, "digits")


@pytest.mark.parametrize("name", ["Frozen", "Plain"])
def test_members_keep_their_own_frozen_weights(mine: str, name: str) -> None:
    settings = [digits(seed, model={"name": f"{mine}:{name}"}) for seed in range(3)]
    cohort = Cohort.create(settings)
    assert_same(cohort, list(cohort.train()), alone(settings))
    assert cohort.choice is not None
    assert "not trained" in cohort.choice.excluded["vmap"]
    with pytest.raises(UserError, match=r"got 'vmap' where members differ in values that are not trained"):
        Cohort.create(settings, route="vmap")


def test_what_is_not_trained_is_not_written_where_it_is_common(mine: str) -> None:
    settings = [digits(model={"name": f"{mine}:Frozen"}, schedule={"peak_lr": rate}) for rate in (0.01, 0.02)]
    for route in ("vmap", "single"):
        cohort = Cohort.create(settings, route=route)
        list(cohort.train(2))
        read = cohort.read(0)
        cohort.write(1, read)  # the same frozen values
        assert torch.equal(cohort.read(1)["module.head.weight"], read["module.head.weight"])
        read["module.proj.weight"] = 3.0 * read["module.proj.weight"]
        if route == "single":
            cohort.write(1, read)
            continue
        with pytest.raises(UserError, match=r"'module.proj.weight' must stay as it is with route 'vmap', got other"):
            cohort.write(1, read)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mean_error", "gives one mean for all targets"),
        ("mean_of_one", "has other values for outputs with an axis for the members"),
        ("mixing", "has other values for outputs with an axis for the members"),
        ("second_axis", "does not take outputs with an axis for the members"),
    ],
)
def test_a_loss_that_needs_members_apart(mine: str, name: str, reason: str) -> None:
    # as many examples as classes: nothing but the values tells that the axes are mixed up
    settings = [digits(seed, loss={"name": f"{mine}:{name}"}, batch_size=10) for seed in range(2)]
    cohort = Cohort.create(settings)
    assert_same(cohort, list(cohort.train()), alone(settings))
    with pytest.raises(UserError, match=f"route must suit the members, got 'stacked' where the loss {reason}"):
        Cohort.create(settings, route="stacked")


def test_what_is_the_user_s_or_compiled_is_not_recorded(mine: str) -> None:
    settings = [digits(seed, loss={"name": f"{mine}:each_error"}) for seed in range(2)]
    with pytest.raises(UserError, match="route must suit the members, got 'recorded' where the loss is the user's, "):
        Cohort.create(settings, route="recorded")
    settings = [digits(seed, compile=True) for seed in range(2)]
    with pytest.raises(UserError, match="route must suit the members, got 'recorded' where the model is compiled"):
        Cohort.create(settings, route="recorded")


@pytest.mark.parametrize("route", ["recorded", "stacked", "vmap"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"name": "resnet", "depth": 8, "width": 4}}, "the model keeps statistics of its batches"),
        ({"sam": {"rho": 0.1}}, "sam, sharpness-aware minimisation, takes two gradients"),
        ({"precision": "float16"}, "precision = 'float16' scales the losses"),
        ({"simulated_precision": {"mantissa_bits": 3, "exponent_bits": 4}}, "simulated_precision rounds inside"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_route_that_members_cannot_take(route: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"route must suit the members, got '{route}' where {reason}.*; use 'auto'"):
        Cohort.create([digits(seed, **changes) for seed in range(2)], route=route)


def test_members_that_are_alone_may_become_anything() -> None:
    cohort = Cohort.create([digits(0), digits(1)], route="alone")
    state = TrainState.create(digits(0))
    list(cohort.train(2)), list(train(state, 2))
    cohort.configure(0, digits(0, sam={"rho": 0.1}))
    state.config = digits(0, sam={"rho": 0.1})
    list(cohort.train()), list(train(state))
    assert torch.equal(weights(cohort.members[0]), weights(state))
    assert cohort.members[0].flops == state.flops > cohort.members[1].flops


def test_what_a_cohort_cannot_do_does_not_enter_it_later(tmp_path: Path) -> None:
    cohort = Cohort.create([digits(0), digits(1)], route="stacked")
    list(cohort.train(2))
    before = cohort.read(0)
    with pytest.raises(
        UserError, match=r"member 0 must suit the route 'stacked' of its cohort, got one where sam, .*; leave"
    ):
        cohort.configure(0, digits(0, sam={"rho": 0.1}))
    with pytest.raises(UserError, match=r"averaging.name must be None to continue from this checkpoint, got 'ema'"):
        cohort.configure(0, digits(0, averaging={"name": "ema"}))
    with pytest.raises(UserError, match=r"averaging.name must be None to continue from this checkpoint, got 'swa'"):
        cohort.copy(1, 0, digits(0, averaging={"name": "swa"}))
    TrainState.create(digits(0, sam={"rho": 0.1})).save(tmp_path / "sam.pt")
    with pytest.raises(UserError, match=r"member 1 must suit the route 'stacked' of its cohort, got one where sam, "):
        cohort.enter(1, tmp_path / "sam.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in cohort.read(0).items())
    list(cohort.train())
    assert cohort.finished
