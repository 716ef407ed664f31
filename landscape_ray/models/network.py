"""What training, probes and vectorised populations ask of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from landscape_ray.models.layers import Dropout
from landscape_ray.models.parametrisation import Rule
from landscape_ray.signature import Signature

Group: TypeAlias = Literal["embedding", "hidden", "head", "norm", "bias"]
"""embedding: tables of tokens and positions; head: the output layer's matrix; norm: gains and shifts of norms; bias."""


class Weight(NamedTuple):
    """What is known of a parameter besides its values."""

    group: Group
    rule: Rule
    decays: bool
    """Whether weight decay applies: matrices and kernels, not vectors."""


class Network(nn.Module, ABC):
    """A module that knows its parameters.

    A concrete network's constructor is `(config, signature, generator)` and ends with `self.initialise(generator)`.

    Attributes:
        signature: what it was built for.
        stackable: whether `forward` accepts stacked parameters and inputs (see `landscape_ray.models.layers`).
        draws_noise: whether training may draw from PyTorch's generators, which `set_noise` then seeds for it.
    """

    stackable: ClassVar[bool] = False
    draws_noise: ClassVar[bool] = False

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature
        self._dropouts: list[Dropout] | None = None

    @abstractmethod
    def group_of(self, name: str) -> Group:
        """Return the group of the parameter with this name."""

    @abstractmethod
    def forward_flops_per_unit(self) -> float:
        """Return the FLOPs of one forward pass per unit of the signature (token, image, example).

        A multiply-add is 2 FLOPs. Counted: matrix products and convolutions, attention products over the causal half
        where attention is causal. Not counted: norms, activations, softmax, table look-ups.
        """

    def flops_per_unit(self) -> float:
        """Return the training FLOPs per unit: a backward pass costs two forward passes."""
        return 3.0 * self.forward_flops_per_unit()

    def approximate_flops_per_unit(self, *, embedding: bool = False) -> float:
        """Return 6 N per unit, the usual approximation of `flops_per_unit` (Kaplan et al. 2020, arXiv 2001.08361).

        N is `num_params(embedding=embedding)`: without tables and head as there, or all of it (Hoffmann et al. 2022,
        arXiv 2203.15556). It takes every parameter for a weight that is used `uses_per_unit` times.
        """
        return 6.0 * self.num_params(embedding=embedding) * self.uses_per_unit()

    def uses_per_unit(self) -> int:
        """Return how many times a weight is used for one unit; networks with several positions a unit override it."""
        return 1

    def weights(self) -> dict[str, Weight]:
        """Return group and rule of every parameter, by its name in `named_parameters` (tied ones once)."""
        rules = dict(self._rules())
        return {
            name: Weight(self.group_of(name), rules[name], decays=parameter.dim() > 1)
            for name, parameter in self.named_parameters()
        }

    def _rules(self) -> Iterator[tuple[str, Rule]]:
        for prefix, module in self.named_modules():
            for name, rule in getattr(module, "rules", {}).items():
                yield (f"{prefix}.{name}" if prefix else name), rule

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every parameter with a positive `init_std` from a normal distribution; the others keep their values."""
        parameters = dict(self.named_parameters())
        for name, weight in self.weights().items():
            if weight.rule.init_std > 0:
                parameters[name].normal_(0.0, weight.rule.init_std, generator=generator)

    def count_params(self) -> dict[Group, int]:
        """Return the number of parameters by group; a tied head counts once, with the embedding."""
        counts: dict[Group, int] = dict.fromkeys(("embedding", "hidden", "head", "norm", "bias"), 0)
        for name, parameter in self.named_parameters():
            counts[self.group_of(name)] += parameter.numel()
        return counts

    def num_params(self, *, embedding: bool = True) -> int:
        """Return the number of parameters; without `embedding`, less the groups embedding and head."""
        counts = self.count_params()
        return sum(counts.values()) - (0 if embedding else counts["embedding"] + counts["head"])

    def set_noise(self, seed: int, step: int) -> None:
        """Make dropout that of update number `step` of the run with this seed."""
        for layer in self.dropouts():
            layer.key.fill_(layer.key_for(seed, step))

    def dropouts(self) -> list[Dropout]:
        """Return the dropout layers that do something in training; looked for once, for a walk over all takes time."""
        if self._dropouts is None:
            self._dropouts = [module for module in self.modules() if isinstance(module, Dropout) and module.active]
        return self._dropouts

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs for a batch of inputs; see the signature for the shapes."""
        out: Tensor = super().__call__(inputs)
        return out
