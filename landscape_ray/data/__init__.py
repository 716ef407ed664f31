"""Data by name: a batch is a function of (seed, step). Text, images, algorithmic and synthetic tasks, streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import Tag

from landscape_ray.config import CUSTOM, Model, told_by_name
from landscape_ray.data.algorithmic import (
    ModularConfig,
    ParityConfig,
    XorConfig,
    open_modular,
    open_parity,
    open_xor,
)
from landscape_ray.data.custom import CustomDataConfig, open_custom
from landscape_ray.data.dataset import Batch, Data
from landscape_ray.data.drift import DriftConfig, open_drift
from landscape_ray.data.images import ImageConfig, open_images
from landscape_ray.data.synthetic import (
    RandomFeaturesConfig,
    TeacherConfig,
    open_random_features,
    open_teacher,
)
from landscape_ray.data.task_sequence import TaskSequenceConfig, open_task_sequence
from landscape_ray.data.text import TextConfig, TextData, open_text

DataConfig: TypeAlias = Annotated[
    Annotated[TextConfig, Tag("text")]
    | Annotated[ImageConfig, Tag("images")]
    | Annotated[ModularConfig, Tag("modular")]
    | Annotated[ParityConfig, Tag("parity")]
    | Annotated[XorConfig, Tag("xor")]
    | Annotated[TeacherConfig, Tag("teacher")]
    | Annotated[RandomFeaturesConfig, Tag("random_features")]
    | Annotated[DriftConfig, Tag("drift")]
    | Annotated[TaskSequenceConfig, Tag("task_sequence")]
    | Annotated[CustomDataConfig, Tag(CUSTOM)],
    told_by_name("text", custom=True),
]
"""The table [train.data]; its field `name` says which data, text where it is not given."""


class Dataset(NamedTuple):
    """One kind of data: the model of its configuration, and the function that opens what a configuration names."""

    config: type[Model]
    open: Callable[..., Data]


DATASETS: dict[str, Dataset] = {
    "text": Dataset(TextConfig, open_text),
    "images": Dataset(ImageConfig, open_images),
    "modular": Dataset(ModularConfig, open_modular),
    "parity": Dataset(ParityConfig, open_parity),
    "xor": Dataset(XorConfig, open_xor),
    "teacher": Dataset(TeacherConfig, open_teacher),
    "random_features": Dataset(RandomFeaturesConfig, open_random_features),
    "drift": Dataset(DriftConfig, open_drift),
    "task_sequence": Dataset(TaskSequenceConfig, open_task_sequence),
}


def open_data(config: Any, *, cache: Path | None = None, progress: bool = False) -> Data:
    """Return the data that a configuration names, ready to be drawn from.

    Args:
        config: one of :data:`DataConfig`.
        cache: folder for what is prepared once; by default `LANDSCAPE_RAY_CACHE`, else the user's cache folder.
        progress: show a progress bar on standard error where something is prepared.

    Raises:
        UserError: the data is missing, unreadable or too small.
    """
    opener = DATASETS[config.name].open if config.name in DATASETS else open_custom
    return opener(config, cache=cache, progress=progress)


__all__ = ["DATASETS", "Batch", "Data", "DataConfig", "Dataset", "TextConfig", "TextData", "open_data", "open_text"]
