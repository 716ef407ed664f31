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
