from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss, weighted
from landscape_ray.probes.operators import FiniteDifferenceHessian, HessianOperator


def half_squares(module, batch):
    inputs, targets = batch
    return 0.5 * (module(inputs) - targets).square().mean()


def directions(size, count=3):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.acceptance
def test_exact_product_equals_dense_hessian(case, dense_hessian):
    dense = dense_hessian(case)
    operator = HessianOperator(FixedLoss(case.module, case.loss, [case.batch]))
    assert operator.size == len(dense)
    for v in directions(operator.size):
        torch.testing.assert_close(operator(v), dense @ v, rtol=1e-9, atol=1e-9 * float((dense @ v).norm()))


def test_recomputed_graph_gives_the_same_bits(case):
    (v,) = directions(HessianOperator(FixedLoss(case.module, case.loss, [case.batch])).size, 1)
    kept, anew = (
        HessianOperator(FixedLoss(case.module, case.loss, [case.batch]), retain_graph=keep) for keep in (True, False)
    )
    assert torch.equal(kept(v), anew(v))
    assert torch.equal(kept(v), anew(v))
    assert (kept.matvec_gradients, anew.matvec_gradients) == (2.3, 3.5)


def test_finite_difference_agrees_in_float64(case):
    operator = HessianOperator(FixedLoss(case.module, case.loss, [case.batch]))
    differences = FiniteDifferenceHessian(FixedLoss(case.module, case.loss, [case.batch]))
    for v in directions(operator.size):
        exact = operator(v)
        assert float((differences(v) - exact).norm() / exact.norm()) < 1e-5


def test_linear_regression_hessian_is_second_moment():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    module = nn.Linear(6, 1, bias=False).double()
    operator = HessianOperator(FixedLoss(module, half_squares, [(X, torch.zeros(40, 1, dtype=torch.float64))]))
    columns = torch.stack([operator(e) for e in torch.eye(6, dtype=torch.float64)])
    torch.testing.assert_close(columns, X.T @ X / 40)


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor

    @property
    def num_examples(self) -> int:
        return len(self.inputs)


@pytest.mark.acceptance
@pytest.mark.parametrize("operator", [HessianOperator, FiniteDifferenceHessian])
def test_unequal_batches_equal_the_full_batch(operator, build_mlp):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(256, 3, generator=generator, dtype=torch.float64)
    Y = torch.randn(256, 3, generator=generator, dtype=torch.float64)
    module = build_mlp()
    full = operator(FixedLoss(module, half_squares, [(X, Y)]))
    by_weight = operator(FixedLoss(module, half_squares, [((X[:200], Y[:200]), 200), ((X[200:], Y[200:]), 56)]))
    by_count = operator(FixedLoss(module, half_squares, [Pair(X[:200], Y[:200]), Pair(X[200:], Y[200:])]))
    unweighted = operator(FixedLoss(module, half_squares, [((X[:200], Y[:200]), 1), ((X[200:], Y[200:]), 1)]))
    tolerance = 1e-10 if operator is HessianOperator else 1e-7
    for v in directions(full.size):
        expected = full(v)
        for split in (by_weight, by_count):
            assert float((split(v) - expected).norm() / expected.norm()) < tolerance
        assert float((unweighted(v) - expected).norm() / expected.norm()) > 1e-3
    assert by_count.mean_loss == pytest.approx(full.mean_loss, rel=1e-12)
    assert full.mean_loss == pytest.approx(half_squares(module, (X, Y)).item(), rel=1e-12)


def test_frozen_parameters_are_left_out(case, dense_hessian):
    last = list(case.module.parameters())[-1]
    last.requires_grad_(False)
    dense = dense_hessian(case)
    operator = HessianOperator(FixedLoss(case.module, case.loss, [case.batch]))
    assert operator.size == len(dense) == sum(p.numel() for p in case.module.parameters()) - last.numel()
    (v,) = directions(operator.size, 1)
    torch.testing.assert_close(operator(v), dense @ v)


