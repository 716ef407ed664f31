"""Batches of labelled images: the digits inside this package, MNIST, CIFAR-10, or the user's own.

Images stay in memory as bytes and become numbers batch by batch. An epoch visits every training example once: the
examples of step k with batch size B are the positions k B .. (k + 1) B of an endless sequence of permutations, one for
each epoch, each a function of (seed, epoch). So a batch is a function of (seed, step), and batches may cross epochs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from landscape_ray.data.cache import default_cache
from landscape_ray.data.corruption import Corruption, Integers, corrupt, stratified_order
from landscape_ray.data.dataset import AUGMENT_STREAM, PROBE_STREAM, TRAIN_STREAM, Batch, Data, generator_for
from landscape_ray.data.image_files import read_images
from landscape_ray.data.image_sets import LabelledImages, Pixels
from landscape_ray.data.image_shifts import SHIFTS, shifted
from landscape_ray.data.pictures import Advance
from landscape_ray.errors import UserError
from landscape_ray.signature import Images

Normalise: TypeAlias = Literal["standard", "unit"]
Augment: TypeAlias = Literal["none", "flip", "crop", "crop_flip", "shift"]

CROP_SHARE = 1 / 8
"""Random crops move by up to this share of the side: 4 pixels of 32, 1 of 8."""
CACHED_POSITIONS = 1 << 25
"""Bound on the positions in all kept permutations: 256 MiB."""
NORMALISED_AT_ONCE = 1 << 22
"""Pixels of a training set that is kept as normalised numbers besides, 16 MiB: small networks notice a pass less."""
STATISTICS_CHUNK = 1024
"""Images whose sums are taken at once: bounds the memory."""


class ImageConfig(Corruption):
    """The fields of `[train.data]` for images."""

    name: Literal["images"] = "images"
    """The kind of data."""
    source: str = Field("digits", min_length=1)
    """`digits` (1,797 handwritten digits of 8 x 8 pixels, inside this package), or a path: a folder with the files of
    MNIST, Fashion-MNIST or CIFAR-10 as their pages provide them, Parquet with the columns `image` and `label`, or a
    folder with one subfolder of PNG or JPEG files for each class, perhaps below `train` and `test`."""
    validation_fraction: float = Field(0.1, gt=0.0, le=0.5)
    """Share of the images to hold out, in the proportions of the classes, where the source has no split of its own."""
    image_size: int | None = Field(None, ge=1)
    """Side in pixels that PNG and JPEG pictures are scaled to, after cropping them to a square about their centre; by
    default they stay as they are and must all have one size."""
    normalise: Normalise = "standard"
    """`standard`: mean 0 and standard deviation 1 in each channel over the training images; `unit`: in [0, 1]."""
    augment: Augment = "none"
    """What is done to training images at random: `flip` left to right, `crop` (moved by up to an eighth of the side,
    mirrored at the border), both in `crop_flip`, or `shift` (moved as by `crop`, with black at the border)."""


class ImageData(Data):
    """Labelled images in memory, and the batches drawn from them.

    >>> data = open_images(ImageConfig(augment="shift"))
    >>> inputs, targets = data.batch(seed=0, step=3, batch_size=4)
    >>> tuple(inputs.shape), inputs.dtype, tuple(targets.shape)
    ((4, 1, 8, 8), torch.float32, (4,))
    """

    def __init__(
        self,
        train: LabelledImages,
        validation: LabelledImages,
        *,
        num_classes: int,
        max_value: int = 255,
        normalise: Normalise = "standard",
        augment: Augment = "none",
    ) -> None:
        """Take the images as they are.

        Args:
            train: images to learn from; their statistics normalise both parts.
            validation: held-out images of the same shape.
            num_classes: number of classes; labels are 0 .. num_classes - 1.
            max_value: the pixel value that stands for 1.
            normalise: how pixels become numbers.
            augment: what is done to training images at random.

        Raises:
            UserError: no images, unequal shapes, a single class, labels outside the classes, or nothing to normalise.
        """
        if num_classes < 2:
            raise UserError(f"there must be at least two classes of images, got {num_classes}; correct data.source")
        for part, (images, labels) in (("training", train), ("held-out", validation)):
            if not images.size:
                raise UserError(f"there must be {part} images, got none; give data.source more of them")
            if not 0 <= labels.min() <= labels.max() < num_classes:
                raise UserError(
                    f"{part} labels must be in 0 .. {num_classes - 1}, got {labels.min()} .. {labels.max()}; "
                    f"correct them in data.source"
                )
        if train.images.shape[1:] != validation.images.shape[1:]:
            raise UserError(
                f"held-out images must have the shape of the training images, "
                f"got {validation.images.shape[1:]} and {train.images.shape[1:]}; set data.image_size or convert them"
            )
        self._train, self._validation = _tensors(train), _tensors(validation)
        self._num_classes, self._max_value = num_classes, max_value
        self._normalise, self._augment = normalise, augment
        if normalise == "standard":
            mean, deviation = _statistics(train.images)
        else:
            mean, deviation = np.zeros(1), np.full(1, float(max_value))
        if not deviation.all():
            raise UserError(
                f"data.normalise = 'standard' needs pixels that vary in every channel of the training images, channel "
                f"{int(deviation.argmin())} is constant; use 'unit'"
            )
        self._factor = torch.tensor(1 / deviation, dtype=torch.float32).view(-1, 1, 1)
        self._addend = torch.tensor(-mean / deviation, dtype=torch.float32).view(-1, 1, 1)
        self._permutations: dict[int, tuple[int, Integers]] = {}
        self._stacked: tuple[tuple[tuple[int, ...], int], Integers] | None = None

    @property
    def signature(self) -> Images:
        """Channels, height, width and classes."""
        _, channels, height, width = self._train[0].shape
        return Images(channels=channels, height=height, width=width, num_classes=self._num_classes)

    @property
    def num_train(self) -> int:
        """Training images: an epoch is this many divided by the batch size."""
        return self._train[1].size(0)

    @property
    def num_validation(self) -> int:
        """Held-out images."""
        return len(self._validation[1])

    @functools.cached_property
    def corpus_id(self) -> str:
        """A hash of all images and labels as trained on, and of how they are normalised and augmented."""
        digest = hashlib.sha256()
        shapes = [tuple(tensor.shape) for tensor in (*self._train, *self._validation)]
        settings = [shapes, self._num_classes, self._max_value, self._normalise, self._augment]
        digest.update(json.dumps(settings).encode())
        for tensor in (*self._train, *self._validation):
            array = tensor.numpy()
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()[:16]

    @property
    def shifts(self) -> tuple[str, ...]:
        """Noise, blur, contrast and rotation, each in five levels."""
        return SHIFTS

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Return the images of one training step: without replacement within an epoch.

        Args:
            seed: seed of the run's data, >= 0.
            step: updates completed before this one, >= 0.
            batch_size: number of images, B.

        Returns:
            (B, channels, height, width) float32 and (B,) int64.
        """
        return self._draw([seed], step, batch_size)

    def batches(self, seeds: Sequence[int], step: int, batch_size: int) -> Batch:
        """Return the batches of K runs, (K, B, channels, height, width) and (K, B); one gather makes them all."""
        if len(set(seeds)) == 1:
            return super().batches(seeds, step, batch_size)
        inputs, targets = self._draw(seeds, step, batch_size)
        return inputs.view(len(seeds), batch_size, *inputs.shape[1:]), targets.view(len(seeds), batch_size)

    def probe_batch(self, seed: int, batch_size: int) -> Batch:
        """Return a fixed random choice of training images, not augmented.

        Raises:
            UserError: there are not that many.
        """
        if not 1 <= batch_size <= self.num_train:
            raise UserError(
                f"a probe's batch_size must be 1 to {self.num_train}, the number of training images, got {batch_size}; "
                f"lower it"
            )
        positions = torch.from_numpy(generator_for(seed, PROBE_STREAM).permutation(self.num_train)[:batch_size])
        images, labels = (tensor.index_select(0, positions) for tensor in self._train)
        return self._numbers(images), labels

    def validation_batches(self, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return held-out images, evenly spaced over the held-out set; the same at every call.

        Args:
            num_batches: how many; None for all of the held-out images, in order.
            batch_size: images in each; the last batch is smaller where the images run out.

        Raises:
            UserError: there are not that many held-out images.
        """
        batches = []
        for positions in self._validation_positions(num_batches, batch_size):
            images, labels = (tensor.index_select(0, positions) for tensor in self._validation)
            batches.append((self._numbers(images), labels))
        return batches

    def shift_batches(self, name: str, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return the images of :meth:`validation_batches` under a shift, with their labels.

        Args:
            name: one of :attr:`shifts`, for instance `noise_3`.
            num_batches: as for the validation batches.
            batch_size: as for the validation batches.

        Raises:
            UserError: no such shift, or too few images.
        """
        if name not in SHIFTS:
            return super().shift_batches(name, num_batches, batch_size)
        batches = []
        for positions in self._validation_positions(num_batches, batch_size):
            images, labels = (tensor.index_select(0, positions) for tensor in self._validation)
            changed = shifted(images.float() / self._max_value, name, positions.tolist())
            batches.append((self._numbers(changed * self._max_value), labels))
        return batches

    def _validation_positions(self, num_batches: int | None, batch_size: int) -> Iterable[Tensor]:
        available = -(-self.num_validation // batch_size)
        if num_batches is None:
            num_batches = available
        if not 1 <= num_batches <= available:
            raise UserError(
                f"validation needs 1 to {available} batches of {batch_size} for {self.num_validation} held-out images, "
                f"got num_batches = {num_batches}; lower it or the batch size, or give data.source more images"
            )
        num_images = min(num_batches * batch_size, self.num_validation)
        # evenly spaced, because a folder lists one class after the other
        return torch.split(torch.arange(num_images) * self.num_validation // num_images, batch_size)

    def _draw(self, seeds: Sequence[int], step: int, batch_size: int) -> Batch:
        positions = torch.from_numpy(self._positions(seeds, step, batch_size))
        if self._augment == "none" and self._train[0].numel() <= NORMALISED_AT_ONCE:
            return self._normalised.index_select(0, positions), self._train[1].index_select(0, positions)
        images, labels = (tensor.index_select(0, positions) for tensor in self._train)
        if self._augment != "none":
            images = self._augmented(images, seeds, step, batch_size)
        return self._numbers(images), labels

    def _positions(self, seeds: Sequence[int], step: int, batch_size: int) -> Integers:
        """Return the positions of the batches of some runs, one after the other, (K B,)."""
        epoch, start = divmod(step * batch_size, self.num_train)
        few = len(seeds) * self.num_train <= CACHED_POSITIONS
        if few and len(seeds) > 1 and start + batch_size <= self.num_train:
            return self._orders(tuple(seeds), epoch)[:, start : start + batch_size].ravel()
        return np.concatenate([part for seed in seeds for part in self._pieces(seed, epoch, start, batch_size)])

    def _orders(self, seeds: tuple[int, ...], epoch: int) -> Integers:
        """Return the orders of an epoch of some runs, (K, num_train); the latest are kept, which saves time only."""
        if self._stacked is None or self._stacked[0] != (seeds, epoch):
            self._stacked = (seeds, epoch), np.stack([self._permutation(seed, epoch) for seed in seeds])
        return self._stacked[1]

    def _pieces(self, seed: int, epoch: int, start: int, batch_size: int) -> Iterator[Integers]:
        """Yield the positions of a batch of one run, a piece for each epoch that it has part in.

        Pieces of NumPy's arrays, which cost a tenth of pieces of tensors: small networks notice.
        """
        while batch_size > 0:
            part = self._permutation(seed, epoch)[start : start + batch_size]
            yield part
            batch_size -= len(part)
            epoch, start = epoch + 1, 0

    def _permutation(self, seed: int, epoch: int) -> Integers:
        """Return the order of an epoch; the latest one of each seed is kept, which changes nothing but the time."""
        kept = self._permutations.get(seed)
        if kept is not None and kept[0] == epoch:
            return kept[1]
        permutation = generator_for(seed, TRAIN_STREAM, epoch).permutation(self.num_train)
        if len(self._permutations) * self.num_train >= CACHED_POSITIONS:
            self._permutations.clear()
        self._permutations[seed] = epoch, permutation
        return permutation

    def _augmented(self, images: Tensor, seeds: Sequence[int], step: int, batch_size: int) -> Tensor:
        """Return moved and mirrored images, (K B, channels, height, width); a function of (seed, step)."""
        chance = np.concatenate([generator_for(seed, AUGMENT_STREAM, step).random((batch_size, 3)) for seed in seeds])
        pixels: Pixels = images.numpy()
        if self._augment != "flip":
            pixels = _moved(pixels, chance[:, :2], "constant" if self._augment == "shift" else "reflect")
        if self._augment in ("flip", "crop_flip"):
            turned = chance[:, 2] < 0.5
            pixels[turned] = pixels[turned][..., ::-1]
        return torch.from_numpy(pixels)

    @functools.cached_property
    def _normalised(self) -> Tensor:
        """The training images as normalised numbers."""
        return self._numbers(self._train[0].clone())

    def _numbers(self, images: Tensor) -> Tensor:
        """Return pixel values as normalised numbers."""
        return images.float().mul_(self._factor).add_(self._addend)


def _moved(pixels: Pixels, chance: np.ndarray[Any, Any], border: Literal["constant", "reflect"]) -> Pixels:
    """Return images (n, channels, height, width) moved at random, each as a window of itself with a border around.

    Args:
        pixels: the images.
        chance: (n, 2) uniform numbers in [0, 1), for rows and columns.
        border: black, or mirrored at the edge pixel, which is not repeated.
    """
    sides = pixels.shape[2:]
    reach = [min(max(round(side * CROP_SHARE), 1), side - 1) for side in sides]
    starts = [(chance[:, axis] * (2 * reach[axis] + 1)).astype(np.int64)[:, None] for axis in (0, 1)]
    wide = np.pad(pixels, [(0, 0), (0, 0), *((r, r) for r in reach)], mode=border)
    windows = np.lib.stride_tricks.sliding_window_view(wide, sides, axis=(2, 3))
    n, channels = (np.arange(size) for size in pixels.shape[:2])
    moved: Pixels = windows[n[:, None], channels, starts[0], starts[1]]
    return moved


def _tensors(part: LabelledImages) -> tuple[Tensor, Tensor]:
    images, labels = part
    # files are read into read-only memory, which tensors must not share
    return (
        torch.from_numpy(np.require(images, dtype=np.uint8, requirements=["C", "W"])),
        torch.from_numpy(np.require(labels, dtype=np.int64, requirements=["C", "W"])),
    )


def _statistics(images: Pixels) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return mean and standard deviation of each channel, from exact sums: a constant channel has exactly 0."""
    channels = images.shape[1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    for start in range(0, len(images), STATISTICS_CHUNK):
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + STATISTICS_CHUNK, channel].ravel(), minlength=256)
    values = np.arange(256)
    sums, squares = (counts @ values).tolist(), (counts @ values**2).tolist()
    count = images.size // channels
    deviation = [math.sqrt(count * square - total**2) / count for total, square in zip(sums, squares, strict=True)]
    return np.array(sums) / count, np.array(deviation)


def open_images(config: ImageConfig, *, cache: Path | None = None, progress: bool = False) -> ImageData:
    """Return the images that a configuration names, in memory.

    PNG and JPEG pictures are decoded into the cache the first time; all else is read directly.

    Args:
        config: what to open.
        cache: the cache folder; by default `LANDSCAPE_RAY_CACHE`, else the user's cache folder.
        progress: show a counter on standard error while pictures are decoded.

    Raises:
        UserError: missing, incomplete or damaged files, images of several sizes, or a choice that does not fit them.
    """
    with _progress(config.source, progress) as advance:
        found = read_images(
            config.source, image_size=config.image_size, cache=cache or default_cache(), advance=advance
        )
    train, validation = found.train, found.validation
    if validation is None:
        # not a function of any seed: every run of every sweep is measured on the same images
        order = stratified_order(train.labels, generator_for(0))
        num_held_out = max(round(config.validation_fraction * len(order)), 1)
        held_out, left = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
        train, validation = train.at(left), train.at(held_out)
    kept, labels = corrupt(train.labels, found.num_classes, config)
    images = train.images[kept] if len(kept) < len(train.images) else train.images
    return ImageData(
        LabelledImages(images, labels),
        validation,
        num_classes=found.num_classes,
        max_value=found.max_value,
        normalise=config.normalise,
        augment=config.augment,
    )


@contextlib.contextmanager
def _progress(source: str, shown: bool) -> Iterator[Advance]:
    if not shown:
        yield lambda num_images: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    counter = TextColumn("{task.description}: {task.completed:,.0f} images")
    with Progress(SpinnerColumn(), counter, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"reading {source}", total=None)
        yield lambda num_images: bar.advance(task, num_images)
