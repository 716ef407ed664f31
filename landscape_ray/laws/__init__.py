"""Laws of training loss: what curves tell about schedules that were not run. numpy and scipy only.

>>> import numpy as np
>>> from landscape_ray.schedules import Schedule
>>> lr = {name: Schedule(name=name, peak=0.01, num_steps=200).values() for name in ("constant", "cosine", "linear")}
>>> loss = {name: 2 + 0.5 * np.cumsum(lr[name]) ** -0.5 - 3 * annealing_area(lr[name], 0.95) for name in lr}
>>> step = np.arange(20, 201, 10)
>>> curves = [Curve(name, lr[name], step, loss[name][step - 1]) for name in ("constant", "cosine")]
>>> fit = fit_annealing(curves, decay=0.95)
>>> fit.status, round(fit.parameters["alpha"], 6)
('certified', 0.5)
>>> prediction = predict_annealing(fit, lr["linear"], [200])
>>> bool(abs(prediction.loss_nats[0] - loss["linear"][-1]) < 1e-6)
True
"""

from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import Law, Parameter, Variable, grid, linear, nonlinear
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.predict import predict_points
from landscape_ray.laws.core.result import FitResult, Forecast, PointPrediction, Prediction, table
from landscape_ray.laws.curves.annealing import ANNEALING, fit_annealing
from landscape_ray.laws.curves.curve import Curve, annealing_area
from landscape_ray.laws.curves.curve_set import CurveSet
from landscape_ray.laws.curves.prediction import predict_annealing
from landscape_ray.laws.curves.validation import calibrate, leave_one_schedule_out, objective_sensitivity
from landscape_ray.laws.scaling.axes import (
    ACCURACY_LOGIT,
    ACCURACY_PROBIT,
    CONCEPT_FREQUENCY,
    DATA_DIMENSION,
    FINETUNING,
)
from landscape_ray.laws.scaling.broken import BROKEN_POWER
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA
from landscape_ray.laws.scaling.kaplan import (
    CRITICAL_BATCH,
    KAPLAN_COMPUTE,
    KAPLAN_DATA,
    KAPLAN_SIZE,
    KAPLAN_SIZE_DATA,
    KAPLAN_SIZE_STEPS,
)
from landscape_ray.laws.scaling.overtraining import DOWNSTREAM_ERROR, OVERTRAINING, OVERTRAINING_COMPUTE
from landscape_ray.laws.scaling.power import COMPUTE_FRONTIER, POWER, POWER_FLOOR
from landscape_ray.laws.scaling.tokens import EFFECTIVE_TOKENS, REPETITION
from landscape_ray.laws.scaling.trajectory import KAPLAN_TRAJECTORY
from landscape_ray.laws.scaling.wallclock import TRAINING_TIME

LAWS: dict[str, Law] = {
    "power": POWER,
    "power_floor": POWER_FLOOR,
    "broken_power": BROKEN_POWER,
    "compute_frontier": COMPUTE_FRONTIER,
    "kaplan_size": KAPLAN_SIZE,
    "kaplan_data": KAPLAN_DATA,
    "kaplan_compute": KAPLAN_COMPUTE,
    "kaplan_size_data": KAPLAN_SIZE_DATA,
    "kaplan_size_steps": KAPLAN_SIZE_STEPS,
    "kaplan_trajectory": KAPLAN_TRAJECTORY,
    "critical_batch": CRITICAL_BATCH,
    "chinchilla": CHINCHILLA,
    "overtraining": OVERTRAINING,
    "overtraining_compute": OVERTRAINING_COMPUTE,
    "downstream_error": DOWNSTREAM_ERROR,
    "repetition": REPETITION,
    "effective_tokens": EFFECTIVE_TOKENS,
    "training_time": TRAINING_TIME,
    "data_dimension": DATA_DIMENSION,
    "finetuning": FINETUNING,
    "concept_frequency": CONCEPT_FREQUENCY,
    "accuracy_probit": ACCURACY_PROBIT,
    "accuracy_logit": ACCURACY_LOGIT,
    "annealing": ANNEALING,
}
"""Laws by name; a user's own is named by its dotted path, `package.module:NAME`."""

__all__ = [
    "LAWS",
    "Curve",
    "CurveSet",
    "FitResult",
    "Forecast",
    "Law",
    "Objective",
    "Parameter",
    "PointPrediction",
    "Points",
    "Prediction",
    "Variable",
    "annealing_area",
    "calibrate",
    "fit",
    "fit_annealing",
    "grid",
    "leave_one_schedule_out",
    "linear",
    "nonlinear",
    "objective_sensitivity",
    "predict_annealing",
    "predict_points",
    "table",
]
