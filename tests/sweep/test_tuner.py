"""What the driver keeps of the trials that Ray runs for it."""

import io
from types import SimpleNamespace
from typing import Any

from ray.tune.trainable.metadata import _TrainingRunMetadata
from rich.console import Console

from landscape_ray.sweep.display import Dashboard
from landscape_ray.sweep.tuner import DashboardCallback


class Ended(SimpleNamespace):
    """A trial of Ray's that has ended."""

    def __str__(self) -> str:
        return str(self.trial_id)


def test_rays_statistics_of_a_trial_go_with_its_end() -> None:
    """They are most of what Ray holds of a trial; what is shown and its last result stay."""
    metadata = _TrainingRunMetadata()
    for step in range(3):
        metadata.update_metric("loss_nats", 1.0 / (step + 1), step=step + 1)
    assert metadata.metric_analysis
    metadata.last_result = {"loss_nats": 0.5, "step": 10, "ended": True}
    trial: Any = Ended(
        trial_id="t0000",
        config={"trial": {"values": {"schedule.peak_lr": 0.1}}},
        last_result=metadata.last_result,
        run_metadata=metadata,
    )
    dashboard = Dashboard(Console(file=io.StringIO()), "s", 1, 10)
    DashboardCallback(dashboard).on_trial_complete(0, [trial], trial)
    assert metadata.metric_analysis == metadata.metric_n_steps == {}
    assert metadata.last_result["loss_nats"] == 0.5
    row = dashboard.rows["t0000"]
    assert (row.status, row.step, row.loss_nats) == ("finished", 10, 0.5)
