"""The table [resources]: what one trial gets, over how many processes, and which nodes will do."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from landscape_ray.config import Model

ACCELERATOR = "accelerator_type:"
"""What Ray calls the resource that tells a node's kind of GPU begins with this."""

GRAIN = 1e-4
"""Ray counts resources in ten-thousandths."""

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"!?(?:in\({_NAME}(?:, *{_NAME})*\)|{_NAME})")
_LABEL_NAME = re.compile(rf"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{{0,251}}[A-Za-z0-9])?/)?{_NAME}")
"""What Ray takes (_private/label_utils.py of 2.60)."""


class ResourcesConfig(Model):
    """The table [resources]: what one trial gets."""

    cpus_per_trial: float = Field(default=1.0, gt=0)
    """Ray CPUs; also the number of torch threads, at least one. Below 1, several trials share a core."""
    gpus_per_trial: float = Field(default=0.0, ge=0)
    """Ray GPUs. Below 1, several trials share one, each with its share of the memory and no more."""
    memory_gib_per_trial: float | None = Field(default=None, gt=0)
    """Memory that Ray sets aside on the trial's node, so that no more trials start there than fit. Default: none."""
    workers: int = Field(default=1, ge=1)
    """Processes that train the model of one trial together, each with an equal part of every batch and of what the
    trial gets: 4 workers and 4 GPUs are one GPU each. Losses are those of one process, up to rounding."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Where the workers of a trial go: pack on few nodes, spread over many, where there is room; strict_pack on one
    node, strict_spread on as many as there are workers, or the trial waits."""
    accelerator: str | None = Field(default=None, min_length=1)
    """Kind of GPU that the trial's nodes must have, by Ray's name of it (H200, A100, T4 ...). Default: any."""
    custom: dict[str, float] = {}
    """What the trial takes of resources that nodes were started with (`ray start --resources`), by name."""
    labels: dict[str, str] = {}
    """Labels that the trial's nodes must have (`ray start --labels`): value, !value, in(a, b) or !in(a, b)."""
    max_failures: int = Field(default=1, ge=0)
    """How often a trial is started again, from its last checkpoint, after it raised or its process or node was lost.
    Also how often a member of a population that has failed so often is replaced by a copy of another, at least once."""
    max_report_seconds: float | None = Field(default=None, gt=0)
    """Longest time between two commits of a trial, its start included. A trial that takes longer hangs: its process is
    ended, which counts as a failure. Default: no limit."""

    max_disk_gib: float | None = Field(default=None, gt=0)
    """Most that the sweep may take of a machine's disk. Over it, checkpoints go that nothing needs any more; where that
    is not enough, the sweep pauses. Default: no limit."""

    @model_validator(mode="after")
    def _consistent(self) -> ResourcesConfig:
        if self.workers == 1 and self.placement != "pack":
            raise ValueError(f"placement needs workers > 1, got '{self.placement}' for one worker; leave it out")
        each = "" if self.workers == 1 else f" for each of {self.workers} workers"
        if (gpus := self.gpus_per_trial / self.workers) > 1 and gpus % 1:
            raise ValueError(f"gpus_per_trial must be a whole number, or at most 1,{each} got {self.gpus_per_trial:g}")
        for name, amount in self.custom.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory") or name.startswith(ACCELERATOR):
                raise ValueError(f"custom.{name} must be a resource of yours; CPUs, GPUs, memory have their own fields")
            share = amount / self.workers
            if share < GRAIN or (share > 1 and share % 1):
                raise ValueError(
                    f"custom.{name} must be a whole number, or between {GRAIN} and 1,{each} got {amount:g}"
                )
        for name, wanted in self.labels.items():
            if not _LABEL_NAME.fullmatch(name):
                raise ValueError(f"labels must have names of letters, digits, '-', '_', '.' and one '/', got '{name}'")
            if not _LABEL.fullmatch(wanted):
                raise ValueError(f"labels.{name} must be value, !value, in(a, b) or !in(a, b), got '{wanted}'")
        return self

    @property
    def num_threads(self) -> int:
        """Torch threads of a worker."""
        return max(1, int(self.cpus_per_trial / self.workers))

    @property
    def gpus_per_worker(self) -> float:
        """Ray GPUs of a worker."""
        return self.gpus_per_trial / self.workers

    @property
    def label_selector(self) -> dict[str, str]:
        """Labels as Ray asks nodes for them. It would take a space after a comma for a part of the value."""
        return {name: wanted.replace(" ", "") for name, wanted in self.labels.items()}

    @property
    def share(self) -> dict[str, float]:
        """What one worker takes of its node, by Ray's names."""
        whole = {"CPU": self.cpus_per_trial, "GPU": self.gpus_per_trial, **self.custom}
        if self.memory_gib_per_trial is not None:
            whole["memory"] = self.memory_gib_per_trial * 2**30
        share = {name: amount / self.workers for name, amount in whole.items() if amount}
        if self.accelerator is not None:
            share[f"{ACCELERATOR}{self.accelerator}"] = 0.001  # as Ray itself asks for one: it bounds nothing
        return share


def label_fits(wanted: str, label: str | None) -> bool:
    """Return whether a node's label, None for none, is one that is asked for.

    >>> label_fits("in(a, b)", "b"), label_fits("!spot", None), label_fits("eu", "us")
    (True, True, False)
    """
    positive = not wanted.startswith("!")
    text = wanted.removeprefix("!")
    choices = [each.strip() for each in text[3:-1].split(",")] if text.startswith("in(") else [text]
    return (label in choices) is positive
