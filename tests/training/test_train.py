import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.config import parse, with_values
from landscape_ray.errors import UserError
from landscape_ray.records import EvalRecord, EventRecord, ProbeRecord, Record, StepRecord
from landscape_ray.training import TrainConfig, TrainState, read_checkpoint, train
from landscape_ray.training.state import checksum, select_device

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_gpt.json"


def make(tiny: dict[str, Any], **values: Any) -> TrainConfig:
    return parse(TrainConfig, with_values(tiny, {key.replace("__", "."): v for key, v in values.items()}), "tiny")


def essence(records: list[Record]) -> list[tuple[Any, ...]]:
    """What must be equal between equal runs: everything but clocks."""
    out = []
    for r in records:
        fields = {k: getattr(r, k) for k in r.__dataclass_fields__ if not k.endswith(("seconds", "unix"))}
        out.append((r.kind, *fields.items()))
    return out


def assert_same_weights(a: TrainState, b: TrainState) -> None:
    for (name, p), q in zip(a.module.state_dict().items(), b.module.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    for one, other in zip(a.optimizer.parts, b.optimizer.parts, strict=True):
        for p, q in zip(one.state.values(), other.state.values(), strict=True):
            assert all(torch.equal(p[key], q[key]) for key in p)


def test_records_come_in_order_and_on_time(tiny_config: TrainConfig) -> None:
    records = list(train(TrainState.create(tiny_config)))
    assert [r.step for r in records if isinstance(r, StepRecord)] == list(range(1, 11))
    assert [r.step for r in records if isinstance(r, EvalRecord)] == [0, 5, 10]
    assert [r.step for r in records if isinstance(r, ProbeRecord)] == [0, 5, 10]
    assert all(a.step <= b.step and a.num_tokens <= b.num_tokens for a, b in pairwise(records))
    assert records[-1].num_tokens == 10 * 4 * 16
    costs = sum(r.cost_seconds for r in records if not isinstance(r, EventRecord))
    assert costs == pytest.approx(records[-1].elapsed_seconds, rel=1e-9)


def test_the_learning_rate_in_the_record_is_the_one_of_the_schedule(tiny_config: TrainConfig) -> None:
    records = [r for r in train(TrainState.create(tiny_config)) if isinstance(r, StepRecord)]
    schedule = tiny_config.schedule.build(10)
    assert [r.lr for r in records] == [schedule(k) for k in range(10)]


@pytest.mark.acceptance
@pytest.mark.parametrize("change", [{}, {"model__dropout": 0.2}, {"model__positions": "learned"}])
def test_resume_is_bit_exact(tiny: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    config = make(tiny, **change)
    whole = TrainState.create(config)
    expected = list(train(whole))

    first = TrainState.create(config)
    records = list(train(first, until_step=5))
    first.save(tmp_path / "state.pt", note="half")
    second, extra = TrainState.load(tmp_path / "state.pt")
    records += list(train(second))

    assert extra == {"note": "half"}
    assert essence(records) == essence(expected)
    assert_same_weights(whole, second)
    assert second.finished
    assert list(train(second)) == []


def test_stopping_between_updates_changes_nothing(tiny_config: TrainConfig) -> None:
    whole, piecewise = TrainState.create(tiny_config), TrainState.create(tiny_config)
    expected = list(train(whole))
    records = [r for until in range(1, 11) for r in train(piecewise, until_step=until)]
    assert essence(records) == essence(expected)


def test_global_generators_are_left_alone(tiny: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    list(train(TrainState.create(make(tiny, model__dropout=0.3))))
    assert torch.equal(before, torch.get_rng_state())


def test_runs_without_a_probe_have_the_same_weights(tiny: dict[str, Any]) -> None:
    with_probe, without = TrainState.create(make(tiny)), TrainState.create(make(tiny, probes={}))
    list(train(with_probe))
    list(train(without))
    assert with_probe.probe_seconds > 0
    assert without.probe_seconds == 0
    assert_same_weights(with_probe, without)


def test_seeds_differ(tiny: dict[str, Any]) -> None:
    a, b = (next(iter(train(TrainState.create(make(tiny, seed=seed, probes={})), 1))) for seed in (0, 1))
    assert a.loss_nats != b.loss_nats  # type: ignore[union-attr]


def test_a_mutated_value_wins_over_the_checkpoint(tiny: dict[str, Any], tmp_path: Path) -> None:
    state = TrainState.create(make(tiny))
    list(train(state, 5))
    state.save(tmp_path / "state.pt")
    mutated = make(tiny, schedule__peak_lr=0.001, optimizer__weight_decay=0.5, optimizer__beta1=0.7)
    continued, _ = TrainState.load(tmp_path / "state.pt", mutated)
    record = next(r for r in train(continued, 6) if isinstance(r, StepRecord))
    assert record.lr == mutated.schedule.build(10)(5) == 0.001
    assert (record.weight_decay, record.momentum) == (0.5, 0.7)
    decays, plain = continued.optimizer.parts[0].param_groups
    assert (decays["lr"], decays["weight_decay"], decays["betas"]) == (0.001, 0.5, (0.7, 0.95))
    assert plain["weight_decay"] == 0.0


@pytest.mark.acceptance
def test_golden_losses(tiny: dict[str, Any]) -> None:
    """The numbers that a refactoring must not change. On another CPU the last digits differ, hence the tolerance."""
    golden = json.loads(GOLDEN.read_text())
    corpus = str(GOLDEN.parent / "corpus")  # not the standard library, which changes with Python's version
    records = list(train(TrainState.create(make(tiny, data__source=corpus))))
    losses = [r.loss_nats for r in records if isinstance(r, StepRecord)]
    evals = [r.loss_nats for r in records if isinstance(r, EvalRecord)]
    sharpness = [r.value for r in records if isinstance(r, ProbeRecord)]
    assert losses == pytest.approx(golden["train_loss_nats"], rel=1e-4)
    assert evals == pytest.approx(golden["eval_loss_nats"], rel=1e-4)
    assert sharpness == pytest.approx(golden["sharpness"], rel=2e-2)


def test_divergence_is_an_outcome(tiny: dict[str, Any]) -> None:
    state = TrainState.create(make(tiny, clipping__name="none"))
    next(iter(train(state, 1)))
    with torch.no_grad():
        state.module.blocks[0].up.weight.fill_(math.inf)  # type: ignore[union-attr, operator]
    before = {name: p.clone() for name, p in state.module.state_dict().items()}
    records = list(train(state))
    assert isinstance(records[-1], EventRecord)
    assert records[-1].event == "diverged"
    assert state.diverged is not None
    assert "gradient norm" in state.diverged
    assert state.finished
    assert all(torch.equal(before[name], p) or bool(p.isnan().any()) for name, p in state.module.state_dict().items())
    assert list(train(state)) == []


def test_a_useless_held_out_loss_is_a_divergence_too(tiny: dict[str, Any]) -> None:
    state = TrainState.create(make(tiny, probes={}))
    with torch.no_grad():
        state.module.embedding.weight[0, 0] = math.nan
    records = list(train(state))
    assert [r.kind for r in records] == ["eval", "event"]
    assert "held-out loss nan at step 0" in str(state.diverged)
    assert math.isnan(state.best_loss_nats)


@pytest.mark.acceptance
def test_a_model_learns_the_standard_library(tiny: dict[str, Any]) -> None:
    config = make(
        tiny, num_steps=60, batch_size=16, data__context_length=64, model__width=64, model__num_heads=4, probes={},
        eval__every_steps=60, eval__num_batches=4,
    )  # fmt: skip
    evals = [r.loss_nats for r in train(TrainState.create(config)) if isinstance(r, EvalRecord)]
    assert evals[0] > 5.0
    assert evals[-1] < 3.0


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "version", "pickle"])
def test_bad_checkpoints_are_refused(tiny_config: TrainConfig, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.pt"
    state = TrainState.create(tiny_config)
    state.save(path)
    messages = {
        "missing": "no checkpoint at",
        "truncated": r"cannot be read .*delete it to start this run anew",
        "foreign": "is not a checkpoint of landscape_ray",
        "version": "has version 99, this program reads 4",
        "pickle": "cannot be read",
    }
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(1)}, path)
    elif damage == "version":
        torch.save({**read_checkpoint(path), "version": 99}, path)
    else:
        import pickle

        path.write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=messages[damage]):
        TrainState.load(path)


