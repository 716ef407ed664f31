"""One loop, a generator of records: whoever consumes them decides where they go."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape_ray.records import EvalRecord, EventRecord, ProbeRecord, Record, StepRecord
from landscape_ray.schedules import Schedule
from landscape_ray.training.state import TrainState

DROPOUT_STREAM = 1
"""Second entry of the seed of the dropout generator: keeps it apart from the data's draws."""


def next_token_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy in nats per token of `module` on (inputs, targets), each (B, T)."""
    inputs, targets = batch
    return F.cross_entropy(module(inputs).float().flatten(0, 1), targets.flatten())


def train(state: TrainState, until_step: int | None = None) -> Iterator[Record]:
    """Advance `state`, yielding a record of everything that happens, in order.

    An evaluation or probe that is due at a step runs after the update that reaches the step; all of them run at step
    0 and at the end. A non-finite loss or gradient is not applied: the run ends with a `diverged` event.

    Args:
        state: where to start; holds the result when the generator is exhausted.
        until_step: stop when this many updates are completed; None for the end of the run.

    Yields:
        StepRecord, EvalRecord, ProbeRecord or EventRecord.
    """
    config = state.config
    end = config.num_steps if until_step is None else min(until_step, config.num_steps)
    schedule = config.schedule.build(config.num_steps)
    yield from _observe(state)
    while state.step < end and state.diverged is None:
        yield _update(state, schedule)
        yield from _observe(state)


def _update(state: TrainState, schedule: Schedule) -> Record:
    """Do one optimizer update; return its record, or the event that it could not be done."""
    start = time.perf_counter()
    config = state.config
    lr = float(schedule(state.step))
    weight_decay, betas = config.optimizer.weight_decay, (config.optimizer.beta1, config.optimizer.beta2)
    for group in state.optimizer.param_groups:
        group.update(lr=lr, betas=betas, eps=config.optimizer.eps)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0

    inputs, targets = state.data.batch(config.seed, state.step, config.batch_size)
    batch = inputs.to(state.device, non_blocking=True), targets.to(state.device, non_blocking=True)
    state.module.train()
    state.optimizer.zero_grad(set_to_none=True)
    with _dropout_stream(state), _autocast(state):
        loss = next_token_loss(state.forward, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    clip = config.optimizer.grad_clip or math.inf
    grad_norm = float(torch.nn.utils.clip_grad_norm_(state.module.parameters(), clip))
    loss_nats = float(loss.detach())
    if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
        return _diverge(state, f"loss {loss_nats}, gradient norm {grad_norm} in update {state.step + 1}", lr=lr)
    state.optimizer.step()

    state.step += 1
    state.num_tokens += inputs.numel()
    state.flops += state.module.flops_per_token() * inputs.numel()
    cost = time.perf_counter() - start
    state.elapsed_seconds += cost
    return StepRecord(
        **_progress(state),
        cost_seconds=cost,
        loss_nats=loss_nats,
        grad_norm=grad_norm,
        lr=lr,
        weight_decay=weight_decay,
        momentum=betas[0],
    )


def _observe(state: TrainState) -> Iterator[Record]:
    """Yield the evaluation and the probes that are due at the present step, each once."""
    if state.observed_step >= state.step or state.diverged is not None:
        return
    config = state.config
    state.observed_step = state.step
    if _due(state, config.eval.every_steps):
        yield _evaluate(state)
        if not math.isfinite(state.loss_nats):
            yield _diverge(state, f"held-out loss {state.loss_nats} at step {state.step}")
            return
    if config.probes.sharpness is not None and _due(state, config.probes.sharpness.every_steps):
        yield _probe(state, "sharpness")


def _due(state: TrainState, every_steps: int) -> bool:
    return state.step % every_steps == 0 or state.step == state.config.num_steps


def _evaluate(state: TrainState) -> EvalRecord:
    """Return the mean held-out loss over the fixed validation windows."""
    start = time.perf_counter()
    state.module.eval()
    with torch.no_grad(), _autocast(state):
        # equally sized batches: the mean of means is the mean over tokens
        losses = [next_token_loss(state.module, batch) for batch in state.validation]
        sizes = torch.tensor([batch[1].numel() for batch in state.validation], dtype=torch.float64)
    loss_nats = float((torch.stack(losses).double().cpu() * sizes).sum() / sizes.sum())
    state.loss_nats = loss_nats
    if math.isfinite(loss_nats):
        state.best_loss_nats = min(loss_nats, state.best_loss_nats if math.isfinite(state.best_loss_nats) else math.inf)
    cost = time.perf_counter() - start
    state.elapsed_seconds += cost
    state.eval_seconds += cost
    return EvalRecord(**_progress(state), cost_seconds=cost, loss_nats=loss_nats)


def _probe(state: TrainState, name: str) -> ProbeRecord:
    """Return the estimate of one probe; the host is as it was afterwards."""
    start = time.perf_counter()
    estimate = state.probes[name].measure(state.module, next_token_loss)
    cost = time.perf_counter() - start
    state.elapsed_seconds += cost
    state.probe_seconds += cost
    return ProbeRecord(
        **_progress(state),
        cost_seconds=cost,
        probe=name,
        value=estimate.value,
        standard_error=estimate.standard_error,
        num_matvecs=estimate.num_matvecs,
    )


def _diverge(state: TrainState, how: str, **detail: float) -> EventRecord:
    state.diverged = f"diverged: {how}"
    return EventRecord(**_progress(state), event="diverged", detail=json.dumps({"how": how, **detail}))


def _progress(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "num_tokens": state.num_tokens,
        "flops": state.flops,
        "elapsed_seconds": state.elapsed_seconds,
        "time_unix": time.time(),
    }


def _autocast(state: TrainState) -> contextlib.AbstractContextManager[Any]:
    if state.config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(state.device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def _dropout_stream(state: TrainState) -> Iterator[None]:
    """Make dropout a function of (seed, step) and leave the global generators as they were."""
    if state.config.model.dropout == 0.0:
        yield
        return
    seed = np.random.SeedSequence([state.config.seed, state.step, DROPOUT_STREAM]).generate_state(1, np.uint64)[0]
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(seed))
        yield
