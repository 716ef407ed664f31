from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from landscape_ray.models.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm, linear, reserved
from landscape_ray.models.parametrisation import Rule

RULE = Rule(init_std=1.0)
K = 3


def filled(layer: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Linear(6, 5, rule=RULE, bias_rule=RULE),
    "linear without bias": lambda: Linear(6, 5, rule=RULE),
    "linear with multiplier": lambda: Linear(6, 5, rule=Rule(init_std=1.0, multiplier=0.25), bias_rule=RULE),
    "layer norm": lambda: LayerNorm(6, rule=RULE),
    "layer norm without bias": lambda: LayerNorm(6, rule=RULE, bias=False),
    "rms norm": lambda: RMSNorm(6, rule=RULE),
}


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_stacked_layers_are_their_members(name: str, shape: tuple[int, ...]) -> None:
    members = [filled(LAYERS[name](), seed) for seed in range(K)]
    x = torch.randn(K, *shape, generator=torch.Generator().manual_seed(9))
    state = {
        key: torch.stack([dict(m.named_parameters())[key] for m in members]) for key, _ in members[0].named_parameters()
    }
    stacked = functional_call(members[0], state, (x,))
    for k, member in enumerate(members):
        torch.testing.assert_close(stacked[k], member(x[k]), rtol=1e-5, atol=1e-6)


def stack(seed: int, *shape: int) -> Tensor:
    return torch.randn(K, *shape, generator=torch.Generator().manual_seed(seed))


def test_gradients_go_to_their_places() -> None:
    x, weight, bias = stack(0, 4, 6), stack(1, 5, 6).requires_grad_(), stack(2, 5).requires_grad_()
    wanted = torch.autograd.grad(linear(x, weight, bias).square().sum(), (weight, bias))
    row = torch.zeros(K, 48)
    places = [row[:, :30].view(K, 5, 6), row[:, 32:37]]
    with reserved(list(zip((weight, bias), places, strict=True))):
        found = torch.autograd.grad(linear(x, weight, bias).square().sum(), (weight, bias))
    for gradient, place, expected in zip(found, places, wanted, strict=True):
        assert gradient.data_ptr() == place.data_ptr()
        torch.testing.assert_close(place, expected, rtol=1e-6, atol=1e-6)
    assert not row[:, 30:32].any()
    place = places[0].clone()
    again = torch.autograd.grad(linear(2 * x, weight, bias).square().sum(), weight)
    assert again[0].data_ptr() != places[0].data_ptr()  # outside the block
    assert torch.equal(place, places[0])


def test_gradients_of_parameters_that_are_used_twice_add_up() -> None:
    x, weight = stack(0, 4, 6), stack(1, 6, 6).requires_grad_()

    def loss() -> Tensor:
        return (linear(linear(x, weight, None), weight, None) * weight.sum()).square().sum()

    (wanted,) = torch.autograd.grad(loss(), weight)
    with reserved([(weight, torch.zeros(K, 6, 6))]):
        (found,) = torch.autograd.grad(loss(), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_to_be_differentiated_have_memory_of_their_own() -> None:
    x, weight = stack(0, 4, 6), stack(1, 5, 6).requires_grad_()

    def product() -> Tensor:
        (gradient,) = torch.autograd.grad(linear(x, weight, None).square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
        return second

    wanted = product()
    with reserved([(weight, torch.zeros(K, 5, 6))]):
        torch.testing.assert_close(product(), wanted)


def test_stacked_embeddings_are_their_members() -> None:
    members = [filled(Embedding(7, 4, rule=RULE), seed) for seed in range(K)]
    index = torch.randint(0, 7, (K, 2, 5), generator=torch.Generator().manual_seed(1))
    weight = torch.stack([member.weight for member in members])  # type: ignore[misc]
    stacked = functional_call(members[0], {"weight": weight}, (index,))
    assert torch.equal(stacked, torch.stack([member(index[k]) for k, member in enumerate(members)]))


def test_multiplier_acts_on_the_product_and_not_on_the_bias() -> None:
    layer = filled(Linear(6, 5, rule=Rule(init_std=1.0, multiplier=0.25), bias_rule=RULE), 0)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), 0.25 * (x @ layer.weight.T) + layer.bias)  # type: ignore[operator]