def test_tied_weights_count_once():
    # f = u w'(w x): one matrix in two places; the untied twin has the Hessian blocks that the tied one adds up.
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 3, bias=False)
            self.decoder = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.decoder(torch.tanh(self.encoder(x)))

    untied = Tied().double()
    with torch.no_grad():
        untied.decoder.weight.copy_(untied.encoder.weight)
    tied = copy.deepcopy(untied)
    tied.decoder.weight = tied.encoder.weight
    X = torch.randn(12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    small, large = (HessianOperator(FixedLoss(m, half_squares, [(X, X)])) for m in (tied, untied))
    assert (small.size, large.size) == (9, 18)
    for v in directions(9):
        parts = large(torch.cat([v, v]))
        torch.testing.assert_close(small(v), parts[:9] + parts[9:])


def test_parameters_that_enter_linearly_or_not_at_all_have_zero_rows():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.curved = nn.Parameter(torch.tensor([2.0]))
            self.linear = nn.Parameter(torch.tensor([3.0]))
            self.unused = nn.Parameter(torch.tensor([4.0]))

    operator = HessianOperator(FixedLoss(Partly(), lambda m, x: (m.curved**2 * x + m.linear).sum(), [torch.ones(1)]))
    assert operator(torch.ones(3)).tolist() == [2.0, 0.0, 0.0]
    straight = HessianOperator(FixedLoss(Partly(), lambda m, x: (m.linear * x).sum(), [torch.ones(1)]))
    assert straight(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("operator", [HessianOperator, FiniteDifferenceHessian])
def test_works_inside_no_grad_inference_mode_and_autocast(operator, smooth_case):
    module, loss, batch = smooth_case
    module, batch = module.float(), (batch[0].float(), batch[1])
    v = torch.ones(sum(p.numel() for p in module.parameters()))
    expected = operator(FixedLoss(module, loss, [batch]))(v)
    for surroundings in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with surroundings:
            assert torch.equal(operator(FixedLoss(module, loss, [batch]))(v), expected)


@pytest.mark.parametrize("operator", [HessianOperator, FiniteDifferenceHessian])
def test_dropout_in_train_mode_is_one_function_and_global_generator_stays(operator):
    module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 1)).double()
    X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = torch.get_rng_state()
    hessian = operator(FixedLoss(module, half_squares, [(X, X[:, :1])]))
    u, v = directions(hessian.size, 2)
    there, back = hessian(v), hessian(u)
    # symmetric: the masks are fixed. u'Hv may be small by chance; its rounding goes by the lengths
    assert float(u @ there) == pytest.approx(float(v @ back), abs=1e-7 * float(u.norm() * there.norm()))
    assert torch.equal(torch.get_rng_state(), state)
    module.eval()
    assert not torch.allclose(operator(FixedLoss(module, half_squares, [(X, X[:, :1])]))(v), hessian(v))


