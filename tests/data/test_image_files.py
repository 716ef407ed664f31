"""Every format of images: what is written comes back, nothing in a file runs, and what is wrong is said."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from landscape_ray.data import image_files
from landscape_ray.data.dataset import generator_for
from landscape_ray.data.image_files import read_images
from landscape_ray.data.image_sets import ImageSet, LabelledImages, Pixels
from landscape_ray.data.images import ImageConfig, open_images
from landscape_ray.errors import UserError


def read(path: Path, image_size: int | None = None) -> ImageSet:
    return read_images(str(path), image_size=image_size, cache=path.parent / "cache", advance=lambda num: None)


def some(num: int, *shape: int, seed: int = 0) -> LabelledImages:
    generator = generator_for(seed)
    images = generator.integers(256, size=(num, *shape), dtype=np.uint8)
    return LabelledImages(images, generator.integers(10, size=num))


def assert_same(found: LabelledImages | None, expected: LabelledImages) -> None:
    assert found is not None
    assert found.images.dtype == np.uint8
    assert found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.labels, expected.labels)


# MNIST and Fashion-MNIST.

IDX_NAMES = ("{}-idx{}-ubyte", "{}.idx{}-ubyte", "{}-idx{}-ubyte.gz", "{}.idx{}-ubyte.gz")


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, name: str = IDX_NAMES[0]) -> tuple[LabelledImages, LabelledImages]:
    folder.mkdir(parents=True, exist_ok=True)
    parts = some(12, 1, 5, 4), some(7, 1, 5, 4, seed=1)
    for prefix, (images, labels) in zip(("train", "t10k"), parts, strict=True):
        for kind, array in (("images", images[:, 0]), ("labels", labels)):
            content = idx(array)
            path = folder / name.format(f"{prefix}-{kind}", array.ndim)
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return parts


@pytest.mark.parametrize("name", IDX_NAMES)
@pytest.mark.parametrize("below", ["", "raw"])
def test_mnist(tmp_path: Path, name: str, below: str) -> None:
    train, validation = write_mnist(tmp_path / below, name)
    found = read(tmp_path)
    assert_same(found.train, train)
    assert_same(found.validation, validation)
    assert found.num_classes == max(*train.labels, *validation.labels) + 1
    assert found.max_value == 255
    data = open_images(ImageConfig(source=str(tmp_path)))
    assert (data.num_train, data.num_validation) == (12, 7)


@pytest.mark.parametrize("name", IDX_NAMES[:2])
def test_a_plain_file_wins_over_a_compressed_one(tmp_path: Path, name: str) -> None:
    train, _ = write_mnist(tmp_path, name)
    for other in IDX_NAMES[2:]:
        (tmp_path / other.format("train-images", 3)).write_bytes(b"damaged")
    assert_same(read(tmp_path).train, train)


def test_incomplete_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"four idx files, t10k-labels-idx1-ubyte is missing; get .* Yann LeCun"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be an idx file of bytes with 3 dimensions, it starts with nothing; get the four files"),
        (b"<html>", "must be an idx file of bytes with 3 dimensions, it starts with 3c68746d; get"),
        (idx(np.zeros(12)), "with 3 dimensions, it starts with 00000801"),
        (struct.pack(">HBB", 0, 0x0D, 3) + bytes(12), "it starts with 00000d03"),
        (idx(np.zeros((12, 5, 4)))[:10], "it starts with 00000803"),
        (idx(np.zeros((12, 5, 4)))[:-1], r"must hold 12 x 5 x 4 = 240 bytes of data, got 239: it is damaged; get"),
        (idx(np.zeros((12, 5, 4))) + b"\0", "got 241: it is damaged"),
        (idx(np.zeros((11, 5, 4))), "one image for each label, got 11 images and 12 labels; get"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no" + data, lambda data: data[:20] + b"\0"])
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_mnist(tmp_path, IDX_NAMES[2])
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz cannot be read \(.+\); get the four files"):
        read(tmp_path)


# CIFAR-10.


def python_2_batch(images: Pixels, labels: list[int]) -> bytes:
    """Return what Python 2's cPickle writes with protocol 2: the format of the files from the University of Toronto."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    content = images.tobytes()
    dtype = (
        b"cnumpy\ndtype\n" + short(b"u1") + b"K\0K\1\x87R"
        + b"(K\3" + short(b"|") + b"NNN" + number(-1) + number(-1) + b"K\0tb"
    )  # fmt: skip
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\1cnumpy\nndarray\nq\2K\0\x85" + short(b"b") + b"\x87Rq\3"
        + b"(K\1" + number(len(labels)) + number(3072) + b"\x86" + dtype + b"\x89"
        + b"T" + struct.pack("<i", len(content)) + content + b"tb"
    )  # fmt: skip
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    entries = [
        (b"batch_label", short(b"training batch 1 of 5")),
        (b"labels", listed),
        (b"data", array),
        (b"filenames", b"](" + b"".join(short(b"camion_s_000148.png") for _ in labels) + b"e"),
    ]
    return b"\x80\2}(" + b"".join(short(key) + value for key, value in entries) + b"u."