@pytest.mark.parametrize("name", ["version", "counters", "optimizer"])
def test_a_tensor_under_one_of_our_names_is_refused(tiny_config: TrainConfig, tmp_path: Path, name: str) -> None:
    """It compares to a tensor, and takes a name for an index."""
    path = tmp_path / "state.pt"
    TrainState.create(tiny_config).save(path)
    payload = {**read_checkpoint(path), name: torch.zeros(2)}
    torch.save({**payload, "checksum": checksum(payload)}, path)
    said = "has version tensor" if name == "version" else f"does not fit the run .TypeError: {name} is a Tensor"
    with pytest.raises(UserError, match=said):
        TrainState.load(path)


def test_a_checkpoint_keeps_its_model(tiny: dict[str, Any], tmp_path: Path) -> None:
    TrainState.create(make(tiny)).save(tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"was made with model = .*keep model or start a new run"):
        TrainState.load(tmp_path / "state.pt", make(tiny, model__depth=2))


def test_a_checkpoint_is_whole_or_absent(tiny_config: TrainConfig, tmp_path: Path, monkeypatch: Any) -> None:
    state = TrainState.create(tiny_config)
    path = tmp_path / "state.pt"
    state.save(path)
    before = path.read_bytes()
    list(train(state, 2))

    def full_disk(payload: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*state\.pt: no space left on device; free some space"):
        state.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_missing_device_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=r"train\.device must be available, got 'cuda'"):
        select_device("cuda")


