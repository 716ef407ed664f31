"""What to do next, from fitted laws: how large, for how long, and which run to make first."""

from landscape_ray.laws.decisions.allocation import Allocation, Quantity, allocate
from landscape_ray.laws.decisions.next_run import Proposal, next_runs

__all__ = ["Allocation", "Proposal", "Quantity", "allocate", "next_runs"]
