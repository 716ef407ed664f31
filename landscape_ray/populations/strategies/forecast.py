"""Forecast population-based training: members are ranked by where they will end, not by where they are.

The loss of the moment favours whoever lowers the learning rate first. Here a law fitted to the population's own losses
(:mod:`landscape_ray.populations.strategies.forecasting`) says what each member will reach if it keeps its values and
follows the common schedule, cooldown included, to the common horizon.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Choice, Observation, decode, encode
from landscape_ray.populations.strategies.forecasting import Fit, Forecaster, LineageState
from landscape_ray.populations.strategies.truncation import Truncation
from landscape_ray.registry import suggest
from landscape_ray.schedules import Schedule

MIN_ROUNDS = 2
"""Rounds of forecasts that must have been checked before the law can be trusted."""

CHECKED_ROUNDS = 3
"""Rounds over which forecasts are checked."""


class Check(NamedTuple):
    """A forecast of a member's next observation, and what came."""

    law: float
    """Absolute error of the law."""
    standing_still: float
    """Absolute error of the forecast that nothing changes."""


class Forecast(Truncation):
    """Truncation selection by the forecast final loss.

    The forecast of a member is the law at the end of its remaining schedule, plus what its last loss is above the law:
    members differ, and what a lineage has over others stays with it.

    The law is trusted while it has been fitted, and its forecasts of the population's next losses, made an interval
    ahead, have over the last rounds been better than the forecast that nothing changes. Until it is, members are ranked
    by their losses; but for the first `patience` of the horizon nobody is replaced on the ground of the loss alone,
    unless diverged: early losses mislead most.

    Args:
        schedule: of the learning rate; what the member's value is the peak of. Its cooldown is the common cooldown.
        lr_name: the name of the peak learning rate in the space.
        patience: share of the horizon, in [0, 1].
        certainty: standard errors of the difference of two forecasts by which the donor must be better.
        **options: of every strategy.
    """

    name: ClassVar[str] = "forecast"

    def __init__(
        self,
        *args: Any,
        schedule: Schedule,
        lr_name: str = "schedule.peak_lr",
        patience: float = 0.25,
        certainty: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if lr_name not in self.space:
            raise UserError(
                f"lr_name must be in the space, got '{lr_name}'; forecasts are of the learning rate's effect, "
                f"{suggest(lr_name, self.space)}"
            )
        domain = self.space[lr_name]
        if domain.choices is not None or domain.bounds[0] <= 0:
            raise UserError(f"{lr_name} must be a range of positive numbers, got {domain.extremes}; use log_uniform")
        if not 0 <= patience <= 1:
            raise UserError(f"patience must be in [0, 1], got {patience}; it is a share of the horizon")
        if not certainty >= 0:
            raise UserError(f"certainty must be >= 0, got {certainty}; 0 compares the forecasts alone")
        self.lr_name, self.patience, self.certainty = lr_name, patience, certainty
        self.schedule = dataclasses.replace(schedule, peak=1.0)
        self._forecaster = Forecaster(*domain.bounds, self.num_steps)
        self._states = {number: self._forecaster.fresh() for number in self.members}
        self._fit: Fit | None = None
        self._unfitted = 0
        """Observations since the last fit."""
        self._offsets: dict[int, float] = {}
        """How far the last loss of each member is above the law."""
        self._checks: list[Check] = []

    # the law

    @property
    def trusted(self) -> bool:
        """Whether members are ranked by forecasts."""
        count = len(self.members)
        if self._fit is None or len(self._checks) < MIN_ROUNDS * count:
            return False
        checks = np.array(self._checks[-CHECKED_ROUNDS * count :])
        return bool(np.median(checks[:, 0]) < np.median(checks[:, 1]))

    def forecast(self, member: int, lr: float | None = None) -> float:
        """Return the loss that a member is expected to end with; nan before the law has been fitted.

        Args:
            member: whose weights.
            lr: peak learning rate from here on; None for its own.
        """
        if self._fit is None:
            return math.nan
        state = self._states[member]
        peak = float(self.members[member].values[self.lr_name]) if lr is None else lr
        rates = peak * np.asarray(self.schedule(np.arange(state.step, self.num_steps)))
        end = self._forecaster.follow(state, rates)
        return float(self._fit.loss(end.progress, end.noise)) + self._offsets.get(member, 0.0)

    def learn(self, observation: Observation) -> None:
        """Check the forecast of this observation, and take it in."""
        number = observation.member
        if any(not math.isfinite(point.lr) for point in observation.points):
            raise UserError(
                f"points of member {number} must carry the mean learning rate, got nan; forecasts need what was applied"
            )
        state, sound = self._states[number], self.members[number].sound
        before = self.lineage.path(number)[-2:-1]
        if self._fit is not None and number in self._offsets and before and sound:
            end = state.copy()
            for point in observation.points:
                self._forecaster.advance(end, point.lr, point.step - end.step)
            expected = float(self._fit.loss(end.progress, end.noise)) + self._offsets[number]
            still = before[0].points[-1].loss
            self._checks.append(Check(abs(expected - observation.loss), abs(still - observation.loss)))
            del self._checks[: -CHECKED_ROUNDS * len(self.members)]
        self._forecaster.learn(state, observation.points)
        self._unfitted += 1

    def _refit(self) -> None:
        """Fit the law once a round, to everything but the beginning."""
        if self._unfitted * 2 < len(self.members):
            return
        self._unfitted = 0
        self._fit = self._forecaster.fit(max(self.schedule.warmup_steps, self.num_steps // 50))
        self._offsets = {}
        if self._fit is not None:
            for number, member in self.members.items():
                if member.sound:
                    state = self._states[number]
                    self._offsets[number] = member.loss - float(self._fit.loss(state.progress, state.noise))

    # the rule

    def scores(self, members: list[int]) -> dict[int, float]:
        """Return forecasts while the law is trusted, else losses."""
        return {n: self.forecast(n) for n in members} if self.trusted else super().scores(members)

    def replaces(self, donor: int, member: int) -> bool:
        """Return whether the donor's forecast is better by enough."""
        if not self.certainty or not self.trusted:
            return True
        error = math.sqrt(2 * float(np.mean(np.square([check.law for check in self._checks]))))
        return self.forecast(member) - self.forecast(donor) > self.certainty * error

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Fit, rank and replace."""
        self._refit()
        furthest = max(member.step for member in self.members.values())
        if not self.trusted and furthest <= self.patience * self.num_steps:
            return {}
        choices = self.truncate(ready, self.members)
        self._inherit(choices)
        return choices

    def rescue(self, number: int) -> Choice:
        """Return whom a diverged member copies."""
        choice = super().rescue(number)
        self._inherit({number: choice})
        return choice

    def _inherit(self, choices: dict[int, Choice]) -> None:
        """Give members the past of the weights that they take."""
        past = {n: self._states[choice.donor].copy() for n, choice in choices.items() if choice.donor is not None}
        self._states |= past
        for number, choice in choices.items():
            if choice.donor is not None and choice.donor in self._offsets:
                self._offsets[number] = self._offsets[choice.donor]

    # saving

    def extra_state(self) -> dict[str, Any]:
        """Return everything that forecasts depend on."""
        fit = self._fit
        return {
            "forecaster": self._forecaster.state_dict(),
            "states": [[n, s.progress.tolist(), s.noise.tolist(), s.step] for n, s in self._states.items()],
            "fit": None if fit is None else dataclasses.asdict(fit) | {"coefficients": fit.coefficients.tolist()},
            "unfitted": self._unfitted,
            "offsets": [[number, encode(offset)] for number, offset in self._offsets.items()],
            "checks": [list(check) for check in self._checks],
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._forecaster.load_state_dict(state["forecaster"])
        self._states = {n: LineageState(np.array(s), np.array(z), step) for n, s, z, step in state["states"]}
        fit = state["fit"]
        self._fit = None if fit is None else Fit(**fit | {"coefficients": np.array(fit["coefficients"])})
        self._unfitted = state["unfitted"]
        self._offsets = {number: decode(offset) for number, offset in state["offsets"]}
        self._checks = [Check(*check) for check in state["checks"]]
