"""The trunk that trials share: checkpoints of a stable phase, from which others branch into their own cooldowns.

Two trials that differ in nothing but their cooldown make the same updates until the first of them begins it. The first
trial to get there leaves checkpoints behind, at multiples of `every_steps`; others load the last one before their own
cooldown instead of making these updates again, and come out the same to the bit (`landscape_ray.schedules.branches`).
Nobody waits: a trial that wants a checkpoint that is not there makes the updates itself, and leaves them to the next.
"""

from __future__ import annotations

from pathlib import Path

from landscape_ray.config import config_id
from landscape_ray.schedules import Schedule
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.training import TrainConfig

COOLDOWN_FIELDS = (
    *("name", "cooldown_fraction", "cooldown_shape", "final_ratio"),
    *("exponent", "power_base", "milestones", "gamma", "points", "range_ratio", "range_shape"),
    *("up_fraction", "initial_ratio", "cycle_shape", "momentum_low", "momentum_high"),
)
"""Fields of the schedule that say nothing about a stable phase."""


def stable_steps(schedule: Schedule) -> int:
    """Return how many updates of a run its trunk can share: all that are made at the peak, and the warm-up before.

    >>> stable_steps(Schedule(name="wsd", peak=1.0, num_steps=100, warmup_steps=10, cooldown_fraction=0.3))
    70
    """
    if schedule.name == "constant":
        return schedule.num_steps
    return schedule.cooldown_start if schedule.name == "wsd" else 0


def thin_trunks(folder: Path) -> None:
    """Keep the last checkpoint of each trunk: a search that has finished needs none, one that is extended may use it.

    Args:
        folder: of the sweep.
    """
    for trunk in (folder / "trunks").glob("*"):
        steps = sorted(int(path.stem) for path in trunk.glob("*.pt") if path.stem.isdigit())
        for step in steps[:-1]:
            (trunk / f"{step}.pt").unlink(missing_ok=True)


class Trunk:
    """The checkpoints that one trial may take from or leave to others.

    Args:
        spec: the sweep; without a table [search.trunk] nothing is shared.
        folder: of the sweep.
        config: of the trial.
    """

    def __init__(self, spec: SweepSpec, folder: Path, config: TrainConfig) -> None:
        table = spec.search.trunk if spec.search is not None else None
        self.every_steps = table.every_steps if table is not None else 0
        self.stable_steps = stable_steps(config.schedule.build(config.num_steps)) if table is not None else 0
        shared = config.model_dump(mode="json", exclude={"eval", "probes"})
        shared["schedule"] = {k: v for k, v in shared["schedule"].items() if k not in COOLDOWN_FIELDS}
        if config.averaging is None:  # where averages begin depends on the length of the run
            del shared["num_steps"]
        self._path = folder / "trunks" / config_id(shared)

    def next_stop(self, step: int) -> int | None:
        """Return the next step at which a checkpoint is left behind, None for none."""
        if not self.every_steps:
            return None
        following = (step // self.every_steps + 1) * self.every_steps
        return following if following <= self.stable_steps else None

    def find(self) -> Path | None:
        """Return the last checkpoint that the trial may begin from."""
        there = {int(path.stem): path for path in self._path.glob("*.pt") if path.stem.isdigit()}
        usable = [step for step in there if step <= self.stable_steps]
        return there[max(usable)] if usable else None

    def wants(self, step: int) -> Path | None:
        """Return where to leave a checkpoint of the present step, None where there is one or none is due."""
        if not self.every_steps or step == 0 or step % self.every_steps or step > self.stable_steps:
            return None
        path = self._path / f"{step}.pt"
        return None if path.exists() else path
