"""Forecast population-based training: members are ranked by where they will end, not by where they are.

The loss of the moment favours whoever lowers the learning rate first. Here a law fitted to the population's own losses
(:mod:`landscape_ray.populations.strategies.forecasting`) says what each member will reach if it keeps its values and
follows the common schedule, cooldown included, to the common horizon.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Choice, Observation, decode, encode
from landscape_ray.populations.strategies.forecasting import Fit, Forecaster, LineageState
from landscape_ray.populations.strategies.truncation import Truncation
from landscape_ray.registry import suggest
from landscape_ray.schedules import Schedule

Item = TypeVar("Item")

MIN_ROUNDS = 2
"""Rounds of forecasts that must have been checked before the law can be trusted."""

CHECKED_ROUNDS = 3
"""Rounds over which forecasts are checked."""


MAX_MADE = 12
"""Forecasts that are remembered of each lineage; of more every second one is forgotten, so that old ones remain."""

MIN_MISSES = 4
"""Members of a round that can say what they miss by differently."""

MAX_MISSES = 4000
"""Misses that are remembered, the newest."""


class Made(NamedTuple):
    """What a lineage's losses were forecast with at some time."""

    step: int
    """Updates completed then."""
    fit: int
    """Which of the fits."""
    offset: float
    """How far the lineage was above the law."""


class Miss(NamedTuple):
    """A forecast of a loss, and what came."""

    fit: int
    """Which of the fits made it."""
    lead: int
    """Updates from the one to the other."""
    error: float
    """Loss less forecast."""


class Check(NamedTuple):
    """A forecast of a member's next observation, and what came."""

    law: float
    """Absolute error of the law."""
    standing_still: float
    """Absolute error of the forecast that nothing changes."""


