"""Pictures that are decoded one by one: PNG and JPEG files by class, or cells of Parquet tables; with a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from landscape_ray.data.image_sets import ImageSet, LabelledImages, Pixels
from landscape_ray.data.tables import VALIDATION_NAMES
from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic_with

logger = logging.getLogger(__name__)

Advance: TypeAlias = Callable[[int], None]

PARQUET_SUFFIXES = (".parquet", ".pq")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
CACHE_VERSION = 1


def find_pictures(folder: Path) -> Pictures | None:
    """Return what a folder holds of Parquet files or of subfolders with pictures, unread; None for nothing.

    Raises:
        UserError: splits that cannot be told apart.
    """
    tables = [path for path in _files_below(folder) if path.suffix.lower() in PARQUET_SUFFIXES]
    if tables:
        return Pictures(folder, _parquet_splits(folder, tables))
    return _picture_folder(folder)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Files with pictures, listed and not read."""

    root: Path
    splits: dict[str, list[tuple[Path, str | None]]]
    """`train` and perhaps `validation`: pictures with the names of their classes, or Parquet files with None."""

    def read(self, image_size: int | None, cache: Path, advance: Advance) -> ImageSet:
        """Return the decoded pictures, from the cache if they are there whole.

        Decoding is slow, and every trial of a sweep opens the same pictures; but a cache is never in the way.
        """
        listing = [
            (split, path.relative_to(self.root).as_posix(), name, path.stat().st_size, path.stat().st_mtime_ns)
            for split, files in self.splits.items()
            for path, name in files
        ]
        parts = [CACHE_VERSION, str(self.root.resolve()), image_size, listing]
        key = hashlib.sha256(json.dumps(parts).encode("utf-8", "backslashreplace")).hexdigest()[:16]
        place = cache / "images" / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', self.root.stem)[:40]}-{key}.npz"
        try:
            with np.load(place) as arrays:  # checks the checksum of each array
                train = LabelledImages(arrays["train_images"], arrays["train_labels"])
                if "validation_labels" not in arrays:
                    return ImageSet(train, None, int(arrays["num_classes"]))
                validation = LabelledImages(arrays["validation_images"], arrays["validation_labels"])
                return ImageSet(train, validation, int(arrays["num_classes"]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("decoding the images again: %s is damaged (%s)", place, error)
        found = self.decode(image_size, advance)
        try:
            write_atomic_with(place, lambda file: _write_arrays(file, found))
        except UserError as error:
            logger.warning("the decoded images are not kept: %s", error)
        return found

    def decode(self, image_size: int | None, advance: Advance) -> ImageSet:
        """Return the images in order; classes that have names are numbered in the order of the names."""
        images: dict[str, list[Pixels]] = {}
        labels: dict[str, list[Any]] = {}
        first: tuple[tuple[int, ...], str] | None = None
        for split, files in self.splits.items():
            images[split], labels[split] = [], []
            for image, label, where in self._items(files, image_size):
                first = first or (image.shape[1:], where)
                if image.shape[1:] != first[0]:
                    raise UserError(
                        f"all images must have one size, got {_by(first[0])} in {first[1]} and {_by(image.shape[1:])} "
                        f"in {where}; set data.image_size to scale and crop them to a square"
                    )
                images[split].append(image)
                labels[split].append(label)
                advance(1)
            if not images[split]:
                raise UserError(f"{self.root} holds no images for {split}; add some, or leave that split out")
        num_classes, numbered = _number(labels, self.root)
        # grey pictures beside coloured ones become coloured
        channels = max(image.shape[0] for split in images.values() for image in split)
        parts = {
            split: LabelledImages(
                np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images[split]]),
                numbered[split],
            )
            for split in self.splits
        }
        return ImageSet(parts["train"], parts.get("validation"), num_classes)

    def _items(
        self, files: list[tuple[Path, str | None]], image_size: int | None
    ) -> Iterator[tuple[Pixels, int | str, str]]:
        for path, name in files:
            if name is None:
                yield from _parquet_rows(path, image_size)
            else:
                yield _decode(path, str(path), image_size), name, str(path)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _number(labels: dict[str, list[Any]], root: Path) -> tuple[int, dict[str, np.ndarray[Any, np.dtype[np.int64]]]]:
    """Return the number of classes and the labels as numbers."""
    kinds = {type(label) for split in labels.values() for label in split}
    if kinds == {str}:
        classes = {name: number for number, name in enumerate(sorted(set(labels["train"])))}
        unknown = sorted(set(labels.get("validation", ())) - classes.keys())
        if unknown:
            raise UserError(
                f"{root}: every held-out class must be one of the training classes {', '.join(classes)}, got "
                f"{', '.join(unknown)}; rename or remove it"
            )
        labels = {split: [classes[name] for name in names] for split, names in labels.items()}
        num_classes = len(classes)
    elif kinds == {int}:
        values = [label for split in labels.values() for label in split]
        if min(values) < 0 or max(values) >= len(values):
            bad = min(values) if min(values) < 0 else max(values)
            raise UserError(
                f"{root}: labels must be classes from 0, fewer than there are images, got {bad} among {len(values)} "
                f"images; number the classes"
            )
        num_classes = max(values) + 1
    else:
        raise UserError(f"{root}: labels must be either names or numbers in all files, got both; write them alike")
    return num_classes, {split: np.array(numbers, dtype=np.int64) for split, numbers in labels.items()}


