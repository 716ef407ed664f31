from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.models import MODELS, build_model
from landscape_ray.probes.fixed_loss import FORWARD, FixedLoss, observing
from landscape_ray.probes.losses import DetailedLoss, OutputLoss, detailed
from landscape_ray.signature import Images

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(num_classes, *shape, seed=1):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mean_of_three(build_mlp) -> tuple[nn.Module, tuple[Tensor, Tensor], FixedLoss]:
    module, X, y = build_mlp(), normal(30, 3), classes(3, 30)
    parts = [((X[a:b], y[a:b]), b - a) for a, b in ((0, 3), (3, 20), (20, 30))]
    return module, (X, y), FixedLoss(module, CROSS_ENTROPY, parts)


def direct(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    value = nn.functional.cross_entropy(module(batch[0]), batch[1])
    gradient = torch.autograd.grad(value, list(module.parameters()))
    return value.item(), torch.cat([g.reshape(-1) for g in gradient])


def test_value_and_gradient_are_those_of_the_whole(mean_of_three):
    module, batch, function = mean_of_three
    value, gradient = direct(module, batch)
    assert function.value() == pytest.approx(value, rel=1e-12)
    found_value, found_gradient = function.gradient()
    assert found_value == function.value()
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-10, atol=1e-14)


def test_displaced_values_are_those_of_displaced_weights(mean_of_three):
    module, batch, function = mean_of_three
    step = 0.3 * normal(function.size)
    before, versions = function.weights, [p._version for p in module.parameters()]
    moved = copy.deepcopy(module)
    nn.utils.vector_to_parameters(before + step, moved.parameters())
    value, gradient = direct(moved, batch)
    assert function.value_at(step) == pytest.approx(value, rel=1e-12)
    found_value, found_gradient = function.gradient_at(step)
    assert found_value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-10, atol=1e-14)
    assert torch.equal(function.weights, before)
    assert versions == [p._version for p in module.parameters()]
    with function.moved_by(step):
        assert torch.equal(function.weights, before + step)
    assert torch.equal(function.weights, before)
    failing = FixedLoss(module, lambda m, b: m.weight, [batch])
    with pytest.raises(AttributeError, match="weight"):
        failing.value_at(step)
    assert torch.equal(function.weights, before)


def test_prices_add_up(mean_of_three):
    _, _, function = mean_of_three
    zero = torch.zeros(function.size)
    assert function.spent_gradients == 0.0
    function.value(), function.value_at(zero), function.gradient(), function.gradient_at(zero)
    assert function.spent_gradients == pytest.approx(2 * FORWARD + 2)


def test_vectors_and_tensors_are_two_views_of_the_same():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).double(), nn.Linear(1, 1))
    module[2].weight.requires_grad_(False)
    function = FixedLoss(module, CROSS_ENTROPY, [normal(1)])
    assert (function.size, function.dtype) == (6 + 3 + 3 + 1 + 1, torch.float64)  # the wider type holds both
    parts = function.unflatten(function.weights)
    for part, parameter in zip(parts, function.parameters, strict=True):
        assert part.dtype == parameter.dtype
        assert torch.equal(part, parameter)
    assert torch.equal(function.flatten(parts), function.weights)
    assert not function.weights.requires_grad
    few = FixedLoss(module, CROSS_ENTROPY, [normal(1)], parameters=[module[1].bias, module[2].weight, module[0].bias])
    assert [id(p) for p in few.parameters] == [id(module[0].bias), id(module[1].bias)]  # in the order of the module


def test_batches_may_be_anything_the_loss_takes():
    class Sums(NamedTuple):
        rows: dict[str, Tensor]
        num_examples: int

    module = nn.Linear(2, 1, bias=False).double()
    batches = [Sums({"x": normal(4, 2)}, 4), Sums({"x": normal(2, 2, seed=1)}, 2)]
    function = FixedLoss(module, lambda m, b: m(b.rows["x"]).mean(), batches)
    everything = torch.cat([batch.rows["x"] for batch in batches])
    assert function.value() == pytest.approx(module(everything).mean().item(), rel=1e-12)
    torch.testing.assert_close(function.gradient()[1], everything.mean(0))
    # doubled inside of any nesting, integers as they are
    module.float()
    single = [Sums({"x": batch.rows["x"].float()}, batch.num_examples) for batch in batches]
    seen: list[Any] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return module(batch.rows["x"] if isinstance(batch, Sums) else batch[0][0]).mean()

    with observing(module, loss, single, double=True) as function:
        torch.testing.assert_close(function.gradient()[1], everything.float().double().mean(0))
    assert isinstance(seen[0], Sums)
    nested = [([normal(2, 2).float()], torch.arange(2), "name")]
    with observing(module, loss, nested, double=True) as function:
        function.value()
    rows, labels, name = seen[-1]
    assert (type(rows), rows[0].dtype, labels.dtype, name) == (list, torch.float64, torch.int64, "name")


