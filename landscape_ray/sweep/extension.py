"""A sweep goes on under another budget: more trials, or longer ones. What would change what was done is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from landscape_ray.config import parse, read_toml, with_values
from landscape_ray.errors import UserError
from landscape_ray.sweep.run import index_of
from landscape_ray.sweep.spec import CHANGES, SweepSpec
from landscape_ray.tracking.folder import SweepFolder

NUM_TRIALS, NUM_STEPS = "search.num_trials", "train.num_steps"
HARMLESS = ("description", "resources.")
"""Fields, and beginnings of fields, that say how a sweep runs and nothing about its results."""


def text_id(text: str) -> str:
    """Return a short hash of a sweep file's text, by which an edit of a running sweep's own copy is noticed."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def extend(
    folder: SweepFolder, file: Path | None = None, num_trials: int | None = None, num_steps: int | None = None
) -> dict[str, Any]:
    """Change a sweep's budget, or how it runs, before it is resumed; return what changed, by dotted name.

    The copy of the sweep file in the folder stays as it was launched; changes are kept in sweep.json. Members of a
    population, or a single run, that ended at the old length are taken up again.

    Args:
        folder: of the sweep; no driver may be running it.
        file: another sweep file, which may differ in the number of trials, the length, the description and
            [resources] only.
        num_trials: new number of trials of a search.
        num_steps: new length of a population's members, or of a single run.

    Raises:
        UserError: a change that would make the sweep's own results incomparable, with the reason.
    """
    with folder.lock():
        launched = folder.meta.get("spec_text_id")
        if launched is not None and launched != text_id(folder.spec_text):
            raise UserError(
                f"{folder.spec_path} was edited after the launch, which its trials do not know; restore it, and give "
                "changes with --num-trials, --num-steps or --spec"
            )
        before = with_values(read_toml(folder.spec_path), folder.meta.get(CHANGES, {}))
        after = before if file is None else read_toml(file)
        wanted = {NUM_TRIALS: num_trials, NUM_STEPS: num_steps}
        after = with_values(after, {name: value for name, value in wanted.items() if value is not None})
        old = parse(SweepSpec, before, str(folder.spec_path))
        new = parse(SweepSpec, after, str(file or folder.spec_path))
        changes = _differences(old, new)
        for name, value in changes.items():
            if name == NUM_TRIALS:
                _check_num_trials(folder, value)
            elif name == NUM_STEPS:
                _check_num_steps(old, value)
            elif not name.startswith(HARMLESS):
                raise UserError(
                    f"{name} cannot change from {old.params().get(name)!r} to {value!r} in a sweep that has begun: its "
                    "trials would not compare; start a new sweep (search.warm_start takes over what this one knows)"
                )
        if changes:
            kept = {**folder.meta.get(CHANGES, {}), **changes}
            folder.update_meta(**{CHANGES: kept}, status="interrupted", num_trials=new.num_trials)
        if NUM_STEPS in changes:
            for trial in folder.trials():
                if (summary := trial.summary()) is not None and summary.status == "finished":
                    trial.set_status("pending", f"to go on to step {changes[NUM_STEPS]}")
    return changes


def _differences(old: SweepSpec, new: SweepSpec) -> dict[str, Any]:
    """Return the new values of what differs, by dotted name; None for what is no longer there."""
    left, right = _fields(old), _fields(new)
    return {name: right.get(name) for name in [*left, *right] if left.get(name) != right.get(name)}


def _fields(spec: SweepSpec) -> dict[str, Any]:
    """Return the whole file under dotted names, in which tables with names of the user's choice are one value.

    Such names may have dots, as Ray's own labels have, and may be gone from the new file.
    """
    tables = {"resources.labels": spec.resources.labels, "resources.custom": spec.resources.custom}
    parts = tuple(f"{name}." for name in tables)
    return {name: value for name, value in spec.params().items() if not name.startswith(parts)} | tables


def _check_num_trials(folder: SweepFolder, value: int | None) -> None:
    begun = len({index_of(trial.trial_id) for trial in folder.trials()})
    if value is None or value < begun:
        raise UserError(f"search.num_trials must be at least the {begun} trials that were begun, got {value}")


def _check_num_steps(old: SweepSpec, value: int | None) -> None:
    if old.search is not None:
        raise UserError(
            f"train.num_steps cannot change from {old.num_steps} to {value} in a search: trials of different lengths "
            "do not compare, and its sampler has learnt from the short ones; start a new sweep with search.warm_start"
        )
    if value is None or value < old.num_steps:
        raise UserError(f"train.num_steps must be at least the present {old.num_steps}, got {value}")
