"""Populations under a fake clock, on problems whose best schedules are known."""

from landscape_ray.populations.simulation.problems import (
    LawCurves,
    NoisyQuadratic,
    Tabulated,
    ToyQuadratic,
    TriangleWave,
)
from landscape_ray.populations.simulation.simulator import Problem, Simulator

__all__ = ["LawCurves", "NoisyQuadratic", "Problem", "Simulator", "Tabulated", "ToyQuadratic", "TriangleWave"]
