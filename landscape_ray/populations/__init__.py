"""Decisions of a population, as pure functions with their own seeded generator. Numpy only."""

from landscape_ray.populations.explore import explore, initial_members

__all__ = ["explore", "initial_members"]
