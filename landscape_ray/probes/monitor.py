"""Several probes along a run, each when it is due, all of them within a budget of time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import slowest
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.probe import NOBODY, Host, Need, Probe


class Monitor:
    """Decides after each update which probes to run, and runs them.

    A probe is due every so many steps, at step 0 and at the end. With a budget, what is due waits until it can be paid
    for: the time spent on probes, that of the next one included, stays below `budget` times the time spent on training.
    For the measurement at the end, which is always made, a part is put aside all along; what the budget cannot pay for
    is measured only then, cut as short as the probe can be. Those that wait are served in the order in which they came
    due, so that a dear one is not starved by cheap ones. What a probe will cost is told from its price and its past;
    the first time from the time of an update, if the host tells its batch size. What costs nothing does not wait.

    Data-parallel processes go by the clock of the slowest, so that they decide alike.

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
        self._sizes: dict[str, float] = {}
        self._began, self._trained_before, self._spent_before = time.perf_counter(), 0.0, 0.0

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
        due = self.due(step, num_steps)
        self._waiting = [name for name in due if self.probes[name].price_gradients > 0]
        free = [name for name in due if name not in self._waiting]
        if not due:
            return
        if training_seconds is None:
            training_seconds = self._training_seconds()
        device = next(module.parameters()).device if module is not None else torch.device("cpu")
        if not self._sizes:  # of the largest part that a process has, for all alike
            self._sizes = {
                name: slowest(sum(map(_num_examples, probe.batches)), device) for name, probe in self.probes.items()
            }
        clock = _Clock(self, step, slowest(training_seconds, device), num_steps, host.batch_size)
        for name in free + self._waiting:
            if name not in free and not clock.affords(name):
                if clock.hopeless(name):
                    continue  # not before the end: the others need not wait behind it
                break
            if name in self._waiting:
                self._waiting.remove(name)
            told = dataclasses.replace(host, step=step, allowance_gradients=clock.allowance_gradients(name))
            if not told.answers(self.probes[name].needs):
                continue
            began = time.perf_counter()
            found = self.probes[name].measure(module, loss, told)
            seconds = slowest(time.perf_counter() - began, device)
            self._last_step[name] = step
            self.spent_seconds += seconds
            price = math.fsum(estimate.price_gradients for estimate in found.values())
            if price > 0:
                self._seconds_per_gradient[name] = seconds / price
            yield from found.items()

    def due(self, step: int, num_steps: int | None = None) -> list[str]:
        """Return the probes that come due at this step, or wait since an earlier one, longest first."""
        if not self.probes:  # a cohort asks three times for each member and update
            return []
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

    def _training_seconds(self) -> float:
        """Return the time since this was made, or went on from a state, that did not go into probes."""
        return self._trained_before + time.perf_counter() - self._began - (self.spent_seconds - self._spent_before)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, of the probes too: tensors and plain values."""
        return {
            "spent_seconds": self.spent_seconds,
            "training_seconds": self._training_seconds(),
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
        self.spent_seconds = self._spent_before = state["spent_seconds"]
        self._began, self._trained_before = time.perf_counter(), state["training_seconds"]
        self._waiting = [name for name in state["waiting"] if name in self.probes]
        self._last_step = {name: step for name, step in state["last_step"].items() if name in self.probes}
        self._seconds_per_gradient = {n: r for n, r in state["seconds_per_gradient"].items() if n in self.probes}
        for name, probe in self.probes.items():
            if name in state["probes"]:
                probe.load_state_dict(state["probes"][name])


class _Clock:
    """What the budget has to say at one step."""

    def __init__(
        self, monitor: Monitor, step: int, training_seconds: float, num_steps: int | None, batch_size: int
    ) -> None:
        self._monitor, self._training_seconds, self._batch_size = monitor, training_seconds, batch_size
        self._step, self._num_steps = step, num_steps
        self._last = step == num_steps

    def affords(self, name: str) -> bool:
        """Return whether the next measurement of a probe can be paid for now; at the end all are made."""
        return self._last or self._monitor.budget is None or self._expected(name) <= self._left()

    def hopeless(self, name: str) -> bool:
        """Return whether it could not be paid for before the end, by what is known."""
        if self._num_steps is None or not self._step or self._monitor.budget is None:
            return False
        total = self._monitor.budget * self._training_seconds * self._num_steps / self._step
        others = math.fsum(self._expected(other) for other in self._monitor.probes if other != name)
        return self._expected(name) > total - self._monitor.spent_seconds - others

    def allowance_gradients(self, name: str) -> float:
        """Return what a measurement may cost, in gradients; at the end, what there is left."""
        rate = self._rate(name)
        if self._monitor.budget is None or not 0 < rate < math.inf:
            return math.inf
        return max(self._left(), 0.0) / rate

    def _left(self) -> float:
        """Return how many seconds may be spent now; what is put aside for the end is taken off."""
        assert self._monitor.budget is not None
        left = self._monitor.budget * self._training_seconds - self._monitor.spent_seconds
        if self._num_steps is None or self._last:
            return left
        wanted = math.fsum(self._expected(name) for name in self._monitor.probes)
        # what cannot be paid for at all would keep everything else from being measured
        most = 0.5 * self._monitor.budget * self._training_seconds * self._num_steps / max(self._step, 1)
        return left - min(wanted, most) * self._step / self._num_steps

    def _expected(self, name: str) -> float:
        """Return what the next measurement will take, in seconds."""
        price = self._monitor.probes[name].price_gradients
        return self._rate(name) * price if price else 0.0

    def _rate(self, name: str) -> float:
        """Return the seconds that a gradient on the batches of a probe takes.

        0 where nothing tells, which lets the first one through; inf before the first update, which will tell.
        """
        known = self._monitor._seconds_per_gradient.get(name)
        if known is not None:
            return known
        if not self._batch_size:
            return 0.0
        if not self._step:
            return math.inf
        return self._training_seconds / self._step * self._monitor._sizes[name] / self._batch_size


def _num_examples(item: Any) -> float:
    """Return the number of examples of a batch: as it says, by its weight, or by its first tensor."""
    if hasattr(item, "num_examples"):
        return float(item.num_examples)
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float)):
        return float(item[1])
    while isinstance(item, (list, tuple)) and item:
        item = item[0]
    return float(len(item)) if isinstance(item, Tensor) and item.dim() else 1.0