def python_3_batch(protocol: int, order: str = "C") -> Callable[[Pixels, list[int]], bytes]:
    def write(images: Pixels, labels: list[int]) -> bytes:
        rows = np.array(images.reshape(len(labels), -1), order=order)  # type: ignore[call-overload]
        entries = {"data": rows, "labels": labels, "filenames": [b"", b"a.png"], "batch_label": "x"}
        return pickle.dumps(entries, protocol=protocol)

    return write


def binary_batch(images: Pixels, labels: list[int]) -> bytes:
    rows = images.reshape(len(labels), -1)
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))


def write_cifar(
    folder: Path, write: Callable[[Pixels, list[int]], bytes], suffix: str = ""
) -> tuple[LabelledImages, LabelledImages]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    batches = [some(3, 3, 32, 32, seed=number) for number in range(6)]
    for name, (images, labels) in zip(names, batches, strict=True):
        (folder / f"{name}{suffix}").write_bytes(write(images, labels.tolist()))
    train = LabelledImages(*(np.concatenate(arrays) for arrays in zip(*batches[:5], strict=True)))
    return train, batches[5]


@pytest.mark.parametrize(
    ("write", "suffix", "below"),
    [
        (python_2_batch, "", "cifar-10-batches-py"),
        (python_2_batch, "", ""),
        (python_3_batch(2), "", ""),
        (python_3_batch(4), "", ""),
        (python_3_batch(5), "", ""),
        (python_3_batch(5, "F"), "", ""),
        (python_3_batch(4, "F"), "", ""),
        (binary_batch, ".bin", "cifar-10-batches-bin"),
        (binary_batch, ".bin", ""),
    ],
)
def test_cifar(tmp_path: Path, write: Callable[[Pixels, list[int]], bytes], suffix: str, below: str) -> None:
    train, validation = write_cifar(tmp_path / below, write, suffix)
    found = read(tmp_path)
    assert_same(found.train, train)
    assert_same(found.validation, validation)
    assert found.num_classes == 10


def test_the_python_2_fixture_is_a_real_pickle() -> None:
    images, labels = some(2, 3, 32, 32)
    batch = pickle.loads(python_2_batch(images, labels.tolist()), encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], images.reshape(2, -1))
    assert batch[b"labels"] == labels.tolist()