@pytest.mark.acceptance
def test_measuring_in_float64_leaves_a_float32_host_as_it_is():
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    module[0].bias.requires_grad_(False)
    X, y = normal(9, 4).float(), classes(3, 9)
    CROSS_ENTROPY(module, (X, y)).backward()
    before = copy.deepcopy(module)
    gradients = [p.grad for p in module.parameters()]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    some = [module[4].weight, module[0].bias, module[2].bias]
    for eval_mode in (True, False):
        with observing(module, CROSS_ENTROPY, [(X, y)], eval_mode=eval_mode, double=True, parameters=some) as function:
            assert function.dtype == torch.float64
            assert [p.shape for p in function.parameters] == [(6,), (3, 6)]
            assert function.module.training is not eval_mode
            value, gradient = function.gradient()
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
        twin = copy.deepcopy(before).double().train(not eval_mode)
        torch.manual_seed(0)
        expected = CROSS_ENTROPY(twin, (X.double(), y))
        expected_gradient = torch.autograd.grad(expected, [twin[2].bias, twin[4].weight])
        torch.set_rng_state(state)
        assert value == pytest.approx(expected.item(), rel=1e-14)
        torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in expected_gradient]))
    assert module.training
    assert all(p.grad is g for p, g in zip(module.parameters(), gradients, strict=True))
    for (name, now), then in zip(module.state_dict().items(), before.state_dict().values(), strict=True):
        assert now.dtype == then.dtype, name
        assert torch.equal(now, then), name
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_noise_belongs_to_the_seed():
    module = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 1)).double()
    batch = (normal(16, 8), normal(16, 1))
    loss = OutputLoss(lambda o, t: 0.5 * (o - t).square())
    values = []
    for seed in (1, 1, 2):
        with observing(module, loss, [batch], eval_mode=False, seed=seed) as function:
            values += [function.value(), function.gradient()[0]]
    assert values[0] == values[1] == values[2] == values[3] != values[4] == values[5]


@pytest.mark.acceptance
def test_a_loss_that_draws_from_a_generator_out_of_reach_is_noticed(smooth_case):
    module, loss, batch = smooth_case
    FixedLoss(module, loss, [batch]).check_deterministic()
    fixed = FixedLoss(module, lambda m, b: loss(m, b) + torch.rand(()), [batch])
    fixed.check_deterministic()  # torch's generators are put where they were
    augmented = FixedLoss(module, lambda m, b: loss(m, b) + np.random.rand(), [batch])  # noqa: NPY002
    with pytest.raises(UserError, match=r"loss must be a fixed function of the weights, got .* and then .*"):
        augmented.check_deterministic()
    inputs, targets = batch
    many = [(torch.cat([inputs] * 64), torch.cat([targets] * 64))]
    noisy = OutputLoss(lambda o, t: nn.functional.mse_loss(o, o.detach() + np.random.rand(), reduction="none"))  # noqa: NPY002
    with pytest.raises(UserError, match=r"loss must be a fixed function of the weights, got .* and then .*"):
        FixedLoss(module, noisy, many).check_deterministic()  # a few examples tell
    broken = FixedLoss(module, lambda m, b: loss(m, b) * float("nan"), [batch])
    broken.check_deterministic()  # nan is a value like any other


class Sizes(nn.Linear):
    """Notes how many examples it is given."""

    def __init__(self):
        super().__init__(2, 3, dtype=torch.float64)
        self.seen = []

    def append_norm(self):
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)  # in train mode

    def forward(self, inputs):
        self.seen.append(len(inputs))
        return super().forward(inputs)


def test_whether_a_loss_is_fixed_is_asked_on_a_few_examples_where_they_can_be_cut_off():
    def seen(loss, batches, change=lambda module: None):
        module = Sizes()
        change(module)
        function = FixedLoss(module, loss, batches)
        function.check_deterministic()
        return module.seen, function.spent_gradients

    def batch(num):
        return normal(num, 2), torch.zeros(num, dtype=torch.long)

    def whole(module, batch):
        return CROSS_ENTROPY(module, batch)

    few, price = seen(CROSS_ENTROPY, [batch(320)])
    assert few == [40, 40]
    assert price == pytest.approx(2 * FORWARD / 8)
    few, price = seen(CROSS_ENTROPY, [(batch(320), 320), (batch(264), 264)])
    assert few == [40, 33, 40, 33]
    assert price == pytest.approx(2 * FORWARD * 73 / 584)
    for loss, given, change in (
        (whole, batch(320), lambda module: None),  # which may be of any kind
        (CROSS_ENTROPY, batch(250), lambda module: None),  # too few
        (CROSS_ENTROPY, batch(320), lambda module: module.compile(backend="eager")),
        (CROSS_ENTROPY, batch(320), lambda module: module.append_norm()),
    ):
        _, price = seen(loss, [given], change)
        assert price == pytest.approx(2 * FORWARD)


