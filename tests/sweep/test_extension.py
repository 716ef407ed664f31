"""A sweep under another budget: what may change, and what is refused with a reason."""

import io
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.sweep.extension import extend
from landscape_ray.sweep.session import new_sweep, train_one
from landscape_ray.sweep.spec import SweepSpec, spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder

SweepText = Callable[..., str]


def launched(text: str, path: Path) -> SweepFolder:
    return new_sweep(parse(SweepSpec, tomllib.loads(text), "file"), text, path / "runs", "s", None)


def begin(folder: SweepFolder, *trials: str, status: Any = "finished") -> None:
    for name in trials:
        folder.trial(name).commit(RunSummary(run_id=name, status=status, config={}, varied={}), 0)


def test_more_trials_and_fewer_than_planned(sweep_text: SweepText, tmp_path: Path) -> None:
    folder = launched(sweep_text(search={"num_trials": 5}), tmp_path)
    begin(folder, "t0000", "t0001", "t0002")
    folder.update_meta(status="finished")
    assert extend(folder, num_trials=9) == {"search.num_trials": 9}
    assert spec_of(folder).num_trials == 9
    assert folder.meta["status"] == "interrupted"
    assert folder.meta["num_trials"] == 9
    assert extend(folder, num_trials=3) == {"search.num_trials": 3}
    assert 'num_trials" = 5' in folder.spec_text, "the file stays as it was launched"
    with pytest.raises(UserError, match=r"search.num_trials must be at least the 3 trials that were begun, got 2"):
        extend(folder, num_trials=2)


def test_nothing_to_change_changes_nothing(sweep_text: SweepText, tmp_path: Path) -> None:
    folder = launched(sweep_text(), tmp_path)
    meta = folder.meta
    assert extend(folder) == {}
    assert extend(folder, folder.spec_path) == {}
    assert folder.meta == meta


def test_a_population_goes_on_from_its_end(sweep_text: SweepText, tmp_path: Path) -> None:
    folder = launched(sweep_text("population"), tmp_path)
    begin(folder, "t0000", "t0001")
    begin(folder, "t0002", status="diverged")
    assert extend(folder, num_steps=30) == {"train.num_steps": 30}
    statuses = {trial.trial_id: trial.read().summary.status for trial in folder.trials()}  # type: ignore[union-attr]
    assert statuses == {"t0000": "pending", "t0001": "pending", "t0002": "diverged"}
    with pytest.raises(UserError, match=r"train.num_steps must be at least the present 30, got 20"):
        extend(folder, num_steps=20)


def test_a_search_keeps_its_length(sweep_text: SweepText, tmp_path: Path) -> None:
    folder = launched(sweep_text(), tmp_path)
    with pytest.raises(UserError, match=r"train.num_steps cannot change from 10 to 30 in a search: .*warm_start"):
        extend(folder, num_steps=30)


def test_another_file_may_differ_in_the_budget_only(
    sweep_text: SweepText, tiny: dict[str, Any], tmp_path: Path
) -> None:
    folder = launched(sweep_text(), tmp_path)
    file = tmp_path / "new.toml"
    file.write_text(sweep_text(resources={"cpus_per_trial": 0.25, "max_failures": 3}, description="more"))
    assert extend(folder, file) == {
        "description": "more",
        "resources.cpus_per_trial": 0.25,
        "resources.max_failures": 3,
    }
    for changes, field in (
        ({"seed": 2}, "seed cannot change from 1 to 2"),
        ({"train": {**tiny, "batch_size": 8}}, "train.batch_size cannot change from 4 to 8"),
        ({"commit_steps": 4}, "commit_steps cannot change from 5 to 4"),
    ):
        file.write_text(sweep_text(**changes))
        with pytest.raises(UserError, match=f"{field} in a sweep that has begun: its trials would not compare"):
            extend(folder, file)
    assert spec_of(folder).resources.max_failures == 3, "what was refused changed nothing"


def test_names_of_nodes_and_resources_may_have_dots_and_may_go(sweep_text: SweepText, tmp_path: Path) -> None:
    """Ray's own labels have dots: ray.io/region. Changes are kept under dotted names."""
    folder = launched(sweep_text(resources={"labels": {"ray.io/region": "eu", "zone": "a"}}), tmp_path)
    file = tmp_path / "new.toml"
    for given in (
        {"labels": {"ray.io/region": "us", "a.b": "!c"}, "custom": {"site.fast": 1.0}},
        {"labels": {"a.b": "d"}, "custom": {"site.slow": 0.5, "x": 2.0}},
        {"labels": {}},
    ):
        file.write_text(sweep_text(resources=given))
        changes = extend(folder, file)
        found = spec_of(folder).resources
        assert (found.labels, found.custom) == (given["labels"], given.get("custom", {}))
        assert changes["resources.labels"] == given["labels"], "a table in one piece"
        assert extend(folder, file) == {}


def test_an_edited_copy_is_noticed(sweep_text: SweepText, tmp_path: Path) -> None:
    folder = launched(sweep_text(), tmp_path)
    folder.spec_path.write_text(sweep_text(seed=5))
    with pytest.raises(UserError, match=r"spec.toml was edited after the launch.*--num-trials"):
        extend(folder)


def test_a_sweep_that_is_running_is_left_alone(sweep_text: SweepText, tmp_path: Path) -> None:
    folder = launched(sweep_text(), tmp_path)
    with folder.lock(), pytest.raises(UserError, match=r"is already being run by process"):
        extend(folder, num_trials=7)


@pytest.mark.acceptance
def test_a_single_run_goes_on_and_records_every_step_once(
    sweep_text: SweepText, tiny: dict[str, Any], tmp_path: Path, store_template: Path
) -> None:
    train = {**tiny, "schedule": {"name": "constant", "peak_lr": 0.01}}
    folder = launched(sweep_text("population", train=train), tmp_path)
    folder.update_meta(single_run=True)
    (tmp_path / "runs" / "mlflow.db").write_bytes(store_template.read_bytes())
    console = Console(file=io.StringIO())
    assert train_one(folder, console).status == "finished"
    extend(folder, num_steps=20)
    outcome = train_one(folder, console)
    assert outcome.status == "finished"
    assert outcome.sync.error == ""
    rows = collect(folder.path).records.to_pylist()
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 21))
    assert json.loads((folder.path / "sweep.json").read_text())["changes"] == {"train.num_steps": 20}
