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

from collections.abc import Callable
from typing import NamedTuple

from landscape_ray.laws.annealing import fit_annealing
from landscape_ray.laws.curves import Curve, annealing_area
from landscape_ray.laws.prediction import predict_annealing
from landscape_ray.laws.result import FitResult, Forecast, Prediction, table
from landscape_ray.laws.validation import calibrate, leave_one_schedule_out, objective_sensitivity


class Law(NamedTuple):
    """A law: how it is fitted, and how a fit predicts."""

    fit: Callable[..., FitResult]
    predict: Callable[..., Prediction]


LAWS: dict[str, Law] = {"annealing": Law(fit_annealing, predict_annealing)}

__all__ = [
    "LAWS",
    "Curve",
    "FitResult",
    "Forecast",
    "Law",
    "Prediction",
    "annealing_area",
    "calibrate",
    "fit_annealing",
    "leave_one_schedule_out",
    "objective_sensitivity",
    "predict_annealing",
    "table",
]
