import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.models import GPT, GPTConfig
from landscape_ray.models.gpt import rotary_table, rotate

CONFIGS = {
    "rotary": {"depth": 2, "width": 32, "num_heads": 4},
    "learned": {"depth": 2, "width": 32, "num_heads": 4, "positions": "learned"},
    "untied": {"depth": 1, "width": 16, "num_heads": 2, "tied_head": False},
}


def build(config: dict[str, object], seed: int = 0, context_length: int = 16) -> GPT:
    generator = torch.Generator().manual_seed(seed)
    return GPT(parse(GPTConfig, config, "x"), vocab_size=64, context_length=context_length, generator=generator)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_future_does_not_leak(name: str) -> None:
    model = build(CONFIGS[name]).eval()
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 64
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :10], b[:, :10], rtol=0, atol=1e-6)
    assert not torch.allclose(a[:, 10:], b[:, 10:])


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_a_function_of_the_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    a, b, c = build(CONFIGS[name]), build(CONFIGS[name]), build(CONFIGS[name], seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for (key, p), q, r in zip(a.state_dict().items(), b.parameters(), c.parameters(), strict=False):
        assert torch.equal(p, q), key
        assert p.dim() == 1 or not torch.equal(p, r), key


def test_parameter_counts_match_the_formula() -> None:
    depth, width, vocabulary = 2, 32, 64
    block = 12 * width**2 + 4 * width  # qkv, out, up, down; two norms
    body = depth * block + 2 * width
    assert build(CONFIGS["rotary"]).num_params(embedding=False) == body
    assert build(CONFIGS["rotary"]).num_params() == body + vocabulary * width
    assert build(CONFIGS["learned"]).num_params() == body + vocabulary * width + 16 * width
    assert build(CONFIGS["learned"]).num_params(embedding=False) == body
    untied = build(CONFIGS["untied"])
    assert untied.num_params() - untied.num_params(embedding=False) == 2 * 64 * 16


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_match_an_independent_counter(name: str) -> None:
    context_length = 64
    model = build(CONFIGS[name], context_length=context_length)
    tokens = torch.zeros(1, context_length, dtype=torch.int64)
    # the mathematical kernel multiplies the whole T x T square, we count the causal half: (T + 1) / 2 of T
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    square = 3 * 2 * 2 * model.config.depth * model.config.width * context_length**2
    half = square * (context_length + 1) / (2 * context_length)
    counted = counter.get_total_flops() - square + half
    assert model.flops_per_token() * context_length == pytest.approx(counted, rel=1e-12)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    cos, sin = rotary_table(32, 8)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    Q, K = rotate(q.expand(32, 8), cos, sin), rotate(k.expand(32, 8), cos, sin)
    torch.testing.assert_close(Q.norm(dim=-1), q.norm().expand(32))
    scores = Q @ K.T
    for shift in (0, 3, 11):
        diagonal = scores.diagonal(offset=shift)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_initial_loss_is_near_that_of_guessing() -> None:
    model = build(CONFIGS["untied"])
    tokens = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(math.log(64), rel=0.02)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 30, "num_heads": 4}, "width must be a multiple of num_heads, got 30 and 4"),
        ({"width": 12, "num_heads": 4}, "width / num_heads must be even for rotary positions, got 12 / 4"),
        ({"name": "gtp"}, "'name' input should be 'gpt'"),
        ({"dropout": 1.0}, "'dropout' input should be less than 1"),
    ],
)
def test_impossible_shapes_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(GPTConfig, config, "file")
