"""The probes of a run: the tables under [train.probes], and what the loop tells a probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from landscape_ray.config import Model
from landscape_ray.data import Data
from landscape_ray.errors import UserError
from landscape_ray.probes import PROBES, Host, Monitor, Probe

if TYPE_CHECKING:
    from landscape_ray.training.state import TrainState


class ProbeTable(Model):
    """What the table of every probe has."""

    every_steps: int | Literal["auto"] = 100
    """Distance of measurements in updates; the first is at step 0, the last at the end. auto: as often as
    probes.budget allows."""
    batch_size: int = Field(default=4, ge=1)
    """Examples in the probe batch, the same at every measurement. Values on different batch sizes do not compare."""

    num_batches: int = Field(default=1, ge=1)
    """How many such batches. For most probes parts of one large batch, computed one after the other to save memory; for
    those of noise (batch_sharpness, gradient_noise_scale) the sample."""

    @model_validator(mode="after")
    def _at_least_one(self) -> ProbeTable:
        if self.every_steps != "auto" and self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {self.every_steps}")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the keywords of the probe's constructor."""
        return self.model_dump(exclude={"every_steps", "batch_size", "num_batches"})


class SharpnessConfig(ProbeTable):
    """The table [train.probes.sharpness]: top Hessian eigenvalue on a fixed batch of training data."""

    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Lanczos stops when the residual is below this share of the eigenvalue. At 0.03, one cold start in five settles
    early on a value that is more than 1 % too low; at 0.01, one in twenty-five."""
    max_matvecs: int = Field(default=30, ge=1, le=1000)
    route: Literal["exact", "finite_difference", "auto"] = "auto"
    """How Hessian-vector products are computed; auto: finite differences where a check with an exact one agrees."""

    def settings(self) -> dict[str, Any]:
        """Return the keywords of the probe's constructor."""
        return {"tol": self.tolerance, "max_matvecs": self.max_matvecs, "route": self.route}


class ProbesConfig(Model):
    """The table [train.probes]; a probe that is not named does not run."""

    budget: float | None = Field(default=None, gt=0)
    """Most that all probes together may take, as a share of the training time: 0.05 is 5 %. What is due waits until it
    can be paid for; so that with a budget the clock has a say in what is measured when. None: no limit."""
    sharpness: SharpnessConfig | None = None

    @property
    def tables(self) -> dict[str, ProbeTable]:
        """The probes that run, by name."""
        return {name: value for name, value in self if isinstance(value, ProbeTable)}

    @model_validator(mode="after")
    def _paid_for(self) -> ProbesConfig:
        for name, table in self.tables.items():
            if table.every_steps == "auto" and self.budget is None:
                raise ValueError(f"{name}.every_steps must be a number where probes.budget is not set, got 'auto'")
        return self


def build_monitor(config: ProbesConfig, data: Data, device: torch.device, seed: int) -> Monitor:
    """Return the probes that the configuration names, each with its fixed batches of training data.

    Raises:
        UserError: settings that don't go together.
    """
    probes: list[Probe] = []
    for name, table in config.tables.items():
        inputs, targets = (part.to(device) for part in data.probe_batch(seed, table.batch_size * table.num_batches))
        parts = zip(torch.split(inputs, table.batch_size), torch.split(targets, table.batch_size), strict=True)
        try:
            probes.append(PROBES[name](batches=[(part, len(part[0])) for part in parts], seed=seed, **table.settings()))
        except UserError as error:
            raise UserError(f"probes.{name}.{error}") from None
    every = {name: None if t.every_steps == "auto" else t.every_steps for name, t in config.tables.items()}
    return Monitor(probes, every, budget=config.budget)


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
    return [parameter.detach().clone() for parameter in state.optimizer.parameters]


def remember_update(state: TrainState, before: list[Tensor] | None) -> None:
    """Keep what the update added to the weights that `weights_before` returned."""
    if before is None:
        state.last_update = None
        return
    state.last_update = [
        parameter.detach() - old for parameter, old in zip(state.optimizer.parameters, before, strict=True)
    ]
