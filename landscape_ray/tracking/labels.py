"""What people see of a sweep in the MLflow UI: plain tags to filter by, and a table of runs that shows what matters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from landscape_ray.config import flatten
from landscape_ray.records import RunSummary
from landscape_ray.text import si
from landscape_ray.tracking import server

VIEW: Final = "landscape_ray"
"""Key of the shared view; the UI keeps such views as tags of the experiment."""

_VIEW_TAG: Final = f"mlflow.sharedViewState.{VIEW}"
_MAX_COLUMNS = 6
_MAX_RUNS = 1000


def task_of(config: Mapping[str, Any]) -> str:
    """Return what a run is trained on, in a word or two.

    >>> task_of({"data": {"name": "images", "source": "digits"}}), task_of({"data": {"source": "/data/books"}})
    ('images digits', 'text books')
    """
    data = config.get("data")
    table = data if isinstance(data, Mapping) else {}
    name, source = str(table.get("name", "text")), table.get("source")
    return f"{name} {str(source).rstrip('/').rpartition('/')[2]}" if source else name


def size_of(summary: RunSummary) -> str:
    """Return the size of a run's model: its family and its parameters; empty when it is not known."""
    if not summary.num_params:
        return ""
    model = summary.config.get("model")
    family = str(model.get("name", "gpt")) if isinstance(model, Mapping) else ""
    return f"{family} {si(summary.num_params).replace(' ', '')}".strip()


def trial_tags(summary: RunSummary) -> dict[str, str]:
    """Return the plain tags of a trial's run, to filter and group by: task and size."""
    tags = {"task": task_of(summary.config) if summary.config else "", "size": size_of(summary)}
    return {name: value for name, value in tags.items() if value}


def show_what_matters(client: MlflowClient, experiment_id: str) -> None:
    """Give an experiment a view of its runs with results and searched values as columns, for all its sweeps.

    The columns follow the newest runs; who changes them in the UI keeps a view of their own.
    """
    found = client.search_runs([experiment_id], run_view_type=ViewType.ACTIVE_ONLY, max_results=_MAX_RUNS)
    client.set_experiment_tag(experiment_id, _VIEW_TAG, json.dumps(view_state(found), separators=(",", ":")))
    for key, value in server.EXPERIMENT_KIND.items():
        client.set_experiment_tag(experiment_id, key, value)


def view_state(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the state of the run table as the UI shares it: columns and order."""
    names = Counter(name for run in runs for name in _varied(run))
    varied = [name for name, _ in names.most_common(_MAX_COLUMNS)]
    columns = ["metrics.`sweep/best_loss_nats`", "metrics.`eval/loss_nats`"]
    columns += [f"params.`{name}`" for name in varied]
    columns += [f"tags.`{name}`" for name in (server.STATUS, "searcher", "strategy", "task", "size")]
    return {
        "selectedColumns": columns,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "searchFilter": "",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
    }


def _varied(run: Run) -> list[str]:
    """Return what was searched in a trial's run."""
    try:
        varied = json.loads(run.data.tags.get(server.SUMMARY, "{}")).get("varied", {})
    except (ValueError, AttributeError):  # cut at the limit of a tag
        return []
    return [server.clean_key(name) for name in flatten(varied)] if isinstance(varied, dict) else []
