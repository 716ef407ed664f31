from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from landscape_ray.probes.guard import host_untouched
from landscape_ray.probes.sharpness import SharpnessProbe, sharpness


def build():
    """Return a module in train mode with dropout, batch norm, a frozen layer and one gradient missing."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    module[4].requires_grad_(False)
    module[3].eval()  # a mixture of modes
    return module


def cross_entropy(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def fixed_batch(num_examples=32, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_examples, 6, generator=generator), torch.randint(3, (num_examples,), generator=generator)


def photograph(module):
    """Return everything that must not change, as bits and identities."""
    return {
        "state": {name: t.numpy().tobytes() for name, t in module.state_dict().items()},
        "identities": [(id(p), p.data_ptr(), p._version, p.requires_grad) for p in module.parameters()],
        "buffers": [(id(b), b.data_ptr()) for b in module.buffers()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
    }


def vandalise(module):
    """Do to the host what a careless probe could do."""
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = parameter.data.double() + 1
            parameter.grad = torch.full_like(parameter, 3.0)
            parameter.requires_grad_(not parameter.requires_grad)
    module[0].weight = nn.Parameter(torch.zeros(8, 6))
    module[1].running_mean = torch.full((8,), 9.0)
    module[1].running_var.add_(1)
    module[1].register_buffer("extra", torch.zeros(1))
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002


def vandalise_and_fail(module):
    with host_untouched(module):
        vandalise(module)
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("failing", [False, True])
def test_everything_is_put_back_also_after_an_exception(failing):
    module = build()
    cross_entropy(module, fixed_batch()).backward()
    module[6].bias.grad = None
    module[0].weight.grad[0, 0] = -0.0  # equal to 0.0, other bits
    before = photograph(module)
    if failing:
        with pytest.raises(RuntimeError, match="on purpose"):
            vandalise_and_fail(module)
    else:
        with host_untouched(module):
            vandalise(module)
            assert photograph(module) != before
    assert photograph(module) == before


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ["exact", "finite_difference", "auto"])
@pytest.mark.parametrize("eval_mode", [True, False])
def test_sharpness_leaves_the_host_bit_identical(route, eval_mode):
    module = build()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(module, fixed_batch()).backward()
        optimizer.step()
    module[6].bias.grad = None
    moments = copy.deepcopy(optimizer.state_dict())
    before = photograph(module)
    estimate = sharpness(module, cross_entropy, [fixed_batch()], route=route, eval_mode=eval_mode)
    assert estimate.value > 0
    assert photograph(module) == before
    after = optimizer.state_dict()
    assert after["param_groups"] == moments["param_groups"]
    for index, state in moments["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in state.items())


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ["exact", "finite_difference", "auto"])
def test_training_with_and_without_the_probe_gives_the_same_bits(route):
    def train(probe):
        module = build()
        module.train()
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
        values = []
        for step in range(12):
            optimizer.zero_grad()
            batch = torch.randn(16, 6), torch.randint(3, (16,))  # from the global generator, as dropout
            cross_entropy(module, batch).backward()
            if probe is not None and step % 3 == 0:
                values.append(probe.measure(module, cross_entropy)["sharpness"].value)
            optimizer.step()
        return module.state_dict(), values

    plain, _ = train(None)
    probed, values = train(SharpnessProbe([fixed_batch()], route=route))
    assert all(plain[name].numpy().tobytes() == probed[name].numpy().tobytes() for name in plain)
    assert len(set(values)) == 4


def test_sharpness_leaves_the_host_bit_identical_when_the_loss_breaks():
    module = build()
    before = photograph(module)
    calls = []

    def breaks_second_time(module, batch):
        calls.append(module.training)
        if len(calls) == 2:
            raise RuntimeError("loss broke")
        return cross_entropy(module, batch)

    with pytest.raises(RuntimeError, match="loss broke"):
        sharpness(module, breaks_second_time, [fixed_batch()], route="finite_difference")
    assert calls == [False, False]
    assert photograph(module) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_are_put_back_and_values_agree():
    module = build()
    expected = sharpness(module, cross_entropy, [fixed_batch()], tol=1e-4)
    on_device = copy.deepcopy(module).cuda().train()
    batch = tuple(t.cuda() for t in fixed_batch())
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    for route in ("exact", "finite_difference", "auto"):
        sharpness(on_device, cross_entropy, [batch], route=route, eval_mode=False)
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert sharpness(on_device, cross_entropy, [batch], tol=1e-4).value == pytest.approx(expected.value, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_are_in_float32_unless_asked_and_the_switches_are_put_back() -> None:
    seen: list[tuple[str, bool]] = []

    class Looking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().forward(x)

    module, before = Looking(64, 64).cuda(), (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    batch = (torch.randn(32, 64, device="cuda"), torch.randn(32, 64, device="cuda"))
    values = {}
    for tf32, wanted in ((False, ("highest", False)), (True, ("high", True))):
        probe = SharpnessProbe(batches=[batch])
        probe.tf32 = tf32
        seen.clear()
        found = probe.measure(module, lambda m, b: (m(b[0]) - b[1]).square().mean())
        values[tf32] = found["sharpness"].value
        assert set(seen) == {wanted}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert values[True] == pytest.approx(values[False], rel=1e-2)
