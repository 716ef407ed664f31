"""One model over two processes is the model of one process, and goes on from a checkpoint to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from landscape_ray.config import parse, with_values
from landscape_ray.data import open_data
from landscape_ray.data.prefetch import Prefetcher
from landscape_ray.errors import UserError
from landscape_ray.records import EvalRecord, ProbeRecord, StepRecord, VariantRecord
from landscape_ray.training import TrainConfig, TrainState, parallel, train
from landscape_ray.training.averaging import Averager
from landscape_ray.training.parallel import (
    Reducer,
    World,
    check_module,
    check_parts,
    fingerprint,
    probe_part,
    world,
)

BASE: dict[str, Any] = {
    "num_steps": 10,
    "batch_size": 4,
    "data": {"context_length": 16},
    "model": {"depth": 1, "width": 16, "num_heads": 2},
    "schedule": {"name": "wsd", "peak_lr": 0.01, "warmup_steps": 2},
    "eval": {"every_steps": 5, "num_batches": 3, "batch_size": 4},
    "probes": {"gradient_norms": {"every_steps": 5}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulation_steps": 2, "clipping.threshold": 0.05},
    "sam": {"sam": {"rho": 0.05}, "clipping": {"name": "auto", "window": 5}},
    "averaged": {"optimizer": {"name": "sgd", "nesterov": True}, "averaging": {"name": "ema", "decay": 0.9}},
    "dropout": {"model.dropout": 0.2},
}


def config_of(changes: dict[str, Any]) -> TrainConfig:
    return parse(TrainConfig, with_values(BASE, changes), "tiny")


def doubled(config: TrainConfig) -> TrainState:
    state = TrainState.create(config)
    state.module.double()
    if config.averaging is not None:
        state.averager = Averager(state.module, config.averaging, config.num_steps)
    return state


def course(state: TrainState, until: int | None = None) -> list[float]:
    """Train; return gradient norms, losses and measurements in their order."""
    found: list[float] = []
    for record in train(state, until):
        if isinstance(record, StepRecord):
            # losses are summed up in float32 before they are recorded
            found += [record.grad_norm, float(f"{record.loss_nats:.4f}")]
        elif isinstance(record, (EvalRecord, VariantRecord)):
            found += [record.loss_nats, record.accuracy or math.nan]
        elif isinstance(record, ProbeRecord):
            found.append(record.value)
    return found


def in_process(rank: int, folder: Path) -> None:
    """Be one of two processes: run every setting, the first also in two halves."""
    found: dict[str, Any] = {name: course(doubled(config_of(changes))) for name, changes in SETTINGS.items()}
    whole = TrainState.create(config_of({}))
    found["whole"] = course(whole)
    half = TrainState.create(config_of({}))
    first = course(half, 5)
    half.save(folder / f"half{rank}.pt")
    resumed, _ = TrainState.load(folder / f"half{rank}.pt")
    found["halves"] = first + course(resumed)
    found["fingerprints"] = [fingerprint(whole.module), fingerprint(resumed.module)]
    found["world"] = world()
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    pair.call(__file__, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.acceptance
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "dropout"])
def test_two_processes_train_what_one_trains(found: list[dict[str, Any]], name: str) -> None:
    alone = course(doubled(config_of(SETTINGS[name])))
    assert len(alone) > 20
    assert found[0][name] == pytest.approx(alone, rel=1e-9, nan_ok=True)


def test_both_processes_have_the_same_numbers(found: list[dict[str, Any]]) -> None:
    assert [each["world"] for each in found] == [[0, 2], [1, 2]]
    first, second = ({name: v for name, v in each.items() if name != "world"} for each in found)
    assert json.dumps(first) == json.dumps(second)


@pytest.mark.acceptance
def test_a_run_over_two_processes_goes_on_to_the_bit(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["halves"] == each["whole"]
        assert each["fingerprints"][0] == each["fingerprints"][1]


def test_processes_drop_different_units(found: list[dict[str, Any]]) -> None:
    alone = course(doubled(config_of(SETTINGS["dropout"])))
    assert found[0]["dropout"][-4:] != pytest.approx(alone[-4:], rel=1e-9)
    assert all(math.isfinite(loss) for loss in found[0]["dropout"][-4:-2])


@pytest.mark.parametrize(
    ("changes", "num_workers", "said"),
    [
        ({}, 3, r"batch_size must be a multiple of workers x accumulation_steps = 3 x 1, got 4; each worker takes"),
        ({"accumulation_steps": 4}, 2, r"= 2 x 4, got 4"),
        ({"probes.opposing_signals": {}}, 2, r"probes.opposing_signals must be measured in one process"),
        ({"probes.sharpness": {"batch_size": 1}}, 2, r"probes.sharpness.batch_size must be at least .* 2, got 1"),
        ({"probes.batch_sharpness": {"num_batches": 3}}, 4, r"probes.batch_sharpness.num_batches must be .* 4, got 3"),
    ],
)
def test_a_run_that_cannot_be_cut_is_refused(changes: dict[str, Any], num_workers: int, said: str) -> None:
    config = config_of(changes)
    check_parts(config, 1)
    with pytest.raises(UserError, match=said):
        check_parts(config, num_workers)


def test_batch_normalisation_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    check_module(module, 1)
    check_module(nn.LayerNorm(2), 2)
    with pytest.raises(UserError, match=r"a model over 2 workers must not use statistics .* batch normalisation '1'"):
        check_module(module, 2)


def test_shares_are_disjoint_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(12).view(6, 2)
    assert torch.equal(torch.cat([World(rank, 3).slice(rows) for rank in range(3)]), rows)
    assert sorted(World(0, 2).part([1, 2, 3]) + World(1, 2).part([1, 2, 3])) == [1, 2, 3]
    assert World().slice(rows) is rows
    batches = [((rows, rows), 6)]
    assert probe_part(batches) is batches
    monkeypatch.setattr(parallel, "world", lambda: World(1, 4))
    ((inputs, targets), number) = probe_part(batches)[0]
    assert (inputs.tolist(), targets.tolist(), number) == ([[4, 5], [6, 7]], [[4, 5], [6, 7]], 2)
    assert [number for _, number in probe_part([((rows, rows), k) for k in range(5)])] == [1]


class Work:
    def wait(self) -> None: ...


def test_parameters_that_one_process_does_not_use_have_a_mean_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes that do the same, the sum is twice what one has."""
    monkeypatch.setattr(parallel, "world", lambda: World(0, 2))
    monkeypatch.setattr(parallel, "BUCKET_BYTES", 8)
    monkeypatch.setattr(parallel.distributed, "all_reduce", lambda flat, async_op=False: (flat.mul_(2), Work())[1])
    first, second, third = (torch.ones(3, requires_grad=True) for _ in range(3))
    first.grad, second.grad = torch.arange(3.0), torch.ones(3)
    reduce = Reducer([first, second, third])
    assert reduce(torch.tensor(5.0)) == 5.0
    assert (first.grad.tolist(), third.grad) == ([0, 1, 2], None)
    second.grad = None
    reduce(torch.tensor(5.0))
    assert second.grad is not None
    assert second.grad.tolist() == [0, 0, 0]
    third.grad = torch.ones(3)
    with pytest.raises(UserError, match="must use the same parameters in every update, got one that had no gradient"):
        reduce(torch.tensor(5.0))


def test_a_fingerprint_knows_every_bit() -> None:
    module = nn.Linear(3, 2)
    before = fingerprint(module)
    with torch.no_grad():
        module.weight[1, 2] = torch.nextafter(module.weight[1, 2], torch.tensor(9.0))
    assert fingerprint(module) != before
    assert fingerprint(module.double()) == fingerprint(module)


def test_a_loader_gives_its_part_of_every_batch() -> None:
    data = open_data(config_of({}).data)
    whole, _ = data.batch(0, 3, 6)
    parts = [Prefetcher(data, torch.device("cpu"), part=(k, 3)).get(0, 3, 6)[0] for k in range(3)]
    assert torch.equal(torch.cat(parts), whole)
