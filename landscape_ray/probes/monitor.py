"""Several probes along a run, each when it is due, all of them within a budget of time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.probe import NOBODY, Host, Need, Probe


class Monitor:
    """Decides after each update which probes to run, and runs them.

    A probe is due every so many steps, at step 0 and at the end. With a budget, what is due waits until it can be paid
    for: the time spent on probes, that of the next one included, stays below `budget` times the time spent on training.
    For the measurement at the end, which is always made, a part is put aside all along. Those that wait are served in
    the order in which they came due, so that a dear one is not starved by cheap ones. What a probe will cost is told
    from its price and its past; the first time from the time of an update, if the host tells its batch size.

    With a budget, what is measured when depends on the clock; the training itself never does.

    >>> import torch
    >>> from landscape_ray.probes import SharpnessProbe
    >>> model, data = nn.Linear(2, 1), (torch.eye(2), torch.ones(2, 1))
    >>> loss = lambda module, batch: 0.5 * (module(batch[0]) - batch[1]).square().mean()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = Monitor([SharpnessProbe([data])], every_steps=2)
    >>> for step in range(1, 5):
    ...     optimizer.zero_grad()
    ...     loss(model, data).backward()
    ...     optimizer.step()
    ...     for name, estimate in monitor(step, model, loss):
    ...         print(step, name, round(estimate.value, 3))
    2 sharpness 1.5
    4 sharpness 1.5
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        every_steps: int | Mapping[str, int | None] | None = None,
        *,
        budget: float | None = None,
    ) -> None:
        """Keep the probes.

        Args:
            probes: with different names.
            every_steps: distance of measurements, for all or by name; None measures as often as the budget allows.
            budget: share of the training time, > 0; None sets no limit.

        Raises:
            UserError: two probes of one name; a distance below 1, or none without a budget; a budget out of range.
        """
        self.probes = {probe.name: probe for probe in probes}
        if len(self.probes) < len(probes):
            names = [probe.name for probe in probes]
            raise UserError(f"probes must have different names, got {', '.join(names)}; leave one out")
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise UserError(f"budget must be positive and finite, got {budget}; 0.05 is 5 % of the training time")
        self._every = {
            name: every_steps.get(name) if isinstance(every_steps, Mapping) else every_steps for name in self.probes
        }
        for name, every in self._every.items():
            if every is not None and every < 1:
                raise UserError(f"every_steps of the probe '{name}' must be at least 1, got {every}")
            if every is None and budget is None:
                raise UserError(
                    f"every_steps of the probe '{name}' must be given where there is no budget, got none; give one"
                )
        self.budget = budget
        self.spent_seconds = 0.0
        self._waiting: list[str] = []
        self._last_step: dict[str, int] = {}
        self._seconds_per_gradient: dict[str, float] = {}
        self._began = time.perf_counter()

    def __call__(
        self,
        step: int,
        module: nn.Module,
        loss: Loss,
        host: Host = NOBODY,
        *,
        training_seconds: float | None = None,
        num_steps: int | None = None,
    ) -> Iterator[tuple[str, Estimate]]:
        """Run what is due and can be paid for; yield each estimate with its name.

        A probe that needs what the host does not know yet is left out: there is no update at step 0.

        Args:
            step: updates completed.
            module: see :meth:`Probe.measure`.
            loss: see :meth:`Probe.measure`.
            host: see :meth:`Probe.measure`; its step and allowance are filled in.
            training_seconds: spent on training so far; None takes the time since this was made, less the probes'.
            num_steps: length of the run, where it is known: what is due then is measured at the end.
        """
        if training_seconds is None:
            training_seconds = time.perf_counter() - self._began - self.spent_seconds
        for name in self.due(step, num_steps):
            if name not in self._waiting:
                self._waiting.append(name)
        while self._waiting:
            name = self._waiting[0]
            allowance = self._allowance(step, training_seconds, num_steps)
            expected = self._expected_seconds(name, host.batch_size, step, training_seconds)
            if step != num_steps and expected > allowance:
                return
            self._waiting.remove(name)
            told = dataclasses.replace(host, step=step)
            if not told.answers(self.probes[name].needs):
                continue
            if self.budget is not None and step != num_steps and (rate := self._seconds_per_gradient.get(name)):
                told = dataclasses.replace(told, allowance_gradients=allowance / rate)
            began = time.perf_counter()
            found = self.probes[name].measure(module, loss, told)
            seconds = time.perf_counter() - began
            self._last_step[name] = step
            self.spent_seconds += seconds
            price = math.fsum(estimate.price_gradients for estimate in found.values())
            if price > 0:
                self._seconds_per_gradient[name] = seconds / price
            yield from found.items()

    def due(self, step: int, num_steps: int | None = None) -> list[str]:
        """Return the probes that come due at this step, or wait since an earlier one, longest first."""
        new = [
            name
            for name, every in self._every.items()
            if name not in self._waiting
            and self._last_step.get(name) != step
            and (step == num_steps or every is None or step % every == 0)
        ]
        return self._waiting + sorted(new, key=lambda name: self._last_step.get(name, -1))

    def wants(self, need: Need, step: int, num_steps: int | None = None) -> bool:
        """Return whether a probe that may run at this step needs `need` from the host."""
        return any(need in self.probes[name].needs for name in self.due(step, num_steps))

    def _allowance(self, step: int, training_seconds: float, num_steps: int | None) -> float:
        """Return how many seconds may be spent now; what is put aside for the end is taken off."""
        if self.budget is None:
            return math.inf
        reserve = 0.0
        if num_steps is not None and step < num_steps:
            reserve = math.fsum(
                rate * self.probes[name].price_gradients for name, rate in self._seconds_per_gradient.items()
            )
            reserve *= step / num_steps
        return self.budget * training_seconds - self.spent_seconds - reserve

    def _expected_seconds(self, name: str, batch_size: int, step: int, training_seconds: float) -> float:
        """Return what the next measurement will take; 0 where nothing tells, which lets the first one through."""
        rate = self._seconds_per_gradient.get(name)
        if rate is None:
            num_examples = sum(getattr(item, "num_examples", 0) or _weight(item) for item in self.probes[name].batches)
            if batch_size and not step:
                return math.inf  # the first update will tell
            rate = training_seconds / step * num_examples / batch_size if batch_size else 0.0
        return rate * self.probes[name].price_gradients

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, of the probes too: tensors and plain values."""
        return {
            "spent_seconds": self.spent_seconds,
            "waiting": list(self._waiting),
            "last_step": dict(self._last_step),
            "seconds_per_gradient": dict(self._seconds_per_gradient),
            "probes": {name: probe.state_dict() for name, probe in self.probes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another monitor, for the probes that both have.

        Raises:
            UserError: a probe's state is of another version.
        """
        self.spent_seconds = state["spent_seconds"]
        self._waiting = [name for name in state["waiting"] if name in self.probes]
        self._last_step = {name: step for name, step in state["last_step"].items() if name in self.probes}
        self._seconds_per_gradient = {n: r for n, r in state["seconds_per_gradient"].items() if n in self.probes}
        for name, probe in self.probes.items():
            if name in state["probes"]:
                probe.load_state_dict(state["probes"][name])


def _weight(item: Any) -> float:
    return float(item[1]) if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float)) else 0.0
