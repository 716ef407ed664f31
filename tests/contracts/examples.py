"""One small example of everything that is registered. A new entry needs one, and is then in the contract suites."""

import math
from typing import Any

import torch
from torch import nn

from landscape_ray.data import Batch, Data
from landscape_ray.data.dataset import generator_for
from landscape_ray.signature import Images, Signature, Tokens, Vectors

MINE = "tests.contracts.examples"

DATA: dict[str, dict[str, Any]] = {
    "text": {"name": "text", "context_length": 16},
    "images": {"name": "images", "augment": "crop_flip", "label_noise": 0.1},
    "modular": {"name": "modular", "modulus": 13},
    "parity": {"name": "parity", "num_features": 10, "num_validation": 64},
    "xor": {"name": "xor", "num_features": 10, "num_validation": 64},
    "teacher": {"name": "teacher", "num_features": 8, "num_validation": 64},
    "random_features": {"name": "random_features", "num_latents": 8, "num_validation": 64},
    "drift": {"name": "drift", "num_steps": 10, "rate": 0.1, "base": {"num_latents": 8, "num_validation": 64}},
    "task_sequence": {"name": "task_sequence", "num_tasks": 2, "task_steps": 4},
}

MODEL: dict[str, dict[str, Any]] = {
    "gpt": {"name": "gpt", "depth": 1, "width": 16, "num_heads": 2},
    "mlp": {"name": "mlp", "depth": 2, "width": 16},
    "cnn": {"name": "cnn", "depth": 2, "width": 4, "norm": "batch"},
    "resnet": {"name": "resnet", "depth": 8, "width": 4, "norm": "batch"},
    "vit": {"name": "vit", "depth": 1, "width": 16, "num_heads": 2, "patch_size": 4},
    "transformers": {
        "name": "transformers",
        "architecture": "gpt2",
        "options": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    },
}
"""Each with the data that suits it below."""

SUITS = {"gpt": "text", "mlp": "images", "cnn": "images", "resnet": "images", "vit": "images", "transformers": "text"}

OPTIMIZER: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "sgd": {"name": "sgd", "momentum": 0.9},
    "muon": {"name": "muon"},
    "schedule_free_adamw": {"name": "schedule_free_adamw"},
}

NEEDS = {"transformers": "transformers", "schedule_free_adamw": "schedulefree"}
"""Package that an entry needs beyond those that are always installed."""

PROBE: dict[str, dict[str, Any]] = {
    "sharpness": {"tolerance": 0.1},
    "preconditioned_sharpness": {"tolerance": 0.1},
    "layer_sharpness": {"tolerance": 0.2, "max_matvecs": 8},
    "batch_sharpness": {"num_batches": 3},
    "directional_sharpness": {},
    "critical_sharpness": {},
    "sam_sharpness": {"radii": [0.01, 0.05]},
    "worst_case_sharpness": {"num_steps": 3},
    "average_case_sharpness": {"num_pairs": 3},
    "logit_sharpness": {},
    "linf_smoothness": {"num_vectors": 3, "num_ascents": 1},
    "eigenvalues": {"tolerance": 0.1, "max_matvecs": 12},
    "spectral_density": {"num_steps": 8},
    "trace": {"max_matvecs": 12},
    "ggn_trace": {"max_gradients": 10.0},
    "gradient_noise_scale": {"batch_size": 16},
    "gradient_coherence": {"batch_size": 8},
    "gradient_norms": {},
    "distance_from_init": {},
    "opposing_signals": {"batch_size": 16, "fraction": 0.25, "num_permutations": 19},
}
"""Their tables; batch_size and every_steps come on top."""

SCHEDULE: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"warmup_steps": 2},
    "cosine": {"warmup_steps": 2, "final_ratio": 0.1},
    "wsd": {"warmup_steps": 2, "cooldown_fraction": 0.4},
    "polynomial": {"exponent": 2.0},
    "cosine_power": {"power_base": 10.0},
    "inverse_sqrt": {"warmup_steps": 2},
    "step": {"milestones": [0.5], "gamma": 0.5},
    "one_cycle": {},
    "table": {"points": [[0.0, 0.5], [0.5, 1.0], [1.0, 0.0]]},
    "range": {"range_ratio": 0.01},
}


def suits(signature: Signature) -> dict[str, Any]:
    """Return a model for a kind of data."""
    match signature:
        case Tokens():
            return MODEL["gpt"]
        case Images():
            return MODEL["mlp"]
        case Vectors():
            return MODEL["mlp"]


class Noisy(nn.Module):
    """A user's own module, with randomness of PyTorch's."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, num_outputs)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(inputs)
        return out


def absolute_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A user's own loss."""
    return (outputs - targets).abs().sum(-1)


class Waves(Data):
    """A user's own data: y = sin(w x)."""

    def __init__(self, frequency: float) -> None:
        self.frequency = frequency

    @property
    def signature(self) -> Signature:
        return Vectors(num_features=1, num_outputs=1, targets="values")

    @property
    def corpus_id(self) -> str:
        return f"waves-{self.frequency}"

    def _draw(self, stream: tuple[int, ...], seed: int, size: int) -> Batch:
        x = torch.from_numpy(generator_for(seed, *stream).uniform(-math.pi, math.pi, (size, 1))).float()
        return x, (self.frequency * x).sin()

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        return self._draw((0, step), seed, batch_size)

    def probe_batch(self, seed: int, batch_size: int) -> Batch:
        return self._draw((1,), seed, batch_size)

    def validation_batches(self, num_batches: int | None, batch_size: int) -> list[Batch]:
        return [self._draw((2, i), 0, batch_size) for i in range(num_batches or 4)]


def mean_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a loss of a user that gives the mean only."""
    return torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
