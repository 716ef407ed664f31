"""The momentum annealing law: the whole loss curve of a run from its learning-rate schedule.

    L(s) = L0 + A S1(s)^-alpha - C S2(s)

Legend: L loss (nats per token) after s updates; S1 sum of the learning rate; S2 annealing area, how much the learning
rate has been lowered, felt with a delay set by lambda (`decay`, see :func:`landscape_ray.laws.curves.annealing_area`);
L0, A, alpha, C fitted. In S1 and S2 the warm-up counts with the peak learning rate.

What the law is not: under it, a higher peak learning rate, a longer horizon or zero-rate steps at the end always look
better. It compares schedules of one peak inside the fitted range; :mod:`landscape_ray.laws.prediction` says when it is
asked for more.

References:
    Tissue, Wang and Wang 2024, arXiv 2408.11029.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.bootstrap import resample
from landscape_ray.laws.certificate import certify, judge
from landscape_ray.laws.curves import Curve, data_hash, follows
from landscape_ray.laws.fitting import Optimum, SeparableLaw, polish, search
from landscape_ray.laws.result import FitResult

Array: TypeAlias = NDArray[np.float64]

NAMES = ("L0", "A", "alpha", "C")

PEAK_TOLERANCE = 0.01
"""Largest relative difference between peak learning rates that count as the same peak."""

ALPHA_BOUNDS = (0.01, 5.0)
_NUM_STARTS = 24


def annealing_loss(parameters: Array, s1: Array, s2: Array) -> Array:
    """Return L for parameters (..., 4) in the order of NAMES."""
    l0, a, alpha, c = (parameters[..., i] for i in range(4))
    return np.asarray(l0 + a * s1**-alpha - c * s2)


class _Points(NamedTuple):
    """What is fitted: one entry a point, curve after curve."""

    s1: Array
    s2: Array
    loss: Array
    run: NDArray[np.int64]


class _Scaled(NamedTuple):
    """The law at the points with columns of order one, and the scales that lead back."""

    law: SeparableLaw
    s1: float
    s2: float

    def natural(self, parameters: Array) -> Array:
        """Return rows (L0, A', C', alpha) of the scaled law as rows in the order of NAMES."""
        l0, a, c, alpha = parameters.T
        return np.stack([l0, a * self.s1**alpha, alpha, c / self.s2], axis=1)


def fit_annealing(
    curves: Sequence[Curve],
    *,
    decay: float | Sequence[float] = 0.999,
    huber_delta: float = 1e-3,
    skip_steps: int = 0,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> FitResult:
    """Return the momentum annealing law fitted to loss curves of runs that share one peak learning rate.

    Minimises sum huber(log loss - log L) over L0, A, C >= 0 and alpha in [0.01, 5] from 24 starts. Intervals come from
    a bootstrap of runs (5 or more) or of residual blocks within runs (fewer), never of single points, and are for the
    chosen `decay`.

    Args:
        curves: at least one; two schedules or more are needed for a certified fit, one of them with a decay.
        decay: lambda in [0, 1), about 1 - 1 / (updates that the loss takes to respond to a lower rate); .99 to .999
            for runs of 10k updates and more, less for short ones. Of several values, the one with the smallest
            objective is kept, which counts as one more parameter.
        huber_delta: threshold on the log residual, > 0; inf for least squares.
        skip_steps: losses up to this step are not fitted, in addition to those in the warm-up: the law describes the
            course after the initial transient.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Returns:
        The fit with its intervals, certificate, status and warnings.

    Raises:
        UserError: no curves, two of one name, different peaks, too few points, or an option out of range.
    """
    started = time.perf_counter()
    decays = sorted({float(value) for value in np.atleast_1d(np.asarray(decay, dtype=np.float64))})
    _check_options(curves, decays, huber_delta, num_bootstrap, confidence)
    num_parameters = len(NAMES) + (len(decays) > 1)
    candidates: list[tuple[float, float, _Points, _Scaled, Optimum]] = []
    for value in decays:
        points = _points(curves, value, skip_steps)
        if len(points.loss) <= num_parameters:
            raise UserError(
                f"curves must have more than {num_parameters} points after the warm-up, got {len(points.loss)}; "
                "evaluate more often or lower skip_steps"
            )
        scaled = _scale(points)
        found = search(scaled.law, points.loss, huber_delta)
        candidates.append((float(found.objective[0]), value, points, scaled, found))
    objective, chosen, points, scaled, found = min(candidates, key=lambda candidate: candidate[0])

    best = scaled.natural(found.parameters[:1])[0]
    prediction = annealing_loss(best, points.s1, points.s2)
    residual = np.log(points.loss) - np.log(prediction)
    samples, bootstrap = _bootstrap(
        scaled, points, residual, found.row(0), huber_delta, num_parameters, num_bootstrap, seed
    )
    identified = {name: name != "C" or bool((points.s2 != 0).any()) for name in NAMES}
    tail = (1 - confidence) / 2
    intervals = {
        name: (float(np.quantile(samples[:, i], tail)), float(np.quantile(samples[:, i], 1 - tail)))
        for i, name in enumerate(NAMES)
        if identified[name] and len(samples)
    }
    certificate = certify(found, ("L0", "A", "C", "alpha"), len(points.loss), num_parameters) | {
        "decay_objectives": {repr(candidate[1]): candidate[0] for candidate in candidates},
        "bootstrap": bootstrap,
        "seconds": time.perf_counter() - started,
    }
    parameters = {**{name: float(value) for name, value in zip(NAMES, best, strict=True)}, "decay": chosen}
    warnings = _warnings(curves, decays, chosen, identified["C"])
    status, reasons = judge(parameters, intervals, objective, certificate, [n for n in NAMES if identified[n]])
    reasons += tuple(name for name in ("one_schedule", "C_not_identified") if any(w.startswith(name) for w in warnings))
    status = "weak" if reasons and status == "certified" else status
    return FitResult(
        law="annealing",
        parameters=parameters,
        intervals=intervals,
        confidence=confidence,
        objective={
            "name": "least_squares" if math.isinf(huber_delta) else "huber",
            "of": "log loss_nats",
            "reduction": "sum",
            "huber_delta": None if math.isinf(huber_delta) else huber_delta,
            "value": objective,
        },
        status=status,
        reasons=reasons,
        warnings=warnings,
        certificate=certificate,
        residuals=_residual_summary(points.loss, prediction, residual, num_parameters),
        data=_data_summary(curves, points, skip_steps, identified["C"]),
        sample_names=NAMES,
        samples=samples,
    )


def _check_options(
    curves: Sequence[Curve], decays: list[float], huber_delta: float, num_bootstrap: int, confidence: float
) -> None:
    if not curves:
        raise UserError("curves must hold at least one curve, got none; pass the runs to fit")
    names = [curve.run_id for curve in curves]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"curves must have distinct run_ids, got '{twice}' twice; rename or drop one")
    peaks = {curve.run_id: curve.peak_lr for curve in curves}
    if max(peaks.values()) > min(peaks.values()) * (1 + PEAK_TOLERANCE):
        listing = ", ".join(f"{name}: {peak:g}" for name, peak in peaks.items())
        raise UserError(
            f"curves must share one peak learning rate, got {listing}; fit each peak on its own, the law does not hold "
            "across peaks"
        )
    if not decays or not all(0 <= value < 1 for value in decays):
        raise UserError(f"decay must hold values in [0, 1), got {decays}; .9 to .999 is usual")
    if not huber_delta > 0:
        raise UserError(f"huber_delta must be > 0, got {huber_delta}; 1e-3 is usual, inf is least squares")
    if num_bootstrap < 0:
        raise UserError(f"num_bootstrap must be >= 0, got {num_bootstrap}; 0 switches the intervals off")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be in (0, 1), got {confidence}; .9 is usual")


def _points(curves: Sequence[Curve], decay: float, skip_steps: int) -> _Points:
    kept = [curve.step > max(curve.warmup_steps, skip_steps) for curve in curves]
    at = [curve.step[keep] - 1 for curve, keep in zip(curves, kept, strict=True)]
    present = [number for number, index in enumerate(at) if len(index)]
    return _Points(
        s1=np.concatenate([curve.s1()[index] for curve, index in zip(curves, at, strict=True)]),
        s2=np.concatenate([curve.s2(decay)[index] for curve, index in zip(curves, at, strict=True)]),
        loss=np.concatenate([curve.loss_nats[keep] for curve, keep in zip(curves, kept, strict=True)]),
        run=np.concatenate([np.full(len(at[n]), i) for i, n in enumerate(present)] or [np.empty(0, np.int64)]),
    )


def _scale(points: _Points) -> _Scaled:
    """Return the law with S1 relative to its geometric mean (A and alpha decouple) and S2 to its largest value."""
    middle = float(np.exp(np.log(points.s1).mean()))
    log_s1 = np.log(points.s1 / middle)
    largest = float(np.abs(points.s2).max()) or 1.0
    annealing = -points.s2 / largest

    def columns(exponents: Array) -> tuple[Array, Array]:
        power = np.exp(-exponents * log_s1)
        out = np.stack([np.ones_like(power), power, np.broadcast_to(annealing, power.shape)], axis=2)
        slopes = np.zeros((*out.shape, 1))
        slopes[:, :, 1, 0] = -log_s1 * power
        return out, slopes

    law = SeparableLaw(
        columns=columns,
        num_linear=3,
        lower=np.array([ALPHA_BOUNDS[0]]),
        upper=np.array([ALPHA_BOUNDS[1]]),
        starts=np.geomspace(2 * ALPHA_BOUNDS[0], 0.6 * ALPHA_BOUNDS[1], _NUM_STARTS)[:, None],
    )
    return _Scaled(law, middle, largest)


def _bootstrap(
    scaled: _Scaled,
    points: _Points,
    residual: Array,
    best: Optimum,
    huber_delta: float,
    num_parameters: int,
    num_bootstrap: int,
    seed: int,
) -> tuple[Array, dict[str, Any]]:
    """Return parameters (num_bootstrap, 4) of the samples, all polished from the optimum, and the method."""
    if not num_bootstrap or not np.isfinite(best.objective[0]):
        return np.empty((0, len(NAMES))), {"method": "none"}
    weights, y, method = resample(points.loss, residual, points.run, num_parameters, num_bootstrap, seed)
    start = np.broadcast_to(best.parameters, (num_bootstrap, len(NAMES)))
    found = polish(scaled.law, y, weights, huber_delta, start)
    return scaled.natural(found.parameters), {**method, "num_samples": num_bootstrap, "seed": seed}


def _residual_summary(loss: Array, prediction: Array, residual: Array, num_parameters: int) -> dict[str, Any]:
    error = loss - prediction
    spread = float(((loss - loss.mean()) ** 2).sum())
    inflation = math.sqrt(len(loss) / (len(loss) - num_parameters))
    return {
        "rmse_nats": float(np.sqrt((error**2).mean())),
        "max_abs_nats": float(np.abs(error).max()),
        "r2": 1.0 - float((error**2).sum()) / spread if spread > 0 else 0.0,
        "log_quantiles": (inflation * np.quantile(residual, np.linspace(0, 1, 41))).tolist(),
    }


def _data_summary(curves: Sequence[Curve], points: _Points, skip_steps: int, identified: bool) -> dict[str, Any]:
    return {
        "runs": [curve.run_id for curve in curves],
        "num_points": len(points.loss),
        "num_points_dropped": sum(len(curve.step) for curve in curves) - len(points.loss),
        "skip_steps": skip_steps,
        "peak_lr": max(curve.peak_lr for curve in curves),
        "horizon": max(int(curve.step[-1]) for curve in curves),
        "s1_range": [float(points.s1.min()), float(points.s1.max())],
        "s2_range": [float(points.s2.min()), float(points.s2.max())],
        "C_identified": identified,
        "sha256": data_hash(curves),
    }


def _warnings(curves: Sequence[Curve], decays: list[float], chosen: float, identified: bool) -> tuple[str, ...]:
    warnings = []
    longest = max(curves, key=lambda curve: len(curve.lr))
    if all(follows(longest, curve) for curve in curves):
        warnings.append("one_schedule: all runs follow one schedule, so the effect of another one is extrapolated")
    if not identified:
        warnings.append("C_not_identified: no fitted loss comes after a decay, so C is a convention (0), not a result")
    if len(decays) > 1:
        warnings.append("decay_selected: decay was chosen by the objective; the intervals are for the chosen value")
        if chosen in (decays[0], decays[-1]):
            warnings.append(f"decay_at_edge: the chosen decay {chosen:g} is at the edge of the grid; widen the grid")
    rising = [curve.run_id for curve in curves if (np.diff(curve.schedule()) > PEAK_TOLERANCE * curve.peak_lr).any()]
    early = [curve.run_id for curve in curves if curve.lr[curve.warmup_steps] < (1 - PEAK_TOLERANCE) * curve.peak_lr]
    odd = [name for name in (curve.run_id for curve in curves) if name in rising or name in early]
    if odd:
        warnings.append(
            f"lr_rises: the learning rate of {', '.join(odd)} rises, or starts below the peak, after the declared "
            "warm-up; declare warmup_steps, the law is not validated for re-warming"
        )
    return tuple(warnings)