def _picture_folder(folder: Path) -> Pictures | None:
    subfolders = _subfolders(folder)
    if "train" in subfolders:
        held_out = next((name for name in VALIDATION_NAMES if name in subfolders), None)
        splits = {"train": _class_files(subfolders["train"])}
        if held_out is not None:
            splits["validation"] = _class_files(subfolders[held_out])
    elif subfolders and subfolders.keys() <= set(VALIDATION_NAMES):
        raise UserError(f"{folder} must have a subfolder 'train' beside {', '.join(subfolders)}; add it")
    else:
        splits = {"train": _class_files(folder)}
    return Pictures(folder, splits) if splits["train"] else None


def _subfolders(folder: Path) -> dict[str, Path]:
    found = (entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith("."))
    return {entry.name: entry for entry in found}


def _files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted, without hidden files and folders."""
    found = []
    for here, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _class_files(folder: Path) -> list[tuple[Path, str | None]]:
    files: list[tuple[Path, str | None]] = []
    num_others = 0
    for name, subfolder in _subfolders(folder).items():
        for path in _files_below(subfolder):
            if path.suffix.lower() in PICTURE_SUFFIXES:
                files.append((path, name))
            else:
                num_others += 1
    if num_others and files:
        logger.warning("%s: passed over %d files that are not PNG or JPEG", folder, num_others)
    return files


def _decode(file: Path | bytes, where: str, image_size: int | None) -> Pixels:
    """Return a picture as (1, height, width) if it is grey, else (3, height, width); transparency is dropped."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise UserError("reading PNG and JPEG files needs Pillow; pip install pillow") from None
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=("PNG", "JPEG")) as opened:
            picture: Any = PIL.ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):
                raise UserError(f"{where} must have 8 bits per channel, got mode {picture.mode}; convert it")
            if picture.mode == "P":  # directly to RGB, Pillow warns of some palettes
                picture = picture.convert("RGBA")
            picture = picture.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB")
            if image_size is not None and picture.size != (image_size, image_size):
                picture = PIL.ImageOps.fit(picture, (image_size, image_size), PIL.Image.Resampling.BILINEAR)
            pixels = np.asarray(picture, dtype=np.uint8)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be read as PNG or JPEG ({error}); replace or remove it") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# Parquet: the layout of Hugging Face's image datasets, or flat lists of pixels.


