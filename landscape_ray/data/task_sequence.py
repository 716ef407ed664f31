"""Tasks that come one after another, made out of one set of data: permuted inputs, or parts of the classes.

What a step trains on is a function of (seed, step), as everywhere. Held-out data have no step: they are of all tasks in
equal parts, and of one task each as shift sets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, Tag, model_validator
from torch import Tensor

from landscape_ray.config import Model, config_id, told_by_name
from landscape_ray.data.algorithmic import (
    ModularConfig,
    ParityConfig,
    XorConfig,
    open_modular,
    open_parity,
    open_xor,
)
from landscape_ray.data.dataset import Batch, Data, generator_for
from landscape_ray.data.images import ImageConfig, ImageData, open_images
from landscape_ray.data.pool import TASK_STREAM
from landscape_ray.data.synthetic import RandomFeaturesConfig, TeacherConfig, open_random_features, open_teacher
from landscape_ray.errors import UserError
from landscape_ray.signature import Images, Signature, Vectors

TaskBase: TypeAlias = Annotated[
    Annotated[ImageConfig, Tag("images")]
    | Annotated[ModularConfig, Tag("modular")]
    | Annotated[ParityConfig, Tag("parity")]
    | Annotated[XorConfig, Tag("xor")]
    | Annotated[TeacherConfig, Tag("teacher")]
    | Annotated[RandomFeaturesConfig, Tag("random_features")],
    told_by_name("images"),
]


class TaskSequenceConfig(Model):
    """The fields of `[train.data]` for tasks that come one after another, each made from the same data."""

    name: Literal["task_sequence"] = "task_sequence"
    base: TaskBase = ImageConfig()
    """The data that tasks are made of: `images`, or any data of feature vectors."""
    kind: Literal["permuted", "split"] = "permuted"
    """permuted: each task has its own fixed permutation of the pixels or features, the first one the identity
    (Goodfellow et al. 2013, arXiv 1312.6211); split: each task has its own part of the classes of the images, in the
    order of their numbers; a class keeps its number, and the model all its outputs (Zenke et al. 2017, arXiv
    1703.04200; class-incremental in the terms of van de Ven and Tolias 2019, arXiv 1904.07734)."""
    num_tasks: int = Field(default=5, ge=2)
    """Tasks in the sequence."""
    task_steps: int = Field(default=1000, ge=1)
    """Updates for each task; the last task goes on as long as the run does."""
    seed: int = Field(default=0, ge=0)
    """The permutations: the same in all runs of a sweep. Without effect on split classes."""

    @model_validator(mode="after")
    def _possible(self) -> TaskSequenceConfig:
        if self.kind == "split" and not isinstance(self.base, ImageConfig):
            raise UserError(
                f"base.name must be 'images' for split classes, got '{self.base.name}'; use kind = 'permuted'"
            )
        if isinstance(self.base, ModularConfig) and self.base.representation == "tokens":
            raise UserError("base.representation must be 'one_hot' for permuted features, got 'tokens'; change it")
        return self


class TaskSequenceData(Data):
    """Tasks one after another; see :class:`TaskSequenceConfig` and its two kinds.

    Validation is over all tasks in equal parts, which at the end of the sequence is the average loss or accuracy of
    the continual-learning literature (Lopez-Paz and Ranzato 2017, arXiv 1706.08840); so are probe batches. The shift
    sets `task_0`, `task_1`, ... are the held-out data of one task each: what has been learnt, and what forgotten.
    """

    def __init__(self, config: TaskSequenceConfig, base: Data) -> None:
        """Take the settings and the opened base."""
        self.config, self.base = config, base

    @property
    def signature(self) -> Signature:
        """That of the base."""
        return self.base.signature

    @property
    def shifts(self) -> tuple[str, ...]:
        """One for each task."""
        return tuple(f"task_{task}" for task in range(self.config.num_tasks))

    @property
    def corpus_id(self) -> str:
        """A hash of the base's content and of the settings that matter."""
        settings: dict[str, Any] = self.config.model_dump(mode="json", exclude={"base"})
        if self.config.kind == "split":
            del settings["seed"]
        return config_id({**settings, "base": self.base.corpus_id})

    def task_at(self, step: int) -> int:
        """Return the task of a step, 0 to num_tasks - 1.

        >>> data = open_task_sequence(TaskSequenceConfig(num_tasks=3, task_steps=10))
        >>> [data.task_at(step) for step in (0, 9, 10, 29, 30)]
        [0, 0, 1, 2, 2]
        """
        return min(step // self.config.task_steps, self.config.num_tasks - 1)

    def _task_named(self, name: str) -> int | None:
        return self.shifts.index(name) if name in self.shifts else None


class PermutedData(TaskSequenceData):
    """Tasks that differ in a permutation of the pixels (the same one in all channels) or features.

    Attributes:
        config, base: the settings and the data without permutations.
        permutations: (num_tasks, n) int64; input i of task t is input permutations[t, i] of the base.
    """

    def __init__(self, config: TaskSequenceConfig, base: Data) -> None:
        """Draw the permutations.

        Raises:
            UserError: there are fewer permutations than tasks.
        """
        super().__init__(config, base)
        match base.signature:
            case Images() as images:
                self._size = images.height * images.width
            case Vectors() as vectors:
                self._size = vectors.num_features
        if self._size < 20 and math.factorial(self._size) < config.num_tasks:
            raise UserError(
                f"num_tasks must be at most {math.factorial(self._size)}, the permutations of {self._size} inputs, got "
                f"{config.num_tasks}; lower it or use data with more inputs"
            )
        generator = generator_for(config.seed, TASK_STREAM)
        distinct: dict[tuple[int, ...], None] = {tuple(range(self._size)): None}
        while len(distinct) < config.num_tasks:
            distinct[tuple(generator.permutation(self._size).tolist())] = None
        self.permutations = torch.tensor(list(distinct))

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Return the base's batch of this step as the present task has it."""
        inputs, targets = self.base.batch(seed, step, batch_size)
        return self._permuted(inputs, self.task_at(step)), targets

    def batches(self, seeds: Sequence[int], step: int, batch_size: int) -> Batch:
        """Return the batches of several runs stacked."""
        if len(set(seeds)) == 1:
            return super().batches(seeds, step, batch_size)
        inputs, targets = self.base.batches(seeds, step, batch_size)
        return self._permuted(inputs, self.task_at(step)), targets

    def probe_batch(self, seed: int, batch_size: int) -> Batch:
        """Return the base's probe batch, example i as task i modulo num_tasks has it."""
        return self._mixed([self.base.probe_batch(seed, batch_size)])[0]

    def validation_batches(self, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return the base's held-out data, example i as task i modulo num_tasks has it.

        Raises:
            UserError: the base has too few.
        """
        return self._mixed(self.base.validation_batches(num_batches, batch_size))

    def shift_batches(self, name: str, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return the base's held-out data as one task has them.

        Raises:
            UserError: there is no such task, or the base has too few.
        """
        task = self._task_named(name)
        if task is None:
            return super().shift_batches(name, num_batches, batch_size)
        batches = self.base.validation_batches(num_batches, batch_size)
        return [(self._permuted(inputs, task), targets) for inputs, targets in batches]

    def _permuted(self, inputs: Tensor, task: int) -> Tensor:
        if task == 0:
            return inputs
        return self._flat(inputs).index_select(-1, self.permutations[task]).view(inputs.shape)

    def _mixed(self, batches: list[Batch]) -> list[Batch]:
        mixed, first = [], 0
        for inputs, targets in batches:
            tasks = torch.arange(first, first + len(inputs)) % self.config.num_tasks
            first += len(inputs)
            flat = self._flat(inputs)
            index = self.permutations[tasks].view(len(inputs), *[1] * (flat.dim() - 2), self._size).expand_as(flat)
            mixed.append((flat.gather(-1, index).view(inputs.shape), targets))
        return mixed

    def _flat(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(-2) if isinstance(self.signature, Images) else inputs


class SplitData(TaskSequenceData):
    """Tasks that differ in their classes.

    Attributes:
        config, base: the settings and the data with all classes.
        classes: of each task.
    """

    base: ImageData

    def __init__(self, config: TaskSequenceConfig, base: ImageData) -> None:
        """Divide the classes.

        Raises:
            UserError: there are fewer classes than tasks, or no images of a task.
        """
        super().__init__(config, base)
        num_classes = base.signature.num_classes
        if num_classes < config.num_tasks:
            raise UserError(
                f"num_tasks must be at most {num_classes}, the classes of the images, got {config.num_tasks}; lower it"
            )
        parts = np.array_split(np.arange(num_classes), config.num_tasks)
        self.classes = tuple(tuple(part.tolist()) for part in parts)
        self._tasks = tuple(_of_classes(base, classes) for classes in self.classes)

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Return images of the present task; its first step begins an epoch over them."""
        task = self.task_at(step)
        return self._tasks[task].batch(seed, step - task * self.config.task_steps, batch_size)

    def batches(self, seeds: Sequence[int], step: int, batch_size: int) -> Batch:
        """Return the batches of several runs stacked."""
        task = self.task_at(step)
        return self._tasks[task].batches(seeds, step - task * self.config.task_steps, batch_size)

    def probe_batch(self, seed: int, batch_size: int) -> Batch:
        """Return the base's probe batch, of all classes."""
        return self.base.probe_batch(seed, batch_size)

    def validation_batches(self, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return the base's held-out images, of all classes.

        Raises:
            UserError: there are too few.
        """
        return self.base.validation_batches(num_batches, batch_size)

    def shift_batches(self, name: str, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return the held-out images of one task.

        Raises:
            UserError: there is no such task, or it has too few.
        """
        task = self._task_named(name)
        if task is None:
            return super().shift_batches(name, num_batches, batch_size)
        return self._tasks[task].validation_batches(num_batches, batch_size)


def _of_classes(data: ImageData, classes: tuple[int, ...]) -> ImageData:
    """Return the images of some classes, normalised as all are and with the labels that they have."""
    part = copy.copy(data)
    part._train, part._validation = (
        _select(tensors, classes, where)
        for tensors, where in ((data._train, "training"), (data._validation, "held-out"))
    )
    part._permutations = {}
    return part


def _select(tensors: tuple[Tensor, Tensor], classes: tuple[int, ...], where: str) -> tuple[Tensor, Tensor]:
    images, labels = tensors
    kept = torch.isin(labels, torch.tensor(classes))
    if not kept.any():
        raise UserError(
            f"base must have {where} images of every task, got none of the classes {classes}; lower num_tasks or give "
            f"base.source more images"
        )
    return images[kept], labels[kept]


def open_task_sequence(
    config: TaskSequenceConfig, *, cache: Path | None = None, progress: bool = False
) -> TaskSequenceData:
    """Return the tasks; images are opened as by `open_images`.

    Raises:
        UserError: the base cannot be opened, or there are more tasks than it allows.
    """
    match config.base:
        case ImageConfig():
            images = open_images(config.base, cache=cache, progress=progress)
            return SplitData(config, images) if config.kind == "split" else PermutedData(config, images)
        case ModularConfig():
            base: Data = open_modular(config.base)
        case ParityConfig():
            base = open_parity(config.base)
        case XorConfig():
            base = open_xor(config.base)
        case TeacherConfig():
            base = open_teacher(config.base)
        case RandomFeaturesConfig():
            base = open_random_features(config.base)
    return PermutedData(config, base)
