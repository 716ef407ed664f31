"""What one run is: the tables under [train] of a sweep file, validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from landscape_ray.config import Model
from landscape_ray.data import DataConfig, TextConfig
from landscape_ray.errors import UserError
from landscape_ray.models import GPTConfig, ModelConfig
from landscape_ray.registry import resolve
from landscape_ray.schedules import SCHEDULES, Schedule, monotone_points
from landscape_ray.training.averaging import AveragingConfig
from landscape_ray.training.clipping import ClippingConfig
from landscape_ray.training.loss import LossConfig
from landscape_ray.training.optimizers import AdamWConfig, OptimizerConfig
from landscape_ray.training.precision import SimulatedPrecisionConfig
from landscape_ray.training.probe_tables import ProbesConfig
from landscape_ray.training.sam import SAMConfig


class ScheduleConfig(Model):
    """The table [train.schedule]: the learning rate as a function of the step; see `landscape_ray.schedules`."""

    name: str = "wsd"
    """constant | linear | cosine | wsd | polynomial | cosine_power | inverse_sqrt | step | one_cycle | table | range,
    or the path package.module:Name of a shape of yours."""
    peak_lr: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end divided by the peak."""
    cooldown_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps spent in the cooldown (wsd)."""
    cooldown_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the cooldown (wsd); sqrt is 1 - sqrt(progress)."""
    exponent: float = Field(default=2.0, gt=0)
    """Of polynomial; 1 is linear."""
    power_base: float = Field(default=10.0, ge=1)
    """Of cosine_power: the larger, the earlier the decay."""
    milestones: list[float] = [0.5, 0.75]
    """Of step: where the learning rate drops, as shares of num_steps."""
    gamma: float = Field(default=0.1, ge=0, le=1)
    """Of step: factor of each drop."""
    up_fraction: float = Field(default=0.3, ge=0, le=1)
    """Of one_cycle: share of the steps spent rising."""
    initial_ratio: float = Field(default=0.04, ge=0, le=1)
    """Of one_cycle: first learning rate divided by the peak."""
    cycle_shape: Literal["cosine", "linear"] = "cosine"
    """Of one_cycle."""
    momentum_low: float = Field(default=0.85, ge=0, lt=1)
    """Of one_cycle: momentum at the peak of the learning rate; it replaces the optimizer's."""
    momentum_high: float = Field(default=0.95, ge=0, lt=1)
    """Of one_cycle: momentum at both ends; equal to momentum_low, it does not move."""
    points: list[tuple[float, float]] = []
    """Of table: corners [progress, height], both in [0, 1]; `landscape-ray refine` makes them from a run. Or a table of
    free coordinates of a curve that falls, for searches: warmup = 0.05, ratio_1 = 0.9, ratio_2 = 0.5 ..."""
    range_ratio: float = Field(default=1e-5, gt=0, le=1)
    """Of range: first learning rate divided by the last, which is peak_lr."""
    range_shape: Literal["exponential", "linear"] = "exponential"
    """Of range: by equal factors or equal differences."""

    @field_validator("points", mode="before")
    @classmethod
    def _pairs(cls, points: Any) -> Any:
        if isinstance(points, Mapping):
            return _monotone(points)
        # TOML and JSON have lists, and nothing is converted silently elsewhere
        if not isinstance(points, list):
            return points
        return [tuple(point) if isinstance(point, list) else point for point in points]

    @model_validator(mode="after")
    def _known(self) -> ScheduleConfig:
        resolve(self.name, SCHEDULES, "schedule.name")
        return self

    def build(self, num_steps: int) -> Schedule:
        """Return the schedule for a run of `num_steps` updates.

        Raises:
            UserError: fields that don't fit together.
        """
        shape = self.model_dump(exclude={"peak_lr", "milestones", "points"})
        return Schedule(
            peak=self.peak_lr,
            num_steps=num_steps,
            milestones=tuple(self.milestones),
            points=tuple(self.points),
            **shape,
        )


def _monotone(coordinates: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the corners of a table that is given by free coordinates: warmup, ratio_1, ratio_2 ..."""
    names = [f"ratio_{k}" for k in range(1, len(coordinates) + ("warmup" not in coordinates))]
    if set(names) != coordinates.keys() - {"warmup"}:
        raise ValueError(f"points as a table must be ratio_1, ratio_2 ... and maybe warmup, got {sorted(coordinates)}")
    try:
        return list(monotone_points([coordinates[name] for name in names], coordinates.get("warmup", 0.0)))
    except (UserError, TypeError) as error:
        raise ValueError(str(error)) from None


class EvalConfig(Model):
    """The table [train.eval]: held-out loss on the same fixed examples every time."""

    every_steps: int = Field(default=50, ge=1)
    num_batches: int | Literal["all"] = 8
    """How many batches of held-out data; all: every example, which is what small sets of images want."""
    batch_size: int = Field(default=32, ge=1)
    shifts: list[str] = []
    """Shifted held-out sets to evaluate at the end of the run, for out-of-distribution error: names that the data
    offers, such as noise_3 for images or the domains in data.shifts for text."""

    @model_validator(mode="after")
    def _positive(self) -> EvalConfig:
        if self.num_batches != "all" and self.num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, got {self.num_batches}; 'all' takes everything held out")
        return self

    @property
    def limit(self) -> int | None:
        """Number of batches; None for all."""
        return None if self.num_batches == "all" else self.num_batches


class TrainConfig(Model):
    """The table [train]: everything that determines one run."""

    num_steps: int = Field(ge=1)
    """Optimizer updates."""
    batch_size: int = Field(default=16, ge=1)
    """Examples (sequences, images) per update."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Parts that a batch is computed in, one after the other, to save memory; must divide batch_size."""
    seed: int = Field(default=0, ge=0)
    """Initial weights, order of the data and dropout."""
    data: DataConfig = TextConfig()
    model: ModelConfig = GPTConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clipping: ClippingConfig = ClippingConfig()
    sam: SAMConfig | None = None
    """Sharpness-aware minimisation; twice the cost of an update."""
    averaging: AveragingConfig | None = None
    """Averaged weights beside the trained ones; evaluated as a variant of the run."""
    eval: EvalConfig = EvalConfig()
    probes: ProbesConfig = ProbesConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16, float16: matrix products under autocast; weights, optimizer and probes stay in float32."""
    simulated_precision: SimulatedPrecisionConfig | None = None
    """Values rounded to a format of few bits, in float32 arithmetic."""
    compile: bool = False
    """Whether training steps go through torch.compile."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.schedule.warmup_steps > self.num_steps:
            raise ValueError(
                f"schedule.warmup_steps must be at most num_steps = {self.num_steps}, "
                f"got {self.schedule.warmup_steps}; lower one or raise the other"
            )
        try:
            self.schedule.build(self.num_steps)
        except UserError as error:
            raise ValueError(f"schedule.{error}") from None
        if self.simulated_precision is not None and self.compile:
            raise ValueError("simulated_precision must run uncompiled, got compile = true; set it to false")
        if self.sam is not None and self.precision == "float16":
            raise ValueError("sam must run in float32 or bfloat16, got precision = 'float16'; use 'bfloat16'")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps must divide batch_size = {self.batch_size}, got {self.accumulation_steps}"
            )
        return self
