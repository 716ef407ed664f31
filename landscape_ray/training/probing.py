"""The probes of a run at work: their fixed batches, and what the loop tells them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from landscape_ray.data import Batch, Data
from landscape_ray.errors import UserError
from landscape_ray.probes import Host, Monitor, Probe
from landscape_ray.training.parallel import probe_part
from landscape_ray.training.probe_tables import ProbesConfig, TopTable

if TYPE_CHECKING:
    from landscape_ray.training.state import TrainState


def build_monitor(config: ProbesConfig, data: Data, device: torch.device, *, seed: int, batch_size: int) -> Monitor:
    """Return the probes that the configuration names, each with this process' part of its fixed batches.

    Args:
        config: the table.
        data: what the run is trained on.
        device: where it is.
        seed: of the run.
        batch_size: examples in an update.

    Raises:
        UserError: settings that don't go together.
    """
    probes: list[Probe] = []
    share = (config.budget or 0.0) / max(len(config.tables), 1)
    for name, table in config.tables.items():
        probe = table.probe(name)(batches=[], seed=seed, **table.settings())
        probe.double, probe.tf32 = table.double, isinstance(table, TopTable) and table.tf32
        size = table.batch_size
        if size == "auto" and table.every_steps != "auto":
            size = _affordable(share * table.every_steps, probe.price_gradients * table.num_batches, batch_size)
        assert isinstance(size, int)
        try:
            probe.batches = probe_part(probe_batches(data, device, seed, size, table.num_batches))
        except UserError as error:
            raise UserError(f"probes.{name}.batch_size is too large: {error}") from None
        if probe.name != name:
            raise UserError(f"probes.custom.{name} must be called as its probe, got one of name '{probe.name}'")
        probes.append(probe)
    every = {name: None if t.every_steps == "auto" else t.every_steps for name, t in config.tables.items()}
    return Monitor(probes, every, budget=config.budget)


def probe_batches(
    data: Data, device: torch.device, seed: int, batch_size: int, num_batches: int
) -> list[tuple[Batch, int]]:
    """Return fixed batches of training data, each with its number of examples."""
    inputs, targets = (part.to(device) for part in data.probe_batch(seed, batch_size * num_batches))
    parts = zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True)
    return [(part, len(part[0])) for part in parts]


def _affordable(num_updates: float, price_gradients: float, batch_size: int) -> int:
    """Return the largest probe batch for which a measurement costs no more than so many updates.

    An update costs its gradient and a little more, which is left as a reserve.
    """
    if price_gradients <= 0:
        return batch_size
    return min(batch_size, max(1, int(batch_size * num_updates / price_gradients)))


def host_of(state: TrainState) -> Host:
    """Return what the loop tells a probe about the run."""
    config, last = state.config, max(state.step - 1, 0)
    schedule = config.schedule.build(config.num_steps)
    return Host(
        step=state.step,
        lr=float(schedule(last)),
        momentum=schedule.momentum(last, config.optimizer.momentum),
        optimizer=config.optimizer.name,
        batch_size=config.batch_size,
        preconditioner=state.optimizer.preconditioner,
        update=state.last_update,
    )


def weights_before(state: TrainState) -> list[Tensor] | None:
    """Return a copy of the weights, where a probe asks for what the coming update adds to them."""
    if not state.monitor.wants("update", state.step + 1, state.config.num_steps):
        return None
    return probed_weights(state)


def remember_update(state: TrainState, before: list[Tensor] | None) -> None:
    """Keep what the update added to the weights that `weights_before` returned."""
    if before is None:
        state.last_update = None
        return
    state.last_update = [new - old for new, old in zip(probed_weights(state), before, strict=True)]


def probed_weights(state: TrainState) -> list[Tensor]:
    """Return a copy of the weights that probes look at: with schedule-free optimizers not those that are trained."""
    state.optimizer.eval()
    weights = [parameter.detach().clone() for parameter in state.optimizer.parameters]
    state.optimizer.train()
    return weights