def test_compiled_modules_are_differentiated_twice(smooth_case):
    module, loss, batch = smooth_case
    compiled = torch.compile(module, backend="aot_eager")
    loss(compiled, batch).backward()
    v = torch.ones(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    expected = HessianOperator(FixedLoss(module, loss, [batch]))(v)
    torch.testing.assert_close(HessianOperator(FixedLoss(compiled, loss, [batch]))(v), expected)


@pytest.mark.parametrize("failing", [False, True])
def test_finite_difference_puts_weights_back_bit_by_bit(failing, smooth_case):
    module, loss, batch = smooth_case
    before = [p.detach().clone() for p in module.parameters()]
    versions = [p._version for p in module.parameters()]
    calls = []

    def counted(module, batch):
        calls.append([p.detach().clone() for p in module.parameters()])
        if failing and len(calls) == 2:
            raise RuntimeError("loss broke")
        return loss(module, batch)

    host_graph = loss(module, batch)
    operator = FiniteDifferenceHessian(FixedLoss(module, counted, [batch]), eps=0.3)
    if failing:
        with pytest.raises(RuntimeError, match="loss broke"):
            operator(torch.ones(operator.size))
    else:
        operator(torch.ones(operator.size))
    moved = torch.cat([(a - b).reshape(-1) for a, b in zip(calls[1], before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.3)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert versions == [p._version for p in module.parameters()]
    host_graph.backward()  # would raise if a version counter had moved


def test_finite_difference_of_zero_is_zero(smooth_case):
    operator = FiniteDifferenceHessian(FixedLoss(smooth_case.module, smooth_case.loss, [smooth_case.batch]))
    assert not operator(torch.zeros(operator.size)).any()


def test_prices(smooth_case):
    one = HessianOperator(FixedLoss(smooth_case.module, smooth_case.loss, [smooth_case.batch]))
    assert one.function.spent_gradients == 0.0
    v = torch.ones(one.size)
    one(v), one(v)
    assert (one.num_matvecs, one.function.spent_gradients) == (2, pytest.approx(1.2 + 2 * 2.3))
    difference = FiniteDifferenceHessian(FixedLoss(smooth_case.module, smooth_case.loss, [smooth_case.batch]))
    difference(v)
    assert difference.function.spent_gradients == 2.0


def test_released_graph_is_built_again(smooth_case):
    operator = HessianOperator(FixedLoss(smooth_case.module, smooth_case.loss, [smooth_case.batch]))
    v = torch.ones(operator.size)
    first = operator(v)
    operator.release()
    assert torch.equal(operator(v), first)


def test_weights_that_moved_are_noticed(smooth_case):
    module, loss, batch = smooth_case
    operator = HessianOperator(FixedLoss(module, loss, [batch]))
    v = torch.ones(operator.size)
    operator(v)
    with torch.no_grad():
        next(module.parameters()).mul_(1.1)
    with pytest.raises(UserError, match=r"weights must stay as they are .* build a new one"):
        operator(v)


def test_refused_batches():
    with pytest.raises(UserError, match="batches must hold at least one batch, got none"):
        weighted([])
    with pytest.raises(UserError, match=r"batches\[0\] must be a pair \(batch, weight\) .* got Tensor"):
        weighted([torch.ones(2), torch.ones(2)])
    for weight in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"batches\[1\] must have a weight that is positive and finite"):
            weighted([("a", 1), ("b", weight)])


def test_a_single_batch_needs_no_weight():
    pair = (torch.ones(2), torch.ones(2))
    assert weighted([pair])[0][0] is pair
    assert weighted([(pair, 7)]) == [(pair, 1.0)]


def test_refused_modules_losses_and_vectors():
    X = torch.ones(4, 2)
    linear = nn.Linear(2, 1)
    operator = HessianOperator(FixedLoss(linear, lambda m, x: m(x).square().mean(), [X]))
    with pytest.raises(UserError, match=r"vector must have shape \(3,\), got \(2,\)"):
        operator(torch.ones(2))
    with pytest.raises(
        UserError, match=r"parameter 'weight' must be float32 or float64, got torch.bfloat16; .*float\("
    ):
        HessianOperator(FixedLoss(nn.Linear(2, 1).bfloat16(), nn.functional.mse_loss, [X]))
    with pytest.raises(UserError, match="module must have a parameter with requires_grad, got none"):
        HessianOperator(FixedLoss(nn.Linear(2, 1).requires_grad_(False), nn.functional.mse_loss, [X]))
    with pytest.raises(UserError, match="module must be on one device, got cpu, meta"):
        HessianOperator(FixedLoss(nn.Sequential(linear, nn.Linear(1, 1, device="meta")), nn.functional.mse_loss, [X]))
    with pytest.raises(UserError, match=r"loss must return a scalar tensor, .* got shape \(4, 1\)"):
        HessianOperator(FixedLoss(linear, lambda m, x: m(x), [X]))(torch.ones(3))
    with pytest.raises(UserError, match=r"loss must return a scalar tensor, .* got float"):
        HessianOperator(FixedLoss(linear, lambda m, x: m(x).sum().item(), [X]))(torch.ones(3))
    with pytest.raises(UserError, match="loss must depend on the trainable parameters"):
        HessianOperator(FixedLoss(linear, lambda m, x: x.sum(), [X]))(torch.ones(3))
    for eps in (0.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="eps must be positive and finite"):
            FiniteDifferenceHessian(FixedLoss(linear, nn.functional.mse_loss, [X]), eps=eps)
