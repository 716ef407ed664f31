"""Measuring the weights of a checkpoint, after the fact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape_ray.config import parse
from landscape_ray.data import Batch, TextData
from landscape_ray.errors import UserError
from landscape_ray.probes import PROBES, Estimate, Host, Probe
from landscape_ray.probes.gradients.opposing import OpposingGroups, OpposingSignalsProbe, opposing_groups
from landscape_ray.probes.gradients.per_example import examples_at
from landscape_ray.probes.spectrum.batch_size import check_batch_sizes
from landscape_ray.probes.spectrum.density import spectral_density
from landscape_ray.probes.spectrum.quadrature import SpectralDensity
from landscape_ray.training.loop import update
from landscape_ray.training.probe_tables import ProbesConfig
from landscape_ray.training.probing import (
    build_monitor,
    host_of,
    probe_batches,
    probed_weights,
    remember_update,
)
from landscape_ray.training.spectra import Spectra, spectra
from landscape_ray.training.state import TrainState
from landscape_ray.training.values import Values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was measured at the weights of a checkpoint.

    Attributes:
        step: updates completed.
        num_params: trainable parameters.
        estimates: by name, of each probe the main one first.
        num_examples: that each probe looked at, by its name.
        unknown: probes that do not apply to the run, with the reason.
        density: of the Hessian's spectrum, where it was asked for.
        outliers: the examples with opposing signals, where they were asked for.
        spectra: of layers, classes and batch sizes, where they were asked for.
    """

    step: int
    num_params: int
    estimates: dict[str, Estimate]
    num_examples: dict[str, int]
    unknown: dict[str, str]
    density: SpectralDensity | None = None
    outliers: OutlyingExamples | None = None
    spectra: Spectra | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlyingExamples:
    """The examples that the next update helps and harms most, to be looked at.

    Attributes:
        found: the groups.
        inputs: (2 k, ...), those whose loss falls first, as they go into the model.
        targets: (2 k, ...).
        texts: what each input says, where it is text.
        num_examples: that were searched.
    """

    found: OpposingGroups
    inputs: Tensor
    targets: Tensor
    texts: tuple[str, ...] | None
    num_examples: int

    @property
    def changes(self) -> Tensor:
        """Of the loss of each, (2 k,)."""
        return self.found.loss_changes[torch.cat([self.found.decreasing, self.found.increasing])]


