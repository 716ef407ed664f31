"""Small networks whose dense Hessian can be written out, in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


class Pair:
    """Two processes that have met and wait for work; started by the first, and anew by the next after a failure."""

    PATIENCE_SECONDS = 120.0

    def __init__(self, make_folder: Callable[[], Path]) -> None:
        self._make_folder = make_folder
        self._processes: list[subprocess.Popen[str]] = []

    def call(self, file: str, folder: Path) -> None:
        """Let both call `in_process` of a test file."""
        if not self._processes or any(process.poll() is not None for process in self._processes):
            self.end()
            self._start()
        for process in self._processes:
            print(json.dumps([file, str(folder)]), file=process.stdin, flush=True)
        deadline = time.monotonic() + self.PATIENCE_SECONDS
        while not all((folder / f"{rank}.done").exists() for rank in range(2)):
            late = time.monotonic() > deadline
            if late or any(process.poll() is not None for process in self._processes):
                self.end()
                errors = [(self._folder / f"{rank}.txt").read_text() for rank in range(2)]
                pytest.fail(f"{'too late' if late else 'a process died'}: {'; '.join(errors)}")
            time.sleep(0.01)

    def _start(self) -> None:
        self._folder = self._make_folder()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may resolve to nothing
        program = str(Path(__file__).with_name("process.py"))
        for rank in range(2):
            with open(self._folder / f"{rank}.txt", "w") as errors:
                command = [sys.executable, program, str(rank), str(self._folder)]
                self._processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=errors, text=True)
                )

    def end(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes for all tests of a worker: to start and to meet takes them three times as long as a test."""
    processes = Pair(lambda: tmp_path_factory.mktemp("pair"))
    yield processes
    processes.end()


@pytest.fixture
def two_processes(pair: Pair, tmp_path: Path) -> Callable[[str], Path]:
    """Return the function that calls a test file's `in_process` in two processes, and gives the folder they share."""

    def run(file: str) -> Path:
        pair.call(file, tmp_path)
        return tmp_path

    return run