def pictures(**settings: Any) -> nn.Module:
    config = MODELS["cnn"].config.model_validate({"name": "cnn", "depth": 1, "width": 2, **settings})
    signature = Images(channels=2, height=4, width=4, num_classes=3)
    return build_model(config, signature, torch.Generator().manual_seed(0))


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("build", "refused"),
    [
        (lambda: nn.BatchNorm2d(2), {True}),
        (lambda: nn.BatchNorm2d(2, track_running_stats=False), {True, False}),
        (lambda: pictures(norm="batch"), {True}),
        (lambda: pictures(norm="ghost_batch"), {True}),
        (lambda: pictures(norm="group", num_groups=1), set()),
        (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), set()),
    ],
    ids=["batch norm", "without running ones", "ours", "ghost", "group norm", "instance norm"],
)
def test_statistics_of_each_of_several_batches_are_refused(build, refused):
    X, y = normal(6, 2, 4, 4).float(), classes(3, 6)
    one, several = [((X, y), 6)], [((X[:4], y[:4]), 4), ((X[4:], y[4:]), 2)]
    for training in (True, False):
        module = build().train(training)
        FixedLoss(module, CROSS_ENTROPY, one)
        if training in refused:
            with pytest.raises(UserError, match=r"layer '.*' must not use the statistics of each micro-batch"):
                FixedLoss(module, CROSS_ENTROPY, several)
        else:
            FixedLoss(module, CROSS_ENTROPY, several)
    with observing(build().train(), CROSS_ENTROPY, several) if False not in refused else pytest.raises(UserError):
        FixedLoss(build().eval(), CROSS_ENTROPY, several)


def test_output_losses_are_flat_and_their_mean_is_the_loss():
    tokens, X = classes(5, 4, 6), normal(4, 6, 5)
    module = nn.Linear(5, 5).double()
    each = CROSS_ENTROPY.per_target(module(X), tokens)
    assert each.shape == (24,)
    rows = [nn.functional.cross_entropy(module(X[b, t]), tokens[b, t]).item() for b in range(4) for t in range(6)]
    assert each.tolist() == pytest.approx(rows, rel=1e-12)
    assert CROSS_ENTROPY(module, (X, tokens)).item() == pytest.approx(sum(rows) / 24, rel=1e-12)
    values = OutputLoss(lambda o, t: 0.5 * (o - t).square(), "gaussian")
    each = values.per_target(module(X), torch.zeros(4, 6, 5))  # summed over the outputs of a target
    assert torch.allclose(each, 0.5 * module(X).square().sum(-1).flatten())
    assert values.likelihood == "gaussian"
    assert CROSS_ENTROPY.likelihood == "categorical"


def test_output_losses_that_are_reduced_are_refused():
    outputs, targets = normal(4, 3), classes(3, 4)
    for criterion in (nn.CrossEntropyLoss(), lambda o, t: nn.functional.cross_entropy(o, t, reduction="none")[:2]):
        with pytest.raises(
            UserError, match=r"criterion must return one loss for each of 4 targets, got shape \((2,)?\)"
        ):
            OutputLoss(criterion).per_target(outputs, targets)


def test_losses_are_taken_apart_where_they_can_be(smooth_case):
    assert detailed(CROSS_ENTROPY, "a purpose") is CROSS_ENTROPY
    assert isinstance(CROSS_ENTROPY, DetailedLoss)
    with pytest.raises(UserError, match=r"loss must have per_target and likelihood for a purpose, got function; wrap"):
        detailed(smooth_case.loss, "a purpose")


def test_without_a_process_group_a_sum_over_processes_is_the_term(mean_of_three):
    _, _, function = mean_of_three
    term = normal(3)
    assert function.reduce(term) is term


def test_finite_is_about_all_parameters():
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    function = FixedLoss(module, CROSS_ENTROPY, [normal(1)])
    assert function.finite
    module.bias.data.fill_(float("inf"))
    assert not function.finite
