from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.sharpness.critical import critical_sharpness
from landscape_ray.probes.sharpness.directional import DirectionalSharpnessProbe, directional_sharpness
from landscape_ray.probes.sharpness.top import sharpness


def direction_for(module: nn.Module, seed: int = 3) -> Tensor:
    """Return a direction in which nets from `conftest` change, but not much: a part of the weights themselves."""
    generator = torch.Generator().manual_seed(seed)
    parts = [p.detach() * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in module.parameters()]
    return 0.01 * torch.cat([part.flatten() for part in parts])


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ["exact", "gradient", "parabola", "auto"])
def test_equals_the_quadratic_form_of_the_dense_hessian(case, dense_hessian, route):
    direction = direction_for(case.module)
    unit = direction / direction.norm()
    truth = float(unit @ dense_hessian(case) @ unit)
    found = directional_sharpness(case.module, case.loss, [case.batch], direction, route=route)
    assert found.converged
    assert found.value == pytest.approx(truth, rel={"gradient": 5e-3, "parabola": 1e-3}.get(route, 1e-9))
    assert abs(found.value - truth) <= 1.05 * found.standard_error + 1e-9 * abs(truth)  # the bound is to leading order
    assert found.route == ("exact" if route == "auto" else route)  # a single call is its own check
    checked = 2 / 3  # of the guard against losses that are not deterministic
    prices = {"exact": 3.5, "gradient": 7 / 3, "parabola": 5 / 3, "auto": 5 / 3 + 3.5}
    assert found.price_gradients == pytest.approx(prices[route] + checked)


def test_sign_and_length_do_not_matter(smooth_case):
    direction = direction_for(smooth_case.module)
    first, second, third = (
        directional_sharpness(smooth_case.module, smooth_case.loss, [smooth_case.batch], factor * direction).value
        for factor in (1.0, -1.0, 0.3)
    )
    assert second == pytest.approx(first, rel=1e-12)
    assert third == pytest.approx(first, rel=1e-3)


def test_eigenvector_gives_the_sharpness_and_nothing_is_above_it(smooth_case):
    top = sharpness(smooth_case.module, smooth_case.loss, [smooth_case.batch], tol=1e-6, max_matvecs=200)
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch]
    assert directional_sharpness(*arguments, top.vector, step=0.01).value == pytest.approx(top.value, rel=1e-3)
    for seed in range(5):
        assert directional_sharpness(*arguments, direction_for(smooth_case.module, seed)).value <= top.value


