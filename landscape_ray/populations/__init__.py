"""Decisions of populations, as pure functions with their own seeded generator. numpy and scipy only.

A :class:`Strategy` takes observations and returns decisions; :data:`STRATEGIES` holds the rules by name, and
`package.module:Name` names one of your own. :class:`Lineage` knows where every member's weights come from, and exports
the schedule that one run from scratch has to follow to get them. `landscape_ray.populations.simulation` runs a strategy
under a fake clock.

>>> from landscape_ray.domains import Domain
>>> space = {"lr": Domain(log_uniform=[1e-3, 1e-1])}
>>> strategy = STRATEGIES["truncation"](space, num_members=2, num_steps=20, interval_steps=10)
>>> [decision.until_step for decision in strategy.start()]
[10, 10]
>>> strategy.observe(Observation(0, (Point(10, 2.0),)))
[]
>>> first, second = strategy.observe(Observation(1, (Point(10, 1.0),)))
>>> first.action, first.donor, first.donor_step, second.action
('exploit', 1, 10, 'continue')
"""

from landscape_ray.populations.decisions import Choice, Decision, Failure, Observation, Point, Restart, Values
from landscape_ray.populations.explore import Explorer, explore, initial_members, position
from landscape_ray.populations.lineage import Change, Lineage, Segment, table_of
from landscape_ray.populations.strategies import STRATEGIES
from landscape_ray.populations.strategy import Member, Strategy

__all__ = [
    "STRATEGIES",
    "Change",
    "Choice",
    "Decision",
    "Explorer",
    "Failure",
    "Lineage",
    "Member",
    "Observation",
    "Point",
    "Restart",
    "Segment",
    "Strategy",
    "Values",
    "explore",
    "initial_members",
    "position",
    "table_of",
]
