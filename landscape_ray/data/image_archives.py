"""MNIST, Fashion-MNIST and CIFAR-10 out of the files of their authors. What a file holds is checked; nothing runs."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from landscape_ray.data.image_sets import ImageSet, LabelledImages, Pixels
from landscape_ray.errors import UserError

MNIST_HELP = (
    "get the four files from the MNIST page of Yann LeCun, or from the Fashion-MNIST repository of Zalando Research"
)
CIFAR_HELP = "get the python or the binary version from the CIFAR-10 page of the University of Toronto"


def read_archive(folder: Path) -> ImageSet | None:
    """Return the images of a folder that holds such files, itself or in the subfolder that they come in; else None.

    Raises:
        UserError: incomplete or damaged files.
    """
    for place in (folder, folder / "raw", folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        if place.is_dir():
            names = {entry.name for entry in place.iterdir() if entry.is_file()}
            if any(_IDX_NAME.fullmatch(name) for name in names):
                return _mnist(place, names)
            if any(name in names for name in CIFAR_BATCHES):
                return _cifar(place, names, "", _cifar_pickle)
            if any(f"{name}.bin" in names for name in CIFAR_BATCHES):
                return _cifar(place, names, ".bin", _cifar_binary)
    return None


# MNIST: the idx format is two zero bytes, a type, the number of dimensions, the dimensions as big-endian uint32, data.

_IDX_NAME = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_IDX_UNSIGNED_BYTE = 8


def _mnist(folder: Path, names: set[str]) -> ImageSet:
    chosen: dict[tuple[str, str], Path] = {}
    for name in sorted(names, key=lambda name: (not name.endswith(".gz"), name)):  # a plain file wins
        if match := _IDX_NAME.fullmatch(name):
            chosen[match[1], match[2]] = folder / name
    missing = [
        f"{part}-{kind}-idx{digit}-ubyte"
        for part in ("train", "t10k")
        for kind, digit in (("images", 3), ("labels", 1))
        if (part, kind) not in chosen
    ]
    if missing:
        raise UserError(f"{folder} must hold the four idx files, {', '.join(missing)} is missing; {MNIST_HELP}")
    splits = []
    for part in ("train", "t10k"):
        images = _idx(chosen[part, "images"], 3)
        labels = _idx(chosen[part, "labels"], 1)
        if len(images) != len(labels):
            raise UserError(
                f"{chosen[part, 'images']} must have one image for each label, got {len(images)} images and "
                f"{len(labels)} labels; {MNIST_HELP}"
            )
        splits.append(LabelledImages(images[:, None], labels.astype(np.int64)))
    num_classes = max(int(split.labels.max(initial=0)) for split in splits) + 1
    return ImageSet(splits[0], splits[1], num_classes)


def _idx(path: Path, num_dimensions: int) -> Pixels:
    content = _read(path, MNIST_HELP)
    header = 4 + 4 * num_dimensions
    if content[:4] != bytes([0, 0, _IDX_UNSIGNED_BYTE, num_dimensions]) or len(content) < header:
        raise UserError(
            f"{path} must be an idx file of bytes with {num_dimensions} dimensions, it starts with "
            f"{content[:4].hex() or 'nothing'}; {MNIST_HELP}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=num_dimensions, offset=4))
    if len(content) - header != math.prod(shape):
        raise UserError(
            f"{path} must hold {' x '.join(map(str, shape))} = {math.prod(shape)} bytes of data, got "
            f"{len(content) - header}: it is damaged; {MNIST_HELP}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _read(path: Path, remedy: str) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}") from None


# CIFAR-10: five batches for training and one for testing, each image 3 planes of 32 x 32.

CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_BATCHES = (*CIFAR_TRAIN, "test_batch")
CIFAR_SHAPE = (3, 32, 32)
CIFAR_CLASSES = 10


def _cifar(folder: Path, names: set[str], suffix: str, read: Callable[[Path], LabelledImages]) -> ImageSet:
    missing = [name + suffix for name in CIFAR_BATCHES if name + suffix not in names]
    if missing:
        raise UserError(f"{folder} must hold all six batches, {', '.join(missing)} is missing; {CIFAR_HELP}")
    batches = {}
    for name in CIFAR_BATCHES:
        batches[name] = read(folder / (name + suffix))
        labels = batches[name].labels
        if len(labels) and not 0 <= labels.min() <= labels.max() < CIFAR_CLASSES:
            raise UserError(
                f"{folder / (name + suffix)} must have labels in 0 .. {CIFAR_CLASSES - 1}, got {labels.min()} .. "
                f"{labels.max()}; {CIFAR_HELP}"
            )
    train = LabelledImages(*(np.concatenate(arrays) for arrays in zip(*(batches[n] for n in CIFAR_TRAIN), strict=True)))
    return ImageSet(train, batches["test_batch"], CIFAR_CLASSES)


def _cifar_binary(path: Path) -> LabelledImages:
    content = _read(path, CIFAR_HELP)
    row = 1 + math.prod(CIFAR_SHAPE)
    if not content or len(content) % row:
        raise UserError(
            f"{path} must be rows of {row} bytes, a label and an image, got {len(content)} bytes: it is damaged; "
            f"{CIFAR_HELP}"
        )
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, row)
    return LabelledImages(rows[:, 1:].reshape(-1, *CIFAR_SHAPE), rows[:, 0].astype(np.int64))


def _cifar_pickle(path: Path) -> LabelledImages:
    content = _read(path, CIFAR_HELP)
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        entries = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images = entries["data"].array
        labels = np.array([int(label) for label in entries["labels"]], dtype=np.int64)
        images = images.reshape(len(labels), *CIFAR_SHAPE)
    except Exception as error:  # damaged pickles raise whatever their bytes happen to mean
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as a CIFAR-10 batch ({reason}); {CIFAR_HELP}") from None
    return LabelledImages(images, labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays of bytes; refuses every other name.

    A pickle may call whatever it can name. Here it can name a few functions, all of this class: not even numpy's own
    are within its reach. They are bound methods, on which a pickle cannot set attributes either.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return self._empty
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":  # protocol 5
            return self._from_buffer
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("numpy", "dtype"):
            return self._dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return self._encode
        if (module, name) in (("__builtin__", "bytes"), ("builtins", "bytes")):  # and b"" in particular
            return self._no_bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch has no need of")

    def _empty(self, kind: object, shape: object, code: object) -> _PickledArray:
        return _PickledArray()

    def _from_buffer(self, buffer: Any, dtype: _PickledDtype, shape: Any, order: object) -> _PickledArray:
        array = _PickledArray()
        array.__setstate__((1, shape, dtype, order == "F", bytes(buffer)))
        return array

    def _dtype(self, code: object, align: object = False, copy: object = True) -> _PickledDtype:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array must be of bytes, got {code!r}")
        return _PickledDtype()

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode("latin-1")

    def _no_bytes(self) -> bytes:
        return b""


class _PickledDtype:
    """The type of an array of bytes."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: nothing that an array of bytes depends on."""


class _PickledArray:
    """An array of bytes, built from a pickled state by numpy's safe constructors."""

    __slots__ = ("array",)

    def __setstate__(self, state: tuple[object, Any, _PickledDtype, bool, bytes]) -> None:
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _PickledDtype):
            raise pickle.UnpicklingError("an array must be of bytes")
        self.array: Pixels = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")