def test_incomplete_cifar(tmp_path: Path) -> None:
    write_cifar(tmp_path, binary_batch, ".bin")
    (tmp_path / "data_batch_2.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    message = r"six batches, data_batch_2.bin, test_batch.bin is missing; get .* CIFAR-10 page of the University of Tor"
    with pytest.raises(UserError, match=message):
        read(tmp_path)


class Touch:
    """Pickles to a call of an innocent-looking function that leaves a trace."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.acceptance
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (os.mkdir, r"(posix|nt)\.mkdir"),
        (eval, r"(__builtin__|builtins)\.eval"),
        (getattr, r"(__builtin__|builtins)\.getattr"),
        (np.load, r"numpy\.load"),
        (pickle.loads, r"_?pickle\.loads"),
        (io.open, r"(_io|io)\.open"),
    ],
)
def test_a_malicious_pickle_is_refused_before_it_calls_anything(
    tmp_path: Path, call: Any, name: str, protocol: int
) -> None:
    write_cifar(tmp_path, python_2_batch)
    trace = tmp_path / "trace"
    bad = {"data": Touch(call, str(trace)), "labels": [Touch(os.mkdir, str(trace))]}
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(bad, protocol=protocol))
    message = rf"data_batch_3 cannot be read as a CIFAR-10 batch \(it asks for {name}, which a batch has no need of\)"
    with pytest.raises(UserError, match=message):
        read(tmp_path)
    assert not trace.exists()


ENTRY = b"\x80\2}(U\4data"
END = b"U\6labels](K\1eu."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"Ran out of input"),
        (b"<html>", r".+"),
        (python_2_batch(*some(1, 3, 32, 32)._replace(labels=[1]))[:-50], r".+"),  # type: ignore[arg-type]
        (pickle.dumps([1]), "'list' object has no attribute 'items'"),
        (pickle.dumps({"data": 1}), "'int' object has no attribute 'array'"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}), "'labels'"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["x"]}), "invalid literal for int"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "cannot reshape array of size 6144"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}), "an array must be of bytes, got 'f8'"),
        (pickle.dumps({"data": np.array([None]), "labels": [1]}), "an array must be of bytes, got 'O8'"),
        # numpy's names in places that they do not belong in
        (ENTRY + b"cnumpy\nndarray\n(K\1tR" + END, "'str' object is not callable"),
        (ENTRY + b"cnumpy.core.multiarray\n_reconstruct\nNNN\x87R(K\1K\1NI00\nU\1xtb" + END, "an array must be of byt"),
        (ENTRY + b"cnumpy.core.multiarray\n_reconstruct\n}U\4nameK\1sb" + END, ".+"),
        (ENTRY + b"cnumpy.core.multiarray\n_reconstruct\nN}U\x08__code__K\1s\x86b" + END, ".+"),
        (ENTRY + b"cnumpy.core.multiarray\n_reconstruct\n)\x81" + END, ".+"),
        (b"\x80\2Pid\n.", "persistent"),
    ],
)  # fmt: skip
def test_a_damaged_batch_is_an_error_and_nothing_else(tmp_path: Path, content: bytes, reason: str) -> None:
    write_cifar(tmp_path, python_2_batch)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match=rf"data_batch_3 cannot be read as a CIFAR-10 batch \(.*{reason}.*\); get the"):
        read(tmp_path)


def test_damaged_binary_batch(tmp_path: Path) -> None:
    write_cifar(tmp_path, binary_batch, ".bin")
    for content in (b"", b"\0" * 3072):
        (tmp_path / "data_batch_1.bin").write_bytes(content)
        with pytest.raises(
            UserError, match=rf"rows of 3073 bytes, .* got {len(content)} bytes: it is damaged; get the"
        ):
            read(tmp_path)


@pytest.mark.parametrize(("write", "suffix"), [(binary_batch, ".bin"), (python_2_batch, "")])
def test_cifar_labels_outside_the_classes(
    tmp_path: Path, write: Callable[[Pixels, list[int]], bytes], suffix: str
) -> None:
    write_cifar(tmp_path, write, suffix)
    (tmp_path / f"test_batch{suffix}").write_bytes(write(some(2, 3, 32, 32).images, [3, 10]))
    with pytest.raises(UserError, match=r"test_batch.* must have labels in 0 .. 9, got 3 .. 10; get the python"):
        read(tmp_path)


# Pictures in folders.


def save(path: Path, image: Pixels, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    picture.save(path, **options)


def write_folder(folder: Path, part: LabelledImages, names: str = "abcdefghij") -> LabelledImages:
    """Write PNG files and return what is expected back: sorted by class and file name, numbered by class name."""
    for number, (image, label) in enumerate(zip(*part, strict=True)):
        save(folder / f"class {names[label]}" / f"{number:03}.png", image)
    order = np.lexsort((np.arange(len(part.labels)), [names[label] for label in part.labels]))
    present = sorted({names[label] for label in part.labels})
    labels = np.array([present.index(names[label]) for label in part.labels[order]], dtype=np.int64)
    return LabelledImages(part.images[order], labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_classes_is_divided_by_us(tmp_path: Path, channels: int) -> None:
    part = LabelledImages(some(30, channels, 6, 5).images, np.arange(30) % 3)
    expected = write_folder(tmp_path / "pets", part, names="cab")
    (tmp_path / "pets" / ".hidden").mkdir()
    found = read(tmp_path / "pets")
    assert_same(found.train, expected)
    assert found.validation is None
    assert found.num_classes == 3
    config = ImageConfig(source=str(tmp_path / "pets"), validation_fraction=0.2, normalise="unit")
    data = open_images(config, cache=tmp_path / "cache")
    again = open_images(config.model_copy(update={"corruption_seed": 1}), cache=tmp_path / "cache")
    inputs, targets = data.validation_batches(None, 6)[0]
    assert (data.num_train, data.num_validation) == (24, 6)
    assert np.bincount(targets).tolist() == [2, 2, 2]
    assert bool((again.validation_batches(None, 6)[0][0] == inputs).all())
    pixels = np.concatenate([data.batch(0, 0, 24)[0].numpy(), inputs.numpy()])
    assert sorted(image.tobytes() for image in (pixels * 255).round().astype(np.uint8)) == sorted(
        image.tobytes() for image in part.images
    )


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_folder_with_splits(tmp_path: Path, held_out: str) -> None:
    train = write_folder(tmp_path / "train", LabelledImages(some(8, 3, 4, 4).images, np.arange(8) % 4))
    validation = write_folder(tmp_path / held_out, LabelledImages(some(4, 3, 4, 4, seed=1).images, np.arange(4)))
    (tmp_path / "notes").mkdir()
    found = read(tmp_path)
    assert_same(found.train, train)
    assert_same(found.validation, validation)


def test_validation_is_preferred_to_test(tmp_path: Path) -> None:
    for name, num in (("train", 8), ("test", 4), ("validation", 6)):
        write_folder(tmp_path / name, LabelledImages(some(num, 1, 4, 4).images, np.arange(num) % 2))
    found = read(tmp_path)
    assert found.validation is not None
    assert len(found.validation.labels) == 6


def test_every_kind_of_picture_becomes_grey_or_coloured(tmp_path: Path) -> None:
    grey = PIL.Image.fromarray(some(1, 1, 8, 8).images[0, 0])
    colour = PIL.Image.fromarray(some(1, 3, 8, 8).images[0].transpose(1, 2, 0))
    palette = colour.quantize(16)
    pictures = {
        "a/grey.png": grey, "a/two.png": grey.convert("1"), "a/grey_alpha.png": grey.convert("LA"),
        "b/alpha.png": colour.convert("RGBA"), "b/palette.png": palette, "b/colour.JPEG": colour, "b/grey.jpg": grey,
        "b/print.jpg": colour.convert("CMYK"),
    }  # fmt: skip
    for name, picture in pictures.items():
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        options = {"transparency": bytes(range(16))} if "palette" in name else {}
        picture.save(tmp_path / "all" / name, **options)
    found = read(tmp_path / "all")
    assert found.train.images.shape == (8, 3, 8, 8)
    images = dict(zip(sorted(pictures), found.train.images, strict=True))
    grey_pixels, colour_pixels = np.asarray(grey), np.asarray(colour).transpose(2, 0, 1)
    for name in ("a/grey.png", "a/grey_alpha.png"):
        np.testing.assert_array_equal(images[name], np.stack([grey_pixels] * 3))
    np.testing.assert_array_equal(images["b/alpha.png"], colour_pixels)
    np.testing.assert_array_equal(images["b/palette.png"], np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    assert set(np.unique(images["a/two.png"])) == {0, 255}
    only_grey = {name: picture for name, picture in pictures.items() if name.startswith("a/")}
    for name, picture in only_grey.items():
        (tmp_path / "grey" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "grey" / name)
    assert read(tmp_path / "grey").train.images.shape == (3, 1, 8, 8)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = some(1, 1, 4, 6).images[0]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    save(tmp_path / "all" / "a" / "x.png", image, exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "all").train.images[0, 0], np.rot90(image[0], -1))


def test_sizes_that_differ_are_refused_or_made_equal(tmp_path: Path) -> None:
    image = np.zeros((1, 20, 40), dtype=np.uint8)
    image[:, :, 8:32] = 200  # the square about the centre, and what the filter reaches beyond it
    save(tmp_path / "all" / "a" / "wide.png", image)
    save(tmp_path / "all" / "b" / "small.png", image[:, :10, 10:20])
    message = r"one size, got 20 x 40 in .*wide.png and 10 x 10 in .*small.png; set data.image_size to scale and crop"
    with pytest.raises(UserError, match=message):
        read(tmp_path / "all")
    images = read(tmp_path / "all", image_size=10).train.images
    assert images.shape == (2, 1, 10, 10)
    assert (images == 200).all()


def test_unreadable_pictures(tmp_path: Path) -> None:
    path = tmp_path / "all" / "a" / "x.png"
    save(path, some(1, 1, 8, 8).images[0])
    content = path.read_bytes()
    gif = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(gif, format="GIF")
    for damaged in (b"", content[:40], content[:-30], gif.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x.png cannot be read as PNG or JPEG \(.+\); replace or remove it"):
            read(tmp_path / "all")
    PIL.Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(path)
    with pytest.raises(UserError, match=r"x.png must have 8 bits per channel, got mode I;16; convert it"):
        read(tmp_path / "all")


def test_pictures_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "all" / "a" / "x.png", some(1, 1, 8, 8).images[0])
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UserError, match=r"reading PNG and JPEG files needs Pillow; pip install pillow"):
        read(tmp_path / "all")


def test_other_files_are_passed_over_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "all" / "a" / "x.png", some(1, 1, 8, 8).images[0])
    for name in ("Thumbs.db", "deeper/readme.txt", ".hidden"):
        (tmp_path / "all" / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "all" / "a" / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path / "all").train.labels) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'all'}: passed over 2 files that are not PNG or JPEG"
    ]


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty" / "a").mkdir(parents=True)
    message = r"empty holds no images that are known: .* Yann LeCun, or .* Zalando Research; .* University of Toronto"
    with pytest.raises(UserError, match=message):
        read(tmp_path / "empty")
    write_folder(tmp_path / "half" / "test", LabelledImages(some(2, 1, 4, 4).images, np.arange(2)))
    with pytest.raises(UserError, match=r"half must have a subfolder 'train' beside test; add it"):
        read(tmp_path / "half")
    write_folder(tmp_path / "half" / "train", LabelledImages(some(1, 1, 4, 4).images, np.arange(1)))
    with pytest.raises(UserError, match=r"half: every held-out class must be one of .* class a, got class b; rename"):
        read(tmp_path / "half")
    (tmp_path / "none" / "train" / "a").mkdir(parents=True)
    write_folder(tmp_path / "none" / "train", LabelledImages(some(1, 1, 4, 4).images, np.arange(1)))
    (tmp_path / "none" / "test" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"none holds no images for validation; add some, or leave that split out"):
        read(tmp_path / "none")
    with pytest.raises(
        UserError, match=r"data.source must be 'digits' or a path, got '.*nowhere', where nothing is; g"
    ):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data.source must be 'digits' or a path, got '\\x00'"):
        read_images("\0", image_size=None, cache=tmp_path, advance=lambda num: None)
    (tmp_path / "file.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"must be 'digits', a folder or a .parquet file, got the file .*file.zip"):
        read(tmp_path / "file.zip")

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"half cannot be listed \(Permission denied\); make the folder readable"):
        read(tmp_path / "half")


def test_image_size_is_for_pictures_only(tmp_path: Path) -> None:
    message = r"data.image_size is for pictures in PNG or JPEG files, got 16 for digits, whose images are 8 x 8; leave"
    with pytest.raises(UserError, match=message):
        open_images(ImageConfig(image_size=16))


# Parquet.


HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(image: Pixels) -> bytes:
    content = io.BytesIO()
    PIL.Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(content, format="PNG")
    return content.getvalue()


def table(part: LabelledImages, layout: str = "struct", image: str = "image", label: str = "label") -> pa.Table:
    flat = [picture.ravel().tolist() for picture in part.images]
    columns = {
        "struct": lambda: pa.array([{"bytes": png(image), "path": None} for image in part.images], HUGGING_FACE),
        "bytes": lambda: pa.array([png(image) for image in part.images], pa.large_binary()),
        "list": lambda: pa.array(flat, pa.list_(pa.uint8())),
        "large": lambda: pa.array(flat, pa.large_list(pa.int64())),
        "fixed": lambda: pa.array(flat, pa.list_(pa.uint8(), len(flat[0]))),
    }
    return pa.table({"extra": range(len(flat)), image: columns[layout](), label: pa.array(part.labels)})


@pytest.mark.parametrize("layout", ["struct", "bytes", "list", "large", "fixed"])
@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_file(tmp_path: Path, layout: str, channels: int) -> None:
    part = some(12, channels, 6, 6)
    pq.write_table(table(part, layout), tmp_path / "x.parquet", row_group_size=5)
    found = read(tmp_path / "x.parquet")
    assert_same(found.train, part)
    assert found.validation is None
    assert found.num_classes == part.labels.max() + 1


@pytest.mark.parametrize(
    ("train_names", "held_out"),
    [
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "data/test-00000-of-00001.parquet",
        ),
        (["plain_text/train/0000.parquet", "plain_text/train/0001.parquet"], "plain_text/test/0000.parquet"),
        (["a_train.pq", "b_train.pq"], "validation.pq"),
        (["one.parquet", "two.parquet"], None),
    ],
)
def test_parquet_folders(tmp_path: Path, train_names: list[str], held_out: str | None) -> None:
    parts = [some(12, 1, 5, 5, seed=seed) for seed in range(3)]
    for name, part in zip([*train_names, held_out], parts, strict=True):
        if name is not None:
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table(part, image="img", label="fine_label"), tmp_path / "set" / name)
    found = read(tmp_path / "set")
    assert_same(found.train, LabelledImages(*(np.concatenate(arrays) for arrays in zip(*parts[:2], strict=True))))
    if held_out is None:
        assert found.validation is None
    else:
        assert_same(found.validation, parts[2])


@pytest.mark.parametrize("kind", ["plain", "dictionary"])
def test_parquet_labels_may_be_names(tmp_path: Path, kind: str) -> None:
    part = some(6, 1, 4, 4)
    names = pa.array(["dog", "ant", "dog", "cat", "ant", "cat"])
    labels = names if kind == "plain" else names.dictionary_encode()
    written = table(part).set_column(2, "label", labels)
    pq.write_table(written, tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert found.train.labels.tolist() == [2, 0, 2, 1, 0, 1]
    assert found.num_classes == 3


def with_column(name: str, values: Any) -> pa.Table:
    written = table(some(3, 1, 4, 4))
    return written.set_column(written.schema.get_field_index(name), name, values)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (table(some(3, 1, 4, 4), image="picture"), "must have a column 'image', got extra, picture, label; rename one"),
        (table(some(3, 1, 4, 4), label="y"), "must have a column 'label', got extra, image, y; rename one"),
        (with_column("label", pa.array([0, None, 1])), "must have no missing images and labels, got some after row 0"),
        (with_column("label", pa.array([0.0, 1.0, 1.0])), "labels must be integers or strings, got double; write"),
        (with_column("label", pa.array([0, -1, 1])), "labels must be classes from 0, .*, got -1 among 3 images; n"),
        (with_column("label", pa.array([0, 1000, 1])), "fewer than there are images, got 1000 among 3 images; number"),
        (with_column("image", pa.array(["a.png"] * 3)), "images must be PNG or JPEG bytes, .*, got string; write t"),
        (
            with_column("image", pa.array([{"bytes": None, "path": "a.png"}] * 3, HUGGING_FACE)),
            "row 0: the bytes of the image must be in the file, got only its path; embed them",
        ),
        (
            with_column("image", pa.array([{"bytes": b"x", "path": "a.png"}] * 3)),
            r"x.parquet, row 0 cannot be read as PNG or JPEG",
        ),
        (with_column("image", pa.array([[0] * 5] * 3)), "row 0: a list must be a square image of 1 or 3 ch.* got 5 v"),
        (with_column("image", pa.array([[]] * 3, pa.list_(pa.uint8()))), "row 0: a list must be a square .* got 0 v"),
        (with_column("image", pa.array([[0] * 4, [256] * 4, [0] * 4])), "row 1: pixels must be integers in 0 .. 25"),
        (with_column("image", pa.array([[0] * 4, [None] * 4, [0] * 4])), "row 1: pixels must be integers in 0 .. 255"),
        (with_column("image", pa.array([[0] * 4, [0] * 9, [0] * 4])), "one size, got 2 x 2 in .*row 0 and 3 x 3 in .*"),
    ],
)  # fmt: skip
def test_unusable_parquet(tmp_path: Path, written: pa.Table, message: str) -> None:
    pq.write_table(written, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.parquet")


def test_unusable_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train.parquet cannot be read as Parquet \(.+\); write the file again"):
        read(folder)
    pq.write_table(table(some(12, 1, 4, 4), "list"), folder / "train.parquet")
    with pytest.raises(UserError, match=r"data.image_size is for pictures in PNG or JPEG, got 8 for lists in .*train"):
        read(folder, image_size=8)
    names = table(some(3, 1, 4, 4)).set_column(2, "label", pa.array(["a", "b", "c"]))
    pq.write_table(names, folder / "test.parquet")
    with pytest.raises(UserError, match=r"set: labels must be either names or numbers in all files, got both; write"):
        read(folder)
    pq.write_table(names, folder / "odd.parquet")
    with pytest.raises(UserError, match=r"for 'train' .* or none with such a word, got odd.parquet; rename the files"):
        read(folder)
    for name in ("odd", "train"):
        (folder / f"{name}.parquet").unlink()
    with pytest.raises(UserError, match=r"for 'train' .*, got test.parquet; rename the files"):
        read(folder)


# The cache of decoded pictures.


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write_folder(tmp_path / "all" / "train", LabelledImages(some(6, 3, 4, 4).images, np.arange(6) % 2))
    held_out = write_folder(tmp_path / "all" / "test", LabelledImages(some(4, 3, 4, 4).images, np.arange(4) % 2))
    decoded: list[int] = []

    def again() -> ImageSet:
        decoded.clear()
        return read_images(
            str(tmp_path / "all"), image_size=None, cache=tmp_path / "cache", advance=lambda num: decoded.append(num)
        )

    for num_decoded in (10, 0):
        found = again()
        assert sum(decoded) == num_decoded
        assert_same(found.train, train)
        assert_same(found.validation, held_out)
        assert found.num_classes == 2
    # another file under the same name is another set
    path = tmp_path / "all" / "train" / "class a" / "000.png"
    save(path, 255 - train.images[0])
    os.utime(path, ns=(0, 0))
    np.testing.assert_array_equal(again().train.images[0], 255 - train.images[0])
    assert sum(decoded) == 10
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data.replace(bytes([7] * 48), b"\x06" * 48)])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "all" / "a" / "x.png", np.full((3, 4, 4), 7, dtype=np.uint8))
    first = read(tmp_path / "all")
    (kept,) = (tmp_path / "cache" / "images").iterdir()
    content = kept.read_bytes()
    assert damage(content) != content
    kept.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        assert_same(read(tmp_path / "all").train, first.train)
    assert "decoding the images again" in caplog.text
    assert kept.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_not_in_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "all" / "a" / "x.png", np.full((3, 4, 4), 7, dtype=np.uint8))
    (tmp_path / "cache").write_bytes(b"a file")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "all").train.images.shape == (1, 3, 4, 4)
    assert "the decoded images are not kept" in caplog.text


def test_progress_goes_to_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "all", LabelledImages(some(6, 3, 4, 4).images, np.arange(6) % 2))
    data = open_images(ImageConfig(source=str(tmp_path / "all")), cache=tmp_path / "cache", progress=True)
    assert (data.num_train, data.num_validation) == (5, 1)
    assert capfd.readouterr().out == ""


def test_the_digits_file_is_plain_arrays() -> None:
    with np.load(Path(image_files.__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        assert {name: (arrays[name].dtype.name, arrays[name].shape) for name in arrays} == {
            "images": ("uint8", (1797, 8, 8)),
            "labels": ("uint8", (1797,)),
            "held_out": ("uint16", (360,)),
        }
