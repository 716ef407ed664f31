"""Data: a batch is a function of (seed, step). Text comes as byte tokens from real files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from landscape_ray.config import Model
from landscape_ray.data.text import TextConfig, TextData, open_text


class Dataset(NamedTuple):
    """One kind of data: the model of its configuration, and the function that opens what a configuration names."""

    config: type[Model]
    open: Callable[..., Any]


DATASETS: dict[str, Dataset] = {"text": Dataset(TextConfig, open_text)}

__all__ = ["DATASETS", "Dataset", "TextConfig", "TextData", "open_text"]