def quadratic(scale: float, offset: float = 1.0, cubic: float = 0.0, quartic: float = 0.0):
    """Return a net of one float32 weight at zero, and offset + w + scale w^2 / 2 + cubic w^3 + quartic w^4."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(1))])

    def loss(module, _):
        w = module[0].squeeze()
        return offset + w + 0.5 * scale * w**2 + cubic * w**3 + quartic * w**4

    return module, loss, [None], torch.ones(1)


def test_third_order_drops_out():
    found = directional_sharpness(*quadratic(2.0, cubic=100.0), route="gradient", step=0.1)
    assert found.value == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("route", ["gradient", "parabola"])
def test_fourth_order_is_in_the_error(route):
    """w^4 adds 4 q h^2 to the difference of gradients and 2 q h^2 to the parabola, which is extrapolated away."""
    found = directional_sharpness(*quadratic(1.0, offset=0.0, quartic=0.2), route=route, step=0.5, tol=0.5)
    added = 4 * 0.2 * 0.25
    if route == "gradient":
        assert found.value == pytest.approx(1.0 + added, rel=1e-4)
        assert found.standard_error == pytest.approx(added, rel=1e-2)
    else:
        assert found.value == pytest.approx(1.0, rel=1e-4)
        assert found.standard_error == pytest.approx(2 * 0.2 * 0.25 / 4, rel=1e-2)


def test_rounding_is_seen_and_answered_by_a_longer_step():
    """Curvature 1e-3 under a loss of 1, in float32: at a step of 0.003 it is a hundredth of a rounding."""
    module, loss, batches, direction = quadratic(1e-3, offset=1.0)
    once = directional_sharpness(module, loss, batches, 0.003 * direction, route="gradient")
    assert once.value == pytest.approx(1e-3, rel=0.1)
    again = directional_sharpness(module, loss, batches, 0.1 * direction, route="parabola")
    assert again.converged
    assert again.value == pytest.approx(1e-3, rel=0.05)
    assert again.price_gradients > 7 / 3 + 0.1  # the first step did not do


def test_error_covers_rounding():
    """Honest errors: within twice the error in 19 of 20, over directions of a float32 net at short steps."""
    generator = torch.Generator().manual_seed(5)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    batch = torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator)

    def loss(module, batch):
        return functional.cross_entropy(module(batch[0]), batch[1])

    inside = []
    for seed in range(20):
        direction = direction_for(module, seed)
        truth = directional_sharpness(module, loss, [batch], direction, route="exact").value
        found = directional_sharpness(module, loss, [batch], 0.2 * direction, route="parabola", tol=0.3)
        inside.append(abs(found.value - truth) <= 2 * found.standard_error)
    assert sum(inside) >= 19


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


def network_with_kinks(activation):
    generator = torch.Generator().manual_seed(2)
    module = nn.Sequential(nn.Linear(16, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 3))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    batch = torch.randn(32, 16, generator=generator), torch.randint(3, (32,), generator=generator)
    direction = torch.randn(sum(p.numel() for p in module.parameters()), generator=generator)
    return module, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), batch, direction / direction.norm()


@pytest.fixture
def kinked():
    """A net in float32, where steps that rounding allows cross kinks that are not held, and a random direction."""
    return network_with_kinks(Hinge)


@pytest.mark.acceptance
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("route", ["parabola", "gradient"])
@pytest.mark.parametrize("step", [1.0, 0.1])
def test_differences_do_not_see_the_kinks_of_relu(activation, route, step):
    module, loss, batch, direction = network_with_kinks(activation)
    truth = directional_sharpness(module, loss, [batch], direction, route="exact").value
    found = directional_sharpness(module, loss, [batch], direction, route=route, step=step)
    # the standard error is that of rounding, which depends on the order in which a processor adds up
    assert abs(found.value - truth) <= 3 * found.standard_error < 0.3 * truth


@pytest.mark.parametrize("route", ["parabola", "gradient"])
@pytest.mark.parametrize("step", [1.0, 0.1, 0.01])
def test_differences_that_cross_kinks_are_not_trusted(kinked, route, step):
    module, loss, batch, direction = kinked
    assert not directional_sharpness(module, loss, [batch], direction, route=route, step=step).converged


def test_kinks_send_auto_to_the_exact_product(kinked):
    module, loss, batch, direction = kinked
    found = directional_sharpness(module, loss, [batch], direction)
    assert found.route == "exact"
    assert found.value == directional_sharpness(module, loss, [batch], direction, route="exact").value


def test_no_curvature_is_zero_and_exact():
    module = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    found = directional_sharpness(module, lambda m, _: 1.0 + 3.0 * m[0].sum(), [None], torch.ones(1))
    assert (found.value, found.route) == (0.0, "exact")


@pytest.mark.parametrize("direction", [torch.zeros(1), torch.full((1,), math.nan)])
def test_no_direction_is_nan(direction):
    module, loss, batches, _ = quadratic(1.0)
    found = directional_sharpness(module, loss, batches, direction)
    assert math.isnan(found.value)
    assert not found.converged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"route": "hessian"}, "route must be one of auto, exact, gradient, parabola"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"step": -1.0}, "step must be positive"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        directional_sharpness(*quadratic(1.0), **arguments)


def test_refuses_the_direction_of_another_net():
    module, loss, batches, _ = quadratic(1.0)
    with pytest.raises(UserError, match="update must have 1 elements, one for each trainable weight, got 2"):
        directional_sharpness(module, loss, batches, torch.ones(2))


class GPT(nn.Module):
    """Two layers, GELU, LayerNorm, fused attention; float32."""

    def __init__(self, vocabulary=32, width=32, heads=2, length=24):
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in range(2):
            shape = *tokens.shape, 3, self.heads, -1
            q, k, v = self.qkv[layer](self.norms[2 * layer](x)).view(shape).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out[layer](mixed.transpose(1, 2).flatten(2))
            x = x + self.down[layer](functional.gelu(self.up[layer](self.norms[2 * layer + 1](x))))
        return self.head(self.norms[4](x))


@pytest.fixture(scope="module")
def trained():
    """A small GPT after 30 steps of AdamW at 1e-3 on sequences of a random chain, its last update and batch."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT()
    after = torch.randint(32, (32, 3), generator=generator)

    def batch():
        tokens = [torch.randint(32, (16,), generator=generator)]
        for _ in range(24):
            tokens.append(after[tokens[-1], torch.randint(3, (16,), generator=generator)])
        return torch.stack(tokens[:-1], 1), torch.stack(tokens[1:], 1)

    def loss(module, batch):
        return functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    probe_batch = batch()
    for _ in range(30):
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad()
        loss(module, batch()).backward()
        optimizer.step()
    update = [p.detach() - q for p, q in zip(module.parameters(), before, strict=True)]
    return module, loss, probe_batch, update


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ["gradient", "parabola"])
def test_gpt_along_an_update_of_adamw(trained, route):
    """The science page has 6 percent for one-sided differences; symmetric ones come within 2."""
    module, loss, batch, update = trained
    direction = torch.cat([part.flatten() for part in update])
    truth = directional_sharpness(module, loss, [batch], direction, route="exact").value
    found = directional_sharpness(module, loss, [batch], direction, route=route)
    assert found.value == pytest.approx(truth, rel=0.02)
    assert found.converged
    probe = DirectionalSharpnessProbe([batch], route="exact")  # takes the update in parts
    assert probe.measure(module, loss, Host(update=update))[probe.name].value == pytest.approx(truth, rel=1e-5)


