"""What `bench_probes.py` measures on, and the peers that it compares with: PyHessian and curvlinops, where installed.

Both are called as their documentation says. Products with the Hessian are counted from outside: by replacing the
function that PyHessian calls for one, and by counting the columns that a curvlinops operator multiplies.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_ray.data import TextConfig, open_text
from landscape_ray.data.dataset import Data
from landscape_ray.data.images import ImageConfig, open_images
from landscape_ray.models import GPTConfig, build_model
from landscape_ray.models.resnet import ResNetConfig
from landscape_ray.probes import OutputLoss

LOSS = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
Batch = tuple[Tensor, Tensor]


class Run:
    """A model in training: a batch is a function of the number of updates made.

    Attributes:
        title: of the tables.
        module, optimizer, data, batch_size: what is trained.
        step: updates made.
        probe_batch: of the size of a training batch.
    """

    def __init__(self, kind: Literal["gpt", "cnn", "batchnorm"]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data: Data
        self.optimizer: torch.optim.Optimizer
        if kind == "gpt":
            self.data, self.batch_size = open_text(TextConfig(context_length=64)), 16
            self.module: nn.Module = build_model(GPTConfig(depth=4, width=64), self.data.signature, generator)
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3, betas=(0.9, 0.95))
            what = "GPT, 4 layers of width 64, on bytes of text, batch 16 x 64, AdamW"
        else:
            self.data = open_images(ImageConfig(augment="crop", label_noise=0.1))
            self.batch_size = 256
            norm: Literal["group", "batch"] = "group" if kind == "cnn" else "batch"
            config = ResNetConfig(depth=20, width=16, norm=norm, num_groups=8)
            self.module = build_model(config, self.data.signature, generator)
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.05, momentum=0.9)
            what = f"ReLU residual net, 20 layers, {norm} norm, digits with a tenth of wrong labels, batch 256, SGD"
        self.kind, self.step = kind, 0
        self.title = f"{kind.upper()}: {what}, {sum(p.numel() for p in self.module.parameters()):,} weights"
        self.probe_batch: Batch = self.data.probe_batch(0, self.batch_size)

    def train(self, num_steps: int) -> None:
        """Make updates."""
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            LOSS(self.module, self.data.batch(0, self.step, self.batch_size)).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.step += 1


class Found(NamedTuple):
    """What a method returned: its numbers, products spent, and a remark."""

    values: list[float]
    num_matvecs: int
    remark: str = ""


Solve = Callable[[nn.Module, Batch, int], Found]
"""A method: module, probe batch and seed to what was found."""


class _Rows(nn.Module):
    """The module with one row of outputs for each target, which is what both peers take."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.module(inputs)
        return outputs.flatten(0, -2)


def installed() -> list[str]:
    """Return which of the two can be imported."""
    return [name for name in ("pyhessian", "curvlinops") if importlib.util.find_spec(name)]


@contextlib.contextmanager
def _pyhessian(module: nn.Module, batch: Batch, seed: int) -> Iterator[tuple[Any, list[int]]]:
    """Return a context with PyHessian's object and the number of its products."""
    importlib.import_module("pyhessian")
    inside: Any = sys.modules["pyhessian.hessian"]
    counted, original = [0], inside.hessian_vector_product

    def counting(*arguments: Any) -> Any:
        counted[0] += 1
        return original(*arguments)

    torch.manual_seed(seed)  # it draws from the global generator
    inside.hessian_vector_product = counting
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it leaves a graph in .grad
            rows = _Rows(copy.deepcopy(module))
            yield (
                inside.hessian(rows, nn.CrossEntropyLoss(), data=(batch[0], batch[1].flatten()), cuda=False),
                counted,
            )
            for parameter in rows.parameters():  # parameter and graph refer to each other
                parameter.grad = None
    finally:
        inside.hessian_vector_product = original