def test_norms_are_their_formulas() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    rms, layer = (
        filled(RMSNorm(8, rule=RULE, eps=0.1), 1).double(),
        filled(LayerNorm(8, rule=RULE, eps=0.1), 2).double(),
    )
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * rms.weight)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * layer.weight + layer.bias  # type: ignore[operator]
    torch.testing.assert_close(layer(x), expected)


def dropout(rate: float, *, seed: int = 0, step: int = 0, salt: int = 0) -> Dropout:
    layer = Dropout(rate, salt=salt)
    layer.key.fill_(layer.key_for(seed, step))
    return layer


def kept(shape: tuple[int, ...], rate: float = 0.5, **key: int) -> Tensor:
    return (dropout(rate, **key)(torch.ones(shape)) != 0).double()


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_the_mean(rate: float) -> None:
    size = 200_000
    y = dropout(rate)(torch.ones(size))
    spread = (rate * (1 - rate) / size) ** 0.5
    assert float((y == 0).double().mean()) == pytest.approx(rate, abs=4 * spread)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=1e-6)


def test_dropout_is_a_function_of_its_key() -> None:
    x, before = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    assert torch.equal(dropout(0.3, seed=1, step=2, salt=3)(x), dropout(0.3, seed=1, step=2, salt=3)(x))
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_masks_of_different_keys_are_independent() -> None:
    size = 100_000
    keys = [{"seed": seed, "step": step, "salt": salt} for seed in (0, 1, 2**40) for step in (0, 1) for salt in (0, 1)]
    masks = 2 * torch.stack([kept((size,), **key) for key in keys]) - 1
    correlation = masks @ masks.T / size
    largest = float((correlation - torch.eye(len(keys))).abs().max())
    assert largest < 4.5 / size**0.5  # 66 pairs: 4.5 standard deviations


def test_both_halves_of_a_key_matter() -> None:
    size, low = 100_000, 12345
    masks = []
    for key in (low, low + (2 << 32), low - (99 << 32), low + 5 + (7 << 32)):
        layer = Dropout(0.5, salt=0)
        layer.key.fill_(key)
        masks.append(2 * (layer(torch.ones(size)) != 0).double() - 1)
    first = masks[0]
    for other in masks[1:]:
        assert abs(float(first @ other)) < 4.5 * size**0.5
        assert abs(float(first[5:] @ other[:-5])) < 4.5 * size**0.5  # not the same numbers five places on


def test_dropout_masks_have_no_correlation_along_themselves() -> None:
    size = 100_000
    mask = 2 * kept((size,)) - 1
    for lag in [*range(1, 34), 64, 96, 128, 256, 512, 4096]:
        z = float((mask[lag:] * mask[:-lag]).sum()) / (size - lag) ** 0.5
        assert abs(z) < 4.5, lag


def test_dropout_of_a_stack_is_that_of_its_members_to_the_bit() -> None:
    rates, x = [0.0, 0.2, 0.7], torch.randn(K, 4, 6, generator=torch.Generator().manual_seed(0))
    members = [dropout(rate, seed=seed, step=5, salt=2) for seed, rate in enumerate(rates)]
    layer = dropout(0.5, salt=2)
    state = {name: torch.stack([getattr(member, name) for member in members]) for name in ("key", "rate")}
    stacked = functional_call(layer, state, (x,))
    for k, member in enumerate(members):
        assert torch.equal(stacked[k], member(x[k]) if rates[k] else x[k])


def test_dropout_is_the_identity_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(5)
    assert dropout(0.5).eval()(x) is x
    assert dropout(0.0)(x) is x
    assert not torch.equal(dropout(0.5)(x), x)


def test_dropout_gradient_is_its_mask() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = dropout(0.4)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_masks_are_the_same_on_a_gpu() -> None:
    x = torch.ones(300, 7)
    for seed in range(10):
        layer = dropout(0.3, seed=seed)
        assert torch.equal(layer(x), layer.cuda()(x.cuda()).cpu())
