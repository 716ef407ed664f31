"""Hyperparameter schedules: pure functions of the step, numpy only.

A :class:`Schedule` gives the value of the learning rate (or of any other hyperparameter) in every update of a run.
:data:`SCHEDULES` holds the shapes by name; `package.module:Name` names a shape of your own.
"""

from landscape_ray.schedules.schedule import COOLDOWN_SHAPES, SCHEDULES, Height, Schedule

__all__ = ["COOLDOWN_SHAPES", "SCHEDULES", "Height", "Schedule"]
