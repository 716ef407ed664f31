"""Streams: targets turn at the given rate, tasks change at exact steps, held-out sets are of the time that they say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.config import parse
from landscape_ray.data.dataset import Data
from landscape_ray.data.drift import DriftConfig, DriftData, open_drift
from landscape_ray.data.image_sets import LabelledImages
from landscape_ray.data.images import ImageConfig, ImageData, open_images
from landscape_ray.data.synthetic import RandomFeaturesConfig, TeacherConfig, open_random_features, open_teacher
from landscape_ray.data.task_sequence import (
    PermutedData,
    SplitData,
    TaskSequenceConfig,
    TaskSequenceData,
    open_task_sequence,
)
from landscape_ray.errors import UserError

LINEAR = {"name": "random_features", "num_latents": 30, "decay": 0.0, "num_validation": 64}
TEACHER = {"name": "teacher", "num_features": 8, "num_validation": 64}
XOR = {"name": "xor", "num_features": 9, "num_validation": 60}


def drift(**fields: object) -> DriftData:
    return open_drift(parse(DriftConfig, {"num_steps": 1000, "base": LINEAR, **fields}, "data"))


def sequence(**fields: object) -> TaskSequenceData:
    return open_task_sequence(parse(TaskSequenceConfig, {"num_tasks": 3, "task_steps": 10, **fields}, "data"))


def permuted(**fields: object) -> PermutedData:
    data = sequence(**fields)
    assert isinstance(data, PermutedData)
    return data


def split(**fields: object) -> SplitData:
    data = sequence(kind="split", num_tasks=fields.pop("num_tasks", 5), **fields)
    assert isinstance(data, SplitData)
    return data


MAKERS: dict[str, Callable[[], Data]] = {
    "linear drift": lambda: drift(rate=0.01, change_points=[20]),
    "drifting classes": lambda: drift(base={**TEACHER, "targets": "classes", "num_outputs": 4}, rate=0.1),
    "permuted digits": sequence,
    "permuted XOR": lambda: sequence(base=XOR),
    "permuted fixed XOR": lambda: sequence(base={**XOR, "train_size": 60}),
    "split digits": split,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_batches_are_functions_of_seed_and_step(make: Callable[[], Data]) -> None:
    data, again = make(), make()
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
    forward = [data.batch(7, step, 6) for step in range(30)]
    sets = [data.probe_batch(7, 6), *data.validation_batches(2, 5), *data.shift_batches(data.shifts[0], None, 64)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
    others = [again.probe_batch(7, 6), *again.validation_batches(2, 5), *again.shift_batches(data.shifts[0], None, 64)]
    backward = [again.batch(7, step, 6) for step in reversed(range(30))][::-1]
    for one, other in zip([*forward, *sets], [*backward, *others], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert data.corpus_id == again.corpus_id


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("seeds", [(0, 1, 2**40), (5, 5), (3,)])
def test_stacked_batches_are_the_single_ones(make: Callable[[], Data], seeds: tuple[int, ...]) -> None:
    data = make()
    for step, batch_size in itertools.product((0, 9, 10, 25, 500), (7, 60)):
        inputs, targets = data.batches(seeds, step, batch_size)
        singles = [data.batch(seed, step, batch_size) for seed in seeds]
        assert torch.equal(inputs, torch.stack([single[0] for single in singles]))
        assert torch.equal(targets, torch.stack([single[1] for single in singles]))


# Drift


@pytest.mark.parametrize("base", [LINEAR, TEACHER, {**TEACHER, "targets": "classes", "num_outputs": 3}])
def test_the_stream_begins_as_its_base(base: dict[str, object]) -> None:
    still = open_teacher(parse(TeacherConfig, base, "")) if base["name"] == "teacher" else None
    plain = still or open_random_features(parse(RandomFeaturesConfig, base, ""))
    for data, steps in ((drift(base=base), (0, 7, 999)), (drift(base=base, rate=0.5), (0,))):
        for step in steps:
            for ours, theirs in zip(data.batch(3, step, 20), plain.batch(3, step, 20), strict=True):
                assert torch.equal(ours, theirs)
        assert data.signature == plain.signature


@settings(max_examples=20)
@given(
    rate=st.floats(1e-4, 0.5),
    steps=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([{}, {"features": "rotated"}]),
)
def test_a_linear_target_turns_at_its_rate(
    rate: float, steps: tuple[int, int], seed: int, kind: dict[str, str]
) -> None:
    """Of the predictor that was right s updates ago, the excess risk is 0.5 |c(t) - c(t - s)|^2 = 1 - cos(rate s)."""
    data = drift(base={**LINEAR, **kind, "seed": seed, "decay": 0.5, "label_noise": 0.3}, rate=rate)
    first, second = steps
    latents = np.eye(30, dtype=np.float32)
    scale = torch.from_numpy(data.base.matrix).double()  # type: ignore[attr-defined]
    whitened = torch.from_numpy(data.target(first)(latents)[:, 0]).double()
    weights = torch.linalg.solve(scale.T, whitened)
    assert float(data.population_risk(first, weights)) == pytest.approx(0.5 * 0.3**2, abs=1e-5)
    excess = float(data.population_risk(second, weights)) - 0.5 * 0.3**2
    assert excess == pytest.approx(1 - math.cos(rate * (second - first)), abs=1e-4)


def test_batches_have_the_target_of_their_step() -> None:
    data = drift(base={**LINEAR, "label_noise": 0.2}, rate=0.01, change_points=[300])
    weights = torch.full((30,), 0.1)
    for step in (0, 150, 299, 300, 800):
        inputs, targets = data.batch(0, step, 20_000)
        losses = 0.5 * (inputs @ weights - targets[:, 0]).double().square()
        assert abs(float(losses.mean() - data.population_risk(step, weights))) < 4 * float(losses.std()) / 20_000**0.5


def test_a_teacher_turns_at_its_rate() -> None:
    data = drift(base={**TEACHER, "num_outputs": 2, "seed": 3}, rate=0.02)
    inputs = data.base.batch(9, 9, 20_000)[0].numpy()
    start = data.target(0)(inputs).astype(np.float64)
    for step in (10, 40, 78, 157):
        now = data.target(step)(inputs).astype(np.float64)
        assert np.abs(now.var(0) - 1).max() < 0.06
        assert np.abs((now * start).mean(0) - math.cos(0.02 * step)).max() < 0.06


def test_change_points_bring_new_targets_at_their_step() -> None:
    data = drift(change_points=[100, 250])
    latents = np.eye(30, dtype=np.float32)
    targets = [data.target(step)(latents).tobytes() for step in range(400)]
    changes = [step for step in range(1, 400) if targets[step] != targets[step - 1]]
    assert changes == [100, 250]
    assert len(set(targets)) == 3
    turning = drift(rate=0.01, change_points=[100])
    assert turning.target(100)(latents).tobytes() == targets[100]  # the turning begins anew


def test_held_out_targets_are_those_of_the_named_steps() -> None:
    data = drift(rate=0.01, change_points=[300, 620])
    assert data.shifts == ("step_0", "step_250", "step_299", "step_500", "step_619", "step_750")
    inputs, targets = data.validation_batches(1, 64)[0]
    latents = inputs.numpy()  # in the eigenbasis without decay, features are the latents
    assert torch.equal(targets, torch.from_numpy(data.target(999)(latents)))
    for name in data.shifts:
        same, others = data.shift_batches(name, 1, 64)[0]
        assert torch.equal(same, inputs)
        assert torch.equal(others, torch.from_numpy(data.target(int(name.removeprefix("step_")))(latents)))
    probe, expected = data.probe_batch(0, 50)
    assert torch.equal(expected, torch.from_numpy(data.target(999)(probe.numpy())))
    with pytest.raises(UserError, match=r"eval\.shifts must name shift sets of the data, got 'step_1'; valid: step_0"):
        data.shift_batches("step_1", 1, 64)
    with pytest.raises(
        UserError, match="validation needs 1 to 1 batches of 64 for 64 held-out examples, got num_batches = 2"
    ):
        data.validation_batches(2, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": {**LINEAR, "train_size": 5}}, "base.train_size must be left out for drift, got 5"),
        (
            {"change_points": [5, 3]},
            r"change_points must be ascending steps from 1 to num_steps - 1 = 999, got \[5, 3\]",
        ),
        ({"change_points": [5, 5]}, "change_points must be ascending steps"),
        ({"change_points": [0]}, "change_points must be ascending steps"),
        ({"change_points": [1000]}, "change_points must be ascending steps"),
        ({"base": {**LINEAR, "num_latents": 1}, "rate": 0.1}, "base must have room for a target to turn"),
        ({"base": {"name": "drift"}}, "'base.name' must be a known name, got 'drift'"),
        ({"base": {**LINEAR, "widht": 3}}, "unknown key 'base.widht'"),
    ],
)
def test_impossible_drifts_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        drift(**fields)


def test_a_still_target_needs_no_room() -> None:
    assert drift(base={**LINEAR, "num_latents": 1}).batch(0, 0, 3)[0].shape == (3, 1)


def test_a_teacher_has_no_closed_form() -> None:
    with pytest.raises(UserError, match=r"population_risk must have base\.name = 'random_features', got 'teacher'"):
        drift(base=TEACHER).population_risk(0, torch.zeros(8))


# Sequences of tasks


@pytest.mark.parametrize("make", [permuted, split])
@given(num_tasks=st.integers(2, 6), task_steps=st.integers(1, 50))
@settings(max_examples=10)
def test_tasks_change_at_exact_steps(make: Callable[..., TaskSequenceData], num_tasks: int, task_steps: int) -> None:
    data = make(num_tasks=num_tasks, task_steps=task_steps)
    expected = [task for task in range(num_tasks) for _ in range(task_steps)]
    assert [data.task_at(step) for step in range(num_tasks * task_steps)] == expected
    assert data.task_at(10 * num_tasks * task_steps) == num_tasks - 1
    assert data.shifts == tuple(f"task_{task}" for task in range(num_tasks))


def test_permutations_are_distinct_and_can_be_undone() -> None:
    data = permuted(num_tasks=20)
    assert data.permutations[0].tolist() == list(range(64))
    assert len({tuple(row) for row in data.permutations.tolist()}) == 20
    base = open_images(ImageConfig())
    for step in (0, 9, 10, 57, 199, 500):
        inputs, targets = data.batch(4, step, 11)
        right, labels = base.batch(4, step, 11)
        inverse = data.permutations[data.task_at(step)].argsort()
        assert torch.equal(inputs.flatten(1)[:, inverse].view(right.shape), right)
        assert torch.equal(inputs, right) == (step < 10)
        assert torch.equal(targets, labels)


def test_all_permutations_are_found_when_there_are_no_more() -> None:
    data = permuted(num_tasks=6, base={**XOR, "num_features": 3})
    assert len({tuple(row) for row in data.permutations.tolist()}) == 6
    with pytest.raises(UserError, match="num_tasks must be at most 6, the permutations of 3 inputs, got 7"):
        permuted(num_tasks=7, base={**XOR, "num_features": 3})


def colours() -> ImageData:
    generator = np.random.Generator(np.random.PCG64(0))
    images = generator.integers(256, size=(30, 3, 4, 5), dtype=np.uint8)
    labels = np.arange(30, dtype=np.int64) % 3
    return ImageData(LabelledImages(images, labels), LabelledImages(images[:9], labels[:9]), num_classes=3)


def test_channels_share_a_permutation() -> None:
    base = colours()
    data = PermutedData(TaskSequenceConfig(num_tasks=3, task_steps=1), base)
    inputs, right = data.batch(0, 1, 30)[0], base.batch(0, 1, 30)[0]
    for channel in range(3):
        assert torch.equal(inputs[:, channel].flatten(1), right[:, channel].flatten(1)[:, data.permutations[1]])
    mixed = data.validation_batches(None, 4)
    assert torch.equal(mixed[1][0][1], data.shift_batches("task_2", None, 4)[1][0][1])  # example 5


@pytest.mark.parametrize("base", [{"name": "images"}, XOR, {"name": "modular", "representation": "one_hot"}])
def test_permuted_validation_is_over_all_tasks(base: dict[str, object]) -> None:
    data = permuted(base=base)
    tasks = [data.shift_batches(name, 4, 13) for name in data.shifts]
    validation = data.validation_batches(4, 13)
    for batch, (inputs, targets) in enumerate(validation):
        for row in range(13):
            task = (13 * batch + row) % 3
            assert torch.equal(inputs[row], tasks[task][batch][0][row])
        assert all(torch.equal(targets, task[batch][1]) for task in tasks)
    plain, _ = data.base.probe_batch(3, 7)
    probe, _ = data.probe_batch(3, 7)
    for row in range(7):
        expected = plain[row].flatten()[data.permutations[row % 3]].view(plain[row].shape)
        assert torch.equal(probe[row], expected)


def test_split_tasks_have_their_own_classes() -> None:
    data = split(num_tasks=3, task_steps=40)
    assert data.classes == ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
    for task, classes in enumerate(data.classes):
        seen = torch.cat([data.batch(0, step, 16)[1] for step in range(40 * task, 40 * task + 40)])
        assert set(seen.tolist()) == set(classes)
        held_out = torch.cat([targets for _, targets in data.shift_batches(f"task_{task}", None, 16)])
        assert set(held_out.tolist()) == set(classes)
    sizes = [sum(len(targets) for _, targets in data.shift_batches(name, None, 16)) for name in data.shifts]
    whole = data.validation_batches(None, 16)
    assert sum(sizes) == sum(len(targets) for _, targets in whole)


def test_a_split_task_begins_an_epoch_over_its_images() -> None:
    base = open_images(ImageConfig())
    data = split(num_tasks=5, task_steps=50)
    assert base.signature == data.signature
    whole, labels = base.batch(0, 0, base.num_train)
    pool = {image.numpy().tobytes() for image in whole}
    for task in range(5):
        num_images = sum(int((labels == label).sum()) for label in data.classes[task])
        images, _ = data.batch(1, 50 * task, num_images)
        assert len({image.numpy().tobytes() for image in images}) > 0.99 * num_images  # few digits occur twice
        # normalised as all classes are together
        assert all(image.numpy().tobytes() in pool for image in images)


def test_splitting_leaves_the_base_as_it_was() -> None:
    base, again = open_images(ImageConfig()), open_images(ImageConfig())
    base.batch(0, 0, 8)
    data = SplitData(TaskSequenceConfig(kind="split", task_steps=3), base)
    data.batch(0, 4, 8)
    assert torch.equal(base.batch(0, 1, 8)[0], again.batch(0, 1, 8)[0])
    assert torch.equal(base.validation_batches(1, 8)[0][0], data.validation_batches(1, 8)[0][0])
    assert torch.equal(base.probe_batch(2, 8)[0], data.probe_batch(2, 8)[0])


def test_the_corpus_id_is_that_of_what_is_trained_on() -> None:
    assert permuted().corpus_id == permuted(seed=0).corpus_id
    assert split(seed=1).corpus_id == split(seed=2).corpus_id
    changes = [
        {},
        {"seed": 1},
        {"num_tasks": 4},
        {"task_steps": 11},
        {"base": XOR},
        {"base": {"label_noise": 0.2}},
    ]
    assert len({permuted(**change).corpus_id for change in changes} | {split().corpus_id}) == len(changes) + 1
    drifts = [{}, {"rate": 0.1}, {"change_points": [3]}, {"base": TEACHER}]
    assert len({drift(**change).corpus_id for change in drifts}) == len(drifts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "split", "base": XOR}, "base.name must be 'images' for split classes, got 'xor'"),
        ({"base": {"name": "modular"}}, "base.representation must be 'one_hot' for permuted features, got 'tokens'"),
        ({"kind": "split", "num_tasks": 11}, "num_tasks must be at most 10, the classes of the images, got 11"),
        ({"base": {"name": "text"}}, "'base.name' must be a known name, got 'text'"),
    ],
)
def test_impossible_sequences_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sequence(**fields)


def test_a_task_without_images_is_refused() -> None:
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 1, 4, 4)
    some = LabelledImages(images, np.array([0, 1], dtype=np.int64))
    other = LabelledImages(images, np.array([0, 0], dtype=np.int64))
    config = TaskSequenceConfig(kind="split", num_tasks=2)
    with pytest.raises(
        UserError, match=r"base must have training images of every task, got none of the classes \(1,\)"
    ):
        SplitData(config, ImageData(other, some, num_classes=2))
    with pytest.raises(UserError, match="base must have held-out images of every task"):
        SplitData(config, ImageData(some, other, num_classes=2))


def test_unknown_tasks_are_refused() -> None:
    for data in (permuted(), split()):
        with pytest.raises(UserError, match="must name shift sets of the data, got 'task_9'; valid: task_0, task_1"):
            data.shift_batches("task_9", 1, 4)


def test_every_base_of_a_sequence_can_be_opened() -> None:
    for name in ("images", "parity", "xor", "teacher", "random_features"):
        data = permuted(base={"name": name})
        inputs, right = data.batch(0, 10, 5), data.base.batch(0, 10, 5)
        assert not torch.equal(inputs[0], right[0])
        assert torch.equal(inputs[0].flatten(1).sort(1).values, right[0].flatten(1).sort(1).values)
