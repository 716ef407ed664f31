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
from landscape_ray.laws.optima.batch import (
    CRITICAL_BATCH_TOKENS,
    LR_BATCH_LINEAR,
    LR_BATCH_POWER,
    LR_BATCH_SATURATING,
    LR_BATCH_SQRT,
    LR_BATCH_SURGE,
    STEPS_BATCH,
    CriticalBatch,
    fit_critical_batch,
    fit_largest_stable_lr,
    stable_edge,
    steps_to_loss,
)
from landscape_ray.laws.optima.flatness import Excess, FlatRegion, excess, flat_region
from landscape_ray.laws.optima.power import BATCH_POWER, LR_HORIZON, LR_HORIZON_SIZE, LR_POWER, fit_optima
from landscape_ray.laws.optima.regret import Regret, leave_one_group_out, regret
from landscape_ray.laws.optima.sensitivity import Sensitivity, lr_sensitivity
from landscape_ray.laws.optima.step_law import Recommendation, StepLaw, fit_step_law
from landscape_ray.laws.optima.sweep import Sweep
from landscape_ray.laws.optima.vertex import Optima, Optimum, group_optima
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
from landscape_ray.laws.transfer.ladder import (
    TASK_ACCURACY,
    TASK_LOSS,
    Ladder,
    LadderPrediction,
    fit_ladder,
    smooth_checkpoints,
)
from landscape_ray.laws.transfer.loss_to_loss import (
    EXCESS_TO_EXCESS,
    LOSS_TO_LOSS,
    LossToLoss,
    fit_loss_to_loss,
    match_runs,
)

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        # scaling: size, data, compute
        POWER,
        POWER_FLOOR,
        BROKEN_POWER,
        COMPUTE_FRONTIER,
        KAPLAN_SIZE,
        KAPLAN_DATA,
        KAPLAN_COMPUTE,
        KAPLAN_SIZE_DATA,
        KAPLAN_SIZE_STEPS,
        KAPLAN_TRAJECTORY,
        CRITICAL_BATCH,
        CHINCHILLA,
        OVERTRAINING,
        OVERTRAINING_COMPUTE,
        DOWNSTREAM_ERROR,
        REPETITION,
        EFFECTIVE_TOKENS,
        TRAINING_TIME,
        DATA_DIMENSION,
        FINETUNING,
        CONCEPT_FREQUENCY,
        ACCURACY_PROBIT,
        ACCURACY_LOGIT,
        # optima: learning rate and batch
        LR_POWER,
        BATCH_POWER,
        LR_HORIZON,
        LR_HORIZON_SIZE,
        LR_BATCH_LINEAR,
        LR_BATCH_SQRT,
        LR_BATCH_POWER,
        LR_BATCH_SATURATING,
        LR_BATCH_SURGE,
        STEPS_BATCH,
        CRITICAL_BATCH_TOKENS,
        # transfer: losses and tasks
        LOSS_TO_LOSS,
        EXCESS_TO_EXCESS,
        TASK_LOSS,
        TASK_ACCURACY,
        # curves: the schedule
        ANNEALING,
        ANNEALING_SIZED,
        MULTI_POWER,
        FUNCTIONAL,
        CONVEX,
    )
}
"""Laws by name; a user's own is named by its dotted path, `package.module:NAME`."""

__all__ = [
    "LAWS",
    "BestSchedule",
    "ConvexBound",
    "CriticalBatch",
    "Curve",
    "CurveSet",
    "Excess",
    "FitResult",
    "FlatRegion",
    "Forecast",
    "Ladder",
    "LadderPrediction",
    "Law",
    "LossToLoss",
    "Objective",
    "Optima",
    "Optimum",
    "Parameter",
    "PointPrediction",
    "Points",
    "Prediction",
    "Recommendation",
    "Regret",
    "Sensitivity",
    "StepLaw",
    "Sweep",
    "Variable",
    "annealing_area",
    "best_schedule",
    "calibrate",
    "convex_bound",
    "excess",
    "fit",
    "fit_annealing",
    "fit_critical_batch",
    "fit_curves",
    "fit_ladder",
    "fit_largest_stable_lr",
    "fit_loss_to_loss",
    "fit_multi_power",
    "fit_optima",
    "fit_step_law",
    "flat_region",
    "grid",
    "group_optima",
    "leave_one_group_out",
    "leave_one_schedule_out",
    "linear",
    "lr_sensitivity",
    "match_runs",
    "nonlinear",
    "objective_sensitivity",
    "predict_annealing",
    "predict_curve",
    "predict_points",
    "regret",
    "smooth_checkpoints",
    "stable_edge",
    "steps_to_loss",
    "table",
    "transfer_peak",
]
