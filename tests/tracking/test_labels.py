"""What the run table of the MLflow UI is told to show."""

from __future__ import annotations

import json
import shutil

import pytest

from landscape_ray.records import RunSummary
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.labels import VIEW, size_of, task_of, trial_tags
from landscape_ray.tracking.projector import Projector
from landscape_ray.tracking.server import find_runs, open_client
from landscape_ray.tracking.ui import start_page


@pytest.fixture(scope="module")
def store(search_folder, store_template, tmp_path_factory):
    """The address of a store with a finished search."""
    results = tmp_path_factory.mktemp("results")
    shutil.copy(store_template, results / "mlflow.db")
    folder = SweepFolder(shutil.copytree(search_folder.path, results / "search"))
    uri = f"sqlite:///{results / 'mlflow.db'}"
    assert Projector(folder, uri, "schedules").close(timeout_seconds=120).error == ""
    return uri


def test_the_ui_opens_on_results_and_searched_values(store):
    page = start_page(store)
    client = open_client(store)
    experiment = client.get_experiment_by_name("schedules")
    assert page == f"experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    columns = json.loads(experiment.tags[f"mlflow.sharedViewState.{VIEW}"])["selectedColumns"]
    varied = ["schedule.name", "schedule.peak_lr", "schedule.cooldown_fraction"]
    assert columns[:2] == ["metrics.`sweep/best_loss_nats`", "metrics.`eval/loss_nats`"]
    assert sorted(columns[2:5]) == sorted(f"params.`{name}`" for name in varied)
    assert {"tags.`searcher`", "tags.`task`", "tags.`size`"} < set(columns)


def test_the_experiment_opens_in_the_view_for_training(store):
    tags = open_client(store).get_experiment_by_name("schedules").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_trials_can_be_filtered_by_task_and_size(store):
    client = open_client(store)
    experiment = client.get_experiment_by_name("schedules").experiment_id
    trials = [run for run in find_runs(client, experiment) if run.data.tags["landscape_ray.kind"] == "trial"]
    assert len(trials) == 12
    assert {(run.data.tags["task"], run.data.tags["size"]) for run in trials} == {("text stdlib", "gpt 216k")}


def test_a_store_without_an_experiment_opens_on_the_list(store_template, tmp_path):
    shutil.copy(store_template, tmp_path / "mlflow.db")
    assert start_page(f"sqlite:///{tmp_path / 'mlflow.db'}") == "experiments?workflowType=machine_learning"


def test_tags_of_a_trial_that_never_began():
    assert trial_tags(RunSummary(run_id="t0", status="failed", config={}, varied={})) == {}
    assert task_of({}) == "text"
    known = RunSummary(run_id="t0", status="failed", config={"model": "odd"}, varied={}, num_params=1_500_000)
    assert size_of(known) == "1.5M"
