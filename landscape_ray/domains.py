"""Search domains: what values a hyperparameter may take. Neutral data, read by samplers and by populations alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

from pydantic import Field, model_validator

from landscape_ray.config import Model

Value: TypeAlias = float | int | str | bool

KINDS = ("uniform", "log_uniform", "integers", "choices")


class Domain(Model):
    """One entry of the table [space]: exactly one of the kinds, and optionally when it applies.

    Example:
        `"schedule.peak_lr" = { log_uniform = [1e-3, 2e-2] }`
    """

    uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """[low, high], both included."""
    log_uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """[low, high], uniform in the logarithm."""
    integers: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """[low, high], both included."""
    choices: list[Value] | None = Field(default=None, min_length=1)
    """The values themselves, in an order that makes sense: a mutation moves to a neighbour."""
    when: dict[str, Value | list[Value]] = {}
    """Other searched names and the value, or one of the values, that they must have for this one to be asked at all."""

    @model_validator(mode="after")
    def _sound(self) -> Domain:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a domain must have exactly one of {', '.join(KINDS)}, got {given or 'none'}")
        if self.choices is not None:
            if len(set(map(repr, self.choices))) < len(self.choices):
                raise ValueError(f"choices must differ from each other, got {self.choices}")
            return self
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"{given[0]} must be [low, high] with low < high, got [{low}, {high}]")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform must have low > 0, got {low}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high of a numeric domain."""
        for values in (self.uniform, self.log_uniform, self.integers):
            if values is not None:
                return values[0], values[1]
        raise TypeError("choices have no bounds")

    @property
    def extremes(self) -> list[Value]:
        """Values that show whether the whole domain is acceptable: both ends, or every choice."""
        return list(self.choices) if self.choices is not None else list(self.bounds)

    def contains(self, value: Any) -> bool:
        """Return whether the value lies in the domain."""
        if self.choices is not None:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.integers is not None else (int, float)):
            return False
        low, high = self.bounds
        return low <= value <= high

    def at(self, unit: float) -> Value:
        """Return the value at position `unit` in [0, 1] of the domain (in log space for log_uniform).

        >>> Domain(log_uniform=[1e-4, 1e-2]).at(0.5)
        0.001
        """
        if self.choices is not None:
            return self.choices[min(int(unit * len(self.choices)), len(self.choices) - 1)]
        low, high = self.bounds
        if self.integers is not None:
            return min(int(low + unit * (high - low + 1)), int(high))
        value = math.exp(math.log(low) + unit * math.log(high / low)) if self.log_uniform else low + unit * (high - low)
        return min(max(float(f"{value:.12g}"), low), high)  # rounding may not step over an end

    def clip(self, value: float) -> Value:
        """Return the nearest value of a numeric domain."""
        low, high = self.bounds
        clipped = min(max(value, low), high)
        return round(clipped) if self.integers is not None else float(clipped)


def applies(domain: Domain, values: dict[str, Value]) -> bool:
    """Return whether the domain's `when` holds under the values chosen so far."""
    return all(name in values and values[name] in allowed(wanted) for name, wanted in domain.when.items())


def allowed(wanted: Value | list[Value]) -> list[Value]:
    """Return the values that an entry of `when` names, as a list.

    >>> allowed("wsd"), allowed(["wsd", "linear"])
    (['wsd'], ['wsd', 'linear'])
    """
    return wanted if isinstance(wanted, list) else [wanted]


def in_order(space: dict[str, Domain]) -> Iterator[tuple[str, Domain]]:
    """Yield the entries so that each comes after those that its `when` names.

    Raises:
        ValueError: a `when` names something that is not searched, or goes round in a circle.
    """
    done: set[str] = set()
    pending = dict(space)
    while pending:
        ready = [name for name, domain in pending.items() if done.issuperset(domain.when)]
        if not ready:
            name, domain = next(iter(pending.items()))
            missing = [other for other in domain.when if other not in space]
            problem = f"names '{missing[0]}', which is not searched" if missing else "goes round in a circle"
            raise ValueError(f"space.{name}.when {problem}; name entries of [space] that come before it")
        for name in ready:
            yield name, pending.pop(name)
            done.add(name)
