"""Small networks whose dense Hessian can be written out, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Case(NamedTuple):
    module: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batch: Any


class Attention(nn.Module):
    """One causal attention block with tied embeddings, through the fused kernel's front door."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).view(*tokens.shape, 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + mixed.transpose(1, 2).reshape(x.shape))


def classification(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(module(inputs).flatten(0, -2), targets.flatten())


def mlp(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3))


def seeded(build: Callable[[], nn.Module], scale: float = 1.0) -> nn.Module:
    """Return the module in float64 with normal weights from a generator of its own."""
    module = build().double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


@pytest.fixture(params=["mlp", "attention", "conv"])
def case(request: pytest.FixtureRequest) -> Case:
    generator = torch.Generator().manual_seed(11)
    if request.param == "mlp":
        inputs, targets = torch.randn(20, 3, generator=generator).double(), torch.randint(3, (20,), generator=generator)
        return Case(seeded(mlp), classification, (inputs, targets))
    if request.param == "attention":
        tokens = torch.randint(5, (6, 8), generator=generator)
        return Case(seeded(Attention, 0.7), classification, (tokens[:, :-1], tokens[:, 1:]))
    convolutional = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)
        )
    )
    images, targets = torch.randn(10, 1, 6, 6, generator=generator), torch.randint(3, (10,), generator=generator)
    return Case(convolutional, classification, (images.double(), targets))


@pytest.fixture
def smooth_case() -> Case:
    generator = torch.Generator().manual_seed(11)
    inputs, targets = torch.randn(64, 3, generator=generator).double(), torch.randint(3, (64,), generator=generator)
    return Case(seeded(mlp), classification, (inputs, targets))


@pytest.fixture
def dense_hessian() -> Callable[[Case], Tensor]:
    """Return the function that writes the Hessian out row by row: the slow twin."""

    def write_out(case: Case) -> Tensor:
        parameters = [p for p in case.module.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):
            value = case.loss(case.module, case.batch)
        gradient = torch.autograd.grad(value, parameters, create_graph=True)
        entries = torch.cat([g.reshape(-1) for g in gradient])
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in entries]
        return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])

    return write_out


@pytest.fixture
def build_mlp() -> Callable[..., nn.Module]:
    return lambda activation=nn.Tanh: seeded(lambda: mlp(activation))
