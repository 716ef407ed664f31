"""What every source of labelled images gives, whatever its files look like."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


class LabelledImages(NamedTuple):
    """Images and their classes."""

    images: Pixels
    """(n, channels, height, width)."""
    labels: np.ndarray[Any, np.dtype[np.int64]]
    """(n,) classes from 0."""

    def at(self, positions: np.ndarray[Any, Any]) -> LabelledImages:
        """Return the examples at an array of positions, or where a mask is True."""
        return LabelledImages(self.images[positions], self.labels[positions])


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """What a source holds."""

    train: LabelledImages
    validation: LabelledImages | None
    """None where the source has no split of its own."""
    num_classes: int
    max_value: int = 255
    """The pixel value of white."""
