"""What a sharpness probe costs: Hessian-vector products, one cold solve, and tracking along a run; ours and a peer.

    python scripts/bench_probes.py

A GPT-like model (4 layers, width 64, context 128, batch 8 x 128, bytes) after some AdamW updates on synthetic text, on
one CPU core. Times are CPU seconds; 1 g is one gradient on the probe batch; errors are relative to a Lanczos solve in
float64 to a residual of 1e-3 (errors near 1e-6). The peers solve with the same exact products, on a graph that is kept:

    power       power iteration as PyHessian does it: random start, stop when the value changes by less than tol
    eigsh       ARPACK as curvlinops is commonly used with it: scipy's eigsh(k=1, which="LA") with its defaults
    PyHessian   the package itself, where it can be imported
"""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from landscape_ray.probes import SharpnessProbe
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.lanczos import lanczos, unit_vector
from landscape_ray.probes.operators import CurvatureOperator, FiniteDifferenceHessian, HessianOperator
from landscape_ray.probes.sharpness import sharpness

VOCABULARY, CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 256, 128, 8, 64, 4, 4
WARM_UP_STEPS, TRACKED_STEPS, EVERY = 50, 125, 25
SEEDS = range(3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(x.shape))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ByteGPT(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif parameter.ndim == 1 and not bool((parameter == 1).all()):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions.weight)))
        return logits


def next_byte_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())


