"""Decisions of a search as pure functions of what was observed: which trial goes on, waits or stops. Numpy and scipy.

rule.py           what every stopping rule is
asha.py           successive halving that promotes and pauses
median.py         worse than the median of the others
forecast.py       hardly going to beat the best
extrapolation.py  a loss curve, continued along its schedule
"""

from landscape_ray.search.asha import Asha, rungs_of
from landscape_ray.search.forecast import ForecastStop
from landscape_ray.search.median import MedianStop
from landscape_ray.search.rule import StoppingRule, Verdict

STOPPING: dict[str, type[StoppingRule]] = {rule.name: rule for rule in (Asha, MedianStop, ForecastStop)}
"""Stopping rules by name."""

__all__ = ["STOPPING", "Asha", "ForecastStop", "MedianStop", "StoppingRule", "Verdict", "rungs_of"]
