"""Sweeps as TensorBoard event files, one run a trial, under the names that MLflow has them under."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from landscape_ray.config import flatten
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary, metrics
from landscape_ray.tracking.parts import read_part

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder


def write_events(folder: SweepFolder, out: Path) -> list[Path]:
    """Write the committed rows of every trial, at full resolution, and return the folders that were made.

    Numbers become scalars at their step, with the time at which they were measured; exploits and other events become
    text; searched values with the final loss go to the table of hyperparameters.

    Args:
        folder: the sweep.
        out: where to; a folder a trial is made in it.

    Raises:
        UserError: tensorboardX is missing, no trial has committed anything, or a trial's folder is there already: event
            files are appended to, and a second copy would double every curve.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "TensorBoard files need the package tensorboardX; install it: pip install tensorboardX"
        ) from None

    made = []
    for trial in folder.trials():
        commit = trial.read()
        if commit is None or not commit.num_parts:
            continue
        place = out / trial.trial_id
        if place.exists():
            raise UserError(f"{place} exists; delete it, or write to another folder with --tensorboard")
        with SummaryWriter(str(place), write_to_disk=True) as writer:
            for index in range(commit.num_parts):
                for row in read_part(trial.part_path(index)).to_pylist():
                    _write_row(writer, row)
            _write_hyperparameters(writer, commit.summary)
        made.append(place)
    if not made:
        raise UserError(f"sweep '{folder.path.name}' has committed nothing yet; wait for the first checkpoint")
    return made


def _write_row(writer: Any, row: dict[str, Any]) -> None:
    at = {"global_step": row["step"], "walltime": row["time_unix"]}
    for name, value in metrics(row).items():
        writer.add_scalar(name, value, **at)
    if row["kind"] == "event":
        donor = f" from {row['donor']} at step {row['donor_step']}" if row["donor"] else ""
        writer.add_text(f"event/{row['event']}", f"{row['event']}{donor}: `{row['detail']}`", **at)


def _write_hyperparameters(writer: Any, summary: RunSummary) -> None:
    from tensorboardX.summary import hparams

    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flatten(summary.varied).items()
        if value is not None
    }
    if values:
        for part in hparams(values, {"eval/loss_nats": summary.final_loss_nats}):
            writer.file_writer.add_summary(part)
