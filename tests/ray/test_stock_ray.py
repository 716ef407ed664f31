"""Faults of Ray Tune's own population-based training in whole runs, as the comparisons in one process have them.

What this package has in their place is shown in tests/populations and tests/sweep/population.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig, Tuner
from ray.tune.error import TuneError
from ray.tune.schedulers import PopulationBasedTraining

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow, pytest.mark.acceptance]

INTERVAL = 4
NUM_STEPS = 32


class Member(tune.Trainable):
    """A network that is a number of updates; its optimizer remembers a learning rate, as PyTorch's do."""

    def setup(self, config: dict[str, Any]) -> None:
        self.updates, self.optimizer, self.loaded = 0, {"lr": config["lr"]}, -1

    def step(self) -> dict[str, Any]:
        number = int(self.trial_name[-5:])  # a copy has the whole configuration of its donor
        time.sleep(0.2 if number else 0.1)  # the donor is ahead of the other one
        self.updates += 1
        found = {"loss": number, "applied": self.optimizer["lr"], "loaded": self.loaded}
        self.loaded = -1
        return {**found, "updates": self.updates, "done": self.updates >= NUM_STEPS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        content = {"updates": self.updates, "optimizer": self.optimizer}
        (Path(checkpoint_dir) / "state.json").write_text(json.dumps(content))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        content = json.loads((Path(checkpoint_dir) / "state.json").read_text())
        self.updates = self.loaded = content["updates"]
        self.optimizer = content["optimizer"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        self.setup(new_config)
        return True


class Seen(Callback):
    """Keeps all results; ends the experiment after so many, or when nothing more comes."""

    def __init__(self, most: int | None = None) -> None:
        self.results: list[dict[str, Any]] = []
        self.most, self.last = most, time.monotonic()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.results.append({**result, "config": dict(trial.config)})
        self.last = time.monotonic()
        if len(self.results) == self.most:
            raise RuntimeError("the driver dies")

    def on_step_begin(self, iteration: int, trials: Any, **_: Any) -> None:
        if self.results and time.monotonic() - self.last > 10:
            raise TimeoutError("nothing happens any more")

    def __getstate__(self) -> dict[str, Any]:
        return {"most": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["most"])  # type: ignore[misc]  # a new driver


def population(folder: Path, seen: Seen, *, synch: bool) -> Tuner:
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=INTERVAL,
        quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 1e-1)},
        synch=synch,
    )
    return Tuner(
        tune.with_resources(Member, {"cpu": 1}),
        param_space={"lr": 0.01},
        tune_config=TuneConfig(metric="loss", mode="min", scheduler=scheduler, reuse_actors=True, num_samples=2),
        run_config=RunConfig(
            name="stock",
            storage_path=str(folder),
            callbacks=[seen],
            verbose=0,  # and all checkpoints are kept: with only some, a copy may ask for one that is gone
        ),
    )


def test_a_copy_goes_on_under_the_donors_learning_rate(tmp_path: Path) -> None:
    seen = Seen()
    found = population(tmp_path, seen, synch=False).fit()
    assert not found.errors
    begun = [result for result in seen.results if result["loaded"] >= 0]
    copies = [result for result in begun if result["config"]["lr"] != 0.01]  # the others were paused, and go on
    assert copies
    assert {result["applied"] for result in copies} == {0.01}, "that of the donor"


def test_a_synchronous_population_hangs_after_its_driver_has_died(tmp_path: Path) -> None:
    with pytest.raises(TuneError, match="the driver dies"):
        population(tmp_path, Seen(most=2 * 2 * INTERVAL + 2), synch=True).fit()
    restored = Tuner.restore(str(tmp_path / "stock"), trainable=tune.with_resources(Member, {"cpu": 1}))
    with pytest.raises(TimeoutError, match="nothing happens any more"):
        restored.fit()
