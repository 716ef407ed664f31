"""What curvature probes cost, ours and two peers, on the same models, data and accuracy; and what tracking costs.

    python scripts/bench_probes.py [--quick] [--only cold top10 trace density tracking share]

The peers are PyHessian and curvlinops, `pip install -e .[peers]`; without them their rows are left out. Each is called
as its documentation says, and with the settings that suited it best here. A CNN and a small GPT, both partly trained;
everything on one thread. Times are CPU seconds, medians over interleaved repetitions; errors are relative, to a Lanczos
solve that ends in float64 (that of ten values: the largest of the ten). `meets`: within the accuracy asked for in nine
of ten repetitions, which a median would not show; for traces, as many samples as a standard error of 5 percent takes by
the spread of 60, or where that is not what tells, a root mean square error below 7 percent over four repetitions or
more; with fewer such a row is not judged, and nobody is said to be faster. `ratio`: the time over that of our cheapest
row that meets it, or is not judged. Rows that are only there to be seen, such as PyHessian's own stop, and those that
are judged by their number of samples, are repeated less often.

    cold      the largest eigenvalue from a random start, to 1e-2
    top10     the ten largest, to 1e-2
    trace     to a standard error of 5 percent; peers, which know none, are told how many samples Hutchinson's method
              takes of ours for it
    density   Lanczos quadrature of the same length; the error is that of the largest node, and copies counts the nodes
              within 1e-3 of the largest eigenvalue, of which there is one
    tracking  the largest eigenvalue every 50 updates of a run, to 1e-2
    share     the same by ours alone to 5 percent, for probe batches that are a part of a training batch: part of the
              training time
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_peers import (
    LOSS,
    Batch,
    CurvlinopsTop,
    Found,
    Run,
    Solve,
    curvlinops_density,
    curvlinops_trace,
    installed,
    pyhessian_density,
    pyhessian_top,
    pyhessian_trace,
)
from torch import Tensor, nn

from landscape_ray.probes import SharpnessProbe
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.operators.checked import Products
from landscape_ray.probes.sharpness import sharpness
from landscape_ray.probes.sharpness.top import Route
from landscape_ray.probes.spectrum.density import spectral_density
from landscape_ray.probes.spectrum.eigenpairs import eigenvalues
from landscape_ray.probes.spectrum.lanczos import extremal_pairs
from landscape_ray.probes.spectrum.trace import trace

ACCURACY = 1e-2
WARM_UP, EVERY = 200, 50
PARTS = (1, 2, 4, 8)
ENOUGH = 4
"""Repetitions that tell a root mean square error to a third."""
OWN_STOP = "PyHessian, its own stop"
TRACKERS: tuple[tuple[Route, float, bool], ...] = (
    ("exact", 0.05, False),
    ("auto", 0.05, False),
    ("auto", 0.12, True),
    ("auto", 0.15, True),
)
"""Ways to products, residuals to reach, and whether the value is extrapolated."""


@dataclasses.dataclass
class Row:
    """What a method needed, one entry for each repetition."""

    products: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    errors: list[float] = dataclasses.field(default_factory=list)
    remark: str = ""

    def add(self, solve: Callable[[], Found], references: list[float]) -> None:
        """Solve, and note what it took; a peer that cannot says why."""
        if self.remark.startswith("cannot"):
            return
        began = time.process_time()
        try:
            found = solve()
        except (NotImplementedError, RuntimeError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
            self.remark = f"cannot: {str(error).splitlines()[0][:90]}"
            return
        self.seconds.append(time.process_time() - began)
        self.products.append(found.num_matvecs)
        self.errors.append(max(abs(v / r - 1) for v, r in zip(found.values, references, strict=False)))
        self.remark = found.remark

    @property
    def cost(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.inf

    def meets(self, accuracy: float) -> bool:
        return bool(self.errors) and sum(error <= accuracy for error in self.errors) >= 0.9 * len(self.errors)


def report(title: str, rows: dict[str, Row], meets: Callable[[str, Row], bool | None]) -> None:
    """Print one line a method, and how the best of each stand to each other; None: too few repetitions to judge."""
    print(f"\n  {title}\n    {'':<44}{'products':>9}{'CPU s':>8}{'error':>9}{'largest':>9}{'meets':>7}{'ratio':>7}")
    verdicts = {name: meets(name, row) for name, row in rows.items() if row.errors}
    met = {name: rows[name] for name, verdict in verdicts.items() if verdict}
    possible = [
        rows[name].cost for name, verdict in verdicts.items() if name.startswith("ours") and verdict is not False
    ]
    ours = min(possible, default=math.nan)
    words = {True: "yes", False: "no", None: "?"}
    for name, row in rows.items():
        if not row.seconds:
            print(f"    {name:<44}{row.remark}")
            continue
        print(
            f"    {name:<44}{statistics.median(row.products):9.1f}{row.cost:8.2f}{statistics.median(row.errors):9.1e}"
            f"{max(row.errors):9.1e}{words[verdicts[name]]:>7}{row.cost / ours:7.2f}  {row.remark}"
        )
    if None in verdicts.values():
        num = min(len(rows[name].errors) for name, verdict in verdicts.items() if verdict is None)
        print(
            f"    -> {'one repetition' if num == 1 else f'{num} repetitions'}, not judged: nobody is said to be faster"
        )
        return
    for peer in ("PyHessian", "curvlinops"):
        best = min(((row.cost, name) for name, row in met.items() if name.startswith(peer)), default=None)
        if best and math.isfinite(ours):
            print(f"    -> {best[0] / ours:.2f} times faster than {best[1]}")


def reference(module: nn.Module, batch: Batch, k: int = 1) -> list[float]:
    """Return the largest eigenvalues: a float32 solve for where to start, then float64; errors are below 1e-4.

    Raises:
        RuntimeError: it did not converge.
    """
    start: Tensor | None = None
    if k == 1:
        start = sharpness(module, LOSS, [batch], tol=0.01, max_matvecs=60, seed=1234).vector
    with observing(module, LOSS, [batch], double=True) as function:
        start = None if start is None else start.double()
        found = extremal_pairs(
            HessianOperator(function), function.size, k=k, start=start, tol=0.005, max_matvecs=150, dtype=torch.float64
        )
    if not found.converged:
        raise RuntimeError(f"the reference did not converge: {found}")
    return found.values.tolist()


def ours_top(**settings: Any) -> Solve:
    def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
        estimate = sharpness(module, LOSS, [batch], seed=seed, **settings)
        return Found([estimate.value], estimate.num_matvecs, estimate.route if settings["route"] == "auto" else "")

    return solve


def compare(
    run: Run,
    title: str,
    methods: dict[str, Solve],
    repeats: int,
    wanted: list[float],
    meets: Callable[[str, Row], bool | None] = lambda name, row: row.meets(ACCURACY),
    seldom: dict[str, int] | None = None,
) -> None:
    """Let the methods take turns, and print their table; `seldom`: how often those that are not repeated by all."""
    rows = {name: Row() for name in methods}
    for seed in range(repeats):
        for name, method in methods.items():
            if seed < (seldom or {}).get(name, repeats):
                rows[name].add(functools.partial(method, run.module, run.probe_batch, seed), wanted)
    report(title, rows, meets)


def cold(run: Run, quick: bool) -> None:
    methods: dict[str, Solve] = {
        "ours, exact, residual 0.05": ours_top(route="exact", tol=0.05),
        "ours, exact, residual 0.03": ours_top(route="exact", tol=0.03),
        "ours, auto, residual 0.03": ours_top(route="auto", tol=0.03),
    }
    if "pyhessian" in installed():
        methods |= {f"PyHessian, tol {tol:g}": pyhessian_top(tol) for tol in (1e-2, 3e-3, 1e-3)}
    if "curvlinops" in installed():
        methods["curvlinops, eigsh"] = CurvlinopsTop()
        methods |= {f"curvlinops, eigsh ncv={n} tol=1e-2": CurvlinopsTop(ncv=n, tol=1e-2) for n in (4, 8)}
    wanted = reference(run.module, run.probe_batch)
    compare(run, f"cold: largest eigenvalue, {wanted[0]:.3f}", methods, 1 if quick else 5, wanted)


def top10(run: Run, quick: bool) -> None:
    def ours(tol: float) -> Solve:
        def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
            found = eigenvalues(module, LOSS, [batch], k=10, tol=tol, seed=seed)
            return Found([e.value for e in found.largest], found.num_matvecs)

        return solve

    methods: dict[str, Solve] = {f"ours, residual {tol:g}": ours(tol) for tol in (0.03, 0.01)}
    if "pyhessian" in installed() and not quick:
        methods["PyHessian, tol 0.001"] = pyhessian_top(1e-3, 10)
    if "curvlinops" in installed():
        methods["curvlinops, eigsh tol=1e-2"] = CurvlinopsTop(10, tol=1e-2)
        methods["curvlinops, eigsh ncv=30 tol=1e-2"] = CurvlinopsTop(10, ncv=30, tol=1e-2)
    wanted = reference(run.module, run.probe_batch, 10)
    shown = " ".join(f"{value:.1f}" for value in wanted)
    compare(run, f"top10: {shown}", methods, 1 if quick else 3, wanted)


def traces(run: Run, quick: bool) -> None:
    def ours(**settings: Any) -> Solve:
        def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
            found = trace(module, LOSS, [batch], tol=0.05, seed=seed, **settings)
            return Found([found.value], found.num_matvecs, f"{found.route}, own error {found.standard_error:.2g}")

        return solve

    num_samples = 40 if quick else 60
    with observing(run.module, LOSS, [run.probe_batch]) as function:
        hessian = HessianOperator(function)
        generator = torch.Generator().manual_seed(99)
        samples = []
        for _ in range(num_samples):
            signs = torch.randint(2, (function.size,), generator=generator).to(function.dtype).mul_(2).sub_(1)
            samples.append(float(signs @ hessian(signs)))
    # the mean of the samples would be half as wrong as what is compared with it, where a few large eigenvalues rule
    known = trace(run.module, LOSS, [run.probe_batch], tol=0.04 if quick else 0.015, max_matvecs=160, seed=98)
    mean, error = known.value, known.standard_error
    spread = statistics.stdev(samples) / abs(mean)
    needed = trace(run.module, LOSS, [run.probe_batch], tol=0.05, method="hutchinson").num_matvecs
    methods: dict[str, Solve] = {
        "ours, exact": ours(),
        "ours, auto": ours(route="auto"),
        "ours, exact, Hutchinson": ours(method="hutchinson"),
    }
    if "pyhessian" in installed():
        methods[OWN_STOP] = pyhessian_trace(None)
        methods[f"PyHessian, {needed} samples"] = pyhessian_trace(needed)
    if "curvlinops" in installed():
        methods[f"curvlinops, Hutchinson, {needed} samples"] = curvlinops_trace(needed)
        fit = max(3, 3 * round(needed / 3))
        methods[f"curvlinops, Hutch++, {fit} products"] = curvlinops_trace(fit, "hutchpp_trace")

    def meets(name: str, row: Row) -> bool | None:
        if "Hutch++" in name or any(route in row.remark for route in ("split", "xtrace", "hutch++")):
            if len(row.errors) < ENOUGH:
                return None
            return math.sqrt(statistics.mean(e * e for e in row.errors)) <= 0.07
        # the spread itself is known to 9 percent
        return spread / math.sqrt(statistics.median(row.products)) <= 0.06

    title = f"trace: {mean:.1f} +- {error:.1f}, one sample +- {spread:.0%}; {needed} samples for 5 percent"
    seldom = {OWN_STOP: 1, "ours, exact, Hutchinson": 2}
    compare(run, title, methods, 1 if quick else 8, [mean], meets, seldom)


def density(run: Run, quick: bool) -> None:
    num_steps, num_vectors = (12, 1) if quick else (40, 1)
    (largest,) = reference(run.module, run.probe_batch)

    def remarked(solve: Solve) -> Solve:
        def counted(module: nn.Module, batch: Batch, seed: int) -> Found:
            found = solve(module, batch, seed)
            copies = sum(abs(value / largest - 1) < 1e-3 for value in found.values)
            return found._replace(remark=f"{copies} copies; {found.remark}".rstrip("; "))

        return counted

    def ours(route: Products) -> Solve:
        def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
            settings = {"num_steps": num_steps, "num_vectors": num_vectors, "seed": seed}
            found = spectral_density(module, LOSS, [batch], route=route, **settings)  # type: ignore[arg-type]
            nodes = torch.cat(list(found.nodes)).sort(descending=True).values.tolist()
            return Found(nodes, found.num_matvecs, "finite_difference" if found.by_differences else "")

        return solve

    methods: dict[str, Solve] = {"ours, exact": ours("exact"), "ours, auto": ours("auto")}
    if "pyhessian" in installed():
        methods["PyHessian"] = pyhessian_density(num_steps, num_vectors)
    if "curvlinops" in installed():
        methods["curvlinops"] = curvlinops_density(num_steps, num_vectors)
    methods = {name: remarked(method) for name, method in methods.items()}
    compare(run, f"density: {num_steps} steps, {num_vectors} vector", methods, 1 if quick else 3, [largest])


def tracking(run: Run, quick: bool) -> None:
    """Print what following the largest eigenvalue costs; the first measurement, cold for all, is not counted."""
    probes = {
        f"ours, {route}, residual {tol:g}{', extrapolated' if beyond else ''}": SharpnessProbe(
            [run.probe_batch], route=route, tol=tol, extrapolate=beyond
        )
        for route, tol, beyond in TRACKERS
    }
    methods: dict[str, Solve] = {name: tracked(probe) for name, probe in probes.items()}
    if "pyhessian" in installed():
        methods |= {f"PyHessian, tol {tol:g}": pyhessian_top(tol) for tol in (1e-2, 3e-3, 1e-3)}
    if "curvlinops" in installed():
        methods |= {
            f"curvlinops, eigsh ncv={n} tol=1e-2 warm": CurvlinopsTop(ncv=n, tol=1e-2, warm=True) for n in (4, 8)
        }
    rows = {name: Row() for name in methods}
    seen: list[float] = []
    for index in range(4 if quick else 11):
        run.train(EVERY)
        wanted = reference(run.module, run.probe_batch)
        seen += wanted
        for name, method in methods.items():
            rows[name].add(functools.partial(method, run.module, run.probe_batch, index), wanted)
            if index == 0 and rows[name].seconds:
                rows[name] = Row()
    shown = " ".join(f"{value:.1f}" for value in seen[1:])
    report(f"tracking every {EVERY} updates: {shown}", rows, lambda name, row: row.meets(ACCURACY))


def tracked(probe: SharpnessProbe) -> Solve:
    def solve(module: nn.Module, batch: Batch, seed: int) -> Found:
        estimate = probe.measure(module, LOSS)["sharpness"]
        return Found([estimate.value], estimate.num_matvecs, estimate.route if probe.route == "auto" else "")

    return solve


def share(run: Run, quick: bool) -> None:
    """Print the part of the training time that tracking takes, with each probe batch."""
    inputs, targets = run.probe_batch
    batches = {part: (inputs[: len(inputs) // part], targets[: len(targets) // part]) for part in PARTS}
    probes = {
        part: SharpnessProbe([batch], route="auto", tol=0.12, extrapolate=True) for part, batch in batches.items()
    }
    rows = {part: Row() for part in PARTS}
    prices: dict[int, list[float]] = {part: [] for part in PARTS}
    training = 0.0
    rounds = 3 if quick else 8
    for _ in range(rounds):
        began = time.process_time()
        run.train(EVERY)
        training += time.process_time() - began
        for part, batch in batches.items():
            wanted = reference(run.module, batch)
            rows[part].add(functools.partial(tracked(probes[part]), run.module, batch, 0), wanted)
            prices[part].append(probes[part].price_gradients)
    print(
        f"\n  share: every {EVERY} updates of {1e3 * training / rounds / EVERY:.0f} ms, the first, cold one included\n"
        f"    {'probe batch':<14}{'products':>9}{'gradients':>10}{'of training':>12}"
        f"{'error':>9}{'largest':>9}   5 % and 5 %"
    )
    for part, row in rows.items():
        part_of_time = sum(row.seconds) / training
        error = statistics.median(row.errors)
        print(
            f"    {f'1/{part}':<14}{statistics.mean(row.products):9.1f}"
            f"{statistics.mean(prices[part]):10.1f}{part_of_time:12.1%}{error:9.1e}{max(row.errors):9.1e}"
            f"   {'yes' if part_of_time <= 0.05 and error <= 0.05 else 'no'}"
        )


PARTS_OF_THE_BENCHMARK: dict[str, Callable[[Run, bool], None]] = {
    "cold": cold,
    "top10": top10,
    "trace": traces,
    "density": density,
    "tracking": tracking,
    "share": share,
}


def runs(chosen: list[str]) -> Iterator[tuple[Run, list[str]]]:
    """Yield the partly trained models, and what is measured on each."""
    yield Run("gpt"), chosen
    yield Run("cnn"), chosen
    if "curvlinops" in installed():  # which has no products for group norm
        yield Run("batchnorm"), [name for name in ("cold", "top10") if name in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description="Curvature probes, ours and two peers.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and measurements: a minute or two")
    parser.add_argument("--only", nargs="+", choices=PARTS_OF_THE_BENCHMARK, default=list(PARTS_OF_THE_BENCHMARK))
    parser.add_argument("--models", nargs="+", choices=("gpt", "cnn", "batchnorm"), default=("gpt", "cnn", "batchnorm"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    warnings.simplefilter("ignore")
    missing = [name for name in ("pyhessian", "curvlinops") if name not in installed()]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}; pip install -e .[peers]")
    began = time.process_time()
    for run, chosen in runs(arguments.only):
        if run.kind not in arguments.models or not chosen:
            continue
        run.train(WARM_UP)
        print(f"\n{run.title}, after {WARM_UP} updates")
        for name in chosen:
            PARTS_OF_THE_BENCHMARK[name](run, arguments.quick)
    print(f"\n{time.process_time() - began:.0f} s of CPU in all")


if __name__ == "__main__":
    main()
