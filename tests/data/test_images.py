"""Image batches: epochs are permutations, everything is a function of (seed, step), held-out data stays untouched."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.config import parse
from landscape_ray.data import images as module
from landscape_ray.data.dataset import AUGMENT_STREAM, generator_for
from landscape_ray.data.image_sets import LabelledImages
from landscape_ray.data.images import ImageConfig, ImageData, open_images
from landscape_ray.errors import UserError
from landscape_ray.signature import Images

AUGMENTS = ("none", "flip", "crop", "crop_flip", "shift")


def numbered(num_train: int, num_validation: int = 5, **settings: Any) -> ImageData:
    """Images of 1 x 3 pixels that hold their own position, held-out ones after the training ones; two classes."""

    def part(start: int, num: int) -> LabelledImages:
        position = np.arange(start, start + num)
        pixels = np.stack([position // 256, position % 256, np.zeros(num)], axis=1).astype(np.uint8)
        return LabelledImages(pixels.reshape(num, 1, 1, 3), position % 2)

    settings = {"normalise": "unit", "max_value": 1, **settings}
    return ImageData(part(0, num_train), part(num_train, num_validation), num_classes=2, **settings)


def positions(inputs: torch.Tensor) -> list[int]:
    return (inputs[:, 0, 0, 0] * 256 + inputs[:, 0, 0, 1]).int().tolist()


def coloured(num: int = 40, augment: Any = "none", height: int = 16, width: int = 24, **settings: Any) -> ImageData:
    generator = generator_for(5)
    images = generator.integers(256, size=(num + 10, 3, height, width), dtype=np.uint8)
    labels = generator.integers(4, size=num + 10)
    train, validation = LabelledImages(images[:num], labels[:num]), LabelledImages(images[num:], labels[num:])
    return ImageData(train, validation, num_classes=4, augment=augment, **settings)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return open_images(ImageConfig())


# The digits.


@pytest.mark.acceptance
def test_digits_are_those_of_scikit_learn(digits: ImageData) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    expected = datasets.load_digits()
    data = open_images(ImageConfig(normalise="unit"))
    train, validation = data.batch(0, 0, 1437), data.validation_batches(None, 360)[0]
    images = torch.cat([train[0], validation[0]]).mul(16).to(torch.uint8).numpy().reshape(1797, 64)
    labels = torch.cat([train[1], validation[1]]).numpy()
    ours = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    theirs = zip(expected.data.astype(np.uint8), expected.target, strict=True)
    assert ours == sorted((image.tobytes(), int(label)) for image, label in theirs)


def test_digits_have_a_fixed_stratified_split(digits: ImageData) -> None:
    assert digits.signature == Images(channels=1, height=8, width=8, num_classes=10)
    assert (digits.num_train, digits.num_validation) == (1437, 360)
    train = torch.bincount(digits.batch(0, 0, 1437)[1])
    held_out = torch.bincount(digits.validation_batches(None, 360)[0][1])
    assert (train + held_out).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert float((held_out - (train + held_out) * 360 / 1797).abs().max()) < 1
    assert digits.corpus_id == "d1874469bf2d8581"  # of every pixel and label on its side


# Sampling.


@given(n=st.integers(1, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 2**63), first=st.integers(0, 200))
@settings(deadline=None)
def test_every_epoch_visits_every_image_once(n: int, batch_size: int, seed: int, first: int) -> None:
    data = numbered(n)
    num_steps = (2 * n) // batch_size + 2
    drawn: list[int] = []
    for step in range(first, first + num_steps):
        inputs, targets = data.batch(seed, step, batch_size)
        assert len(inputs) == len(targets) == batch_size
        assert targets.tolist() == [position % 2 for position in positions(inputs)]
        drawn += positions(inputs)
    start = -first * batch_size % n  # where the first whole epoch begins
    whole = [drawn[at : at + n] for at in range(start, len(drawn) - n + 1, n)]
    assert whole
    assert all(sorted(epoch) == list(range(n)) for epoch in whole)


@given(n=st.integers(2, 40), batch_size=st.integers(1, 90), step=st.integers(0, 50))
@settings(deadline=None)
def test_a_batch_is_a_piece_of_the_sequence_of_permutations(n: int, batch_size: int, step: int) -> None:
    epochs = range((step + 1) * batch_size // n + 1)
    sequence = np.concatenate([generator_for(7, 0, epoch).permutation(n) for epoch in epochs])
    expected = sequence[step * batch_size : (step + 1) * batch_size]
    assert positions(numbered(n).batch(7, step, batch_size)[0]) == expected.tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    data = numbered(300)
    orders = [tuple(positions(data.batch(seed, step, 300)[0])) for seed in range(3) for step in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batch_is_a_function_of_seed_and_step_alone(augment: str) -> None:
    data, again = coloured(augment=augment), coloured(augment=augment)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
    forward = [data.batch(7, step, 12) for step in range(10)]
    data.probe_batch(7, 3)
    backward = [again.batch(7, step, 12) for step in reversed(range(10))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("seeds", [[0, 1, 2, 9], [3, 3, 5], [4, 4], [6]])
def test_batches_of_several_runs_are_the_stacked_single_ones(augment: str, seeds: list[int]) -> None:
    data = coloured(augment=augment)
    for step in (0, 3, 4):  # 3 crosses an epoch
        inputs, targets = data.batches(seeds, step, 12)
        singles = [data.batch(seed, step, 12) for seed in seeds]
        assert torch.equal(inputs, torch.stack([single[0] for single in singles]))
        assert torch.equal(targets, torch.stack([single[1] for single in singles]))


def test_permutations_are_made_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counting(seed: int, *stream: int) -> np.random.Generator:
        made.append((seed, *stream))
        return generator_for(seed, *stream)

    monkeypatch.setattr(module, "generator_for", counting)
    data = numbered(100)
    for step in range(30):  # three epochs of ten steps
        data.batches([0, 1], step, 10)
    assert made == [(seed, 0, epoch) for epoch in range(3) for seed in range(2)]


def test_kept_permutations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_POSITIONS", 300)
    bounded, free = numbered(100), numbered(100)
    drawn = bounded.batches(range(8), 2, 10)
    assert len(bounded._permutations) <= 3
    monkeypatch.undo()
    assert torch.equal(drawn[0], free.batches(range(8), 2, 10)[0])
    assert len(free._permutations) == 8


def test_data_survives_pickling(digits: ImageData) -> None:
    again = pickle.loads(pickle.dumps(digits))
    assert again.corpus_id == digits.corpus_id
    assert torch.equal(again.batch(1, 2, 3)[0], digits.batch(1, 2, 3)[0])


def test_batches_do_not_share_memory_with_the_data(digits: ImageData) -> None:
    before = digits.batch(0, 0, 4)
    inputs, targets = digits.batch(0, 0, 4)
    inputs.zero_()
    targets.zero_()
    assert torch.equal(digits.batch(0, 0, 4)[0], before[0])
    assert torch.equal(digits.batch(0, 0, 4)[1], before[1])


# Augmentation.


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize(("height", "width"), [(16, 24), (8, 8), (5, 1)])
def test_augmentation_equals_padding_and_cutting_one_by_one(augment: str, height: int, width: int) -> None:
    plain = coloured(height=height, width=width, normalise="unit", max_value=1)
    data = coloured(height=height, width=width, normalise="unit", max_value=1, augment=augment)
    images, labels = plain.batch(3, 5, 20)
    chance = generator_for(3, AUGMENT_STREAM, 5).random((20, 3))
    reach = [min(max(round(side / 8), 1), side - 1) for side in (height, width)]
    expected = []
    for image, chances in zip(images.numpy(), chance, strict=True):
        if augment in ("crop", "crop_flip", "shift"):
            mode: Any = "constant" if augment == "shift" else "reflect"
            padded = np.pad(image, ((0, 0), (reach[0], reach[0]), (reach[1], reach[1])), mode=mode)
            top, left = (int(c * (2 * r + 1)) for c, r in zip(chances, reach, strict=False))
            flips = augment == "crop_flip" and chances[2] < 0.5
            # a mirror image is the cut mirrored
            image = padded[:, top : top + height, left : left + width]
            image = image[:, :, ::-1] if flips else image
        elif augment == "flip" and chances[2] < 0.5:
            image = image[:, :, ::-1]
        expected.append(image)
    inputs, targets = data.batch(3, 5, 20)
    np.testing.assert_array_equal(inputs.numpy(), np.stack(expected))
    assert torch.equal(targets, labels)


def test_moves_and_mirrors_are_uniform() -> None:
    num, height, width = 14_000, 16, 24
    images = np.zeros((num, 1, height, width), dtype=np.uint8)
    images[:, 0, 8, 10] = 1
    part = LabelledImages(images, np.zeros(num, dtype=np.int64))
    shift = ImageData(part, part, num_classes=2, max_value=1, normalise="unit", augment="shift")
    spots = shift.batch(0, 0, num)[0].flatten(1).argmax(dim=1)
    rows, columns = spots // width, spots % width
    counts = torch.bincount((rows - 6) * 7 + columns - 7, minlength=35).double()
    assert len(counts) == 35  # 5 moves along 16 pixels, 7 along 24
    assert float(((counts - 400) ** 2 / 400).sum()) < 71.0  # 99.98 % quantile for 34 degrees of freedom
    flip = ImageData(part, part, num_classes=2, max_value=1, normalise="unit", augment="flip")
    mirrored = flip.batch(0, 0, num)[0][:, 0, 8, width - 1 - 10].sum()
    assert abs(int(mirrored) - num / 2) < 240  # 4 standard deviations


def test_only_training_batches_are_augmented() -> None:
    plain, data = coloured(), coloured(augment="crop_flip")
    assert not torch.equal(plain.batch(0, 0, 9)[0], data.batch(0, 0, 9)[0])
    assert torch.equal(plain.probe_batch(0, 9)[0], data.probe_batch(0, 9)[0])
    assert torch.equal(plain.validation_batches(1, 9)[0][0], data.validation_batches(1, 9)[0][0])


# Pixels as numbers.


def test_standard_pixels_have_mean_zero_and_deviation_one_in_each_channel() -> None:
    data = coloured(num=1100)  # more than one chunk
    inputs, _ = data.batch(0, 0, 1100)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.double().mean(dim=(0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.double().std(dim=(0, 2, 3), correction=0), torch.ones(3).double())
    raw, _ = coloured(num=1100, normalise="unit").batch(0, 0, 1100)
    ratio = (raw[0, :, 0, 1] - raw[0, :, 0, 0]) / (inputs[0, :, 0, 1] - inputs[0, :, 0, 0])
    torch.testing.assert_close(ratio.double(), raw.double().std(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_unit_pixels_are_shares_of_white(digits: ImageData) -> None:
    inputs, _ = open_images(ImageConfig(normalise="unit")).batch(0, 0, 1437)
    assert set((inputs * 16).unique().tolist()) == set(range(17))
    assert torch.equal(inputs * 16, (inputs * 16).round())
    standard, _ = digits.batch(0, 0, 1437)
    torch.testing.assert_close((inputs - inputs.mean()) / inputs.std(correction=0), standard, atol=1e-5, rtol=0)


# Held-out batches and probes.


@given(num=st.integers(1, 60), batch_size=st.integers(1, 70))
@settings(deadline=None)
def test_all_held_out_images_come_in_order(num: int, batch_size: int) -> None:
    batches = numbered(3, num).validation_batches(None, batch_size)
    assert [position for inputs, _ in batches for position in positions(inputs)] == list(range(3, 3 + num))
    assert all(len(targets) == batch_size for _, targets in batches[:-1])
    assert 1 <= len(batches[-1][1]) <= batch_size


@given(num=st.integers(1, 60), batch_size=st.integers(1, 20), data=st.data())
@settings(deadline=None)
def test_some_held_out_images_are_evenly_spaced(num: int, batch_size: int, data: st.DataObject) -> None:
    num_batches = data.draw(st.integers(1, -(-num // batch_size)))
    batches = numbered(3, num).validation_batches(num_batches, batch_size)
    drawn = [position - 3 for inputs, _ in batches for position in positions(inputs)]
    assert len(batches) == num_batches
    assert len(drawn) == min(num_batches * batch_size, num)
    gaps = np.diff([*drawn, drawn[0] + num])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_more_validation_batches_than_images() -> None:
    data = numbered(3, 25)
    for num_batches in (4, 0):
        message = f"1 to 3 batches of 10 for 25 held-out images, got num_batches = {num_batches}; lower it"
        with pytest.raises(UserError, match=message):
            data.validation_batches(num_batches, 10)
        with pytest.raises(UserError, match=message):
            data.shift_batches("noise_1", num_batches, 10)


def test_probe_batch_is_fixed_and_without_repetition() -> None:
    data = numbered(50)
    first, second = positions(data.probe_batch(0, 20)[0]), positions(data.probe_batch(0, 20)[0])
    assert first == second
    assert len(set(first)) == 20
    assert positions(data.probe_batch(1, 20)[0]) != first
    assert sorted(positions(data.probe_batch(0, 50)[0])) == list(range(50))
    for batch_size in (0, 51):
        with pytest.raises(UserError, match=rf"batch_size must be 1 to 50, .*, got {batch_size}; lower it"):
            data.probe_batch(0, batch_size)


# Corruption through the configuration.


def everything(data: ImageData) -> dict[bytes, int]:
    inputs, targets = data.probe_batch(0, data.num_train)
    return {image.numpy().tobytes(): int(label) for image, label in zip(inputs, targets, strict=True)}


@pytest.mark.acceptance
def test_label_noise_is_exact_and_only_in_training() -> None:
    clean = open_images(ImageConfig(normalise="unit"))
    noisy = open_images(ImageConfig(normalise="unit", label_noise=0.25))
    right, wrong = everything(clean), everything(noisy)
    assert right.keys() == wrong.keys()
    assert sum(right[image] != wrong[image] for image in right) == round(0.25 * 1437)
    for one, other in zip(clean.validation_batches(None, 90), noisy.validation_batches(None, 90), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_train_size_and_imbalance_leave_held_out_images_alone() -> None:
    clean = open_images(ImageConfig(normalise="unit"))
    data = open_images(ImageConfig(normalise="unit", imbalance=0.1, train_size=300))
    assert data.num_train == 300
    assert everything(data).items() <= everything(clean).items()
    counts = np.bincount(data.probe_batch(0, 300)[1])
    profile = np.bincount(clean.probe_batch(0, 1437)[1]) * 0.1 ** (np.arange(10) / 9)
    np.testing.assert_allclose(counts, profile / profile.sum() * 300, atol=1.5)
    assert torch.equal(clean.validation_batches(None, 360)[0][0], data.validation_batches(None, 360)[0][0])


def test_corpus_id_tells_apart_what_training_would_see() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"normalise": "unit"},
        {"augment": "shift"},
        {"label_noise": 0.1},
        {"label_noise": 0.1, "corruption_seed": 1},
        {"imbalance": 0.5},
        {"train_size": 1000},
        {"train_size": 1000, "corruption_seed": 1},
    ]
    assert len({open_images(ImageConfig(**change)).corpus_id for change in changes}) == len(changes)
    # nothing to choose, and a source that comes divided
    same: list[dict[str, Any]] = [{}, {"corruption_seed": 1}, {"train_size": 1437}, {"validation_fraction": 0.3}]
    assert len({open_images(ImageConfig(**change)).corpus_id for change in same}) == 1
    assert coloured().corpus_id == coloured().corpus_id != coloured(num=41).corpus_id


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": "rotate"}, "'augment' .*'none', 'flip', 'crop', 'crop_flip' or 'shift', got 'rotate'"),
        ({"normalise": "no"}, "'normalise' .*'standard' or 'unit', got 'no'"),
        ({"label_noise": 1.5}, "'label_noise' .*less than or equal to 1, got 1.5"),
        ({"imbalance": 0.0}, "'imbalance' .*greater than 0, got 0.0"),
        ({"train_size": 0}, "'train_size' .*greater than or equal to 1, got 0"),
        ({"validation_fraction": 0.6}, "'validation_fraction' .*less than or equal to 0.5, got 0.6"),
    ],
)
def test_configuration_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ImageConfig, fields, "file.toml")


def part(shape: tuple[int, ...], labels: list[int], value: int | None = None) -> LabelledImages:
    images = np.arange(np.prod((len(labels), *shape))).reshape(len(labels), *shape).astype(np.uint8)
    return LabelledImages(images if value is None else np.full_like(images, value), np.array(labels, dtype=np.int64))


def test_unusable_arrays() -> None:
    good = part((1, 2, 2), [0, 1])
    with pytest.raises(UserError, match=r"there must be training images, got none; give data.source more"):
        ImageData(part((1, 2, 2), []), good, num_classes=2)
    with pytest.raises(UserError, match=r"there must be held-out images, got none"):
        ImageData(good, part((1, 0, 2), [0]), num_classes=2)
    with pytest.raises(UserError, match=r"training labels must be in 0 .. 1, got 0 .. 2; correct"):
        ImageData(part((1, 2, 2), [0, 2]), good, num_classes=2)
    with pytest.raises(UserError, match=r"held-out labels must be in 0 .. 1, got -1 .. 1; correct"):
        ImageData(good, part((1, 2, 2), [-1, 1]), num_classes=2)
    with pytest.raises(UserError, match=r"at least two classes of images, got 1; correct data.source"):
        ImageData(part((1, 2, 2), [0]), part((1, 2, 2), [0]), num_classes=1)
    with pytest.raises(UserError, match=r"must have the shape of the training images, got \(3, 2, 2\) and \(1, 2, 2\)"):
        ImageData(good, part((3, 2, 2), [0]), num_classes=2)
    constant = good.images.repeat(3, axis=1)
    constant[:, 1] = 255
    with pytest.raises(UserError, match=r"vary in every channel of the training images, channel 1 is constant; use"):
        ImageData(LabelledImages(constant, good.labels), part((3, 2, 2), [0]), num_classes=2)
    assert ImageData(good, part((1, 2, 2), [0]), num_classes=2, normalise="unit").num_train == 2