def _parquet_splits(folder: Path, tables: list[Path]) -> dict[str, list[tuple[Path, str | None]]]:
    """Return the tables by split: a word of the file's name or of its folders is `train`, `test`, ..."""
    named: dict[str | None, list[tuple[Path, str | None]]] = {}
    for path in tables:
        words = re.split(r"[^a-z]+", path.relative_to(folder).as_posix().lower())
        split = next((word for word in reversed(words) if word == "train" or word in VALIDATION_NAMES), None)
        named.setdefault(split, []).append((path, None))
    if named.keys() == {None}:
        return {"train": named[None]}
    if None in named or "train" not in named:
        odd = named.get(None, next(iter(named.values())))[0][0]
        raise UserError(
            f"{folder} must have Parquet files for 'train' (and 'test' or 'validation') in their names, or none with "
            f"such a word, got {odd.name}; rename the files"
        )
    held_out = next((name for name in VALIDATION_NAMES if name in named), None)
    return {"train": named["train"], **({"validation": named[held_out]} if held_out else {})}


def _parquet_rows(path: Path, image_size: int | None) -> Iterator[tuple[Pixels, int | str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as parquet:
            names = [_column(parquet.schema_arrow.names, known, path) for known in (IMAGE_COLUMNS, LABEL_COLUMNS)]
            for batch in parquet.iter_batches(batch_size=1024, columns=names):
                images, labels = (batch.column(name) for name in names)
                for column in (images, labels):
                    if column.null_count:
                        raise UserError(f"{path} must have no missing images and labels, got some after row {row}")
                for image, label in zip(_cells(images, path, image_size, row), _labels(labels, path), strict=True):
                    yield image, label, f"{path}, row {row}"
                    row += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as Parquet ({reason}); write the file again") from None


def _column(names: list[str], known: tuple[str, ...], path: Path) -> str:
    for name in known:
        if name in names:
            return name
    raise UserError(f"{path} must have a column '{known[0]}', got {', '.join(names) or 'none'}; rename one")


def _cells(column: Any, path: Path, image_size: int | None, row: int) -> Iterator[Pixels]:
    from pyarrow import types

    kind = column.type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
        kind = column.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        for number, content in enumerate(column.to_pylist(), start=row):
            where = f"{path}, row {number}"
            if content is None:
                raise UserError(f"{where}: the bytes of the image must be in the file, got only its path; embed them")
            yield _decode(content, where, image_size)
    elif (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)) and types.is_integer(
        kind.value_type
    ):
        if image_size is not None:
            raise UserError(f"data.image_size is for pictures in PNG or JPEG, got {image_size} for lists in {path}")
        for number, values in enumerate(column.to_pylist(), start=row):
            yield _flat(values, f"{path}, row {number}")
    else:
        raise UserError(
            f"{path}: images must be PNG or JPEG bytes, a struct with such `bytes`, or lists of integers, got "
            f"{column.type}; write them so"
        )


def _flat(values: list[int | None], where: str) -> Pixels:
    """Return a flat list of pixels as a square image: grey, or three planes one after the other."""
    for channels in (1, 3):
        side = math.isqrt(len(values) // channels)
        if side and channels * side * side == len(values):
            break
    else:
        raise UserError(f"{where}: a list must be a square image of 1 or 3 channels, got {len(values)} values")
    if any(value is None or not 0 <= value <= 255 for value in values):
        raise UserError(f"{where}: pixels must be integers in 0 .. 255, got others; scale them")
    return np.array(values, dtype=np.uint8).reshape(channels, side, side)


def _labels(column: Any, path: Path) -> Iterable[int | str]:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise UserError(f"{path}: labels must be integers or strings, got {kind}; write them so")
    return column.to_pylist()  # type: ignore[no-any-return]


def _write_arrays(file: Any, found: ImageSet) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {"num_classes": np.array(found.num_classes)}
    for name, split in (("train", found.train), ("validation", found.validation)):
        if split is not None:
            arrays |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
