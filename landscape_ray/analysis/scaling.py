"""A scaling law on a table of runs: the fit, the evidence on how far it can be trusted, and its record, saved as one.

A saved fit is a folder: `fit.json` (everything at full precision), `table.csv` (the runs, so that anybody can fit
again) and `page.html`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from landscape_ray.analysis.table import RunTable, complete_compute
from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.laws import LAWS, FitResult, Law, Objective, StepLaw, fit
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.optima.surface import NAME as STEP_LAW
from landscape_ray.laws.trust.checklist import Evidence, Item, checklist, from_plain, to_plain
from landscape_ray.laws.trust.comparison import compare, objective_table, residual_trends, seed_noise
from landscape_ray.laws.trust.holdout import Rollout, leave_groups_out, rollouts, sizes_of
from landscape_ray.registry import resolve

FILE_NAME = "fit.json"
TABLE_NAME = "table.csv"
PAGE_NAME = "page.html"

MAX_RUNS_LEFT_OUT = 2000
"""Runs up to which each is left out in turn."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ScalingFit:
    """A law fitted to a table of runs.

    Attributes:
        law_path: its name in `LAWS`, "step_law", or the dotted path of a user's own.
        fit: the fit, with its record.
        source: where the runs come from.
        excluded: run to the reason why it is not in the fit.
        rollouts: forecasts beyond the fitted range, as sentences.
        run_ids: the runs of the points, in order.
        points: variables and response of every point.
        predicted: the law at every point.
        command: what fits it again.
    """

    law_path: str
    fit: FitResult
    source: str
    excluded: dict[str, str]
    rollouts: tuple[str, ...]
    run_ids: tuple[str, ...]
    points: dict[str, list[float]]
    predicted: list[float]
    command: str = ""

    @property
    def law(self) -> Law:
        """The law; the step law is the surface over the groups of its runs."""
        return StepLaw(self.fit).law if self.law_path == STEP_LAW else find_law(self.law_path)

    @property
    def record(self) -> list[Item]:
        """The record of the fit."""
        return from_plain(self.fit.checklist)

    def to_json(self) -> str:
        """Return everything at full precision."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["fit"] = json.loads(self.fit.to_json())
        return json.dumps({"kind": "scaling", **data}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ScalingFit:
        """Return what :meth:`to_json` wrote.

        Raises:
            UserError: the text is not such a fit.
        """
        try:
            data = json.loads(text)
            if data.pop("kind") != "scaling":
                raise ValueError("another kind of fit")
            data["fit"] = FitResult.from_json(json.dumps(data["fit"]))
            for name in ("rollouts", "run_ids"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"fit must be the JSON text of a ScalingFit ({error}); run `landscape-ray fit --law ...` again"
            ) from None


def find_law(name: str) -> Law:
    """Return a law by its name or dotted path.

    Raises:
        UserError: there is none, or it is not a law, or the step law, which is another one for every table.
    """
    if name == STEP_LAW:
        raise UserError(f"law must be of points, got '{name}', a surface over the groups of a table; fit it by itself")
    law = resolve(name, LAWS, "law")
    if not isinstance(law, Law):
        raise UserError(f"law must be a landscape_ray.laws.Law, got {type(law).__name__} at '{name}'; declare one")
    return law


def fit_table(
    law_path: str,
    table: RunTable,
    *,
    objective: Objective | None = None,
    fix: Mapping[str, float] | None = None,
    candidates: Sequence[str] = (),
    num_bootstrap: int = 400,
    confidence: float = 0.9,
    seed: int = 0,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> ScalingFit:
    """Return a law fitted to the runs of a table, held against everything that can be checked.

    Args:
        law_path: name or dotted path of the law.
        table: the runs.
        objective: what is minimised; default Huber 1e-3.
        fix: parameters that are given, not fitted.
        candidates: other laws of the same response, by name, compared on runs left out.
        num_bootstrap: bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.
        command: what fits it again, for the record.
        progress: called with what is being done.

    Raises:
        UserError: the table has no such columns, or the law cannot be fitted to it.
    """
    say = progress or (lambda news: None)
    law = find_law(law_path)
    points, without = table.points(law)
    chosen = objective or Objective()
    options: dict[str, Any] = {"objective": chosen, "fix": fix}
    say(f"{law.name}: search and {num_bootstrap} bootstrap samples")
    found = fit(law, points, **options, num_bootstrap=num_bootstrap, confidence=confidence, seed=seed)
    solution, _ = solve(law, points, **options)
    say("forecasts beyond the fitted range")
    beyond = rollouts(law, points, **options, num_bootstrap=min(num_bootstrap, 200), confidence=confidence, seed=seed)
    say("fits without each run and each size")
    sizes = sizes_of(points)
    groups = len(np.unique(sizes)) if sizes is not None else 0
    sizes_out = leave_groups_out(law, points, sizes, **options) if groups > law.num_fitted(fix) else None
    runs = len(points.run_ids)
    runs_out = leave_groups_out(law, points, **options) if 2 <= runs <= MAX_RUNS_LEFT_OUT else None
    say("other objectives and laws")
    others = [find_law(name) for name in candidates if name != law_path]
    evidence = Evidence(
        runs_out=runs_out,
        sizes_out=sizes_out,
        rollouts=beyond,
        objectives=objective_table(law, points, delta=chosen.delta if math.isfinite(chosen.delta) else 1e-3, fix=fix),
        candidates=compare([law, *others], points, objective=chosen) if others else (),
        trends=residual_trends(law, points, solution.residual),
        noise=seed_noise(law, points),
    )
    misfit, count = _misfit(beyond, sizes_out.errors if sizes_out else None, groups, solution.residual)
    found = dataclasses.replace(found, misfit=misfit, num_misfits=count)
    facts = [
        *table.facts,
        *_excluded_items(without),
        Item("F", "refit", command or "see fit.json and table.csv beside it"),
    ]
    facts.append(Item("F", "precision", "parameters, samples and table with every digit of float64"))
    found = dataclasses.replace(found, checklist=to_plain(checklist(law, found, evidence, facts)))
    return ScalingFit(
        law_path=law_path,
        fit=found,
        source=table.source,
        excluded={**table.dropped, **without},
        rollouts=tuple(str(one) for one in beyond),
        run_ids=tuple(points.run_of or ()),
        points={name: np.asarray(values).tolist() for name, values in points.variables.items()}
        | {law.response.name: np.asarray(points.response).tolist()},
        predicted=np.broadcast_to(law.predict(solution.bound.x, found.parameters), (len(points),)).tolist(),
        command=command,
    )


def _misfit(beyond: Sequence[Rollout], sizes_out: Any, groups: int, residual: Any) -> tuple[float | None, int]:
    """Return how wrong the law is on what it has not seen beyond the noise of the fit, and how many errors say so.

    The larger of two root mean squares, of the points beyond the fitted range and of those of a size left out, each
    with the mean square of the fit's own residuals taken off.
    """
    inside = float(np.mean(np.square(residual)))
    squares = [float(np.mean(np.square(one.relative_error))) for one in beyond]
    if sizes_out is not None:
        squares.append(float(np.mean(np.square(sizes_out))))
    if not squares:
        return None, 0
    return math.sqrt(max(max(squares) - inside, 0.0)), max(groups, 2)


def _excluded_items(without: Mapping[str, str]) -> list[Item]:
    if not without:
        return []
    why = "; ".join(f"{run}: {reason}" for run, reason in list(without.items())[:5])
    return [
        Item("C", "runs without a number that the law needs", f"{len(without)}: {why}", "warning", "see excluded runs")
    ]


def save(found: ScalingFit, table: RunTable, folder: Path) -> Path:
    """Write the fit and its table into a folder, and return the path of the fit."""
    write_atomic(folder / TABLE_NAME, table.to_csv())
    write_atomic(folder / FILE_NAME, found.to_json())
    return folder / FILE_NAME


def load(path: Path) -> ScalingFit:
    """Return the fit at a path: its folder, or the file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no fit at {path}; make one with `landscape-ray fit SOURCE --law LAW --out {path}`")
    return ScalingFit.from_json(file.read_text(encoding="utf-8"))


def query(law: Law, values: Mapping[str, float]) -> dict[str, float]:
    """Return variables for a prediction: what is given, and of N, D and C the one that the others determine.

    Raises:
        UserError: a variable of the law is missing.
    """
    columns = {name: np.array([value]) for name, value in values.items()}
    complete_compute(columns)
    missing = [variable.name for variable in law.variables if variable.name not in columns]
    if missing:
        wanted = ", ".join(f"{v.name} ({v.meaning})" for v in law.variables)
        raise UserError(f"--set must give {', '.join(missing)}; law '{law.name}' depends on {wanted}")
    return {variable.name: float(columns[variable.name][0]) for variable in law.variables}
