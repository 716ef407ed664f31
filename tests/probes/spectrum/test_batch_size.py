from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.spectrum.batch_size import batch_eigenvalue, batch_size_effect

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
SIZE, NUM_EXAMPLES = 120, 128


class Weights(nn.Module):
    def __init__(self, size=SIZE):
        super().__init__()
        self.w = nn.Parameter(torch.ones(size))


def energy(module, matrices):
    """0.5 w'A_i w for each example, so that the Hessian on a batch is the mean of its matrices."""
    return 0.5 * torch.einsum("i,bij,j->b", module.w, matrices, module.w).mean()


def wigner(spikes, s, seed=0):
    """Return one matrix for each example: low rank plus noise of standard deviation s off the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NUM_EXAMPLES, SIZE, SIZE, generator=generator) * (s / math.sqrt(2))
    noise = noise + noise.mT
    noise -= noise.mean(0)  # so that the whole is the low-rank part exactly
    return noise + torch.diag(torch.tensor([*spikes, *[0.0] * (SIZE - len(spikes))]))


@pytest.mark.acceptance
def test_spiked_wigner_noise_follows_the_law():
    s = 0.5
    found = batch_size_effect(Weights(), energy, wigner([4.0, -3.0], s), [4, 8, 32], num_batches=8, tol=1e-3)
    assert found.full_largest.value == pytest.approx(4.0, rel=1e-4)
    assert found.full_smallest.value == pytest.approx(-3.0, rel=1e-4)
    exact = SIZE * s**2 * NUM_EXAMPLES / (NUM_EXAMPLES - 1)  # the mean was taken off
    for variance in (found.variance_largest, found.variance_smallest):
        assert variance.value == pytest.approx(exact, rel=0.1)
        assert abs(variance.value - exact) < 4 * variance.standard_error + 0.05 * exact
    assert max(found.fit_error_largest, found.fit_error_smallest) < 0.03
    for size, largest, smallest in zip(found.batch_sizes, found.largest, found.smallest, strict=True):
        assert found.predict(size) == pytest.approx((largest.value, smallest.value), rel=0.06)
    # a size that was not measured, and the whole
    again = batch_size_effect(Weights(), energy, wigner([4.0, -3.0], s), [16, 64], num_batches=8, tol=1e-3)
    assert found.predict(16)[0] == pytest.approx(again.largest[0].value, rel=0.05)
    assert found.predict(NUM_EXAMPLES) == pytest.approx((4.0, -3.0), rel=1e-4)


def test_below_the_transition_the_noise_is_all_there_is():
    s = 1.0
    found = batch_size_effect(Weights(), energy, wigner([0.5, -0.5], s), [4, 8], num_batches=6)
    for size, largest in zip(found.batch_sizes, found.largest, strict=True):
        edge = 2 * s * math.sqrt(SIZE * (1 / size - 1 / NUM_EXAMPLES))
        assert largest.value == pytest.approx(edge, rel=0.1)


def test_law_is_continuous_and_grows():
    assert batch_eigenvalue(1.0, 1.0) == 2.0
    assert batch_eigenvalue(1.0, 1.0 - 1e-12) == pytest.approx(2.0)
    assert batch_eigenvalue(-1.0, 4.0) == 4.0  # no spike on this side
    grown = [batch_eigenvalue(1.5, variance) for variance in torch.linspace(0.0, 9.0, 50).tolist()]
    assert grown == sorted(grown)
    assert grown[0] == 1.5


def test_identical_examples_have_no_noise():
    matrices = torch.diag(torch.linspace(-1.0, 2.0, 10)).expand(16, 10, 10)
    found = batch_size_effect(Weights(10), energy, matrices, [1, 2, 8], tol=1e-6)
    assert found.variance_largest.value == pytest.approx(0.0, abs=1e-4)
    assert [each.value for each in found.largest] == pytest.approx([2.0] * 3, rel=1e-5)
    assert [each.standard_error for each in found.largest] == pytest.approx([0.0] * 3, abs=1e-5)
    assert found.predict(1) == pytest.approx((2.0, -1.0), rel=1e-4)


def test_gauss_newton_matrices_have_no_smallest(smooth_case):
    found = batch_size_effect(
        smooth_case.module, CROSS_ENTROPY, smooth_case.batch, [4, 16], num_batches=2, curvature="ggn"
    )
    assert found.full_smallest is found.variance_smallest is None
    assert found.smallest == ()
    assert math.isnan(found.predict(8)[1])
    assert found.largest[0].value > found.full_largest.value
    assert 0 < found.price_gradients < 2.7 * found.num_matvecs


def test_examples_may_be_named(smooth_case):
    inputs, targets = smooth_case.batch

    def loss(module, batch):
        return CROSS_ENTROPY(module, (batch["inputs"], batch["targets"]))

    arguments = {"num_batches": 2, "tol": 1e-3}
    named = batch_size_effect(smooth_case.module, loss, {"inputs": inputs, "targets": targets}, [4, 16], **arguments)
    paired = batch_size_effect(smooth_case.module, CROSS_ENTROPY, smooth_case.batch, [16, 4, 4], **arguments)
    assert named.batch_sizes == paired.batch_sizes == (4, 16)
    assert named.largest == paired.largest


def test_progress_says_what_is_measured():
    told: list[str] = []
    matrices = torch.eye(3).expand(8, 3, 3)
    batch_size_effect(Weights(3), energy, matrices, [1, 2], num_batches=2, progress=told.append)
    assert told == ["all 8 examples", "2 batches of 1", "2 batches of 2"]


def test_not_finite_losses_give_nan():
    matrices = torch.full((8, 3, 3), float("nan"))
    found = batch_size_effect(Weights(3), energy, matrices, [1, 2], num_batches=2)
    assert math.isnan(found.variance_largest.value)
    assert math.isnan(found.fit_error_largest)


def test_refused_arguments():
    matrices = torch.zeros(8, 3, 3)
    for sizes in ([4], [0, 2], [2, 5], [2, 2]):
        with pytest.raises(UserError, match="batch_sizes must be two or more between 1 and 4"):
            batch_size_effect(Weights(3), energy, matrices, sizes)
    with pytest.raises(UserError, match="num_batches must be at least 2, got 1"):
        batch_size_effect(Weights(3), energy, matrices, [1, 2], num_batches=1)
    for examples in ((torch.zeros(4), torch.zeros(5)), torch.tensor(0.0), [], "text"):
        with pytest.raises(UserError, match="examples must be tensors whose first dimension counts the examples"):
            batch_size_effect(Weights(3), energy, examples, [1, 2])
    found = batch_size_effect(Weights(3), energy, torch.eye(3).expand(8, 3, 3), [1, 2], num_batches=2)
    for size in (0, 9):
        with pytest.raises(UserError, match=r"batch_size must be 1 \.\.\. 8"):
            found.predict(size)