def test_critical_sharpness_of_gpt_against_the_quadratic(trained):
    """2 / (lr alpha) with alpha = -2 g'D / D'HD at the weights before the update: the loss is no quadratic so far."""
    module, loss, batch, update = trained
    direction = torch.cat([part.flatten() for part in update])
    with observing(module, loss, [batch]) as function, function.moved_by(-direction):
        _, gradient = function.gradient()
        curvature = float(direction @ HessianOperator(function)(direction))
        quadratic = curvature / -float(gradient @ direction) / 1e-3
    found = critical_sharpness(module, loss, [batch], direction, lr=1e-3)
    assert found.converged
    assert 0.8 < found.value / quadratic < 1.3


def test_probe_before_the_first_update(smooth_case):
    probe = DirectionalSharpnessProbe([smooth_case.batch])
    found = probe.measure(smooth_case.module, smooth_case.loss)["directional_sharpness"]
    assert math.isnan(found.value)
    assert not found.converged
    assert probe.needs == {"update"}


def test_probe_remembers_the_step_that_served():
    module, loss, batches, direction = quadratic(1e-3)
    probe = DirectionalSharpnessProbe(batches, route="parabola")
    host = Host(update=[0.05 * direction])
    first, second = (probe.measure(module, loss, host)["directional_sharpness"] for _ in range(2))
    assert first.price_gradients > second.price_gradients
    assert second.price_gradients == pytest.approx(5 / 3)
    assert probe.price_gradients == pytest.approx(5 / 3)
    assert second.converged


def test_probe_does_not_insist_on_parabolas(kinked):
    module, loss, batch, direction = kinked
    probe = DirectionalSharpnessProbe([batch], tol=0.01)
    found = [probe.measure(module, loss, Host(update=[direction]))["directional_sharpness"] for _ in range(11)]
    assert [estimate.route for estimate in found] == ["exact"] * 11
    prices = [estimate.price_gradients for estimate in found]
    assert prices[1:10] == pytest.approx([3.5] * 9)
    assert min(prices[0], prices[10]) >= 3.5 + 5 / 3


