"""The limit of stability of a run's optimizer, from the learning rates and momenta that were applied.

The arithmetic of `landscape_ray.probes.sharpness.stability.threshold`, which cannot be imported where torch is not, for
all updates of a run; the tests hold the two together. Weight decay is left out: it moves a limit by less than one part
in two thousand at LR = 0.01 and a decay of 0.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from landscape_ray.analysis.runs import Run
from landscape_ray.reports.figures import Floats

CURVATURES = ("sharpness", "preconditioned_sharpness")
"""Probes whose values a limit can be one of."""

OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon", "schedule_free_adamw": "schedule-free AdamW"}
"""As they are written."""

YARDSTICK = "2/LR"

GAINS: dict[str, Callable[[Floats], Floats]] = {
    YARDSTICK: lambda beta: np.full(len(beta), 2.0),
    "(2 + 2β)/LR": lambda beta: 2 + 2 * beta,
    "(2 + 2β)/((1 + 2β) LR)": lambda beta: (2 + 2 * beta) / (1 + 2 * beta),
    "(2 + 2β₁)/((1 − β₁) LR)": lambda beta: (2 + 2 * beta) / (1 - beta),
    "2/((1 − β₁) LR)": lambda beta: 2 / (1 - beta),
}
"""Formula to what it has over the learning rate."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Limit:
    """The curvature above which the optimizer of a run is unstable, or a yardstick where that is not known."""

    probe: str
    """Whose value it is a limit of."""
    formula: str
    """As it is written on a page."""
    optimizer: str
    """As it is written; empty where it is not known."""
    holds: bool
    """Whether this is the limit of the optimizer, with what was measured; False: only a yardstick."""
    steps: Floats
    """Of the updates, increasing."""
    values: Floats
    """Limit in each of the updates; inf where its learning rate is 0."""

    def at(self, steps: Floats) -> Floats:
        """Return the limit in the update that led to each step (in the first one for step 0); nan without updates."""
        if not len(self.steps):
            return np.full(len(steps), np.nan)
        return self.values[np.clip(np.searchsorted(self.steps, steps, side="left"), 0, len(self.steps) - 1)]


def limit_of_stability(run: Run, measured: Collection[str]) -> Limit:
    """Return the limit of a run's optimizer on a quadratic, for full batches.

        sgd                   (2 + 2 beta) / LR, with nesterov (2 + 2 beta) / ((1 + 2 beta) LR)
        adamw                 (2 + 2 beta1) / ((1 - beta1) LR)
        schedule_free_adamw   2 / ((1 - beta1) LR)

    That of sgd is one of the sharpness, or where layers have factors of the learning rate (other parametrisations than
    the standard one) of the preconditioned sharpness; the others are of the latter only. Where that was not measured,
    under SAM and for other optimizers there is 2 / LR to compare with, a yardstick.

    Args:
        run: with or without updates.
        measured: probes that the run has values of, at least one of `CURVATURES`.

    References:
        Cohen et al. 2021, arXiv 2103.00065 (momentum); Cohen et al. 2022, arXiv 2207.14484 (adaptive methods).
    """
    config = run.summary.config
    optimizer = _table(config, "optimizer")
    name = str(optimizer.get("name", ""))
    shown = OPTIMIZERS.get(name, name) + (" with SAM" if config.get("sam") else "")
    standard = _table(config, "model").get("parametrisation", "standard") == "standard"
    plain, preconditioned = (probe in measured for probe in CURVATURES)
    formula = formula_of(optimizer, moving=True)
    of_sharpness = name == "sgd" and standard and plain
    holds = formula is not None and not config.get("sam") and (of_sharpness or preconditioned)
    steps, lr, beta = (np.asarray(run.steps[key], dtype=np.float64) for key in ("step", "lr", "momentum"))
    asked = optimizer.get("momentum", optimizer.get("beta1", 0.0))
    beta = np.where(np.isfinite(beta), beta, asked if isinstance(asked, int | float) else 0.0)
    if formula is None or not holds:
        formula = YARDSTICK
    elif name == "sgd" and not beta.any():
        formula = YARDSTICK  # plain gradient descent, whose limit it is
    with np.errstate(divide="ignore"):
        values = GAINS[formula](beta) / lr
    sharp = of_sharpness or (plain and not holds)
    probe = CURVATURES[0] if sharp or not preconditioned else CURVATURES[1]
    return Limit(probe=probe, formula=formula, optimizer=shown, holds=holds, steps=steps, values=values)


