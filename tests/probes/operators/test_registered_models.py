"""Dense Hessians of tiny networks of every registered model, and of layers that are hard to differentiate twice."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_ray.models import MODELS, build_model
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators.hessian import HessianOperator
from landscape_ray.signature import Images, Signature, Tokens
from landscape_ray.training.loss import LossConfig, Objective

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")

TEXT = Tokens(vocab_size=5, context_length=4)
PICTURES = Images(channels=1, height=4, width=4, num_classes=3)

TINY: dict[str, tuple[dict[str, Any], Signature]] = {
    "gpt": ({"depth": 1, "width": 8, "num_heads": 2, "mlp_ratio": 1, "tied_head": True}, TEXT),
    "mlp": ({"depth": 2, "width": 6}, PICTURES),
    "cnn": ({"depth": 2, "width": 2, "norm": "batch"}, PICTURES),
    "resnet": ({"depth": 8, "width": 1, "norm": "batch"}, PICTURES),
    "vit": ({"depth": 1, "width": 4, "num_heads": 2, "patch_size": 2, "mlp_ratio": 1}, PICTURES),
    "transformers": (
        {"architecture": "gpt2", "options": {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 4}},
        TEXT,
    ),
}
"""Each with the data that suits it."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples(signature: Signature) -> tuple[Tensor, Tensor]:
    match signature:
        case Tokens():
            tokens = torch.randint(signature.vocab_size, (3, signature.context_length + 1), generator=generator(1))
            return tokens[:, :-1], tokens[:, 1:]
        case Images():
            shape = (5, signature.channels, signature.height, signature.width)
            targets = torch.randint(signature.num_classes, (5,), generator=generator(2))
            return torch.randn(shape, generator=generator(1)), targets
    raise AssertionError(signature)


def build(name: str, **changes: Any) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a network in float32, off its initial point where weights may be zero, and a batch."""
    if name == "transformers" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    settings, signature = TINY[name]
    config = MODELS[name].config.model_validate({"name": name, **settings, **changes})
    module = build_model(config, signature, generator(0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(3)))
    return module, examples(signature)


def written_out(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the Hessian row by row, from a float64 copy in the mode of the module: the slow twin."""
    module = copy.deepcopy(module).double()
    inputs, targets = batch
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    parameters = [p for p in module.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        loss = nn.functional.cross_entropy(module(inputs).flatten(0, -2), targets.flatten())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in gradient]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype == torch.float64
    return float((found - expected).norm() / expected.norm())


def test_every_registered_model_is_here():
    assert set(TINY) == set(MODELS)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", TINY)
def test_hessian_of_every_registered_model_equals_the_one_written_out(name):
    module, batch = build(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    objective = Objective(LossConfig(), TINY[name][1])
    with observing(module, objective, [batch], double=True) as function:
        found = HessianOperator(function).dense()
    expected = written_out(copy.deepcopy(module).eval(), batch)
    assert 100 < len(found) < 1200
    assert distance(found, expected) < 1e-5
    after = module.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cnn", {"norm": "batch"}),
        ("cnn", {"norm": "group", "num_groups": 1}),
        ("cnn", {"norm": "ghost_batch", "virtual_batch_size": 2}),
    ],
    ids=["batch norm", "group norm", "ghost batch norm"],
)
def test_modes_and_layers_that_are_hard_to_differentiate_twice(name, changes):
    module, batch = build(name, **changes)
    module.train()
    next(module.parameters()).requires_grad_(False)
    buffers = [buffer.clone() for buffer in module.buffers()]
    with observing(module, CROSS_ENTROPY, [batch], eval_mode=False, double=True) as function:
        found = HessianOperator(function).dense()
    expected = written_out(module, batch)
    assert distance(found, expected) < 1e-9
    assert all(torch.equal(now, then) for now, then in zip(module.buffers(), buffers, strict=True))
