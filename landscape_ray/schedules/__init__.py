"""Hyperparameter schedules: pure functions of the step, numpy only.

A :class:`Schedule` gives the value of the learning rate (or of any other hyperparameter) in every update of a run,
and the momentum that goes with it. :data:`SCHEDULES` holds the shapes by name; `package.module:Name` names a shape of
your own. Around it: :func:`refine` turns logged gradient norms into a schedule, :func:`branches` plans cooldowns that
leave one trunk, :func:`analyse_range` reads a learning-rate range test.
"""

from landscape_ray.schedules.branches import Saving, branches, saving
from landscape_ray.schedules.range_test import RangeResult, analyse_range
from landscape_ray.schedules.refined import refine
from landscape_ray.schedules.schedule import Schedule
from landscape_ray.schedules.shapes import COOLDOWN_SHAPES, SCHEDULES, Height
from landscape_ray.schedules.table import Points, monotone_points

__all__ = [
    "COOLDOWN_SHAPES",
    "SCHEDULES",
    "Height",
    "Points",
    "RangeResult",
    "Saving",
    "Schedule",
    "analyse_range",
    "branches",
    "monotone_points",
    "refine",
    "saving",
]