def shares_of_noise(run: Run) -> dict[str, tuple[Floats, Floats]]:
    """Return limits by the noise of small batches of SGD without momentum: name to (steps, shares of 2 / LR).

        SGD's trace condition   p tr(H) + (1 - p) |H|^2 / tr(H), p = 1 / batch size, with |H| where it was measured;
                                of the Hessian, or else of the Gauss-Newton matrix
        batch sharpness         on minibatches of the size of an update

    The first is necessary for stability in the mean square at an interpolating minimum; SGD settles where the second is
    2 / LR. Nothing for other optimizers and with momentum, for which no such limits are known.

    References:
        Wu, Ma and E, NeurIPS 2018; Ma and Ying 2021, arXiv 2105.13462. Andreyev and Beneventano 2024, arXiv 2412.20553.
    """
    config = run.summary.config
    optimizer, probes = _table(config, "optimizer"), _table(config, "probes")
    size = config.get("batch_size")
    beta = np.asarray(run.steps["momentum"], dtype=np.float64)
    moves = bool(np.nan_to_num(beta).any()) or bool(optimizer.get("momentum", 0))
    if optimizer.get("name") != "sgd" or moves or config.get("sam") or not isinstance(size, int):
        return {}
    found: dict[str, tuple[Floats, Floats]] = {}
    values = {name: _by_step(run, name) for name in ("trace", "trace/frobenius", "ggn_trace", "batch_sharpness")}
    traces = values["trace"] or values["ggn_trace"]
    if traces:
        norms = values["trace/frobenius"]
        told = {
            step: trace / size + (1 - 1 / size) * norms.get(step, 0.0) ** 2 / trace
            for step, trace in traces.items()
            if trace > 0
        }
        found["SGD's trace condition"] = _shares(run, told)
    if _table(probes, "batch_sharpness").get("batch_size", size) == size:
        found["batch sharpness"] = _shares(run, values["batch_sharpness"])
    return {name: rows for name, rows in found.items() if len(rows[0])}


def _by_step(run: Run, name: str) -> dict[float, float]:
    rows = run.probe(name)
    pairs = zip(np.asarray(rows["step"], dtype=float), np.asarray(rows["value"], dtype=float), strict=True)
    return {step: value for step, value in pairs if np.isfinite(value)}


def _shares(run: Run, values: Mapping[float, float]) -> tuple[Floats, Floats]:
    steps = np.array(sorted(values), dtype=np.float64)
    lr = np.asarray(run.steps["lr"], dtype=np.float64)
    if not len(steps) or not len(lr):
        return steps[:0], steps[:0]
    at = np.clip(np.searchsorted(run.steps["step"], steps, side="left"), 0, len(lr) - 1)
    return steps, np.array([values[step] for step in steps]) * lr[at] / 2


def formula_of(optimizer: Mapping[str, Any], *, moving: bool = False) -> str | None:
    """Return the limit of an optimizer as it is written on a page; None where none is known.

    Args:
        optimizer: its table.
        moving: whether the momentum may be another one than there.

    >>> formula_of({"name": "sgd", "momentum": 0.9}), formula_of({"name": "sgd", "momentum": 0.0})
    ('(2 + 2β)/LR', '2/LR')
    """
    plain = optimizer.get("momentum") == 0 and not moving
    return {
        "sgd": YARDSTICK if plain else "(2 + 2β)/((1 + 2β) LR)" if optimizer.get("nesterov") else "(2 + 2β)/LR",
        "adamw": "(2 + 2β₁)/((1 − β₁) LR)",
        "schedule_free_adamw": "2/((1 − β₁) LR)",
    }.get(str(optimizer.get("name", "")))


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a table of a configuration; foreign logs may have none, or a word in its place."""
    found = config.get(name, {})
    return found if isinstance(found, Mapping) else {}
