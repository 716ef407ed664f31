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
from landscape_ray.laws.curves.best_schedule import BestSchedule, best_schedule
from landscape_ray.laws.curves.curve import Curve, annealing_area
from landscape_ray.laws.curves.curve_set import CurveSet
from landscape_ray.laws.curves.fit_curves import fit_curves
from landscape_ray.laws.curves.prediction import predict_annealing, predict_curve
from landscape_ray.laws.curves.sized import ANNEALING_SIZED
from landscape_ray.laws.curves.validation import calibrate, leave_one_schedule_out, objective_sensitivity
from landscape_ray.laws.memory.convex import CONVEX, ConvexBound, convex_bound, transfer_peak
from landscape_ray.laws.memory.functional import FUNCTIONAL
from landscape_ray.laws.memory.multi_power import MULTI_POWER
from landscape_ray.laws.memory.regularised import fit_multi_power
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA

LAWS: dict[str, Law] = {
    law.name: law for law in (CHINCHILLA, ANNEALING, ANNEALING_SIZED, MULTI_POWER, FUNCTIONAL, CONVEX)
}
"""Laws by name; a user's own is named by its dotted path, `package.module:NAME`."""

__all__ = [
    "LAWS",
    "BestSchedule",
    "ConvexBound",
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
    "best_schedule",
    "calibrate",
    "convex_bound",
    "fit",
    "fit_annealing",
    "fit_curves",
    "fit_multi_power",
    "grid",
    "leave_one_schedule_out",
    "linear",
    "nonlinear",
    "objective_sensitivity",
    "predict_annealing",
    "predict_curve",
    "predict_points",
    "table",
    "transfer_peak",
]