def inspect(
    checkpoint: Path,
    probes: Sequence[str] = (),
    *,
    batch_size: int = 256,
    num_batches: int | None = None,
    density: bool = False,
    outliers: bool = False,
    by_layer: bool = False,
    by_target: bool = False,
    batch_sizes: Sequence[int] = (),
    num_eigenvalues: int = 3,
    double: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Return what probes say about the weights of a checkpoint, on a fixed batch of training data.

    Probes that ask for an update look at the weights after one more, made by the data and the learning rate that would
    come next; at the end of a run, where the schedule has none left, by the peak learning rate.

    Args:
        checkpoint: a file written by `TrainState.save`.
        probes: names; none: those that the run had, or sharpness.
        batch_size: examples in the probe batch, whatever the run's was.
        num_batches: see `ProbeTable`; None keeps each probe's own.
        density: whether to measure the spectral density of the Hessian, about 160 Hessian-vector products.
        outliers: whether to search the probe batch for groups of examples with opposing signals.
        by_layer: whether to measure the spectrum of each layer; see :func:`landscape_ray.training.spectra.spectra`.
        by_target: likewise, of the loss on each class.
        batch_sizes: likewise; batches against the whole probe batch.
        num_eigenvalues: likewise.
        double: whether probes measure copies of the weights in float64.
        progress: called with the name of each probe before it runs.

    Raises:
        UserError: no such file or probe, or less data than asked for.
    """
    if batch_sizes:
        check_batch_sizes(batch_sizes, batch_size * (num_batches or 1))  # before anything is measured
    state, _ = TrainState.load(checkpoint)
    tables = state.config.probes.tables
    names = list(probes) or list(tables) or ["sharpness"]
    for name in names:
        if name not in PROBES and name not in tables:
            raise UserError(f"--probes must name registered probes ({', '.join(PROBES)}), got '{name}'")
    sizes: dict[str, Any] = {"batch_size": batch_size, "every_steps": 1}
    sizes |= {} if num_batches is None else {"num_batches": num_batches}
    asked = {name: (tables[name].model_dump() if name in tables else {}) | sizes for name in names}
    custom = {name: asked.pop(name) for name in list(asked) if name not in PROBES}
    monitor = build_monitor(
        parse(ProbesConfig, asked | {"custom": custom}, "probes"),
        state.data,
        state.device,
        seed=state.config.seed,
        batch_size=state.config.batch_size,
    )
    moved: tuple[TrainState, Host] | None = None
    estimates: dict[str, Estimate] = {}
    num_examples: dict[str, int] = {}
    unknown: dict[str, str] = {}
    for name, probe in monitor.probes.items():
        if progress is not None:
            progress(name)
        if name == "distance_from_init":
            if name not in state.monitor.probes:
                unknown[name] = "the run had no such probe, so that nothing tells where it began"
                continue
            probe = state.monitor.probes[name]
        looked_at, host = state, host_of(state)
        if "update" in probe.needs:
            moved = moved or _one_more(checkpoint)
            looked_at, host = moved
        if not host.answers(probe.needs):
            unknown[name] = _reason(state, probe)
            continue
        probe.double = double
        looked_at.optimizer.eval()
        estimates |= probe.measure(looked_at.module, looked_at.objective, host)
        looked_at.optimizer.train()
        num_examples[name] = sum(weight for _, weight in probe.batches)
    found = None
    if density:
        if progress is not None:
            progress("spectral density")
        batches = probe_batches(state.data, state.device, state.config.seed, batch_size, num_batches or 1)
        state.optimizer.eval()
        found = spectral_density(state.module, state.objective, batches, route="auto", seed=state.config.seed)
    groups: OutlyingExamples | None = None
    if outliers:
        if progress is not None:
            progress("outlying examples")
        moved = moved or _one_more(checkpoint)
        after, host = moved
        if host.update is None:
            unknown["opposing_signals"] = _reason(state, OpposingSignalsProbe([]))
        else:
            searched = probe_batches(state.data, state.device, state.config.seed, batch_size, num_batches or 1)
            after.optimizer.eval()
            groups = _outliers(after, searched, host.update)
    parts: Spectra | None = None
    if by_layer or by_target or batch_sizes:
        state.optimizer.eval()
        parts = spectra(
            state,
            probe_batches(state.data, state.device, state.config.seed, batch_size, num_batches or 1),
            by_layer=by_layer,
            by_target=by_target,
            batch_sizes=batch_sizes,
            num_eigenvalues=num_eigenvalues,
            progress=progress,
        )
        unknown |= parts.unknown
    return Inspection(
        step=state.step,
        num_params=sum(parameter.numel() for parameter in state.optimizer.parameters),
        estimates=estimates,
        num_examples=num_examples,
        unknown=unknown,
        density=found,
        outliers=groups,
        spectra=parts,
    )


def _outliers(state: TrainState, batches: list[tuple[Batch, int]], update: Sequence[Tensor]) -> OutlyingExamples:
    found = opposing_groups(state.module, state.objective, batches, update, seed=state.config.seed)
    inputs, targets = examples_at(batches, torch.cat([found.decreasing, found.increasing]))
    texts: tuple[str, ...] | None = None
    if isinstance(state.data, TextData):
        known = [state.data.text_of(row) for row in inputs.tolist()]
        texts = tuple(row for row in known if row is not None) or None
    return OutlyingExamples(
        found=found,
        inputs=inputs.cpu(),
        targets=targets.cpu(),
        texts=texts,
        num_examples=sum(weight for _, weight in batches),
    )


def _one_more(checkpoint: Path) -> tuple[TrainState, Host]:
    """Return the run after one more update, and what a loop would tell a probe then."""
    state, _ = TrainState.load(checkpoint)
    schedule = state.config.schedule.build(state.config.num_steps)
    if state.step >= state.config.num_steps or float(schedule(state.step)) == 0.0:
        schedule = dataclasses.replace(schedule, name="constant", warmup_steps=0)
    lr, before = float(schedule(state.step)), probed_weights(state)
    if state.diverged is None:
        update(state, Values(state, schedule))
    if state.diverged is None:
        remember_update(state, before)
    return state, dataclasses.replace(host_of(state), lr=lr)


def _reason(state: TrainState, probe: Probe) -> str:
    if state.diverged is not None:
        return "the run has diverged"
    missing = " and ".join(sorted(probe.needs))
    return f"the optimizer '{state.config.optimizer.name}' has no {missing}"
