"""The learning-rate range test: one short run whose learning rate grows from update to update.

Reference:
    Smith 2015, arXiv 1506.01186, section 3.3.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from landscape_ray.errors import UserError
from landscape_ray.records import StepRecord
from landscape_ray.training.config import EvalConfig, ScheduleConfig, TrainConfig
from landscape_ray.training.loop import train
from landscape_ray.training.probe_tables import ProbesConfig
from landscape_ray.training.state import TrainState


class RangeCurve(NamedTuple):
    """What `landscape_ray.schedules.analyse_range` reads: one entry for each update."""

    lrs: list[float]
    losses: list[float]
    """Training losses; the last is nan where the run diverged."""


def range_test(
    config: TrainConfig,
    *,
    low: float,
    high: float,
    num_steps: int = 400,
    shape: Literal["exponential", "linear"] = "exponential",
) -> RangeCurve:
    """Train a new run of `config` under growing learning rates; return the training loss at each of them.

    Model, data, batch, loss, optimizer, clipping and precision are those of the run that the test is for. Its
    schedule, evaluations, probes and averages are not made.

    Args:
        config: the run to find a learning rate for.
        low: learning rate of the first update, > 0.
        high: learning rate of the last update, > low; the test ends earlier where the run diverges.
        num_steps: updates of the test, >= 2. More of them show a less noisy curve.
        shape: growth by equal factors or by equal differences.

    Raises:
        UserError: an argument out of range, or what building the run raises.
    """
    if not 0 < low < high < math.inf:
        raise UserError(f"low and high must satisfy 0 < low < high, got {low} and {high}; give the ends of the range")
    if num_steps < 2:
        raise UserError(f"num_steps must be >= 2, got {num_steps}; a few hundred show a curve")
    schedule = ScheduleConfig(name="range", peak_lr=high, range_ratio=low / high, range_shape=shape)
    state = TrainState.create(
        config.model_copy(
            update={
                "num_steps": num_steps,
                "schedule": schedule,
                "averaging": None,
                "eval": EvalConfig(every_steps=num_steps, num_batches=1, batch_size=config.eval.batch_size),
                "probes": ProbesConfig(),
            }
        )
    )
    steps = [record for record in train(state) if isinstance(record, StepRecord)]
    curve = RangeCurve([step.lr for step in steps], [step.loss_nats for step in steps])
    if len(steps) < num_steps:  # the update that could not be done
        curve.lrs.append(schedule.build(num_steps)(len(steps)))
        curve.losses.append(math.nan)
    return curve
