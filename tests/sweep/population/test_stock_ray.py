"""The learning rate after a copy: ours, and that of a trainable in the style of Ray's own examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune

from landscape_ray.populations import Decision
from landscape_ray.sweep.population.member import MemberRun
from landscape_ray.sweep.population.orders import Order, Weights
from landscape_ray.sweep.spec import spec_of
from landscape_ray.tracking.collect import collect
from tests.sweep.population.local import make

LR, DECAY = "schedule.peak_lr", "optimizer.weight_decay"


class Usual(tune.Trainable):
    """As `ray/tune/examples/pbt_dcgan_mnist/pbt_dcgan_mnist_trainable.py` saves, loads and takes new values."""

    def setup(self, config: dict[str, Any]) -> None:
        self.module = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=config["lr"])

    def step(self) -> dict[str, Any]:
        self.module(torch.ones(2)).sum().backward()
        self.optimizer.step()
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        content = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(content, Path(checkpoint_dir) / "checkpoint.pt")

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        content = torch.load(Path(checkpoint_dir) / "checkpoint.pt")
        self.module.load_state_dict(content["module"])
        self.optimizer.load_state_dict(content["optimizer"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        for group in self.optimizer.param_groups:
            group["lr"] = new_config["lr"]
        self.config = new_config
        return True


@pytest.mark.acceptance
def test_the_mutated_learning_rate_wins_over_that_of_the_donors_optimizer(
    text: Callable[..., str], tmp_path: Path
) -> None:
    folder = make(tmp_path / "s", text())
    spec, runs = spec_of(folder), []
    for member, lr in enumerate((0.01, 0.03)):
        order = Order(0, Decision(member, "start", {LR: lr, DECAY: 0.0}, 5))
        runs.append(MemberRun(spec, folder.trial(f"t000{member}"), order))
        while not runs[-1].reached:
            runs[-1].advance()
    copy = Decision(1, "exploit", {LR: 0.05, DECAY: 0.0}, 10, donor=0, donor_step=5)
    runs[1].begin(Order(1, copy, Weights(0, 0)))
    while not runs[1].reached:
        runs[1].advance()
    rows = [row for row in collect(folder.path).records.to_pylist() if row["run_id"] == "t0001"]
    assert [row["lr"] for row in rows if row["kind"] == "step" and row["step"] > 5] == [0.05] * 5
    assert {group["lr"] for group in groups(runs[1].state.optimizer.state_dict())} == {0.05}


@pytest.mark.acceptance
@pytest.mark.parametrize("reuse_actors", [True, False], ids=["reused actor", "new actor"])
def test_the_learning_rate_of_rays_copy_is_the_donors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reuse_actors: bool
) -> None:
    """New values first, then the checkpoint: the order in which Ray's driver has an actor do what an exploit is."""
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path))
    donor = Usual({"lr": 0.01})
    donor.train()
    (tmp_path / "saved").mkdir()
    donor.save(str(tmp_path / "saved"))
    if reuse_actors:
        copy = Usual({"lr": 0.03})
        assert copy.reset({"lr": 0.05})
    else:
        copy = Usual({"lr": 0.05})
    copy.restore(str(tmp_path / "saved"))
    assert copy.config["lr"] == 0.05
    assert copy.train()["lr"] == 0.01


def groups(found: Any) -> list[dict[str, Any]]:
    """Return all groups of parameters in what an optimizer saves."""
    if not isinstance(found, dict):
        return [group for each in found for group in groups(each)] if isinstance(found, list | tuple) else []
    own = list(found["param_groups"]) if "param_groups" in found else []
    return own + [group for each in found.values() for group in groups(each)]
