"""A law of loss curves on a sweep: which runs may share it, the fit, and how well it forecasts what it never saw.

These laws compare schedules of one peak learning rate only, so the runs of a sweep are first divided into groups of
equal peak learning rate and equal setting. The law, the momentum law unless another one is named, is fitted on the
largest group; then each schedule in turn is left out, the law is fitted on the others, and its forecast is compared
with what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from landscape_ray.analysis.runs import Run, read_runs, setting
from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.laws import (
    Curve,
    FitResult,
    Forecast,
    Law,
    Prediction,
    calibrate,
    fit_curves,
    leave_one_schedule_out,
    objective_sensitivity,
)
from landscape_ray.laws.curves.annealing import ANNEALING
from landscape_ray.laws.trust.checklist import Evidence, Item, checklist, to_plain
from landscape_ray.text import listing, lr, plural

if TYPE_CHECKING:
    from landscape_ray.tracking.collect import Collected
    from landscape_ray.tracking.folder import SweepFolder

MIN_SCHEDULES = 3
"""Distinct schedules that a group needs: two to fit on and one to forecast."""

DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Values of the law's momentum that are tried."""

HOLDOUT_RULE = (
    "chosen before any error was looked at: a cosine if the group has one, "
    "else the schedule that spends the most updates below its peak"
)

MAX_CALIBRATED = 12
"""Curves up to which the misfit of the law is measured anew for every forecast; its cost grows with their square."""

MAX_GAP = 0.02
"""Largest share of a foreign run between two updates whose learning rate is told."""