def test_no_measurement_with_kinks_is_trusted_unchecked(kinked):
    """Over 30 random directions parabolas of 2 met the tolerance, and were wrong."""
    module, loss, batch, _ = kinked
    generator = torch.Generator().manual_seed(1)
    wrong = 0
    for _ in range(30):
        direction = torch.randn(sum(p.numel() for p in module.parameters()), generator=generator)
        arguments = module, loss, [batch], direction / direction.norm()
        truth = directional_sharpness(*arguments, route="exact").value
        found = directional_sharpness(*arguments)
        assert found.converged
        assert found.value == pytest.approx(truth, rel=1e-6)
        parabola = directional_sharpness(*arguments, route="parabola")
        wrong += parabola.converged and abs(parabola.value - truth) > 0.1 * abs(truth)
    assert wrong  # else this shows nothing


def test_a_parabola_that_misses_the_product_is_not_used_again():
    """Curvature 1 within 1e-8 of the weights, 2 beyond: no parabola above rounding sees the first, and all agree."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.float64))])

    def loss(module, _):
        w = module[0].squeeze()
        length = torch.where(w > 0, w, -w)
        beyond = length - 1e-8
        return 1e3 + torch.where(length < 1e-8, 0.5 * w**2, 0.5e-16 + 1e-8 * beyond + beyond**2)

    probe = DirectionalSharpnessProbe([None])
    host = Host(update=[torch.full((1,), 10.0, dtype=torch.float64)])
    prices = []
    for _ in range(21):
        expected = probe.price_gradients
        found = probe.measure(module, loss, host)[probe.name]
        assert (found.route, found.value) == ("exact", pytest.approx(1.0))
        prices.append(found.price_gradients)
        assert prices[-1] == pytest.approx(expected + (2 / 3 if len(prices) == 1 else 0.0))
        other = DirectionalSharpnessProbe([None])
        other.load_state_dict(probe.state_dict())
        probe = other
    assert prices[1:] == pytest.approx(2 * ([3.5] * 9 + [3.5 + 5 / 3]))


def test_probe_checks_every_tenth_parabola(smooth_case):
    probe = DirectionalSharpnessProbe([smooth_case.batch])
    host = Host(update=[p.detach() * 0.01 for p in smooth_case.module.parameters()])
    found, expected = [], []
    for _ in range(12):
        expected.append(probe.price_gradients)
        found.append(probe.measure(smooth_case.module, smooth_case.loss, host)[probe.name])
    assert [estimate.route for estimate in found] == ["exact", *["parabola"] * 9, "exact", "parabola"]
    assert found[1].value == pytest.approx(found[0].value, rel=0.05)
    assert [estimate.price_gradients for estimate in found[1:]] == pytest.approx(expected[1:])


def test_unpaid_check_is_left_out(smooth_case):
    probe = DirectionalSharpnessProbe([smooth_case.batch])
    update = [p.detach() * 0.01 for p in smooth_case.module.parameters()]
    for _ in range(2):  # nothing is trusted that was not checked
        found = probe.measure(smooth_case.module, smooth_case.loss, Host(update=update, allowance_gradients=5.0))
        assert found[probe.name].route == "exact"
    assert found[probe.name].price_gradients == pytest.approx(3.5)


def test_probe_resumes(smooth_case):
    hosts = [Host(update=[p.detach() * scale for p in smooth_case.module.parameters()]) for scale in (0.01, -0.02)]
    straight, first = (DirectionalSharpnessProbe([smooth_case.batch]) for _ in range(2))
    for probe in (straight, first):
        probe.measure(smooth_case.module, smooth_case.loss, hosts[0])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = DirectionalSharpnessProbe([smooth_case.batch])
    second.load_state_dict(torch.load(file, weights_only=True))
    values = [p.measure(smooth_case.module, smooth_case.loss, hosts[1])[p.name].value for p in (straight, second)]
    assert values[0] == values[1]