def pyhessian_top(tol: float, k: int = 1) -> Solve:
    """Return PyHessian's power iteration."""

    def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
        with _pyhessian(module, batch, seed) as (hessian, counted):
            values, _ = hessian.eigenvalues(tol=tol, top_n=k)
            return Found(sorted(values, reverse=True), counted[0])

    return solve


def pyhessian_trace(num_samples: int | None) -> Solve:
    """Return PyHessian's trace, by its own stopping rule or with a given number of samples."""

    def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
        with _pyhessian(module, batch, seed) as (hessian, counted):
            samples = hessian.trace() if num_samples is None else hessian.trace(maxIter=num_samples, tol=-np.inf)
            return Found([float(np.mean(samples))], counted[0])

    return solve


def pyhessian_density(num_steps: int, num_vectors: int) -> Solve:
    """Return PyHessian's density; `torch.eig`, which it needs and torch no longer has, is put in its place."""

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return values[:, None], vectors

    def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
        with mock.patch.object(torch, "eig", eig, create=True), _pyhessian(module, batch, seed) as (hessian, counted):
            nodes, _ = hessian.density(iter=num_steps, n_v=num_vectors)
        return Found(sorted(np.concatenate(nodes).tolist(), reverse=True), counted[0], "torch.eig put back")

    return solve


@contextlib.contextmanager
def _curvlinops(module: nn.Module, batch: Batch, seed: int) -> Iterator[tuple[Any, list[int]]]:
    """Return a context with curvlinops' Hessian and the number of its products."""
    curvlinops = importlib.import_module("curvlinops")
    torch.manual_seed(seed)
    rows = _Rows(copy.deepcopy(module)).eval()
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = [p for p in rows.parameters() if p.requires_grad]
        data = [(batch[0], batch[1].flatten())]
        operator = curvlinops.HessianLinearOperator(
            rows, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
        )
        counted, original = [0], operator._matmat

        def counting(columns: list[Tensor]) -> Any:
            counted[0] += columns[0].shape[-1]
            return original(columns)

        operator._matmat = counting
        yield operator, counted


class CurvlinopsTop:
    """scipy's eigsh on curvlinops' Hessian, from a random start, or from the last eigenvector."""

    def __init__(self, k: int = 1, *, warm: bool = False, **settings: Any) -> None:
        self.k, self.warm, self.settings = k, warm, settings
        self.last: np.ndarray | None = None

    def __call__(self, module: nn.Module, batch: Batch, seed: int) -> Found:
        with _curvlinops(module, batch, seed) as (hessian, counted):
            size = sum(p.numel() for p in module.parameters() if p.requires_grad)
            random = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
            start = self.last if self.warm and self.last is not None else random
            values, vectors = eigsh(hessian.to_scipy(), k=self.k, which="LA", v0=start, **self.settings)
            self.last = vectors[:, -1]
            return Found(sorted(values.tolist(), reverse=True), counted[0])


def curvlinops_trace(num_samples: int, method: str = "hutchinson_trace") -> Solve:
    """Return a trace by curvlinops with a given number of products."""

    def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
        with _curvlinops(module, batch, seed) as (hessian, counted):
            estimate = getattr(importlib.import_module("curvlinops"), method)(hessian, num_samples)
            return Found([float(estimate)], counted[0])

    return solve


def curvlinops_density(num_steps: int, num_vectors: int) -> Solve:
    """Return curvlinops' density, with the search for the ends of the spectrum that it begins with."""

    def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
        spectrum: Any = importlib.import_module("curvlinops.papyan2020traces.spectrum")
        with _curvlinops(module, batch, seed) as (hessian, counted):
            cache = spectrum.LanczosApproximateSpectrumCached(hessian, num_steps)
            cache.approximate_spectrum(num_repeats=num_vectors)
            nodes = torch.cat([values for values, _ in cache._lanczos_iters])
            return Found(sorted(nodes.tolist(), reverse=True), counted[0])

    return solve
