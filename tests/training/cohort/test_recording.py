"""A recording gives what its function gives, to the bit, on whatever values it is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from landscape_ray.training.cohort import recording
from landscape_ray.training.cohort.recording import NotRecordableError, record

SIZE = 6

Step = tuple[str, int, int]

STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda a, b: torch.relu(a),
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "multiply by itself": lambda a, b: a * a,
    "product": lambda a, b: a @ b * 0.3,
    "transposed": lambda a, b: a.mT,
    "part": lambda a, b: a[:, :3].repeat(1, 2),
    "in place": lambda a, b: (a * 1.0).add_(b),
    "in place through a view": lambda a, b: _halved(a + b),
    "several results": lambda a, b: torch.var_mean(a, 1, keepdim=True)[1] + b,
    "without a place for the result": lambda a, b: F.softplus(a) + torch.ones_like(b),
    "softmax": lambda a, b: a.softmax(0),
    "broadcast": lambda a, b: a[:, :1] * b,
    "another type": lambda a, b: (a > b).float(),
}


def _halved(x: Tensor) -> Tensor:
    x[1:4].mul_(0.5)
    return x


@settings(deadline=None)  # what the first recording of a process imports takes seconds
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.lists(st.integers(0, 13), min_size=1, max_size=3),
)
def test_any_function_is_replayed_to_the_bit(steps: list[Step], kept: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(steps))
    inputs = [torch.randn(SIZE, SIZE, generator=generator) for _ in range(2)]

    def function(*given: Tensor) -> list[Tensor]:
        known = list(given)
        for name, i, j in steps:
            known.append(STEPS[name](known[i % len(known)], known[j % len(known)]))
        return [known[2:][k % len(steps)] for k in kept]

    recorded = record(lambda: function(*inputs))
    for _ in range(2):
        for tensor in inputs:
            tensor.normal_(generator=generator)
        before = [tensor.clone() for tensor in inputs]
        for ours, theirs in zip(recorded.replay(), function(*inputs), strict=True):
            assert torch.equal(ours, theirs)
        assert all(map(torch.equal, before, inputs))


def layers(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a loss and its gradients; everything that small networks do in an update."""
    y = x
    for w in weights:
        y = F.layer_norm(torch.tanh(y @ w), (SIZE,))
    y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
    loss = F.cross_entropy(y.flatten(0, -2), x.flatten(0, -2).argmax(-1))
    return loss.detach(), list(torch.autograd.grad(loss, weights))


def values(seed: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, SIZE, SIZE, generator=generator)
    return x, [torch.randn(SIZE, SIZE, generator=generator).requires_grad_() for _ in range(4)]


def test_gradients_are_replayed_to_the_bit_without_a_graph() -> None:
    x, weights = values(0)
    recorded = record(lambda: layers(x, weights))
    for seed in (1, 2):
        other, others = values(seed)
        with torch.no_grad():
            x.copy_(other)
            for mine, theirs in zip(weights, others, strict=True):
                mine.copy_(theirs)
        loss, gradients = recorded.replay()
        expected, theirs_ = layers(other, others)
        assert torch.equal(loss, expected)
        assert all(map(torch.equal, gradients, theirs_))
        assert not any(tensor.requires_grad or tensor.is_inference() for tensor in gradients)


def test_memory_is_used_again() -> None:
    x = torch.ones(64, 64)
    weight = torch.eye(64)

    def function() -> Tensor:
        y = x
        for _ in range(20):
            y = torch.relu(y @ weight)
        return y

    recorded = record(function)
    (result,) = recording._tensors(recorded.result)
    assert result.untyped_storage().nbytes() == 2 * 64 * 64 * 4  # a product and its factor; relu is done in place
    assert torch.equal(recorded.replay(), x)


def test_the_result_outlives_what_is_computed_after_it() -> None:
    x = torch.arange(4.0)

    def function() -> tuple[Tensor, Tensor, Tensor]:
        first = x + 1.0
        second = (first * 2.0).view(2, 2)
        return first, second[0], (second * 3.0).sum()

    recorded = record(function)
    x.fill_(1.0)
    first, part, total = recorded.replay()
    assert first.tolist() == [2.0] * 4
    assert part.tolist() == [4.0] * 2
    assert total.item() == 48.0


def test_a_recording_moves_to_other_rows() -> None:
    matrix = torch.arange(24.0).view(6, 4)
    scale = torch.tensor(2.0)
    rows = matrix[2:4]
    recorded = record(lambda: (rows[:, 1:].mT @ rows[:, :2]) * scale)
    for shift in (-2, 0, 2):
        moved = recorded.moved(matrix, shift)
        scale.fill_(3.0)
        own = matrix[2 + shift : 4 + shift]
        assert torch.equal(moved.replay(), own[:, 1:].mT @ own[:, :2] * 3.0)
        assert moved.result.data_ptr() == recorded.result.data_ptr()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.dropout(x, 0.5), "draws random numbers"),
        (lambda x: x + torch.rand(4), "draws random numbers"),
        (lambda x: x * float(x.sum()), "looks at values"),
        (lambda x: x[x > 0], "gives results whose shapes depend on values"),
    ],
)
def test_what_would_be_another_function_the_next_time_is_not_recorded(
    function: Callable[[Tensor], Any], reason: str
) -> None:
    x = torch.ones(4)
    state = torch.get_rng_state()
    with pytest.raises(NotRecordableError, match=reason):
        record(lambda: function(x))
    torch.set_rng_state(state)


def test_what_takes_much_memory_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "LIMIT", 2**20)
    x = torch.ones(2**17)
    record(lambda: x + x)
    with pytest.raises(NotRecordableError, match="makes more than 1 MB, all of which a recording needs at first"):
        record(lambda: x + x + x + x)
