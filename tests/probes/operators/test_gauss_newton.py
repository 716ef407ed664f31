from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators.blocks import by_class
from landscape_ray.probes.operators.fisher import EmpiricalFisher, SampledFisher
from landscape_ray.probes.operators.gauss_newton import GGNOperator
from landscape_ray.probes.operators.hessian import HessianOperator

OPERATORS = [GGNOperator, SampledFisher, EmpiricalFisher]


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square()


def with_z_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses + 0.1 * outputs.logsumexp(-1).square()


CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
SQUARES = OutputLoss(half_squares, "gaussian")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(num_classes, *shape, seed=1):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def jacobian(module, inputs) -> Tensor:
    """Return the Jacobian of the outputs, (number of outputs, number of weights), row by row."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
        for output in module(inputs).flatten()
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def output_hessian(criterion, module, batch) -> Tensor:
    """Return the Hessian of the mean loss over all outputs of a batch, written out."""
    inputs, targets = batch
    outputs = module(inputs).detach()
    return torch.autograd.functional.hessian(
        lambda flat: criterion(flat.view(outputs.shape).flatten(0, -2), targets.flatten()).mean(), outputs.flatten()
    )


def gradients(module, loss, batch, *, per_target=False) -> Tensor:
    """Return the gradient of each example's mean loss, or of each target's, one backward pass for each."""
    inputs, targets = batch
    losses = loss.per_target(module(inputs), targets)
    losses = losses if per_target else losses.view(len(inputs), -1).mean(1)
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in losses]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.acceptance
@pytest.mark.parametrize("retain_graph", [True, False])
def test_gauss_newton_equals_its_definition(case, retain_graph):
    operator = GGNOperator(FixedLoss(case.module, CROSS_ENTROPY, [case.batch]), retain_graph=retain_graph)
    J = jacobian(case.module, case.batch[0])
    probabilities = case.module(case.batch[0]).detach().flatten(0, -2).softmax(-1)
    blocks = [torch.diag(p) - torch.outer(p, p) for p in probabilities]
    close(operator.dense(), J.T @ torch.block_diag(*blocks) @ J / len(blocks))
    assert operator.mean_loss == pytest.approx(float(case.loss(case.module, case.batch).detach()), rel=1e-12)


@pytest.mark.acceptance
@pytest.mark.parametrize("likelihood", [None, "categorical"])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="none", weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(reduction="none", ignore_index=1),
        with_z_loss,
    ],
    ids=["plain", "smoothed", "class weights", "ignored targets", "z-loss"],
)
def test_gauss_newton_of_any_loss_whether_it_names_its_likelihood_rightly_or_not(build_mlp, criterion, likelihood):
    module, batch = build_mlp(), (normal(7, 3), classes(3, 7))
    operator = GGNOperator(FixedLoss(module, OutputLoss(criterion, likelihood), [batch]))
    J = jacobian(module, batch[0])
    close(operator.dense(), J.T @ output_hessian(criterion, module, batch) @ J)


@pytest.mark.parametrize("likelihood", [None, "gaussian"])
def test_gauss_newton_of_squared_error_is_the_second_moment_of_the_jacobian(build_mlp, likelihood):
    module, batch = build_mlp(), (normal(7, 3), normal(7, 3, seed=1))
    J = jacobian(module, batch[0])
    close(GGNOperator(FixedLoss(module, OutputLoss(half_squares, likelihood), [batch])).dense(), J.T @ J / 7)


def test_gauss_newton_of_a_loss_linear_in_the_outputs_is_zero(build_mlp):
    function = FixedLoss(build_mlp(), OutputLoss(lambda o, t: (o * t).sum(1)), [(normal(7, 3), normal(7, 3, seed=1))])
    assert not GGNOperator(function)(torch.ones(function.size)).any()


@pytest.mark.acceptance
@pytest.mark.parametrize(("loss", "targets"), [(CROSS_ENTROPY, classes(4, 9)), (SQUARES, normal(9, 4, seed=2))])
def test_gauss_newton_is_the_hessian_of_a_linear_model(loss, targets):
    module = nn.Linear(5, 4).double()
    function = FixedLoss(module, loss, [(normal(9, 5), targets)])
    close(GGNOperator(function).dense(), HessianOperator(function).dense())


@pytest.mark.acceptance
def test_linear_and_logistic_regression_have_their_closed_forms():
    X, y = normal(40, 6), normal(40, 1, seed=2)
    linear = nn.Linear(6, 1, bias=False).double()
    function = FixedLoss(linear, SQUARES, [(X, y)])
    close(GGNOperator(function).dense(), X.T @ X / 40)
    residual = (linear(X) - y).detach()
    close(EmpiricalFisher(function).dense(), X.T @ (residual.square() * X) / 40)

    logistic = OutputLoss(nn.BCEWithLogitsLoss(reduction="none"))
    p = linear(X).detach().sigmoid()
    function = FixedLoss(linear, logistic, [(X, (y > 0).double())])
    expected = X.T @ (p * (1 - p) * X) / 40
    close(GGNOperator(function).dense(), expected)
    close(HessianOperator(function).dense(), expected)


@pytest.mark.acceptance
def test_traces_of_hessian_and_gauss_newton_agree_for_relu_without_normalisation(build_mlp):
    for module, agree in ((build_mlp(nn.ReLU), True), (build_mlp(nn.Tanh), False)):
        function = FixedLoss(module, CROSS_ENTROPY, [(normal(30, 3), classes(3, 30))])
        ggn, hessian = GGNOperator(function).dense(), HessianOperator(function).dense()
        assert float((ggn - hessian).norm()) > 0.1 * float(hessian.norm())
        assert (abs(float(ggn.trace() - hessian.trace())) < 1e-9 * float(hessian.trace())) == agree
        assert float(torch.linalg.eigvalsh(ggn).min()) > -1e-12


@pytest.mark.acceptance
@pytest.mark.parametrize("per", ["example", "target"])
def test_empirical_fisher_is_the_second_moment_of_single_gradients(case, per):
    function = FixedLoss(case.module, CROSS_ENTROPY, [case.batch])
    found = EmpiricalFisher(function, per=per).dense()
    G = gradients(case.module, CROSS_ENTROPY, case.batch, per_target=per == "target")
    close(found, G.T @ G / len(G))
    ggn = GGNOperator(function).dense()
    assert float((found - ggn).norm()) > 0.1 * float(ggn.norm())


def sampled(function, seeds, **settings) -> Tensor:
    """Return the products of Fisher matrices of many seeds with two vectors, one row for each seed."""
    vectors = normal(2, function.size, seed=9)
    fishers = [SampledFisher(function, seed=seed, **settings) for seed in seeds]
    return torch.stack([torch.cat([fisher(v) for v in vectors]) for fisher in fishers])


@pytest.mark.acceptance
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    ("loss", "targets"),
    [(CROSS_ENTROPY, classes(3, 4, 2)), (SQUARES, normal(4, 2, 3, seed=2))],
    ids=["classes", "values"],
)
def test_sampled_fishers_average_to_the_gauss_newton_matrix(loss, targets, num_samples):
    # 2 targets an example, so that targets, not examples, must be what is independent
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    nn.utils.vector_to_parameters(normal(21, seed=5), module.parameters())
    function = FixedLoss(module, loss, [(normal(4, 2, 2), targets)])
    draws = sampled(function, range(100), num_samples=num_samples)
    ggn = GGNOperator(function)
    expected = torch.cat([ggn(v) for v in normal(2, function.size, seed=9)])
    errors = draws.std(0) / math.sqrt(len(draws))
    z = ((draws.mean(0) - expected) / errors)[errors > 1e-12]
    assert float(z.abs().max()) < 5
    # independent labels: the variance falls in proportion to their number
    one = sampled(function, range(1000, 1100))
    assert float(one.var(0).sum() / draws.var(0).sum()) == pytest.approx(num_samples, rel=0.4)


@pytest.mark.acceptance
@pytest.mark.parametrize("num_samples", [1, 4])
def test_sampled_fisher_is_the_second_moment_of_the_scores_of_its_labels(build_mlp, num_samples):
    module, X = build_mlp(), normal(7, 3)
    labelled = SampledFisher(FixedLoss(module, CROSS_ENTROPY, [(X, classes(3, 7))]), num_samples=num_samples)
    found = labelled.dense()
    labels = labelled._draws[0]
    G = [gradients(module, CROSS_ENTROPY, (X, labels[:, k]), per_target=True) for k in range(num_samples)]
    close(found, sum(g.T @ g for g in G) / (7 * num_samples))

    noisy = SampledFisher(FixedLoss(module, SQUARES, [(X, normal(7, 3, seed=1))]), num_samples=num_samples)
    found = noisy.dense()
    outputs = module(X).detach()
    G = [gradients(module, SQUARES, (X, outputs + noise), per_target=True) for noise in noisy._draws[0]]
    close(found, sum(g.T @ g for g in G) / (7 * num_samples))


def test_sampled_labels_belong_to_the_seed_and_stay(build_mlp):
    function = FixedLoss(
        build_mlp(), CROSS_ENTROPY, [((normal(50, 3), classes(3, 50)), 50), ((normal(9, 3), classes(3, 9)), 9)]
    )
    v = normal(function.size)
    first = SampledFisher(function, seed=3)
    assert torch.equal(first(v), first(v))
    assert torch.equal(first(v), SampledFisher(function, seed=3, retain_graph=True)(v))
    assert not torch.allclose(first(v), SampledFisher(function, seed=4)(v))


def test_sampled_labels_follow_the_softmax():
    # certain, impossible and even: a model without inputs whose logits are its weights
    logits = torch.tensor([math.log(0.25), -math.inf, math.log(0.75), -math.inf], dtype=torch.float64)
    module = nn.Linear(1, 4).double()
    with torch.no_grad():
        module.weight.zero_()
        module.bias.copy_(logits.clamp(min=-800.0))
    fisher = SampledFisher(FixedLoss(module, CROSS_ENTROPY, [(normal(1, 1), classes(1, 1))]), num_samples=20_000)
    fisher(torch.ones(fisher.size))
    counts = fisher._draws[0].flatten().bincount(minlength=4)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert abs(float(counts[0]) - 5000) < 4 * math.sqrt(20_000 * 0.25 * 0.75)


@pytest.mark.acceptance
@pytest.mark.parametrize("operator", [GGNOperator, EmpiricalFisher])
@pytest.mark.parametrize("retain_graph", [None, True])
def test_unequal_batches_equal_the_full_batch(operator, retain_graph, build_mlp):
    module, X, y = build_mlp(), normal(256, 3), classes(3, 256)
    full = operator(FixedLoss(module, CROSS_ENTROPY, [(X, y)]))
    split = FixedLoss(module, CROSS_ENTROPY, [((X[:200], y[:200]), 200), ((X[200:], y[200:]), 56)])
    parts = operator(split, retain_graph=retain_graph)
    v = normal(full.size)
    close(parts(v), full(v), 1e-10)
    assert parts.mean_loss == pytest.approx(full.mean_loss, rel=1e-12)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(torch.tanh(self.used(x)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_frozen_parameters_are_left_out_and_unused_ones_have_zero_rows(operator):
    module, batch = Unused().double(), (normal(8, 3), classes(3, 8))
    dense = operator(FixedLoss(module, CROSS_ENTROPY, [batch])).dense()
    assert dense.shape == (24, 24)
    assert not dense[12:].any()
    assert not dense[:, 12:].any()
    assert dense[:12, :12].any()
    alone = FixedLoss(module, CROSS_ENTROPY, [batch], parameters=list(module.used.parameters()))
    close(operator(alone).dense(), dense[:12, :12])
    nothing = FixedLoss(module, CROSS_ENTROPY, [batch], parameters=list(module.unused.parameters()))
    assert not operator(nothing)(torch.ones(12)).any()


@pytest.mark.acceptance
def test_batch_statistics_on_one_batch_and_dropout_masks_are_part_of_the_function():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 3)).double()
    batch = (normal(9, 3), classes(3, 9))
    function = FixedLoss(module, CROSS_ENTROPY, [batch], seed=5)
    ggn, fisher, hessian = GGNOperator(function), EmpiricalFisher(function), HessianOperator(function)
    found, moments, second = ggn.dense(), fisher.dense(), hessian.dense()
    with function.surroundings():
        function.seed_noise()
        J = jacobian(module, batch[0])
        function.seed_noise()
        G = gradients(module, CROSS_ENTROPY, batch)
        function.seed_noise()
        M = output_hessian(CROSS_ENTROPY.criterion, module, batch)
    close(found, J.T @ M @ J)
    close(moments, G.T @ G / 9)
    close(second, second.T)
    assert ggn.mean_loss == pytest.approx(hessian.mean_loss, rel=1e-12) == pytest.approx(function.value(), rel=1e-12)
    module.eval()
    assert not torch.allclose(GGNOperator(function).dense(), found)


@pytest.mark.parametrize("operator", OPERATORS)
def test_host_stays_as_it_is_in_any_mode_of_autograd(operator, smooth_case):
    module, _, batch = smooth_case
    v = normal(sum(p.numel() for p in module.parameters()))
    state = torch.get_rng_state()
    expected = operator(FixedLoss(module, CROSS_ENTROPY, [batch]))(v)
    for surroundings in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with surroundings:
            assert torch.equal(operator(FixedLoss(module, CROSS_ENTROPY, [batch]))(v), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_finite_is_returned(operator, smooth_case):
    module, _, batch = smooth_case
    with torch.no_grad():
        next(module.parameters()).fill_(math.nan)
    broken = operator(FixedLoss(module, CROSS_ENTROPY, [batch]))
    assert broken(torch.ones(broken.size)).isnan().any()


def test_prices_and_release(smooth_case):
    module, _, (X, y) = smooth_case
    one = GGNOperator(FixedLoss(module, CROSS_ENTROPY, [(X, y)]))
    v = normal(one.size)
    first = one(v)
    assert torch.equal(one(v), first)
    assert (one.num_matvecs, one.function.spent_gradients) == (2, pytest.approx(1.1 + 2 * 1.6))
    one.release()
    assert torch.equal(one(v), first)
    assert one.function.spent_gradients == pytest.approx(2 * 1.1 + 3 * 1.6)
    several = GGNOperator(FixedLoss(module, CROSS_ENTROPY, [((X, y), 1), ((X, y), 1)]))
    close(several(v), first)
    assert several.function.spent_gradients == pytest.approx(2.7)


@pytest.mark.parametrize("operator", OPERATORS)
def test_weights_that_moved_are_noticed(operator, smooth_case):
    module, _, batch = smooth_case
    moved = operator(FixedLoss(module, CROSS_ENTROPY, [batch]))
    v = torch.ones(moved.size)
    moved(v)
    with torch.no_grad():
        next(module.parameters()).mul_(1.1)
    with pytest.raises(UserError, match=r"weights must stay as they are .* build a new one"):
        moved(v)


def refusal(operator, module, loss, batch, **settings):
    function = FixedLoss(module, loss, [batch])
    operator(function, **settings)(torch.ones(function.size))


def test_refused_losses(build_mlp):
    module, batch = build_mlp(), (normal(4, 3), classes(3, 4))
    for operator, purpose in zip(OPERATORS, ["Gauss-Newton", "Fisher", "empirical Fisher"], strict=True):
        with pytest.raises(UserError, match=rf"loss must have per_target and likelihood for the {purpose} matrix"):
            operator(FixedLoss(module, lambda m, b: m(b[0]).mean(), [batch]))
    with pytest.raises(UserError, match=r"loss.likelihood must be categorical or gaussian .*, got None"):
        refusal(SampledFisher, module, OutputLoss(with_z_loss), batch)
    weighted = OutputLoss(nn.CrossEntropyLoss(reduction="none", ignore_index=int(batch[1][0])), "categorical")
    with pytest.raises(UserError, match=r"loss.likelihood must be that of the loss, got 'categorical'"):
        refusal(SampledFisher, module, weighted, batch)
    whole = OutputLoss(lambda o, t: (o - t).square(), "gaussian")
    with pytest.raises(UserError, match=r"loss.likelihood must be that of the loss, got 'gaussian'"):
        refusal(SampledFisher, module, whole, (batch[0], normal(4, 3, seed=2)))
    with pytest.raises(UserError, match="num_samples must be at least 1, got 0"):
        refusal(SampledFisher, module, CROSS_ENTROPY, batch, num_samples=0)
    with pytest.raises(UserError, match="per must be one of example, target, got 'token'"):
        refusal(EmpiricalFisher, module, CROSS_ENTROPY, batch, per="token")


class Crossed(OutputLoss):
    """The losses of the examples depend on the outputs of one another."""

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().per_target(outputs - outputs.mean(0), targets)


class Short(OutputLoss):
    """One loss is missing."""

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().per_target(outputs, targets)[1:]


class Reduced(OutputLoss):
    """Only the mean of the losses."""

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().per_target(outputs, targets).mean()


@pytest.mark.parametrize("per", ["example", "target"])
def test_empirical_fisher_refuses_losses_that_cannot_be_told_apart(per):
    module, tokens = nn.Linear(2, 3).double(), (normal(6, 5, 2), classes(3, 6, 5))
    with pytest.raises(
        UserError, match=rf"loss.per_target must give each {per} a loss that depends on its own outputs"
    ):
        refusal(EmpiricalFisher, module, Crossed(CROSS_ENTROPY.criterion), tokens, per=per)
    with pytest.raises(
        UserError, match=r"loss.per_target must return as many losses for every example, flat, got shape \(29,\) for 6"
    ):
        refusal(EmpiricalFisher, module, Short(CROSS_ENTROPY.criterion), tokens, per=per)
    with pytest.raises(
        UserError, match=r"loss.per_target must return as many losses .*, got shape \(\) for 6 examples"
    ):
        refusal(EmpiricalFisher, module, Reduced(CROSS_ENTROPY.criterion), tokens, per=per)
    part = by_class(CROSS_ENTROPY, [tokens])[0]
    with pytest.raises(UserError, match=r"loss must weigh all targets the same for the empirical Fisher matrix"):
        EmpiricalFisher(FixedLoss(module, part.loss, part.batches), per=per)


class Returns(nn.Module):
    def __init__(self, outputs) -> None:
        super().__init__()
        self.layer, self.outputs = nn.Linear(3, 3).double(), outputs

    def forward(self, x: Tensor):
        return self.outputs(self.layer(x))


def test_refused_outputs():
    batch = (normal(4, 3), classes(3, 4))
    with pytest.raises(UserError, match="module must return its outputs as one tensor, got tuple"):
        refusal(GGNOperator, Returns(lambda o: (o, o)), CROSS_ENTROPY, batch)
    with pytest.raises(UserError, match="outputs must depend on the trainable parameters, got a constant"):
        refusal(GGNOperator, Returns(lambda o: o.detach()), CROSS_ENTROPY, batch)


@pytest.mark.acceptance
@pytest.mark.filterwarnings("ignore")  # their imports use what torch has deprecated
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_equals_an_independent_library(activation, build_mlp):
    curvlinops = pytest.importorskip("curvlinops")
    module = build_mlp(activation)
    X, y = normal(24, 3), classes(3, 24)
    data = [(X[:16], y[:16]), (X[16:], y[16:])]
    function = FixedLoss(module, CROSS_ENTROPY, [(batch, len(batch[0])) for batch in data])
    v = normal(function.size)
    for ours, theirs in (
        (GGNOperator(function), curvlinops.GGNLinearOperator),
        (HessianOperator(function), curvlinops.HessianLinearOperator),
        (EmpiricalFisher(function), curvlinops.EFLinearOperator),
    ):
        close(ours(v), theirs(module, nn.CrossEntropyLoss(), list(module.parameters()), data) @ v)