FILE_NAME = "{law}.json"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CurveGroup:
    """Runs that one annealing law may describe."""

    peak_lr: float
    curves: tuple[Curve, ...]
    shapes: dict[str, str]
    """Run to the name of its schedule."""
    num_schedules: int
    """Number of distinct learning-rate curves."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CurveGroups:
    """All groups of a sweep that are large enough, the largest first, and why the other runs are in none."""

    groups: tuple[CurveGroup, ...]
    excluded: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SweepFit:
    """The law of a sweep and its forecasts, as saved beside the sweep."""

    fit: FitResult
    peak_lr: float
    run_ids: tuple[str, ...]
    shapes: dict[str, str]
    excluded: dict[str, str]
    decays: tuple[float, ...]
    forecasts: tuple[Forecast, ...]
    headline: str
    """Run whose schedule is the headline forecast, chosen by `rule`."""
    num_steps: int
    """Updates of the longest run."""
    warmup_steps: int
    """Updates of warm-up, the most usual."""
    best_run: str
    """The run of the fit with the lowest final loss."""
    best_loss_nats: float
    loss_unit: str = "nats/token"
    rule: str = HOLDOUT_RULE

    @property
    def headline_forecast(self) -> Forecast:
        """The forecast of the held-out schedule that stands for all."""
        return next(one for one in self.forecasts if one.run_id == self.headline)

    def to_json(self) -> str:
        """Return everything at full precision."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["fit"] = json.loads(self.fit.to_json())
        data["forecasts"] = [_plain(dataclasses.asdict(one)) for one in self.forecasts]
        return json.dumps({"kind": "curves", **data}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> SweepFit:
        """Return what :meth:`to_json` wrote.

        Raises:
            UserError: the text is not such a fit.
        """
        try:
            data = json.loads(text)
            data.pop("kind")
            data["fit"] = FitResult.from_json(json.dumps(data["fit"]))
            data["forecasts"] = tuple(_forecast(one) for one in data["forecasts"])
            for name in ("run_ids", "decays"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"fit must be the JSON text of a SweepFit ({error}); run `landscape-ray fit` again"
            ) from None


def annealing_curves(collected: Collected, *, loss: Literal["eval", "train"] = "eval") -> CurveGroups:
    """Return the groups of runs that finished with one peak learning rate (within 1e-6) and one setting.

    Losses at step 0 and during warm-up are left out: the law does not describe them. The training loss of update s
    belongs to s - 1 completed updates, before which it was measured.

    Args:
        collected: the sweep's records and summaries.
        loss: held-out loss (`eval`) or training loss (`train`).

    Raises:
        UserError: no group has three distinct schedules.
    """
    excluded: dict[str, str] = {}
    families: list[tuple[str, float, list[tuple[Run, Curve]]]] = []
    for run in read_runs(collected):
        reason = _unusable(run, loss)
        if reason:
            excluded[run.run_id] = reason
            continue
        key, curve = setting(run), curve_of(run, loss)
        for known, peak, members in families:
            if known == key and math.isclose(peak, run.peak_lr, rel_tol=1e-6):
                members.append((run, curve))
                break
        else:
            families.append((key, run.peak_lr, [(run, curve)]))
    groups = []
    for _, peak, members in families:
        curves = [curve for _, curve in members]
        distinct = len({np.asarray(curve.lr).tobytes() for curve in curves})
        if distinct >= MIN_SCHEDULES:
            shapes = {run.run_id: run.shape for run, _ in members}
            groups.append(CurveGroup(peak_lr=peak, curves=tuple(curves), shapes=shapes, num_schedules=distinct))
        else:
            why = f"only {plural(distinct, 'schedule')} at peak LR {lr(peak)}; a group needs {MIN_SCHEDULES}"
            excluded |= {run.run_id: why for run, _ in members}
    if not groups:
        found = [f"{plural(len(members), 'run')} at {lr(peak)}" for _, peak, members in families]
        raise UserError(
            f"runs must share a peak LR for the annealing law, got {listing(found)}: needs >= {MIN_SCHEDULES} finished "
            "runs with equal peak LR and different schedules; put fixed points in [[search.initial]]"
        )
    groups.sort(key=lambda group: (-group.num_schedules, -len(group.curves), group.peak_lr))
    for group in groups[1:]:
        why = f"its group (peak LR {lr(group.peak_lr)}) is not the largest one"
        excluded |= dict.fromkeys(group.shapes, why)
    return CurveGroups(groups=tuple(groups), excluded=excluded)


def fit_sweep(
    folder: SweepFolder | Path | str,
    *,
    law: Law = ANNEALING,
    decays: Sequence[float] | None = None,
    skip_steps: int | None = None,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    save: bool = True,
) -> SweepFit:
    """Return a law of a sweep with its forecasts of held-out schedules, saved as `fits/<law>.json`.

    Args:
        folder: a sweep.
        law: of loss curves.
        decays: momentum values to try, in (0, 1), for laws that have them; None for :data:`DECAYS` up to the longest
            run.
        skip_steps: losses up to this step are left out, as the law describes the course after the initial transient;
            None for a tenth of the longest run, fixed before any error is known.
        num_bootstrap: resamples behind every interval.
        confidence: of the intervals and bands, in (0, 1).
        save: whether to write the file.

    Raises:
        UserError: no group of runs shares a peak learning rate (see :func:`annealing_curves`).
    """
    from landscape_ray.tracking.collect import collect  # pyarrow is needed here only
    from landscape_ray.tracking.folder import SweepFolder

    opened = folder if isinstance(folder, SweepFolder) else SweepFolder.open(Path(folder))
    result = fit_collected(
        collect(opened.path),
        law=law,
        decays=decays,
        skip_steps=skip_steps,
        num_bootstrap=num_bootstrap,
        confidence=confidence,
    )
    if save:
        write_atomic(Path(opened.fits_path) / FILE_NAME.format(law=law.name), result.to_json())
    return result


def fit_collected(
    collected: Collected,
    *,
    law: Law = ANNEALING,
    decays: Sequence[float] | None = None,
    skip_steps: int | None = None,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
) -> SweepFit:
    """Return a law of collected runs, wherever they come from; see :func:`fit_sweep`."""
    found = annealing_curves(collected)
    group = found.groups[0]
    horizon = max(len(curve.lr) for curve in group.curves)
    grid = tuple(decays) if decays is not None else decay_grid(horizon)
    grid = grid if "decay" in law.grid_names else ()
    options: dict[str, Any] = {
        **({"decay": grid} if grid else {}),
        "skip_steps": horizon // 10 if skip_steps is None else skip_steps,
        "num_bootstrap": num_bootstrap,
        "confidence": confidence,
    }
    calibrated = len(group.curves) <= MAX_CALIBRATED
    forecasts = leave_one_schedule_out(group.curves, calibrated=calibrated, law=law, **options)
    units = {run.run_id: run.loss_unit for run in collected.runs}
    best = min(group.curves, key=lambda curve: float(curve.loss_nats[-1]))
    warmups = [curve.warmup_steps for curve in group.curves]
    fitted = calibrate(fit_curves(law, group.curves, **options), forecasts)
    # Under other objectives at the chosen momentum: a search over it is what the fit itself is for.
    chosen = {"decay": fitted.parameters["decay"]} if grid else {}
    others = objective_sensitivity(group.curves, law=law, **(options | chosen))
    evidence = Evidence(schedules=forecasts, objectives=others)
    record = checklist(law, fitted, evidence, _facts(group, fitted, found.excluded))
    return SweepFit(
        fit=dataclasses.replace(fitted, checklist=to_plain(record)),
        peak_lr=group.peak_lr,
        run_ids=tuple(curve.run_id for curve in group.curves),
        shapes=group.shapes,
        excluded=found.excluded,
        decays=grid,
        forecasts=tuple(forecasts),
        headline=headline_run(group),
        num_steps=horizon,
        warmup_steps=max(set(warmups), key=warmups.count),
        best_run=best.run_id,
        best_loss_nats=float(best.loss_nats[-1]),
        loss_unit=units.get(best.run_id, "nats/token"),
    )


def _facts(group: CurveGroup, fit: FitResult, excluded: dict[str, str]) -> list[Item]:
    """Return what the record says of the training set-up and the data."""
    dropped = fit.data["num_points_dropped"]
    left = "; ".join(f"{run}: {why}" for run, why in list(excluded.items())[:5])
    return [
        Item("B", "peak learning rate", f"{lr(group.peak_lr)}, the same in all runs"),
        Item("B", "schedules", f"{group.num_schedules} different: {', '.join(sorted(set(group.shapes.values())))}"),
        Item(
            "B",
            "model, data, optimizer and batch",
            "not told by loss curves",
            "unknown",
            "the law holds for one setting: make sure that the runs share it",
        ),
        Item(
            "C",
            "losses",
            f"{fit.data['num_points']} fitted; {dropped} up to step {fit.data['skip_steps']} or in a warm-up left out",
        ),
        Item(
            "C",
            "runs left out",
            f"{len(excluded)}{': ' + left if left else ''}",
            "warning" if excluded else "ok",
            "see the list of excluded runs" if excluded else "",
        ),
        Item("F", "precision", "parameters and samples with every digit of float64"),
    ]


def load_fit(folder: SweepFolder | Path | str, law: str = ANNEALING.name) -> SweepFit | None:
    """Return the saved fit of a law to a sweep, None when there is none.

    Raises:
        UserError: there is a file, but it cannot be read.
    """
    from landscape_ray.tracking.folder import SweepFolder

    opened = folder if isinstance(folder, SweepFolder) else SweepFolder.open(Path(folder))
    path = Path(opened.fits_path) / FILE_NAME.format(law=law)
    return SweepFit.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def decay_grid(num_steps: int) -> tuple[float, ...]:
    """Return the momentum values whose memory, 1 / (1 - decay) updates, fits into a run.

    >>> decay_grid(150)
    (0.9, 0.95, 0.98, 0.99)
    """
    return tuple(decay for decay in DECAYS if round(1 / (1 - decay)) <= num_steps) or DECAYS[:1]


def headline_run(group: CurveGroup) -> str:
    """Return the run whose schedule is held out for the headline, by :data:`HOLDOUT_RULE`; ties by name."""

    def rank(curve: Curve) -> tuple[bool, int, str]:
        below = int(np.sum(np.asarray(curve.lr)[curve.warmup_steps :] < group.peak_lr * (1 - 1e-6)))
        return group.shapes[curve.run_id] != "cosine", -below, curve.run_id

    return min(group.curves, key=rank).run_id


def _unusable(run: Run, loss: Literal["eval", "train"]) -> str:
    """Return why a run cannot enter the law, an empty text when it can."""
    if run.summary.status != "finished":
        return f"the run is {run.summary.status}: its schedule did not go to its end"
    if run.mutated:
        return "its weights or its LR were changed by a population on the way: no fixed schedule"
    steps = np.asarray(run.steps["step"], dtype=np.int64)
    foreign = not run.schedule
    if not len(steps) or (not foreign and not np.array_equal(steps, np.arange(1, len(steps) + 1))):
        return "its step rows do not cover every update"
    if foreign and _longest_gap(run) > MAX_GAP * steps[-1]:
        return f"its LR is told for too few updates: {_longest_gap(run)} of {steps[-1]} lie between two of them"
    if not np.isfinite(run.steps["lr"]).all():
        return "its step rows do not tell the LR of every update"
    measured, _ = _measured(run, loss)
    return "" if len(measured) else f"it has no {'held-out' if loss == 'eval' else 'training'} loss after its warm-up"


def _longest_gap(run: Run) -> int:
    """Return the most updates between two whose LR is told."""
    return int(np.diff(np.asarray(run.steps["step"], dtype=np.int64), prepend=0).max())


def curve_of(run: Run, loss: Literal["eval", "train"]) -> Curve:
    """Return a run's learning rates and losses after its warm-up, as laws of loss curves take them."""
    step, loss_nats = _measured(run, loss)
    lr_applied = np.asarray(run.steps["lr"], dtype=np.float64)
    if not run.schedule:  # told for some updates only: straight lines between them
        told = np.asarray(run.steps["step"], dtype=np.int64)
        lr_applied = np.interp(np.arange(1, max(told[-1], step[-1]) + 1), told, lr_applied)
    return Curve(run_id=run.run_id, lr=lr_applied, step=step, loss_nats=loss_nats, warmup_steps=run.warmup_steps)


def _measured(run: Run, loss: Literal["eval", "train"]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return (updates completed, loss) where a finite loss was measured after the warm-up."""
    rows = run.evals if loss == "eval" else run.steps
    losses = np.asarray(rows["loss_nats"], dtype=np.float64)
    # the training loss of an update is that of the weights before it
    completed = np.asarray(rows["step"], dtype=np.int64) - (loss == "train")
    kept = (completed > run.warmup_steps) & np.isfinite(losses)
    return completed[kept], losses[kept]


def _plain(data: Any) -> Any:
    """Return nested values with arrays as lists."""
    match data:
        case dict():
            return {key: _plain(item) for key, item in data.items()}
        case list() | tuple():
            return [_plain(item) for item in data]
        case np.ndarray():
            return data.tolist()
        case np.generic():
            return data.item()
        case _:
            return data


def _forecast(data: dict[str, Any]) -> Forecast:
    curve = data["prediction"]
    arrays = {name: np.asarray(curve[name], dtype=np.float64) for name in ("loss_nats", "low", "high")}
    arrays |= {"step": np.asarray(curve["step"], dtype=np.int64)}
    prediction = Prediction(**{**curve, **arrays, "warnings": tuple(curve["warnings"])})
    return Forecast(**{**data, "prediction": prediction, "fitted_on": tuple(data["fitted_on"])})