class Forecast(Truncation):
    """Truncation selection by the forecast final loss.

    The forecast of a member is the law at the end of its remaining schedule, plus what its last losses are above the
    law: members differ, and what a lineage has over others stays with it.

    Where observations carry the loss of averaged weights, law and forecasts go by it wherever it is the lower one: an
    average of the last updates has lost most of the noise of the learning rate, as after a cooldown, and costs one
    evaluation (Sandler et al. 2023, arXiv 2301.02312). Where they don't, the law has to tell noise from progress.

    The law is trusted while it has been fitted, and its forecasts of the population's next losses, made an interval
    ahead, have over the last rounds been better than the forecast that nothing changes. A donor then has to be better
    by `certainty` standard errors of the difference of two forecasts over what remains of the run. How large these are
    is seen in the population itself: every law that was fitted is held against all losses that came later (see
    :meth:`error`). As long as the law is new and the end far away, few members are replaced, and those that go on under
    different rates are what the next law is told apart by; near the end the noise of the losses is what is left.

    While the law is not trusted, members are ranked by their losses, of averaged weights where there are any, and a
    member is replaced only by a donor that it cannot be expected to catch up with: by one that has also come down by
    more in the last interval. Where losses are of averaged weights, that is a lead that grows; where they are not, it
    may be due to noise that has gone, so the donor's learning rate has to be at least as high as well: it has more
    noise to lose.

    Args:
        schedule: of the learning rate; what the member's value is the peak of. Its cooldown is the common cooldown.
        lr_name: the name of the peak learning rate in the space.
        certainty: standard errors of the difference of two forecasts by which the donor must be better.
        **options: of every strategy.
    """

    name: ClassVar[str] = "forecast"

    def __init__(
        self,
        *args: Any,
        schedule: Schedule,
        lr_name: str = "schedule.peak_lr",
        certainty: float = 1.0,
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
        if not certainty >= 0:
            raise UserError(f"certainty must be >= 0, got {certainty}; 0 compares the forecasts alone")
        self.lr_name, self.certainty = lr_name, certainty
        self.schedule = dataclasses.replace(schedule, peak=1.0)
        self._forecaster = Forecaster(*domain.bounds, self.num_steps)
        self._states = {number: self._forecaster.fresh() for number in self.members}
        self._fits: list[Fit] = []
        self._made: dict[int, tuple[Made, ...]] = {}
        """Forecasts along the lineage of each member."""
        self._misses: list[Miss] = []
        self._fallen: dict[int, float] = {}
        """By how much each member's loss came down in its last interval."""
        self._fit: Fit | None = None
        self._unfitted = 0
        """Observations since the last fit."""
        self._recent: dict[int, list[list[float]]] = {}
        """What the forecaster made of the evaluations of each member's last observation."""
        self._offsets: dict[int, float] = {}
        """How far these are above the law."""
        self._checks: list[Check] = []
        self._averaged = False
        """Whether observations carry the loss of averaged weights."""

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
        peak = self._peak(member) if lr is None else lr
        rates = peak * np.asarray(self.schedule(np.arange(state.step, self.num_steps)))
        end = self._forecaster.follow(state, rates)
        return float(self._fit.loss(end.progress, end.noise)) + self._offsets.get(member, 0.0)

    def _peak(self, member: int) -> float:
        return float(self.members[member].values[self.lr_name])

    def learn(self, observation: Observation) -> None:
        """Check the forecast of this observation, and take it in."""
        number = observation.member
        if any(not math.isfinite(point.lr) for point in observation.points):
            raise UserError(
                f"points of member {number} must carry the mean learning rate, got nan; forecasts need what was applied"
            )
        before = self._recent.get(number)
        rows = self._forecaster.learn(self._states[number], observation.points)
        if self._fit is not None and number in self._offsets and before and rows and self.members[number].sound:
            expected = self._forecaster.law(self._fit, rows[-1:]) + self._offsets[number]
            self._checks.append(Check(abs(expected - rows[-1][1]), abs(before[-1][1] - rows[-1][1])))
            del self._checks[: -CHECKED_ROUNDS * len(self.members)]
        if rows and self.members[number].sound:
            self._miss(number, observation.step, rows[-1:])
            if before:
                self._fallen[number] = before[-1][1] - rows[-1][1]
        self._recent[number] = rows
        self._averaged = self._averaged or any(not math.isnan(point.averaged) for point in observation.points)
        self._unfitted += 1

    def _miss(self, number: int, step: int, rows: list[list[float]]) -> None:
        """Hold all forecasts of a lineage against its new loss."""
        for made in self._made.get(number, ()):
            if made.step < step:
                expected = self._forecaster.law(self._fits[made.fit], rows) + made.offset
                self._misses.append(Miss(made.fit, step - made.step, rows[-1][1] - expected))
        del self._misses[:-MAX_MISSES]

    def error(self, lead: int) -> float:
        """Return the standard error of the difference of two members' forecasts so many updates ahead; inf if unknown.

        The variance has two parts: one that is there from one interval to the next, the noise of the losses, and one
        that grows with the square of the distance, rates of progress that the law has wrong. What all members of a
        round miss by alike does not matter for who is better, and is taken out.
        """
        if not self._misses:
            return math.inf
        fits, leads, errors = (np.array(column) for column in zip(*self._misses, strict=True))
        rounds = leads // self.interval_steps
        own = np.full(len(errors), math.nan)
        for fit, number in set(zip(fits.tolist(), rounds.tolist(), strict=True)):
            places = (fits == fit) & (rounds == number)
            if places.sum() >= MIN_MISSES:
                own[places] = errors[places] - np.median(errors[places])
        wanted = min(lead, int(leads.max()))
        short, far = leads <= leads.min(), (2 * leads >= wanted) & (leads <= 2 * wanted) & (leads > leads.min())
        noise, missed = _spread(own[short]), _spread(own[far])
        if math.isnan(noise) or math.isnan(missed):
            return math.inf
        growth = max(missed**2 - noise**2, 0.0) / float(np.mean(leads[far] ** 2) - leads.min() ** 2)
        return math.sqrt(2 * (noise**2 + growth * lead**2))

    def _refit(self) -> None:
        """Fit the law once a round, to everything but the beginning."""
        if self._unfitted * 2 < len(self.members):
            return
        self._unfitted = 0
        self._fit = self._forecaster.fit(max(self.schedule.warmup_steps, self.num_steps // 50))
        self._offsets = {}
        if self._fit is not None:
            self._offsets = {n: self._forecaster.excess(self._fit, rows) for n, rows in self._recent.items() if rows}
            self._fits.append(self._fit)
            for n, offset in self._offsets.items():
                made = (*self._made.get(n, ()), Made(self._states[n].step, len(self._fits) - 1, offset))
                self._made[n] = made if len(made) <= MAX_MADE else made[::2]

    # the rule

    def scores(self, members: list[int]) -> dict[int, float]:
        """Return forecasts while the law is trusted, else losses, as far as known without the noise."""
        if self.trusted:
            return {n: self.forecast(n) for n in members}
        return {n: self._annealed(n) for n in members}

    def _annealed(self, member: int) -> float:
        rows = self._recent.get(member)
        return rows[-1][1] if rows else self.members[member].loss

    def replaces(self, donor: int, member: int) -> bool:
        """Return whether the donor's forecast is better by enough; without a law, whether nothing speaks against it."""
        if not self.trusted:
            return (
                self._annealed(donor) < self._annealed(member)
                and self._fallen.get(donor, -math.inf) > self._fallen.get(member, math.inf)
                and (self._averaged or self._peak(donor) >= self._peak(member))
            )
        if not self.certainty:
            return True
        error = self.error(self.num_steps - self.members[member].step)
        return self.forecast(member) - self.forecast(donor) > self.certainty * error

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Fit, rank and replace."""
        self._refit()
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
        donors = {number: choice.donor for number, choice in choices.items() if choice.donor is not None}
        self._states |= {number: self._states[donor].copy() for number, donor in donors.items()}
        _copy(self._recent, donors)
        _copy(self._made, donors)
        _copy(self._fallen, donors)
        _copy(self._offsets, donors)

    # saving

    def extra_state(self) -> dict[str, Any]:
        """Return everything that forecasts depend on."""
        return {
            "forecaster": self._forecaster.state_dict(),
            "states": [[n, s.progress.tolist(), s.noise.tolist(), s.step] for n, s in self._states.items()],
            "fits": [dataclasses.asdict(fit) | {"coefficients": fit.coefficients.tolist()} for fit in self._fits],
            "fitted": self._fit is not None,
            "made": [[number, list(map(list, made))] for number, made in self._made.items()],
            "misses": [list(miss) for miss in self._misses],
            "fallen": [list(item) for item in self._fallen.items()],
            "unfitted": self._unfitted,
            "recent": [[number, rows] for number, rows in self._recent.items()],
            "offsets": [[number, encode(offset)] for number, offset in self._offsets.items()],
            "averaged": self._averaged,
            "checks": [list(check) for check in self._checks],
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._forecaster.load_state_dict(state["forecaster"])
        self._states = {n: LineageState(np.array(s), np.array(z), step) for n, s, z, step in state["states"]}
        self._fits = [Fit(**fit | {"coefficients": np.array(fit["coefficients"])}) for fit in state["fits"]]
        self._fit = self._fits[-1] if state["fitted"] else None
        self._made = {number: tuple(Made(*row) for row in made) for number, made in state["made"]}
        self._misses = [Miss(*miss) for miss in state["misses"]]
        self._fallen = dict(map(tuple, state["fallen"]))
        self._unfitted = state["unfitted"]
        self._recent = dict(map(tuple, state["recent"]))
        self._offsets = {number: decode(offset) for number, offset in state["offsets"]}
        self._averaged = state["averaged"]
        self._checks = [Check(*check) for check in state["checks"]]


def _spread(errors: np.ndarray[Any, Any]) -> float:
    """Return the standard deviation by way of the median: runs that nobody would copy may be missed by any amount."""
    known = np.abs(errors[~np.isnan(errors)])
    return 1.4826 * float(np.median(known)) if len(known) else math.nan


def _copy(own: dict[int, Item], donors: dict[int, int]) -> None:
    """Give members what their donors have, or nothing where these have nothing."""
    theirs = {number: own[donor] for number, donor in donors.items() if donor in own}  # before any is overwritten
    for number in donors:
        own.pop(number, None)
    own |= theirs
