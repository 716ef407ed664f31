"""Held-out losses of many members at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from landscape_ray.training.cohort.routes import Program
from landscape_ray.training.loop import Measured
from landscape_ray.training.precision import autocast
from landscape_ray.training.state import TrainState


def held_out(member: TrainState) -> tuple[int | None, int]:
    """Return what the held-out batches depend on, besides the data."""
    return member.config.eval.limit, member.config.eval.batch_size


@torch.no_grad()
def evaluations(programs: Sequence[Program], due: Sequence[int]) -> dict[int, Measured]:
    """Return held-out loss, accuracy and share of the cost for the members that are due, by their places.

    Args:
        programs: of all members, which have equal held-out data.
        due: places of members.
    """
    start, found = time.perf_counter(), {}
    for program in programs:
        members = [k for k in range(program.rows.start, program.rows.stop) if k in due]
        if not members:
            continue
        first, scores = program.members[0], []
        for inputs, targets in first.validation:
            with autocast(first.device, first.config.precision):
                outputs = program.outputs(inputs)
            stacked = targets.expand(len(program.members), *targets.shape)
            scores.append(first.objective.score(outputs, stacked, len(program.members)))
        num_targets = sum(score.num_targets for score in scores)
        losses = (torch.stack([score.loss for score in scores]).sum(0) / num_targets).tolist()
        correct = [score.correct for score in scores if score.correct is not None]
        shares = (torch.stack(correct).sum(0).double() / num_targets).tolist() if correct else None
        for k in members:
            row = k - program.rows.start
            found[k] = losses[row], None if shares is None else shares[row]
    cost = (time.perf_counter() - start) / len(due)
    return {k: (loss, accuracy, cost) for k, (loss, accuracy) in found.items()}
