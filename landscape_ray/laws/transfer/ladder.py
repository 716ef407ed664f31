"""From small models to the accuracy of a large one on a task, in two steps.

    step 1    L_task(N, D) = E + A N^-alpha + B D^-beta
    step 2    accuracy = top - drop / (1 + exp(-k (L_task - L_half)))

Legend: N parameters, D training tokens, L_task loss on the task (bits per byte of the right answer), A, B, E, alpha,
beta as in the law of training loss, top accuracy at no loss, drop how much is lost down to guessing, k steepness,
L_half loss of half the drop.

Step 1 is fitted to the ends of runs, step 2 to their checkpoints. Both bootstraps resample the same runs with the same
weights, so that a chained interval carries the uncertainty of both steps and what they share.

References:
    Bhagia et al. 2024, arXiv 2412.04403.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.predict import NOISE_LEVELS, check_usable, predict_points, samples_of
from landscape_ray.laws.core.result import FitResult, PointPrediction
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA

Array: TypeAlias = NDArray[np.float64]

TASK_LOSS = dataclasses.replace(
    CHINCHILLA,
    name="task_loss",
    title="loss on a task over model size and tokens",
    formula="L_task = E + A N^-alpha + B D^-beta",
    reference="Bhagia et al. 2024, arXiv 2412.04403",
    response=Variable("task_loss", "bits/byte", "loss on the task"),
)


def _sigmoid(x: Mapping[str, Any], p: Mapping[str, Any]) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * p["k"] * (x["task_loss"] - p["L_half"])))


def _columns(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Any, ...]:
    return 1.0, -_sigmoid(x, p)


def _slopes(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    share = _sigmoid(x, p)
    bend = share * (1 - share)
    return {}, {"k": -bend * (x["task_loss"] - p["L_half"]), "L_half": bend * p["k"]}


TASK_ACCURACY = Law(
    name="task_accuracy",
    title="accuracy on a task over the loss on it",
    formula="accuracy = top - drop / (1 + exp(-k (L_task - L_half)))",
    reference="Bhagia et al. 2024, arXiv 2412.04403",
    variables=(Variable("task_loss", "bits/byte", "loss on the task", min_distinct=4),),
    response=Variable("accuracy", "", "accuracy", positive=False),
    parameters=(
        linear("top", "accuracy at no loss"),
        linear("drop", "what is lost down to guessing"),
        nonlinear("k", "steepness", 0.1, 200.0, log=True, starts=(1.0, 3.0, 10.0, 30.0)),
        nonlinear("L_half", "loss at which half of it is lost", 0.0, 20.0, starts=(0.4, 0.7, 1.0, 1.5, 2.5)),
    ),
    columns=_columns,
    slopes=_slopes,
    space="raw",
    assumptions=("the accuracy depends on the model by its loss on the task only",),
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LadderPrediction:
    """What a ladder expects of one run.

    Attributes:
        loss: on the task, with its intervals.
        accuracy: fitted.
        low: lower end of the interval of the expected accuracy: the parameters of both steps.
        high: upper end.
        measured_low: lower end of the interval in which a measured accuracy is expected: residuals of both steps too.
        measured_high: upper end.
        confidence: level of both.
        warnings: of both steps, "name: sentence".
    """

    loss: PointPrediction
    accuracy: float
    low: float
    high: float
    measured_low: float
    measured_high: float
    confidence: float
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Ladder:
    """Both steps, fitted.

    Attributes:
        step_1: loss on the task over size and tokens.
        step_2: accuracy over the loss.
        paired: whether sample i of both bootstraps weights the same runs alike.
    """

    step_1: FitResult
    step_2: FitResult
    paired: bool

    def predict(self, N: float, D: float, *, allow_extrapolation: bool = False) -> LadderPrediction:
        """Return the expected accuracy of a run, with intervals through both steps.

        Args:
            N: parameters, counted as in the ladder.
            D: training tokens.
            allow_extrapolation: predict also at more than 100 times the fitted range, with a warning.

        Raises:
            UserError: a step that failed, or see :func:`landscape_ray.laws.core.predict.predict_points`.
        """
        check_usable(TASK_ACCURACY, self.step_2)
        x = {"N": N, "D": D}
        loss = predict_points(TASK_LOSS, self.step_1, x, allow_extrapolation=allow_extrapolation)
        warnings = [f"step_1 {warning}" for warning in loss.warnings]
        if self.step_2.status == "weak":
            warnings.append(f"step_2 weak_fit: {'; '.join(self.step_2.reasons)}")
        low, high = self.step_2.data["ranges"]["task_loss"]
        if not low <= loss.value[0] <= high:
            warnings.append(
                f"step_2 extrapolation: the expected loss {loss.value[0]:.4g} is outside that of the checkpoints, "
                f"[{low:.4g}, {high:.4g}]"
            )
        if not self.paired:
            warnings.append(
                "unpaired: the steps were fitted to different runs, so their uncertainties count as independent"
            )
        arrays = {name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in x.items()}
        losses = TASK_LOSS.term(arrays, samples_of(self.step_1))  # (s, 1)
        second = samples_of(self.step_2)
        count = max(len(losses), len(next(iter(second.values()))))
        losses = np.broadcast_to(losses, (count, 1))
        levels = np.linspace(0, 1, len(self.step_1.residuals["quantiles"]))
        noise_1, noise_2 = (
            np.interp(NOISE_LEVELS, levels, fitted.residuals["quantiles"]) for fitted in (self.step_1, self.step_2)
        )
        tail = (1 - self.step_1.confidence) / 2
        expected = TASK_ACCURACY.term({"task_loss": losses}, second)
        measured = TASK_ACCURACY.term({"task_loss": losses * np.exp(noise_1)}, second)[:, :, None] + noise_2
        ends = [np.quantile(values, [tail, 1 - tail]) for values in (expected, measured)]
        return LadderPrediction(
            loss=loss,
            accuracy=float(TASK_ACCURACY.predict({"task_loss": loss.value}, self.step_2.parameters)[0]),
            low=float(ends[0][0]),
            high=float(ends[0][1]),
            measured_low=float(ends[1][0]),
            measured_high=float(ends[1][1]),
            confidence=self.step_1.confidence,
            warnings=tuple(warnings),
        )


def fit_ladder(
    runs: Points,
    checkpoints: Points,
    *,
    top: float | None = 1.0,
    chance: float | None = None,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> Ladder:
    """Return both steps of a task ladder, each from many starts, with its certificate.

    Args:
        runs: ends of the runs: N, D -> loss on the task; Huber with the threshold 1e-3 on the logarithm.
        checkpoints: loss on the task (`task_loss`) -> accuracy, in [0, 1], with the runs they come from, least squares.
        top: accuracy at no loss; None fits it, which needs checkpoints near it.
        chance: accuracy of guessing, where that is known; None fits it.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: accuracies outside [0, 1], a chance not below the top, or see :mod:`landscape_ray.laws.core.fit`.
    """
    accuracy = np.asarray(checkpoints.response)
    if not ((accuracy >= 0) & (accuracy <= 1)).all():
        raise UserError(f"accuracy must be in [0, 1], got {accuracy.max():g}; divide percentages by 100")
    fixed: dict[str, float] = {} if top is None else {"top": float(top)}
    if chance is not None:
        if top is None or not 0 <= chance < top <= 1:
            raise UserError(f"chance must be in [0, top) with a top given, got {chance:g} and top {top}; give both")
        fixed["drop"] = top - chance
    options: dict[str, Any] = {"num_bootstrap": num_bootstrap, "confidence": confidence, "seed": seed}
    step_1 = fit(TASK_LOSS, runs, objective=Objective("huber", 1e-3), **options)
    step_2 = fit(TASK_ACCURACY, checkpoints, objective=Objective("least_squares"), fix=fixed, **options)
    # The weights of runs are a function of seed and number of runs only: equal names in equal order are equal draws.
    drawn = [step.certificate["bootstrap"]["method"] for step in (step_1, step_2)]
    paired = runs.run_ids == checkpoints.run_ids and drawn[0] == drawn[1] == "runs"
    return Ladder(step_1=step_1, step_2=step_2, paired=paired or not num_bootstrap)


def smooth_checkpoints(values: ArrayLike, *, skip: float = 0.1, window: int = 5) -> Array:
    """Return a series of checkpoints without its beginning, each averaged with those before it.

    Args:
        values: (k,) of one run, in order.
        skip: share of the checkpoints, from the first on, that is left out, rounded up.
        window: how many are averaged; the first ones have fewer before them.

    Raises:
        UserError: an option out of range.

    >>> smooth_checkpoints([9.0, 1.0, 3.0, 5.0], skip=0.25, window=2).tolist()
    [1.0, 2.0, 4.0]
    """
    if not 0 <= skip < 1:
        raise UserError(f"skip must be in [0, 1), got {skip}; .1 is usual")
    if window < 1:
        raise UserError(f"window must be >= 1, got {window}; 1 does not smooth")
    series = np.asarray(values, dtype=np.float64)
    kept = series[int(np.ceil(skip * len(series))) :]
    total = np.concatenate([[0.0], np.cumsum(kept)])
    last = np.arange(1, len(kept) + 1)
    first = np.maximum(last - window, 0)
    return np.asarray((total[last] - total[first]) / (last - first))
