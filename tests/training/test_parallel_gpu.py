"""One model over two processes that share a GPU: gradients on the device, averaged by gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.records import EvalRecord, StepRecord
from landscape_ray.training import TrainConfig, TrainState, train
from landscape_ray.training.parallel import fingerprint

CONFIG: dict[str, Any] = {
    "num_steps": 10,
    "batch_size": 8,
    "device": "cuda",
    "data": {"context_length": 32},
    "model": {"depth": 1, "width": 32, "num_heads": 2},
    "schedule": {"name": "wsd", "peak_lr": 0.01, "warmup_steps": 2},
    "eval": {"every_steps": 5, "num_batches": 2, "batch_size": 4},
    "probes": {"sharpness": {"every_steps": 5, "batch_size": 4}},
}
PRECISIONS = ("float32", "bfloat16", "float16")


def course(precision: str, path: Path | None = None) -> tuple[list[float], int]:
    """Train, with a break in the middle where there is a path; return the losses and what the weights are."""
    config = parse(TrainConfig, {**CONFIG, "precision": precision}, "gpu")
    state = TrainState.create(config)
    losses = []
    for until in (5, 10) if path is not None else (10,):
        if until == 10 and path is not None:
            state.save(path)
            state, _ = TrainState.load(path)
        losses += [each.loss_nats for each in train(state, until) if isinstance(each, (StepRecord, EvalRecord))]
    return losses, fingerprint(state.module)


def in_process(rank: int, folder: Path) -> None:
    """Be one of two processes."""
    found = {name: [course(name), course(name, folder / f"{name}-{rank}.pt")] for name in PRECISIONS}
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_processes_on_a_gpu_train_what_one_trains(pair: Any, tmp_path: Path) -> None:
    pair.call(__file__, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name in PRECISIONS:
        (losses, weights), (resumed, weights_resumed) = first[name]
        assert losses == pytest.approx(course(name)[0], rel=1e-3 if name == "float32" else 3e-2)
        assert (losses, weights) == (resumed, weights_resumed)
        assert [each[1] for each in first[name]] == [each[1] for each in second[name]]