def test_unknown_schedules_and_long_warmups_are_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"schedule.name must be a known name .* got 'cosin'; did you mean 'cosine'\?"):
        make(tiny, schedule__name="cosin")
    with pytest.raises(UserError, match=r"schedule.warmup_steps must be at most num_steps = 10, got 11"):
        make(tiny, schedule__warmup_steps=11)


def test_bfloat16_trains_and_keeps_its_weights_in_float32(tiny: dict[str, Any]) -> None:
    state = TrainState.create(make(tiny, precision="bfloat16"))
    records = list(train(state))
    assert all(math.isfinite(r.loss_nats) for r in records if isinstance(r, StepRecord))
    assert all(p.dtype == torch.float32 for p in state.module.parameters())
    plain = list(train(TrainState.create(make(tiny))))
    assert records[-1].num_tokens == plain[-1].num_tokens
    first, second = (next(r.loss_nats for r in rs if isinstance(r, StepRecord)) for rs in (records, plain))
    assert first == pytest.approx(second, rel=0.02)


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(tiny: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on = {name: list(train(TrainState.create(make(tiny, device=name)))) for name in ("cpu", "cuda")}
    losses = {name: [r.loss_nats for r in rs if isinstance(r, StepRecord)] for name, rs in on.items()}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_divergence_on_a_gpu_keeps_the_weights_from_before(tiny: dict[str, Any], name: str) -> None:
    """The update is started before the host knows that it must not be made."""
    changes = {"optimizer": {"name": name}, "schedule__peak_lr": 1e-3, "device": "cuda", "probes": {}}
    state = TrainState.create(make(tiny, **changes))
    list(train(state, 2))
    with torch.no_grad():
        next(state.module.parameters()).view(-1)[0] = torch.nan
    before = [tensor.clone() for tensor in (*state.module.parameters(), *_states(state))]
    events = [record for record in train(state) if isinstance(record, EventRecord)]
    assert [event.event for event in events] == ["diverged"]
    assert state.step == 2
    for kept, tensor in zip(before, (*state.module.parameters(), *_states(state)), strict=True):
        torch.testing.assert_close(kept, tensor, rtol=0, atol=0, equal_nan=True)


def _states(state: TrainState) -> list[torch.Tensor]:
    states = [values for part in state.optimizer.parts for values in part.state.values()]
    return [tensor for values in states for tensor in values.values()]


@pytest.mark.slow
def test_compiled_steps_agree_with_plain_ones(tiny: dict[str, Any]) -> None:
    plain, compiled = (
        [r.loss_nats for r in train(TrainState.create(make(tiny, compile=flag))) if isinstance(r, StepRecord)]
        for flag in (False, True)
    )
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_sam_leaves_running_statistics_of_the_weights_that_the_run_has(tiny: dict[str, Any]) -> None:
    model = {"name": "resnet", "depth": 8, "width": 4, "norm": "batch"}
    changes = {"data": {"name": "images"}, "model": model, "probes": {}, "schedule__peak_lr": 1e-12}
    plain, sam = (TrainState.create(make(tiny, **changes, **more)) for more in ({}, {"sam": {"rho": 0.5}}))
    for state in (plain, sam):
        list(train(state, 1))
    for (name, one), other in zip(plain.module.named_buffers(), sam.module.buffers(), strict=True):
        assert torch.equal(one, other), name
    assert sam.flops == 2 * plain.flops
