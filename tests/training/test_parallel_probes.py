"""Every probe of a run over two processes measures what it measures in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.probes import PROBES
from landscape_ray.records import ProbeRecord
from landscape_ray.training import TrainConfig, TrainState, train

ALONE = {"opposing_signals"}
"""Refused."""
DRAWN = {"linf_smoothness", "gradient_noise_scale", "average_case_sharpness", "ggn_trace", "trace", "spectral_density"}
"""Estimates from random vectors, or from labels that each process draws for itself; their error is theirs to tell."""
FAMILIES = (*DRAWN, "worst_case_sharpness", "logit_sharpness")


def measured() -> dict[str, float]:
    """Return what all probes find in the middle and at the end of a short run."""
    tables: dict[str, Any] = {
        name: {"every_steps": 2, "batch_size": 8} for name in PROBES if name not in ALONE and ":" not in name
    }
    tables["gradient_noise_scale"]["batch_size"] = 16
    config = {
        "num_steps": 4,
        "batch_size": 4,
        "data": {"name": "images"},
        "model": {"name": "mlp", "width": 8},
        "eval": {"every_steps": 4, "num_batches": 1, "batch_size": 4},
        "schedule": {"name": "constant", "peak_lr": 0.01},
        "probes": tables,
    }
    state = TrainState.create(parse(TrainConfig, config, "probes"))
    return {f"{each.probe} at {each.step}": each.value for each in train(state) if isinstance(each, ProbeRecord)}


def in_process(rank: int, folder: Path) -> None:
    """Be one of two processes."""
    (folder / f"{rank}.json").write_text(json.dumps(measured()))


@pytest.mark.slow
@pytest.mark.acceptance
def test_probes_of_two_processes_measure_what_one_measures(pair: Any, tmp_path: Path) -> None:
    pair.call(__file__, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == pytest.approx(second, nan_ok=True)
    alone = measured()
    assert first.keys() == alone.keys()
    far = {
        name: (first[name], value)
        for name, value in alone.items()
        if first[name] != pytest.approx(value, rel=0.5 if name.startswith(FAMILIES) else 0.03, abs=1e-6, nan_ok=True)
    }
    assert far == {}
