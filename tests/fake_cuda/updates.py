"""What updates do on a CUDA device that is not there, as JSON; a process of its own: `updates.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.fake_cuda import device

CONFIG: dict[str, Any] = {
    "num_steps": 1000,
    "batch_size": 4,
    "device": "cuda",
    "data": {"context_length": 32, "vocab_size": 512},
    "model": {"depth": 2, "width": 32, "num_heads": 2, "positions": "learned"},
    "schedule": {"name": "cosine", "peak_lr": 0.01, "warmup_steps": 2},
    "eval": {"every_steps": 1000, "num_batches": 1, "batch_size": 1},
}
CLIPPINGS = ("none", "norm", "coordinate", "auto")


def updates(record: device.Record, **values: Any) -> dict[str, Any]:
    """Return what the third update of a run does."""
    import numpy as np

    from landscape_ray.config import parse
    from landscape_ray.data import TextData
    from landscape_ray.records import StepRecord
    from landscape_ray.training import TrainConfig, TrainState, train

    config = parse(TrainConfig, {**CONFIG, **values}, "fake")
    tokens = np.arange(20_000, dtype=np.uint16) % 512
    state = TrainState.create(config, TextData(tokens, tokens[:2_000], 512, 32))
    list(train(state, 2))
    record.clear()
    records = list(train(state, 3))
    return {
        "steps": sum(isinstance(each, StepRecord) for each in records),
        "waits": record.waits.copy(),
        "ops": record.table(),
        "bytes": record.num_bytes,
    }


def main(folder: Path) -> None:
    """Print what each case does; the libraries are kept in the folder."""
    device.load(folder)  # before torch, which therefore nothing here imports at its top
    with device.fake_cuda() as record:
        cases = [("adamw", c, "bfloat16") for c in CLIPPINGS] + [("adamw", "norm", p) for p in ("float32", "float16")]
        cases += [("sgd", "norm", "bfloat16"), ("muon", "norm", "bfloat16"), ("muon", "auto", "float32")]
        found = {
            f"{optimizer} {clipping} {precision}": updates(
                record, optimizer={"name": optimizer}, clipping={"name": clipping}, precision=precision
            )
            for optimizer, clipping, precision in cases
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
