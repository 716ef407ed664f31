"""Cross-entropy some rows at a time, against PyTorch's over all of them in float32."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from landscape_ray.signature import Tokens
from landscape_ray.training import chunked, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_plain_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNKS, "cpu", 3 * 50)  # 17 rows: the last chunk is a part
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(17, 50, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(50, (17,), generator=generator)
    targets[5] = -100
    plain = F.cross_entropy(logits.float(), targets)
    (expected,) = torch.autograd.grad(2.0 * plain, logits)
    mean = chunked.mean_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(2.0 * mean, logits)
    assert mean.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(mean, plain, rtol=1e-6, atol=0.0)
    # bfloat16: one rounding of a float32 that differs in its last bits, so one unit in the last place at most
    torch.testing.assert_close(gradient, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_unlikely_targets_and_infinite_logits_have_the_loss_that_they_have() -> None:
    logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    mean = chunked.mean_cross_entropy(logits, torch.tensor([2]))
    assert mean.item() == 1000.0
    mean.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, 0.0, -1.0]]))
    masked = torch.tensor([[-torch.inf, 0.0], [-torch.inf, 1.0]], requires_grad=True)
    chunked.mean_cross_entropy(masked, torch.tensor([1, -100])).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(masked.grad, torch.zeros(2, 2))
    assert chunked.mean_cross_entropy(torch.tensor([[torch.nan, 0.0]]), torch.tensor([0])).isnan()


def test_a_second_derivative_is_refused() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        chunked.mean_cross_entropy(logits, torch.tensor([0, 1])), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


def test_large_outputs_of_few_bits_are_gone_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LARGE", 8)
    objective = loss.Objective(loss.LossConfig(), Tokens(vocab_size=4, context_length=2))
    targets = torch.tensor([[0, 3]])
    for dtype, name in ((torch.float32, "NllLoss"), (torch.bfloat16, "_MeanCrossEntropy")):
        outputs = torch.zeros(1, 2, 4, dtype=dtype, requires_grad=True)
        found = objective.first_order(nn.Identity(), (outputs, targets))
        assert name in type(found.grad_fn).__name__
        assert found.item() == pytest.approx(math.log(4))
        assert "NllLoss" in type(objective(nn.Identity(), (outputs, targets)).grad_fn).__name__
