"""Trials of two processes on Ray: the numbers of one process, whatever dies in between."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.run import TrialRun, checkpoint_of
from landscape_ray.sweep.session import Outcome, reason
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.training import read_checkpoint
from tests.ray.test_faults import check_steps, sweep
from tests.ray.test_sweep import check_records, drive, start

SweepText = Callable[..., str]
pytestmark = [pytest.mark.usefixtures("ray_session", "ready_store")]
TWO = {"cpus_per_trial": 2, "workers": 2, "max_failures": 0}
"""An attempt that failed would be made good by the next one, which has new processes."""


def trained(folder: SweepFolder, trial_id: str = "t0000") -> dict[str, Any]:
    """Return the weights and the optimizer's state at the end of a trial."""
    payload = read_checkpoint(checkpoint_of(folder, trial_id)[1])
    return {name: payload[name] for name in ("module", "optimizer", "clipper")}


@pytest.mark.slow
@pytest.mark.acceptance
def test_trials_over_two_processes_are_those_of_one(sweep_text: SweepText, tmp_path: Path) -> None:
    """Two trials one after the other in the same two processes, one of them beginning where nothing was trained."""
    search = {"num_trials": 2, "sampler": "random"}
    folder = start(sweep_text(search=search, resources=TWO), tmp_path)
    outcome, shown = drive(folder)
    assert outcome.counts == {"finished": 2}, shown
    check_records(folder, 2, 10)
    spec = parse(SweepSpec, tomllib.loads(sweep_text(search=search)), "file")
    for trial in folder.trials():
        there = trial.summary()
        assert there is not None
        alone = TrialRun(spec, SweepFolder.create(tmp_path / trial.trial_id, spec_text="", meta={}).trial("t0000"), 0,
                         there.varied)  # fmt: skip
        while not alone.finished:
            alone.advance()
        here = alone.summary()
        assert there.final_loss_nats == pytest.approx(here.final_loss_nats, rel=1e-4)
        assert (there.num_tokens, there.flops) == (here.num_tokens, here.flops)


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_worker_that_dies_costs_an_attempt_and_no_bit(sweep_text: SweepText, tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    (tmp_path / "rough").mkdir()
    calm, _ = run(sweep_text, tmp_path / "calm", [])
    rough, outcome = run(sweep_text, tmp_path / "rough", ["die-1.1", "raise-1.1", "memory-0.1", "die-0.1"])
    assert outcome.counts == {"finished": 1}
    assert list((tmp_path / "rough" / "orders").iterdir()) == [], "all faults have happened"
    check_steps(rough)
    wanted, found = trained(calm), trained(rough)
    for part in wanted:
        pairs = zip(tree_leaves(wanted[part]), tree_leaves(found[part]), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs), part


def run(write: SweepText, path: Path, orders: list[str], **resources: Any) -> tuple[SweepFolder, Outcome]:
    folder, outcome, _ = sweep(write, path, orders, num_trials=1, **{**TWO, "max_failures": 5, **resources})
    return folder, outcome


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("die-1", "a worker process of the trial died or its node was lost"),
        ("raise-1", "a faulty batch"),
        ("memory-1", "lower train.batch_size"),
        ("raise-0", "a faulty batch"),
        ("hang-1", "no commit within resources.max_report_seconds = 40.0"),
    ],
)
def test_what_a_worker_failed_of_reaches_the_user(order: str, said: str, sweep_text: SweepText, tmp_path: Path) -> None:
    limit = {"max_report_seconds": 40.0} if order == "hang-1" else {}
    _, outcome = run(sweep_text, tmp_path, [f"{order}.1"], max_failures=0, **limit)
    assert outcome.counts == {"failed": 1}
    assert list((tmp_path / "orders").iterdir()) == [], "it failed of what it was told to"
    (error,) = outcome.failures.values()
    assert said in reason(error)


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_population_of_members_of_two_processes(
    cpus: int, sweep_text: SweepText, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """Copies of weights and changed values reach the second process, of a member that stays, and of two in turns.

    That both processes have the same weights is looked at after every training.
    """
    population = {"num_members": 2, "interval_steps": 5, "quantile_fraction": 0.5, "synchronous": True}
    text = sweep_text(
        "population", train={**tiny, "num_steps": 20}, population=population, resources={**TWO, "cpus_per_trial": cpus}
    )
    folder = start(text, tmp_path)
    outcome, shown = drive(folder)
    assert outcome.counts == {"finished": 2}, shown
    rows = collect(folder.path).records.to_pylist()
    assert sum(row["event"] == "exploit" for row in rows) == 3
    check_records(folder, 2, 20)


def test_more_workers_than_the_cluster_holds_are_refused(
    sweep_text: SweepText, tiny: dict[str, Any], tmp_path: Path
) -> None:
    folder = start(sweep_text(train=tiny | {"probes": {}}, resources={"cpus_per_trial": 8, "workers": 4}), tmp_path)
    with pytest.raises(UserError, match=r"resources.workers must fit on the cluster, got 4 with placement 'pack'"):
        drive(folder)
    labelled = start(sweep_text(resources={"labels": {"zone": "eu"}}), tmp_path, "labelled")
    with pytest.raises(UserError, match=r"resources.labels must match a node.*got zone = eu; there are: .*2 CPU"):
        drive(labelled)
