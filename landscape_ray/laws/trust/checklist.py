"""The record of a fit: what was assumed, what was fitted, how it was checked, and what nobody can know from it.

Six sections, filled in by the program, never by hand: A hypothesis, B training set-up, C data, D fitting, E validation,
F release. An item is fine, a warning, a refusal, or unknown; unknown is said, not left out.

References:
    Li et al. 2025, "(Mis)Fitting: a survey of scaling laws", arXiv 2502.18969 (what reports of fits leave out).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.laws.core.certificate import MIN_POINTS_PER_PARAMETER
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.result import FitResult, Forecast
from landscape_ray.laws.trust.comparison import Candidate
from landscape_ray.laws.trust.holdout import Rollout, Stability

Array: TypeAlias = NDArray[np.float64]

Verdict: TypeAlias = Literal["ok", "warning", "refusal", "unknown"]

SECTIONS = {
    "A": "hypothesis",
    "B": "training set-up",
    "C": "data",
    "D": "fitting",
    "E": "validation",
    "F": "release",
}

MAX_OBJECTIVE_SHIFT = 2.0
"""Standard errors that a parameter may move under another objective without a warning."""

MAX_TREND = 3.0
"""t of a trend in the residuals from which on the form of the law is in doubt."""


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One line of the record.

    Attributes:
        section: A to F.
        name: what is recorded.
        value: as text.
        verdict: ok, warning, refusal or unknown.
        remark: what a warning or refusal means, and what to do; else empty.
    """

    section: str
    name: str
    value: str
    verdict: Verdict = "ok"
    remark: str = ""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """What was looked at beside the fit itself; each may be missing.

    Attributes:
        runs_out: fits without each run.
        sizes_out: fits without each size.
        rollouts: forecasts beyond the fitted range.
        objectives: parameters under other objectives.
        candidates: laws compared with this one.
        trends: slope and t of the residuals by variable.
        noise: relative spread of repeated runs, and how many repeat.
        decision_spread: relative width of the interval of the decision that the fit is for.
        schedules: of a law of loss curves, forecasts of runs whose schedule was left out.
    """

    runs_out: Stability | None = None
    sizes_out: Stability | None = None
    rollouts: Sequence[Rollout] = ()
    objectives: Mapping[str, Mapping[str, float]] | None = None
    candidates: Sequence[Candidate] = ()
    trends: Mapping[str, tuple[float, float]] | None = None
    noise: tuple[float, int] | None = None
    decision_spread: float | None = None
    schedules: Sequence[Forecast] = ()


def checklist(law: Law, fit: FitResult, evidence: Evidence, facts: Sequence[Item] = ()) -> list[Item]:
    """Return the record of a fit, section by section.

    Args:
        law: what was fitted.
        fit: the fit.
        evidence: what else was looked at.
        facts: items of the sections B, C and F, which only whoever read the runs can know.
    """
    items = [*_hypothesis(law, fit, evidence), *facts, *_fitting(fit, evidence), *_validation(fit, evidence)]
    order = list(SECTIONS)
    return sorted(items, key=lambda item: order.index(item.section))


def to_plain(items: Sequence[Item]) -> dict[str, Any]:
    """Return the record as a mapping that JSON can hold: items by section, and counts by verdict."""
    sections = {
        f"{key} {title}": [dataclasses.asdict(item) for item in items if item.section == key]
        for key, title in SECTIONS.items()
    }
    counts = {
        verdict: sum(item.verdict == verdict for item in items) for verdict in ("ok", "warning", "refusal", "unknown")
    }
    return {"sections": sections, "counts": counts}


def from_plain(content: Mapping[str, Any]) -> list[Item]:
    """Return the items that :func:`to_plain` wrote."""
    return [Item(**item) for items in content.get("sections", {}).values() for item in items]


