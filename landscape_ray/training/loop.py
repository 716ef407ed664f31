"""One loop, a generator of records: whoever consumes them decides where they go."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from landscape_ray.data import Batch
from landscape_ray.records import EvalRecord, EventRecord, ProbeRecord, Record, StepRecord, VariantRecord
from landscape_ray.training.loss import Score
from landscape_ray.training.parallel import total
from landscape_ray.training.precision import autocast, simulate
from landscape_ray.training.probing import host_of, remember_update, weights_before
from landscape_ray.training.sam import ascend
from landscape_ray.training.state import TrainState
from landscape_ray.training.values import Values


def train(state: TrainState, until_step: int | None = None) -> Iterator[Record]:
    """Advance `state`, yielding a record of everything that happens, in order.

    An evaluation or probe that is due at a step runs after the update that reaches the step; all of them run at step
    0 and at the end. A non-finite loss or gradient is not applied: the run ends with a `diverged` event.

    Args:
        state: where to start; holds the result when the generator is exhausted.
        until_step: stop when this many updates are completed; None for the end of the run.

    Yields:
        StepRecord, EvalRecord, VariantRecord, ProbeRecord or EventRecord.
    """
    config = state.config
    end = config.num_steps if until_step is None else min(until_step, config.num_steps)
    values = Values(state)
    yield from observe(state)
    while state.step < end and state.diverged is None:
        yield update(state, values)
        yield from observe(state)


def update(state: TrainState, values: Values) -> Record:
    """Do one optimizer update; return its record, or the event that it could not be done."""
    start = time.perf_counter()
    config, optimizer = state.config, state.optimizer
    lr, momentum = values.apply()

    batch = state.loader.get(config.seed, state.step, config.batch_size)
    parameters = optimizer.parameters
    loss = _gradient(state, batch)
    if (sam := config.sam) is not None:
        with ascend(parameters, sam.rho, sam.adaptive, sam.eta), _buffers_kept(state):
            _gradient(state, batch)
    state.scaler.unscale()
    grad_norm = state.clipper(parameters)
    # one transfer: on a GPU each one waits for everything before it
    seen = torch.stack((loss.double(), grad_norm.double()))
    before = None
    if ahead := optimizer.conditional and config.precision != "float16":
        seen = seen.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        arrived.record()
        before = weights_before(state)
        optimizer.step(loss.isfinite() & grad_norm.isfinite())  # or not: the GPU goes on while we are told which
        optimizer.zero_grad()
        state.loader.prepare()
        arrived.synchronize()
    else:
        state.loader.prepare()
    loss_nats, norm = seen.tolist()
    # a float16 gradient may overflow: the scaler leaves the update out and lowers its factor, until that is no remedy
    overflow = config.precision == "float16" and state.scaler.factor > 1.0
    if not (math.isfinite(loss_nats) and (math.isfinite(norm) or overflow)):
        return diverge(state, f"loss {loss_nats}, gradient norm {norm} in update {state.step + 1}", lr=lr)
    if not ahead:
        before = weights_before(state)
        state.scaler.step()
    remember_update(state, before)

    state.step += 1
    if state.averager is not None:
        state.averager.update(state.module, state.step)
    num_units = config.batch_size * state.data.signature.units_per_example
    state.num_tokens += num_units
    state.flops += state.flops_per_unit * num_units * (2 if config.sam is not None else 1)
    cost = time.perf_counter() - start
    state.elapsed_seconds += cost
    return StepRecord(
        **progress(state),
        cost_seconds=cost,
        loss_nats=loss_nats,
        grad_norm=norm,
        lr=lr,
        weight_decay=config.optimizer.weight_decay,
        momentum=momentum,
    )


@contextlib.contextmanager
def _buffers_kept(state: TrainState) -> Iterator[None]:
    """Put the buffers back: running statistics are those of the weights of the run, not of where SAM looks."""
    buffers = list(state.module.buffers())
    kept = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, kept, strict=True):
        buffer.copy_(value)


def _gradient(state: TrainState, batch: Batch) -> Tensor:
    """Put the gradient of the mean training loss on a batch into `.grad`; return the loss, 0-d, on the device.

    Args:
        state: the run.
        batch: this process' part of it; gradient and loss are those of the whole.
    """
    config = state.config
    if not state.module.training:  # a walk over all modules
        state.module.train()
    state.optimizer.zero_grad()
    parts = config.accumulation_steps
    rank, size = state.world
    mean = torch.zeros((), device=state.device)
    for index, part in enumerate(zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True)):
        state.module.set_noise(config.seed, (state.step * parts + index) * size + rank)
        with _arithmetic(state):
            loss = state.loss(part)
        state.scaler.scale(loss / parts).backward()  # type: ignore[no-untyped-call]
        mean += loss.detach() / parts
    return state.reduce(mean)


Measured: TypeAlias = tuple[float, float | None, float]
"""Held-out loss, accuracy and what it cost in seconds, measured elsewhere."""


def observe(state: TrainState, measured: Measured | None = None) -> Iterator[Record]:
    """Yield the evaluations and the probes that are due at the present step, each once.

    Args:
        state: the run.
        measured: its evaluation where that has been made already, together with those of other members of a cohort.
    """
    if state.observed_step >= state.step or state.diverged is not None:
        return
    config = state.config
    state.observed_step = state.step
    if due(state, config.eval.every_steps):
        yield evaluate(state, measured)
        if not math.isfinite(state.loss_nats):
            yield diverge(state, f"held-out loss {state.loss_nats} at step {state.step}")
            return
        yield from variants(state)
    yield from probe(state)


def due(state: TrainState, every_steps: int) -> bool:
    """Return whether something that is made every so many updates, and at the end, is due now."""
    return state.step % every_steps == 0 or state.step == state.config.num_steps


def evaluate(state: TrainState, measured: Measured | None = None) -> EvalRecord:
    """Return the mean held-out loss over the fixed validation examples."""
    start = time.perf_counter()
    if measured is None:
        with _evaluating(state):
            loss_nats, accuracy = _mean_loss(state, state.validation)
    else:
        loss_nats, accuracy, seconds = measured
        start -= seconds
    state.loss_nats, state.accuracy = loss_nats, accuracy
    if math.isfinite(loss_nats):
        state.best_loss_nats = min(loss_nats, state.best_loss_nats if math.isfinite(state.best_loss_nats) else math.inf)
    cost = _charge_evaluation(state, start)
    return EvalRecord(**progress(state), cost_seconds=cost, loss_nats=loss_nats, accuracy=accuracy)


def variants(state: TrainState) -> Iterator[VariantRecord]:
    """Yield the evaluations with something changed: averaged weights at every evaluation, shifted data at the end."""
    if state.averager is not None and state.config.averaging is not None and state.averager.count:
        start = time.perf_counter()
        with state.averager.swapped(state.module):
            loss_nats, accuracy = _mean_loss(state, state.validation)
        yield _variant(state, start, state.config.averaging.name, loss_nats, accuracy)
    if state.step == state.config.num_steps:
        for name in state.config.eval.shifts:
            start = time.perf_counter()
            with _evaluating(state):
                loss_nats, accuracy = _mean_loss(state, state.shift_batches(name))
            yield _variant(state, start, name, loss_nats, accuracy)


def _variant(state: TrainState, start: float, variant: str, loss_nats: float, accuracy: float | None) -> VariantRecord:
    cost = _charge_evaluation(state, start)
    return VariantRecord(**progress(state), cost_seconds=cost, variant=variant, loss_nats=loss_nats, accuracy=accuracy)


@contextlib.contextmanager
def _evaluating(state: TrainState) -> Iterator[None]:
    """Have the weights to evaluate in the module: with schedule-free optimizers not those that are trained."""
    state.optimizer.eval()
    try:
        yield
    finally:
        state.optimizer.train()


def _charge_evaluation(state: TrainState, start: float) -> float:
    cost = time.perf_counter() - start
    state.elapsed_seconds += cost
    state.eval_seconds += cost
    return cost


def _mean_loss(state: TrainState, batches: list[Batch]) -> tuple[float, float | None]:
    """Return loss and accuracy over batches of any sizes: sums over targets, divided once."""
    state.module.eval()
    with torch.no_grad(), _arithmetic(state):
        scores = [state.objective.score(state.module(inputs), targets) for inputs, targets in batches]
    if state.world.size > 1:
        return _mean_of_all(state, scores)
    num_targets = sum(score.num_targets for score in scores)
    loss = float(torch.stack([score.loss for score in scores]).cpu().sum()) / num_targets
    correct = [score.correct for score in scores if score.correct is not None]
    return loss, float(torch.stack(correct).cpu().sum()) / num_targets if correct else None


def _mean_of_all(state: TrainState, scores: list[Score]) -> tuple[float, float | None]:
    """Return loss and accuracy over the batches of all processes; this one may have had none."""
    sums = torch.zeros(3, dtype=torch.float64, device=state.device)
    for score in scores:
        sums[0] += score.loss
        sums[1] += score.num_targets
        sums[2] += 0 if score.correct is None else score.correct
    loss, num_targets, correct = total(sums).tolist()
    return loss / num_targets, correct / num_targets if state.objective.classifies else None


def probe(state: TrainState) -> Iterator[ProbeRecord]:
    """Yield the estimates of the probes that are due; the host is as it was afterwards."""
    num_steps = state.config.num_steps
    if not state.monitor.due(state.step, num_steps):
        return
    training_seconds = state.elapsed_seconds - state.eval_seconds - state.probe_seconds
    with _evaluating(state):
        found = list(
            state.monitor(
                state.step,
                state.module,
                state.objective,
                host_of(state),
                training_seconds=training_seconds,
                num_steps=num_steps,
            )
        )
    for name, estimate in found:
        state.elapsed_seconds += estimate.cost_seconds
        state.probe_seconds += estimate.cost_seconds
        yield ProbeRecord(
            **progress(state),
            cost_seconds=estimate.cost_seconds,
            probe=name,
            value=estimate.value,
            standard_error=estimate.standard_error,
            num_matvecs=estimate.num_matvecs,
            price_gradients=estimate.price_gradients,
            converged=int(estimate.converged),
        )


def diverge(state: TrainState, how: str, **detail: float) -> EventRecord:
    """End the run as diverged, which is a result; return the record of it."""
    state.diverged = f"diverged: {how}"
    return EventRecord(**progress(state), event="diverged", detail=json.dumps({"how": how, **detail}))


def progress(state: TrainState) -> dict[str, Any]:
    """Return the fields that all records of this moment share."""
    return {
        "step": state.step,
        "num_tokens": state.num_tokens,
        "flops": state.flops,
        "elapsed_seconds": state.elapsed_seconds,
        "time_unix": time.time(),
    }


@contextlib.contextmanager
def _arithmetic(state: TrainState) -> Iterator[None]:
    """Compute in the precision of the run."""
    simulated = state.config.simulated_precision
    with (
        autocast(state.device, state.config.precision),
        simulate(state.module, simulated) if simulated is not None else contextlib.nullcontext(),
    ):
        yield
