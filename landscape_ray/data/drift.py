"""Data whose target drifts while a run trains on them.

What a step trains on is a function of (seed, step), as everywhere. Held-out data have no step, so they are of the last
one, and of others as shift sets. What a model knows of the present target is the training loss, for every step has
fresh examples: it is measured before the update.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, Tag, model_validator
from torch import Tensor

from landscape_ray.config import Model, config_id, told_by_name
from landscape_ray.data.dataset import PROBE_STREAM, TRAIN_STREAM, Batch, Data, generator_for
from landscape_ray.data.pool import HELD_OUT_STREAM, Pool
from landscape_ray.data.synthetic import (
    Doubles,
    RandomFeaturesConfig,
    RandomFeaturesData,
    SyntheticData,
    Target,
    TeacherConfig,
    open_random_features,
    open_teacher,
)
from landscape_ray.errors import UserError
from landscape_ray.signature import Signature

DriftBase: TypeAlias = Annotated[
    Annotated[RandomFeaturesConfig, Tag("random_features")] | Annotated[TeacherConfig, Tag("teacher")],
    told_by_name("random_features"),
]

LEAST_VARIANCE = 1e-6
"""Of what one target function has that another has not: below, there is nothing to rotate towards."""


class DriftConfig(Model):
    """The fields of `[train.data]` for a target that changes with the step.

    Between change points the target function is f_t = cos(rate s) f + sin(rate s) g, s updates after the last change
    point, with f and g uncorrelated over the inputs and of variance 1: so is f_t, and the correlation of the targets
    s updates apart is cos(rate s). At a change point f and g are replaced by independent ones.
    """

    name: Literal["drift"] = "drift"
    base: DriftBase = RandomFeaturesConfig()
    """The data whose target drifts, `random_features` or `teacher`: its inputs, noise, seed and held-out size. Its
    target is the one at step 0."""
    num_steps: int = Field(ge=1)
    """Updates that the stream is made for: held-out data have the target of the last one. Training may go on."""
    rate: float = Field(default=0.0, ge=0.0)
    """Radians that the target turns in one update: after pi / (2 rate) updates nothing is left of it."""
    change_points: list[int] = []
    """Steps with a new target, ascending: step k is the first one with it, 1 <= k < num_steps."""

    @model_validator(mode="after")
    def _consistent(self) -> DriftConfig:
        if self.base.train_size is not None:
            raise UserError(
                f"base.train_size must be left out for drift, got {self.base.train_size}; every step has fresh examples"
            )
        points = self.change_points
        if points != sorted(set(points)) or (points and not 1 <= points[0] <= points[-1] < self.num_steps):
            raise UserError(
                f"change_points must be ascending steps from 1 to num_steps - 1 = {self.num_steps - 1}, got {points}; "
                f"sort them, and raise num_steps or leave the later ones out"
            )
        return self


class DriftData(Data):
    """Regression or classification with a target that changes; see :class:`DriftConfig`.

    Validation has the target of the last step, num_steps - 1; so have probe batches. The shift sets have the same
    held-out inputs with the targets of other steps: `step_0`, the quarters of the stream, and the last step before
    each change point, so that tracking and forgetting can be read.

    Attributes:
        config: the settings.
        base: the data at step 0.
    """

    def __init__(self, config: DriftConfig) -> None:
        """Draw the target functions.

        Raises:
            UserError: two of them are the same function, up to sign.
        """
        self.config = config
        self.base: SyntheticData = (
            open_teacher(config.base) if isinstance(config.base, TeacherConfig) else open_random_features(config.base)
        )
        segments = range(len(config.change_points) + 1)
        self._functions = [self.base.target(number) for number in range(2 * len(segments))]
        self._correlations = [self._correlation(segment) for segment in segments]
        self._held_out: dict[int, Pool] = {}
        quarters = {config.num_steps * quarter // 4 for quarter in range(4)}
        steps = quarters | {point - 1 for point in config.change_points}
        self._shift_steps = {f"step_{step}": step for step in sorted(steps)}

    def _correlation(self, segment: int) -> Doubles:
        correlation = self.base.correlation(2 * segment, 2 * segment + 1)
        if self.config.rate > 0 and (1 - correlation**2 < LEAST_VARIANCE).any():
            raise UserError(
                f"base must have room for a target to turn, got two that are equal up to sign with seed "
                f"{self.config.base.seed}; raise the number of its inputs, or change base.seed"
            )
        return correlation

    @property
    def signature(self) -> Signature:
        """That of the base."""
        return self.base.signature

    @property
    def corpus_id(self) -> str:
        """A hash of the settings."""
        return config_id(self.config)

    @property
    def shifts(self) -> tuple[str, ...]:
        """Other times of the target: `step_0`, the quarters of the stream, the steps before change points."""
        return tuple(self._shift_steps)

    def target(self, step: int) -> Target:
        """Return the target function of one step: of the base's latents, without noise."""
        segment, *factors = self._turned(step)
        first, second = self._functions[2 * segment : 2 * segment + 2]
        of_first, of_second = (factor.astype(np.float32) for factor in factors)
        if not of_second.any():
            return first
        return lambda latents: of_first * first(latents) + of_second * second(latents)

    def population_risk(self, step: int, weights: Tensor, bias: float = 0.0) -> Tensor:
        """Return the exact expected loss of a linear predictor at one step, as `RandomFeaturesData.population_risk`.

        Raises:
            UserError: the base is a teacher network, for which there is no closed form.
        """
        if not isinstance(self.base, RandomFeaturesData):
            raise UserError(
                "population_risk must have base.name = 'random_features', got 'teacher'; measure it instead"
            )
        segment, of_first, of_second = self._turned(step)
        first, second = self.base.coefficients(2 * segment), self.base.coefficients(2 * segment + 1)
        return self.base.population_risk(weights, bias, target=of_first * first + of_second * second)

    def _turned(self, step: int) -> tuple[int, Doubles, Doubles]:
        """Return the segment of a step, and the factors of its two functions in the target, (O,) each."""
        segment = bisect.bisect_right(self.config.change_points, step)
        angle = self.config.rate * (step - (self.config.change_points[segment - 1] if segment else 0))
        correlation = self._correlations[segment]
        if angle == 0:
            return segment, np.ones_like(correlation), np.zeros_like(correlation)
        # the second function less its part along the first, scaled to variance 1, is uncorrelated with the first
        of_second: Doubles = math.sin(angle) / np.sqrt(1 - correlation**2)
        return segment, math.cos(angle) - of_second * correlation, of_second

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Return fresh examples with the target of this step."""
        inputs, targets = self._draw([generator_for(seed, TRAIN_STREAM, step)], step, batch_size)
        return inputs[0], targets[0]

    def batches(self, seeds: Sequence[int], step: int, batch_size: int) -> Batch:
        """Return the batches of several runs stacked, (K, B, ...), drawn at once."""
        if len(set(seeds)) == 1:
            return super().batches(seeds, step, batch_size)
        return self._draw([generator_for(seed, TRAIN_STREAM, step) for seed in seeds], step, batch_size)

    def probe_batch(self, seed: int, batch_size: int) -> Batch:
        """Return fresh examples that no step has, with the target of the last step."""
        inputs, targets = self._draw([generator_for(seed, PROBE_STREAM)], self.config.num_steps - 1, batch_size)
        return inputs[0], targets[0]

    def validation_batches(self, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return the held-out set with the target of the last step.

        Raises:
            UserError: it has too few examples.
        """
        return self._held_out_at(self.config.num_steps - 1).split(num_batches, batch_size)

    def shift_batches(self, name: str, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return the held-out set with the target of another step.

        Raises:
            UserError: there is no such set, or it has too few examples.
        """
        if name not in self._shift_steps:
            return super().shift_batches(name, num_batches, batch_size)
        return self._held_out_at(self._shift_steps[name]).split(num_batches, batch_size)

    def _held_out_at(self, step: int) -> Pool:
        if step not in self._held_out:
            generator = generator_for(self.config.base.seed, HELD_OUT_STREAM)
            inputs, targets = self._draw([generator], step, self.config.base.num_validation)
            self._held_out[step] = Pool(inputs[0], targets[0])
        return self._held_out[step]

    def _draw(self, generators: Sequence[np.random.Generator], step: int, num_examples: int) -> Batch:
        latents = self.base.latents(generators, num_examples)
        targets = self.base.label(self.target(step)(latents), generators)
        return torch.from_numpy(self.base.features(latents)), targets


def open_drift(config: DriftConfig, *, cache: Path | None = None, progress: bool = False) -> DriftData:
    """Return the data; nothing is read or written.

    Raises:
        UserError: the base has no room for a target to turn.
    """
    return DriftData(config)
