"""Labelled images out of the files that their usual sources provide. What a file holds is checked; nothing runs.

| source | what is looked for |
|---|---|
| `digits` | the set inside this package |
| MNIST, Fashion-MNIST | the four idx files, plain or `.gz`, in the folder or its `raw` |
| CIFAR-10 | `data_batch_1` to `5` and `test_batch` (pickles or `.bin`), in the folder or its `cifar-10-batches-*` |
| Parquet | a file, or a folder of them; splits by the names of files and folders; columns `image` and `label` |
| pictures | a folder with one subfolder of PNG or JPEG files for each class, or two such folders, `train` and `test` |

The digits are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI
Machine Learning Repository, doi:10.24432/C50P49, licence CC BY 4.0), in the order that scikit-learn's `load_digits`
has: 1,797 images of 8 x 8 pixels with values from 0 to 16. 360 of them, drawn once at random in the proportions of the
classes and written down in the file, are held out; 1,437 are for training.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

import numpy as np

from landscape_ray.data.image_archives import CIFAR_HELP, MNIST_HELP, read_archive
from landscape_ray.data.image_sets import ImageSet, LabelledImages
from landscape_ray.data.pictures import PARQUET_SUFFIXES, Advance, Pictures, find_pictures
from landscape_ray.errors import UserError


def read_images(source: str, *, image_size: int | None, cache: Path, advance: Advance) -> ImageSet:
    """Return the images of a source.

    Args:
        source: `digits`, or the path of a file or folder.
        image_size: what pictures in files are scaled and cropped to, in pixels; None for as they are.
        cache: folder where decoded pictures are kept.
        advance: called with the number of pictures decoded.

    Raises:
        UserError: nothing there, nothing that is known, incomplete or damaged files, pictures of several sizes, or an
            `image_size` for images that are not pictures in files.
    """
    path = Path(source).expanduser()
    if source == "digits":
        found: ImageSet | Pictures = _digits()
    elif os.path.isdir(path):
        try:
            found = _in_folder(path)
        except OSError as error:
            raise UserError(f"{path} cannot be listed ({error.strerror}); make the folder readable") from None
    elif os.path.isfile(path):
        if path.suffix.lower() not in PARQUET_SUFFIXES:
            raise UserError(f"data.source must be 'digits', a folder or a .parquet file, got the file {path}")
        found = Pictures(path, {"train": [(path, None)]})
    else:
        raise UserError(
            f"data.source must be 'digits' or a path, got {source!r}, where nothing is; give a folder of MNIST, "
            f"Fashion-MNIST or CIFAR-10 files, of Parquet files, or with a subfolder of pictures for each class"
        )
    if isinstance(found, Pictures):
        return found.read(image_size, cache, advance)
    if image_size is not None:
        height, width = found.train.images.shape[2:]
        raise UserError(
            f"data.image_size is for pictures in PNG or JPEG files, got {image_size} for {source}, whose images "
            f"are {height} x {width}; leave it out"
        )
    return found


def _in_folder(folder: Path) -> ImageSet | Pictures:
    found = read_archive(folder) or find_pictures(folder)
    if found is None:
        raise UserError(
            f"{folder} holds no images that are known: no idx files of MNIST or Fashion-MNIST, no CIFAR-10 batches, no "
            f"Parquet files, no subfolders (one for each class) with PNG or JPEG files; {MNIST_HELP}; {CIFAR_HELP}"
        )
    return found


def _digits() -> ImageSet:
    with (
        importlib.resources.files("landscape_ray.data").joinpath("digits.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        images, labels, held_out = (arrays[name] for name in ("images", "labels", "held_out"))
    everything = LabelledImages(images[:, None], labels.astype(np.int64))
    is_held_out = np.zeros(len(labels), dtype=np.bool_)
    is_held_out[held_out] = True
    train, validation = (everything.at(part) for part in (~is_held_out, is_held_out))
    return ImageSet(train, validation, 10, max_value=16)