def _hypothesis(law: Law, fit: FitResult, evidence: Evidence) -> list[Item]:
    bounds = [
        f"{p.name} in [{p.lower:g}, {p.upper:g}]" if p.role == "nonlinear" else f"{p.name} of {len(p.values)} values"
        for p in law.parameters
        if p.role != "linear"
    ]
    ratio = fit.certificate["points_per_parameter"]
    few = ratio < MIN_POINTS_PER_PARAMETER
    others = [c for c in evidence.candidates if c.law != law.name]
    found = [
        Item("A", "form", law.formula),
        Item("A", "variables", ", ".join(f"{v.name} ({v.unit or v.meaning})" for v in law.variables)),
        Item("A", "linear parameters", ", ".join(law.linear_names)),
        Item("A", "bounds", "; ".join(bounds) or "none"),
        Item(
            "A",
            "points per parameter",
            f"{ratio:.1f}",
            "warning" if few else "ok",
            "fewer than 3: add runs, or fix parameters that are known" if few else "",
        ),
    ]
    if fit.fixed:
        found.append(Item("A", "given parameters", ", ".join(f"{k} = {v:g}" for k, v in fit.fixed.items())))
    if fit.penalty:
        pulled = ", ".join(f"{k} to {c:g} (stiffness {s:g})" for k, (c, s) in fit.penalty.items())
        found.append(Item("A", "penalties", pulled))
    found += [Item("A", "assumption", sentence) for sentence in law.assumptions]
    if others:
        best = evidence.candidates[0]
        mine = next((c for c in evidence.candidates if c.law == law.name), best)
        beaten = mine.difference > 2 * mine.standard_error > 0
        found.append(
            Item(
                "A",
                "candidate laws compared",
                "; ".join(
                    f"{c.law}: error {c.mean_error:.3%} on runs left out, AICc {c.aicc:.1f}"
                    for c in evidence.candidates
                ),
                "warning" if beaten else "ok",
                f"'{best.law}' forecasts left-out runs better: fit that law" if beaten else "",
            )
        )
    else:
        found.append(Item("A", "candidate laws compared", "none", "warning", "one form only: compare a second one"))
    return found


def _fitting(fit: FitResult, evidence: Evidence) -> list[Item]:
    certificate, objective = fit.certificate, fit.objective
    delta = f", delta {objective['huber_delta']:g}" if objective["huber_delta"] else ""
    agree, bounds = certificate["agree_share"], certificate["bounds_hit"]
    status: Verdict = {"certified": "ok", "weak": "warning", "failed": "refusal"}[fit.status]  # type: ignore[assignment]
    found = [
        Item(
            "D",
            "objective",
            f"{objective['name']}{delta} of {objective['of']}, {objective['reduction']}: {objective['value']:.10g}",
        ),
        Item(
            "D",
            "optimum",
            f"{fit.status}; {agree:.0%} of {certificate['num_starts']} starts agree",
            status,
            "; ".join(fit.reasons),
        ),
        Item("D", "gradient norm", f"{certificate['gradient_norm']:.1e}"),
        Item("D", "condition number", f"{certificate['condition_number']:.3g}"),
        Item(
            "D",
            "bounds hit",
            ", ".join(bounds) or "none",
            "warning" if bounds else "ok",
            "the data do not set these" if bounds else "",
        ),
        Item(
            "D",
            "intervals",
            _resampling(fit),
            "ok" if len(fit.samples) else "warning",
            "" if len(fit.samples) else "no bootstrap was made",
        ),
        Item("D", "time", f"{certificate['seconds']:.2f} s"),
        Item("D", "versions", ", ".join(f"{k} {v}" for k, v in certificate["versions"].items())),
        Item("D", "data hash", f"sha256 {fit.data['sha256']}"),
    ]
    if evidence.objectives:
        found.append(_sensitivity(fit, evidence.objectives))
    for name, stability in (("run", evidence.runs_out), ("size", evidence.sizes_out)):
        if evidence.schedules and stability is None:
            continue  # leaving a schedule out is the stronger test
        if stability is None:
            found.append(Item("D", f"stability without one {name}", "not measured", "unknown"))
        else:
            found.append(_stability(fit, name, stability))
    return found


def _resampling(fit: FitResult) -> str:
    made = fit.certificate["bootstrap"]
    if not len(fit.samples):
        return "none"
    return f"{fit.confidence:.0%} from {made['num_samples']} bootstrap samples by {made['method']}, seed {made['seed']}"


def _errors(fit: FitResult) -> dict[str, float]:
    """Return the spread of every parameter, half the width of its central 68 % of samples."""
    if not len(fit.samples):
        return {}
    low, high = np.quantile(fit.samples, [0.16, 0.84], axis=0)
    return dict(zip(fit.sample_names, ((high - low) / 2).tolist(), strict=True))


