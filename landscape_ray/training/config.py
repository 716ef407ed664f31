"""What one run is: the tables under [train] of a sweep file, validated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from landscape_ray.config import Model
from landscape_ray.data import TextConfig
from landscape_ray.models import GPTConfig
from landscape_ray.registry import resolve
from landscape_ray.schedules import SCHEDULES, Schedule


class OptimizerConfig(Model):
    """The table [train.optimizer]: AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices only, times the learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest L2 norm of the whole gradient; 0 switches clipping off."""


class ScheduleConfig(Model):
    """The table [train.schedule]: the learning rate as a function of the step."""

    name: str = "wsd"
    """constant | linear | cosine | wsd, or the path package.module:Name of a shape of yours."""
    peak_lr: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end divided by the peak."""
    cooldown_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps spent in the cooldown (wsd)."""
    cooldown_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the cooldown (wsd); sqrt is 1 - sqrt(progress)."""

    @model_validator(mode="after")
    def _known(self) -> ScheduleConfig:
        resolve(self.name, SCHEDULES, "schedule.name")
        return self

    def build(self, num_steps: int) -> Schedule:
        """Return the schedule for a run of `num_steps` updates."""
        return Schedule(
            name=self.name,
            peak=self.peak_lr,
            num_steps=num_steps,
            warmup_steps=self.warmup_steps,
            final_ratio=self.final_ratio,
            cooldown_fraction=self.cooldown_fraction,
            cooldown_shape=self.cooldown_shape,
        )


class EvalConfig(Model):
    """The table [train.eval]: held-out loss on the same fixed windows every time."""

    every_steps: int = Field(default=50, ge=1)
    num_batches: int = Field(default=8, ge=1)
    batch_size: int = Field(default=32, ge=1)


class SharpnessConfig(Model):
    """The table [train.probes.sharpness]: top Hessian eigenvalue on a fixed batch of training data."""

    every_steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=4, ge=1)
    """Sequences in the probe batch."""
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Lanczos stops when the residual is below this share of the eigenvalue. At 0.03, one cold start in five settles
    early on a value that is more than 1 % too low; at 0.01, one in twenty-five."""
    max_matvecs: int = Field(default=30, ge=1, le=1000)
    route: Literal["exact", "finite_difference", "auto"] = "auto"
    """How Hessian-vector products are computed; auto: finite differences where a check with an exact one agrees."""


class ProbesConfig(Model):
    """The table [train.probes]; a probe that is not named does not run."""

    sharpness: SharpnessConfig | None = None


class TrainConfig(Model):
    """The table [train]: everything that determines one run."""

    num_steps: int = Field(ge=1)
    """Optimizer updates."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per update."""
    seed: int = Field(default=0, ge=0)
    """Initial weights, order of the data and dropout."""
    data: TextConfig = TextConfig()
    model: GPTConfig = GPTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    probes: ProbesConfig = ProbesConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products under autocast; weights, optimizer and probes stay in float32."""
    compile: bool = False
    """Whether training steps go through torch.compile."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainConfig:
        if self.schedule.warmup_steps > self.num_steps:
            raise ValueError(
                f"schedule.warmup_steps must be at most num_steps = {self.num_steps}, "
                f"got {self.schedule.warmup_steps}; lower one or raise the other"
            )
        return self