def synthetic_text(seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets from a fixed Markov chain over bytes."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1000 + seed)
    columns = [torch.randint(VOCABULARY, (BATCH, 1), generator=generator)]
    for _ in range(CONTEXT):
        probabilities = torch.softmax(2 * table[columns[-1][:, 0]], -1)
        columns.append(torch.multinomial(probabilities, 1, generator=generator))
    text = torch.cat(columns, 1)
    return text[:, :-1], text[:, 1:]


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        next_byte_loss(module, synthetic_text(step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class Solve(NamedTuple):
    value: float
    num_matvecs: int
    cpu_seconds: float
    price_gradients: float


def timed(solve: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    result = solve()
    return result, time.process_time() - began


def repeated(solve: Callable[[], Any], times: int) -> float:
    """Return the median CPU seconds."""
    return statistics.median(timed(solve)[1] for _ in range(times))


def power_iteration(matvec: Callable[[Tensor], Tensor], size: int, seed: int, tol: float, most: int = 100) -> float:
    """Return the eigenvalue of largest magnitude; stops when it changes by less than `tol`, relative."""
    v = unit_vector(size, seed=seed)
    value = math.nan
    for _ in range(most):
        product = matvec(v)
        previous, value = value, float(v @ product)
        if abs(value - previous) < tol * (abs(previous) + 1e-6):
            break
        v = product / torch.linalg.vector_norm(product)
    return value


def arpack(matvec: Callable[[Tensor], Tensor], size: int, seed: int) -> float:
    def product(v: np.ndarray) -> np.ndarray:
        return matvec(torch.from_numpy(v.ravel())).numpy()

    operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
    start = unit_vector(size, seed=seed).numpy()
    return float(eigsh(operator, k=1, which="LA", v0=start, return_eigenvectors=False)[0])


def pyhessian_value(module: nn.Module, batch: tuple[Tensor, Tensor], tol: float) -> float:
    from pyhessian import hessian  # type: ignore[import-not-found,unused-ignore]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps the graph in .grad
        values, _ = hessian(copy.deepcopy(module), criterion, data=batch, cuda=False).eigenvalues(tol=tol)
    return float(values[0])


def prices(module: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Print the price of one product by route; return the CPU seconds of one gradient."""
    parameters = list(module.parameters())
    gradient = repeated(lambda: torch.autograd.grad(next_byte_loss(module, batch), parameters), 7)
    size = sum(p.numel() for p in parameters)
    print(f"\nOne Hessian-vector product; 1 g = {1e3 * gradient:.0f} ms of CPU, {size} weights")
    operators: dict[str, CurvatureOperator] = {
        "exact, graph kept": HessianOperator(module, next_byte_loss, [batch]),
        "exact, graph built anew": HessianOperator(module, next_byte_loss, [batch], retain_graph=False),
        "finite difference": FiniteDifferenceHessian(module, next_byte_loss, [batch]),
    }
    v = unit_vector(size)
    exact = operators["exact, graph kept"](v)
    for name, operator in operators.items():
        error = float((operator(v) - exact).norm() / exact.norm())
        cost = repeated(lambda operator=operator: operator(v), 7)  # type: ignore[misc]
        print(f"  {name:<24} {cost / gradient:5.2f} g   charged {operator.matvec_gradients:.1f} g   error {error:.1e}")
    return gradient


def report(rows: dict[str, list[Solve]], references: list[float], peer: str) -> None:
    """Print one line a method: means, the errors, and how the costs compare with those of the peer."""
    print(f"  {'':<34}{'products':>9}{'CPU s':>8}{'error median':>14}{'max':>9}{'peer / this, CPU':>18}")
    peer_seconds = statistics.mean(s.cpu_seconds for s in rows[peer])
    for name, solves in rows.items():
        errors = [abs(s.value / r - 1) for s, r in zip(solves, references, strict=True)]
        seconds = statistics.mean(s.cpu_seconds for s in solves)
        products = statistics.mean(s.num_matvecs for s in solves)
        shown = f"{products:9.1f}" if products else f"{'':>9}"
        print(
            f"  {name:<34}{shown}{seconds:8.2f}{statistics.median(errors):14.1e}{max(errors):9.1e}"
            f"{peer_seconds / seconds:18.1f}"
        )


def of_estimate(estimate: Estimate, seconds: float) -> Solve:
    return Solve(estimate.value, estimate.num_matvecs, seconds, estimate.price_gradients)


def cold_solves(module: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    reference = converged(module, batch)
    print(f"\nTop eigenvalue, cold, {len(SEEDS)} seeds; reference {reference:.4f}")
    rows: dict[str, list[Solve]] = {}
    for seed in SEEDS:
        for route, tol in (("exact", 0.03), ("exact", 0.005), ("auto", 0.03), ("auto", 0.005)):
            settings: dict[str, Any] = {"route": route, "tol": tol, "seed": seed}
            solved = timed(lambda: sharpness(module, next_byte_loss, [batch], **settings))  # noqa: B023
            rows.setdefault(f"ours, {route}, tol {tol}", []).append(of_estimate(*solved))
        for name, solve in peers(seed).items():
            operator = HessianOperator(module, next_byte_loss, [batch])
            value, seconds = timed(lambda: solve(operator))  # noqa: B023
            rows.setdefault(name, []).append(Solve(value, operator.num_matvecs, seconds, operator.price_gradients))
        if importlib.util.find_spec("pyhessian"):
            value, seconds = timed(lambda: pyhessian_value(module, batch, 1e-3))
            rows.setdefault("PyHessian, tol 1e-3", []).append(Solve(value, 0, seconds, math.nan))
    report(rows, [reference] * len(SEEDS), "power, tol 1e-3")
    if not importlib.util.find_spec("pyhessian"):
        print("  (PyHessian is not installed: skipped)")
    first_below(module, batch, reference)


def peers(seed: int) -> dict[str, Callable[[HessianOperator], float]]:
    return {
        "power, tol 1e-2": lambda h: power_iteration(h, h.size, seed, 1e-2),
        "power, tol 1e-3": lambda h: power_iteration(h, h.size, seed, 1e-3),
        "eigsh, defaults": lambda h: arpack(h, h.size, seed),
    }


def first_below(module: nn.Module, batch: tuple[Tensor, Tensor], reference: float) -> None:
    """Print how many products bring the value within one percent, whatever the stopping rule would say."""
    needed: dict[str, list[int]] = {"Lanczos": [], "power": []}
    most = 24
    for seed in SEEDS:
        operator = HessianOperator(module, next_byte_loss, [batch])
        for name in needed:
            vectors: list[Tensor] = []
            products: list[Tensor] = []

            def recorded(v: Tensor, vectors: list[Tensor] = vectors, products: list[Tensor] = products) -> Tensor:
                vectors.append(v.clone())
                products.append(operator(v))  # noqa: B023
                return products[-1]

            if name == "power":
                power_iteration(recorded, operator.size, seed, 0.0, most)
                values = [float(v @ product) for v, product in zip(vectors, products, strict=True)]
            else:
                lanczos(recorded, operator.size, seed=seed, tol=0.0, max_matvecs=most)
                projected = torch.stack(vectors) @ torch.stack(products).T
                values = [float(torch.linalg.eigvalsh(projected[:m, :m])[-1]) for m in range(1, most + 1)]
            needed[name].append(next((k for k, x in enumerate(values, 1) if abs(x / reference - 1) < 0.01), most))
    shown = ", ".join(f"{name} {counts}" for name, counts in needed.items())
    print(f"  products until within 1e-2, by seed, {most} at most: {shown}")


def converged(module: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Return the top eigenvalue in float64; the bound of the result is checked."""
    twin = copy.deepcopy(module).double()
    estimate = sharpness(twin, next_byte_loss, [batch], tol=1e-3, max_matvecs=60)
    if not estimate.converged:
        raise RuntimeError(f"the reference did not converge: {estimate}")
    return estimate.value


def tracking(
    module: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], gradient: float
) -> None:
    trackers = {
        "ours, warm, exact": SharpnessProbe([batch], cold_every=10**6),
        "ours, cold, exact": SharpnessProbe([batch], cold_every=1),
        "ours, warm, differences": SharpnessProbe([batch], cold_every=10**6, route="finite_difference"),
        "ours, as shipped, auto": SharpnessProbe([batch], route="auto"),
    }
    rows: dict[str, list[Solve]] = {}
    references: list[float] = []
    for first in range(WARM_UP_STEPS, WARM_UP_STEPS + TRACKED_STEPS + 1, EVERY):
        references.append(converged(module, batch))
        for name, tracker in trackers.items():
            estimate, seconds = timed(lambda: tracker.measure(module, next_byte_loss))  # noqa: B023
            rows.setdefault(name, []).append(of_estimate(estimate, seconds))
        operator = HessianOperator(module, next_byte_loss, [batch])
        value, seconds = timed(lambda: power_iteration(operator, operator.size, first, 1e-3))  # noqa: B023
        rows.setdefault("power, tol 1e-3", []).append(Solve(value, operator.num_matvecs, seconds, 0.0))
        trained(module, optimizer, first, EVERY)
    # The first measurement is cold for all.
    rows, references = {name: solves[1:] for name, solves in rows.items()}, references[1:]
    print(f"\nTracking every {EVERY} updates, {len(references)} measurements; sharpness", end=" ")
    print(" ".join(f"{r:.1f}" for r in references))
    report(rows, references, "power, tol 1e-3")
    for name in ("ours, warm, exact", "ours, as shipped, auto"):
        price = statistics.mean(s.cpu_seconds for s in rows[name]) / gradient
        charged = statistics.mean(s.price_gradients for s in rows[name])
        print(
            f"  {name}: {price:.1f} g of CPU, {charged:.1f} g charged; 5 % of the time every {price / 0.05:.0f} updates"
        )


def main() -> None:
    torch.set_num_threads(1)
    began = time.process_time()
    module, batch = ByteGPT(seed=0), synthetic_text(-1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    trained(module, optimizer, 0, WARM_UP_STEPS)
    gradient = prices(module, batch)
    cold_solves(module, batch)
    tracking(module, optimizer, batch, gradient)
    print(f"\n{time.process_time() - began:.0f} s of CPU in all")


if __name__ == "__main__":
    main()