def _sensitivity(fit: FitResult, objectives: Mapping[str, Mapping[str, float]]) -> Item:
    errors = _errors(fit)
    shifts = {
        name: max(abs(row[name] - fit.parameters[name]) for row in objectives.values())
        for name in fit.parameters
        if name in next(iter(objectives.values()))
    }
    text = "; ".join(
        f"{objective}: {', '.join(f'{k} {v:.5g}' for k, v in row.items())}" for objective, row in objectives.items()
    )
    far = [k for k, shift in shifts.items() if errors.get(k, 0) > 0 and shift > MAX_OBJECTIVE_SHIFT * errors[k]]
    return Item(
        "D",
        "other objectives",
        text,
        "warning" if far else "ok",
        f"{', '.join(far)} moved by more than {MAX_OBJECTIVE_SHIFT:g} standard errors: part of the result is the "
        "choice of the objective"
        if far
        else "",
    )


def _stability(fit: FitResult, name: str, stability: Stability) -> Item:
    errors = _errors(fit)
    moves = {k: stability.most_influential(k) for k in stability.parameters if k in errors}
    far = {k: m for k, m in moves.items() if errors[k] > 0 and abs(m[1]) > MAX_OBJECTIVE_SHIFT * errors[k]}
    text = "; ".join(f"{k} {shift:+.3g} without {group}" for k, (group, shift) in moves.items())
    remark = (
        f"without {', '.join(sorted({m[0] for m in far.values()}))} the law is another one: look at it" if far else ""
    )
    return Item("D", f"stability without one {name}", text or "no parameter moved", "warning" if far else "ok", remark)


def _validation(fit: FitResult, evidence: Evidence) -> list[Item]:
    found = []
    for one in evidence.rollouts:
        inside, total = int(one.inside.sum()), len(one.inside)
        short = inside < total * one.confidence - 2 * math.sqrt(total * one.confidence * (1 - one.confidence))
        remark = (
            "fewer points than promised lie inside the intervals of that fit: the final ones are widened by the misfit"
            if short
            else ""
        )
        if one.factor > 10:
            remark = (remark + "; " if remark else "") + "more than 10 times the fitted range"
        found.append(Item("E", f"held out: {one.variable}", str(one), "warning" if remark else "ok", remark))
    for forecast in evidence.schedules:
        missed = not forecast.low <= forecast.observed_final <= forecast.high
        remark = "the measured loss lies outside the interval of that fit" if missed else ""
        found.append(Item("E", "schedule left out", str(forecast), "warning" if missed else "ok", remark))
    if not found:
        found.append(Item("E", "held out", "nothing", "warning", "no forecast beyond the fitted range was tested"))
    if evidence.runs_out is not None:
        found.append(Item("E", "error on runs left out", f"{evidence.runs_out.mean_error:.3%} on average"))
    if evidence.trends is None:
        found.append(Item("E", "trends of the residuals", "not measured", "unknown"))
    else:
        bent = [name for name, (_, t) in evidence.trends.items() if abs(t) > MAX_TREND]
        text = "; ".join(f"over log {name}: {slope:+.2g} (t {t:+.1f})" for name, (slope, t) in evidence.trends.items())
        remark = f"the residuals depend on {', '.join(bent)}: the form of the law is in doubt" if bent else ""
        found.append(Item("E", "trends of the residuals", text or "none", "warning" if bent else "ok", remark))
    if evidence.noise is None:
        found.append(Item("E", "noise between seeds", "unknown", "unknown", "no run is repeated with another seed"))
    else:
        spread, count = evidence.noise
        found.append(Item("E", "noise between seeds", f"{spread:.3%}, from {count} repeats"))
    if evidence.decision_spread is not None:
        wide = evidence.decision_spread > 1.0
        found.append(
            Item(
                "E",
                "stability of the decision",
                f"its interval spans a factor of {1 + evidence.decision_spread:.2f}",
                "warning" if wide else "ok",
                "the bootstrap samples disagree on what to do" if wide else "",
            )
        )
    if fit.misfit is not None:
        found.append(
            Item("E", "misfit", f"{fit.misfit:.3%}, from {fit.num_misfits} held-out forecasts, in the intervals")
        )
    return found
