"""Spectra of the parts of a run: bands of a vocabulary, targets that are no classes, weights that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.training import TrainConfig, TrainState
from landscape_ray.training.probing import probe_batches
from landscape_ray.training.spectra import NUM_BANDS, spectra

EVAL = {"every_steps": 8, "num_batches": 1, "batch_size": 8}


def created(data: dict[str, Any], model: dict[str, Any]) -> TrainState:
    return TrainState.create(
        parse(TrainConfig, {"num_steps": 8, "batch_size": 8, "data": data, "model": model, "eval": EVAL}, "spectra")
    )


def batches_of(state: TrainState, size: int) -> list[Any]:
    return probe_batches(state.data, state.device, 0, size, 1)


def test_a_vocabulary_is_measured_in_bands_that_sum_to_the_whole() -> None:
    state = created({"name": "text", "context_length": 16}, {"name": "gpt", "depth": 1, "width": 16, "num_heads": 2})
    told: list[str] = []
    found = spectra(state, batches_of(state, 8), by_target=True, num_eigenvalues=1, progress=told.append)
    assert found.bands
    assert 2 <= len(found.classes) <= NUM_BANDS
    assert sum(part.size for part in found.classes.values()) == pytest.approx(1.0)
    assert all(name.startswith(f"{place} (") for place, name in enumerate(found.classes, start=1))
    assert any("'" in name or " tokens)" in name for name in found.classes)
    assert told[0] == "spectrum of the whole network"
    assert told[1:] == [f"spectrum of band {name}" for name in found.classes]
    assert found.whole is not None
    # the largest eigenvalue of a weighted sum is at most the weighted sum of the largest ones
    weighted = sum(part.size * part.found.largest[0].value for part in found.classes.values())
    errors = sum(part.size * part.found.largest[0].standard_error for part in found.classes.values())
    assert found.whole.largest[0].value <= weighted + errors


def test_layers_are_told_with_their_place_and_their_parameters() -> None:
    state = created({"name": "images"}, {"name": "mlp", "width": 8, "depth": 2})
    told: list[str] = []
    found = spectra(state, batches_of(state, 16), by_layer=True, num_eigenvalues=1, progress=told.append)
    sizes = sum(int(part.size) for part in found.layers.values())
    assert sizes == sum(p.numel() for p in state.module.parameters())
    assert told[1].startswith(f"spectrum of layer 1 of {len(found.layers)}, ")
    assert (found.classes, found.batch_sizes, found.unknown) == ({}, None, {})


def test_what_cannot_be_measured_is_said() -> None:
    state = created({"name": "random_features", "num_latents": 8}, {"name": "mlp", "width": 8})
    found = spectra(state, batches_of(state, 16), by_target=True)
    assert (found.classes, found.unknown) == ({}, {"class-wise spectra": "the targets are no classes"})
    with torch.no_grad():
        next(state.module.parameters()).fill_(float("nan"))
    lost = spectra(state, batches_of(state, 16), by_layer=True, batch_sizes=[2, 4])
    assert lost.unknown == {"spectra": "the weights are not finite"}
    assert (lost.whole, lost.layers, lost.batch_sizes) == (None, {}, None)
