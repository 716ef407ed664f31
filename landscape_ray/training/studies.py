"""Small studies of a model before a sweep: does the parametrisation transfer, and which learning rates are sane?

    coordinate_check    how far activations move in the first updates, as a function of the width
    lr_transfer         final loss over learning rates and widths: does the best learning rate stay where it is?

References:
    Yang et al. 2022, Tensor Programs V, arXiv 2203.03466 (coordinate check, appendix D.1; transfer, figure 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from landscape_ray.config import parse, with_values
from landscape_ray.data import Data, open_data
from landscape_ray.errors import UserError
from landscape_ray.models import Network
from landscape_ray.training.config import TrainConfig
from landscape_ray.training.loop import train
from landscape_ray.training.loss import Objective
from landscape_ray.training.state import TrainState

Progress = Callable[[str], None]
"""Called with a few words after each run of a study."""


@dataclass(frozen=True, kw_only=True)
class CoordinateCheck:
    """How far the activations of each layer moved.

    Attributes:
        widths: increasing, shape (W,).
        num_steps: updates after which it was measured.
        change: for each layer, root mean square of activation(num_steps) - activation(0) over examples and
            coordinates, mean over seeds, shape (W,).
        initial: likewise, the root mean square of activation(0).
    """

    widths: tuple[int, ...]
    num_steps: int
    change: dict[str, NDArray[np.float64]]
    initial: dict[str, NDArray[np.float64]]

    def slopes(self) -> dict[str, float]:
        """Return d log(change) / d log(width) of each layer: 0 for a parametrisation that transfers."""
        x = np.log(np.array(self.widths, dtype=np.float64))
        return {layer: float(np.polyfit(x, np.log(values), 1)[0]) for layer, values in self.change.items()}

    @property
    def worst_slope(self) -> float:
        """The slope that is farthest from 0."""
        return max(self.slopes().values(), key=abs)


def with_width(config: TrainConfig, width: int, **values: Any) -> TrainConfig:
    """Return the configuration with another `model.width`, and other values under names with `__` for dots."""
    changes = {"model.width": width, **{name.replace("__", "."): value for name, value in values.items()}}
    return parse(TrainConfig, with_values(config.model_dump(mode="json", exclude_none=True), changes), "study")


def coordinate_check(
    config: TrainConfig,
    widths: Sequence[int],
    *,
    num_steps: int = 8,
    num_seeds: int = 3,
    progress: Progress | None = None,
) -> CoordinateCheck:
    """Return how far activations move in a few updates at a constant learning rate, over widths.

    Layers that differ only by their place in a list of blocks (`blocks.0.up`, `blocks.1.up`) are taken together.

    Args:
        config: of the run; its schedule is replaced by a constant one at its peak.
        widths: two or more values of `model.width`.
        num_steps: updates, >= 1.
        num_seeds: seeds to average over, >= 1.
        progress: called after each run.

    Raises:
        UserError: fewer than two widths, a model without a width, or a run that diverged.
    """
    data, widths = checked_widths(config, widths)
    change: dict[str, list[float]] = {}
    initial: dict[str, list[float]] = {}
    for width in widths:
        sums: dict[str, NDArray[np.float64]] = {}
        for seed in range(config.seed, config.seed + num_seeds):
            run = with_width(config, width, seed=seed, num_steps=num_steps, **CONSTANT)
            state = TrainState(run, data)
            batch = state.validation[0][0]
            before = _activations(state.module, batch)
            for record in train(state):
                _raise_if_diverged(record, f"width {width}")
            after = _activations(state.module, batch)
            for layer, values in before.items():
                moved = _rms(torch.stack([a - b for a, b in zip(after[layer], values, strict=True)]))
                sums[layer] = sums.get(layer, np.zeros(2)) + np.array([moved, _rms(torch.stack(values))])
            if progress is not None:
                progress(f"width {width}, seed {seed}")
        for layer, total in sums.items():
            change.setdefault(layer, []).append(total[0] / num_seeds)
            initial.setdefault(layer, []).append(total[1] / num_seeds)
    return CoordinateCheck(
        widths=widths,
        num_steps=num_steps,
        change={layer: np.array(values) for layer, values in change.items()},
        initial={layer: np.array(values) for layer, values in initial.items()},
    )


CONSTANT = {"schedule__name": "constant", "schedule__warmup_steps": 0, "probes": {}}


@contextmanager
def _recorded(module: Network) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of all layers that have a rule for a weight of more than one axis, the head's among them."""
    found: dict[str, list[Tensor]] = {}

    def record(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, inputs, output: found.setdefault(layer, []).append(output.detach().double())

    handles = []
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "rules") and weight is not None and weight.dim() > 1:
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            handles.append(layer.register_forward_hook(record(kind)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _activations(module: Network, inputs: Tensor) -> dict[str, list[Tensor]]:
    module.eval()
    with _recorded(module) as found:
        module(inputs)
    return found


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class LRTransfer:
    """Final losses over widths and learning rates.

    Attributes:
        widths: increasing, shape (W,).
        peak_lrs: increasing, shape (L,).
        loss: held-out loss at the end, mean over seeds; inf where a seed diverged, shape (W, L).
        spread: standard deviation over seeds (0 for one seed), shape (W, L).
        loss_unit: of the losses.
    """

    widths: tuple[int, ...]
    peak_lrs: tuple[float, ...]
    loss: NDArray[np.float64]
    spread: NDArray[np.float64]
    loss_unit: str

    @property
    def best(self) -> tuple[int, ...]:
        """For each width the position of the learning rate with the lowest loss."""
        return tuple(int(place) for place in np.argmin(self.loss, axis=1))

    @property
    def drift(self) -> int:
        """How many steps of the grid the best learning rate moves over all widths."""
        return max(self.best) - min(self.best)

    @property
    def optimum(self) -> NDArray[np.float64]:
        """For each width the learning rate at the vertex of a parabola in log(lr) through the three lowest neighbours.

        The grid's own where the best one lies at its edge or a neighbour diverged.
        """
        logs = np.log(np.array(self.peak_lrs))
        found = []
        for losses, at in zip(self.loss, self.best, strict=True):
            near = slice(at - 1, at + 2)
            if 0 < at < len(logs) - 1 and np.isfinite(losses[near]).all():
                a, b, _ = np.polyfit(logs[near] - logs[at], losses[near], 2)
                found.append(logs[at] - b / (2 * a) if a > 0 else logs[at])
            else:
                found.append(logs[at])
        return np.asarray(np.exp(np.array(found)))


def lr_transfer(
    config: TrainConfig,
    widths: Sequence[int],
    peak_lrs: Sequence[float],
    *,
    num_seeds: int = 1,
    progress: Progress | None = None,
) -> LRTransfer:
    """Return the final loss over a grid of widths and peak learning rates; every other value stays.

    Args:
        config: of the runs; its schedule is scaled to each peak, evaluations are made at the end only.
        widths: two or more values of `model.width`.
        peak_lrs: three or more learning rates.
        num_seeds: seeds to average over, >= 1.
        progress: called after each run.

    Raises:
        UserError: too few widths or learning rates, or a model without a width.
    """
    data, widths = checked_widths(config, widths)
    rates = tuple(sorted(peak_lrs))
    if len(set(rates)) < 3:
        raise UserError(f"peak_lrs must hold three or more learning rates, got {list(peak_lrs)}; give a grid")
    unit = Objective(config.loss, data.signature).unit
    losses = np.empty((len(widths), len(rates), num_seeds))
    for i, width in enumerate(widths):
        for j, rate in enumerate(rates):
            for k in range(num_seeds):
                run = with_width(
                    config,
                    width,
                    seed=config.seed + k,
                    schedule__peak_lr=rate,
                    eval__every_steps=config.num_steps,
                    probes={},
                )
                state = TrainState(run, data)
                for _ in train(state):
                    pass
                losses[i, j, k] = math.inf if state.diverged is not None else state.loss_nats
                if progress is not None:
                    progress(f"width {width}, peak LR {rate:.2g}: loss {losses[i, j, k]:.4f}")
    finite = np.isfinite(losses).all(axis=-1)
    spread = np.where(finite, np.std(np.where(np.isfinite(losses), losses, 0.0), axis=-1), np.nan)
    return LRTransfer(widths=widths, peak_lrs=rates, loss=losses.mean(axis=-1), spread=spread, loss_unit=unit)


def checked_widths(config: TrainConfig, widths: Sequence[int]) -> tuple[Data, tuple[int, ...]]:
    """Return the data, opened, and the widths in order.

    Raises:
        UserError: fewer than two widths, or a model without a width.
    """
    if not hasattr(config.model, "width"):
        raise UserError(f"model.name must be a model with a width, got '{config.model.name}'; there is nothing to vary")
    ordered = tuple(sorted(set(widths)))
    if len(ordered) < 2:
        raise UserError(f"widths must hold two or more different widths, got {list(widths)}; 64, 128, 256 will do")
    return open_data(config.data), ordered


def _raise_if_diverged(record: Any, where: str) -> None:
    if record.kind == "event" and record.event == "diverged":
        raise UserError(f"the run at {where} diverged at step {record.step}; lower schedule.peak_lr")
