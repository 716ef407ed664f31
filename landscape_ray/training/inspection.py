"""Measuring the weights of a checkpoint, after the fact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.probes import PROBES, Estimate
from landscape_ray.probes.spectrum.density import SpectralDensity, spectral_density
from landscape_ray.training.loop import update
from landscape_ray.training.probing import ProbesConfig, build_monitor, host_of, probe_batches
from landscape_ray.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was measured at the weights of a checkpoint.

    Attributes:
        step: updates completed.
        num_examples: in the probe batch.
        num_params: trainable parameters.
        estimates: by name, of each probe the main one first.
        unknown: probes that do not apply to the run, with the reason.
        density: of the Hessian's spectrum, where it was asked for.
    """

    step: int
    num_examples: int
    num_params: int
    estimates: dict[str, Estimate]
    unknown: dict[str, str]
    density: SpectralDensity | None = None


def inspect(
    checkpoint: Path,
    probes: Sequence[str] = (),
    *,
    batch_size: int = 256,
    num_batches: int = 1,
    density: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Return what probes say about the weights of a checkpoint, on a fixed batch of training data.

    Probes that ask for an update get the one that the run would make next.

    Args:
        checkpoint: a file written by `TrainState.save`.
        probes: names; none: those that the run had, or sharpness.
        batch_size: examples in the probe batch, whatever the run's was.
        num_batches: see `ProbeTable`.
        density: whether to measure the spectral density of the Hessian, about 190 Hessian-vector products.
        progress: called with the name of each probe before it runs.

    Raises:
        UserError: no such file or probe, or less data than asked for.
    """
    state, _ = TrainState.load(checkpoint)
    tables = state.config.probes.tables
    names = list(probes) or list(tables) or ["sharpness"]
    for name in names:
        if name not in PROBES and name not in tables:
            raise UserError(f"--probes must name registered probes ({', '.join(PROBES)}), got '{name}'")
    sizes = {"batch_size": batch_size, "every_steps": 1}
    asked = {name: tables[name].model_dump() if name in tables else {} for name in names}
    asked = {name: table | sizes for name, table in asked.items()}
    for table in asked.values():
        if num_batches > 1:
            table["num_batches"] = num_batches
    custom = {name: asked.pop(name) for name in list(asked) if name not in PROBES}
    monitor = build_monitor(
        parse(ProbesConfig, asked | {"custom": custom}, "probes"),
        state.data,
        state.device,
        seed=state.config.seed,
        batch_size=state.config.batch_size,
    )
    state.last_update = _next_update(checkpoint)
    host = host_of(state)
    estimates: dict[str, Estimate] = {}
    unknown: dict[str, str] = {}
    state.optimizer.eval()
    for name, probe in monitor.probes.items():
        if progress is not None:
            progress(name)
        if not host.answers(probe.needs):
            unknown[name] = f"the optimizer '{state.config.optimizer.name}' has no {' and '.join(sorted(probe.needs))}"
            continue
        estimates |= probe.measure(state.module, state.objective, host)
    found = None
    if density:
        if progress is not None:
            progress("spectral density")
        batches = probe_batches(state.data, state.device, state.config.seed, batch_size, num_batches)
        found = spectral_density(state.module, state.objective, batches, seed=state.config.seed)
    return Inspection(
        step=state.step,
        num_examples=batch_size * num_batches,
        num_params=sum(parameter.numel() for parameter in state.optimizer.parameters),
        estimates=estimates,
        unknown=unknown,
        density=found,
    )


def _next_update(checkpoint: Path) -> list[Tensor] | None:
    """Return what the next update would add to the weights; None where it cannot be made."""
    twin, _ = TrainState.load(checkpoint)
    before = [parameter.detach().clone() for parameter in twin.optimizer.parameters]
    schedule = twin.config.schedule.build(twin.config.num_steps)
    if twin.diverged is not None:
        return None
    if twin.step >= twin.config.num_steps:
        # at the end of a schedule the learning rate may be zero: the direction is that of the peak
        schedule = dataclasses.replace(schedule, name="constant", warmup_steps=0)
    update(twin, schedule)
    moved = [new.detach() - old for new, old in zip(twin.optimizer.parameters, before, strict=True)]
    return moved if any(bool(torch.any(part != 0)) for part in moved) else None
