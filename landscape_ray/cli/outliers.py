"""What `landscape-ray probe --outliers` prints and draws: the examples with opposing signals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from landscape_ray.cli.shared import shown

if TYPE_CHECKING:
    from rich.console import Console

    from landscape_ray.training.inspection import OutlyingExamples


def show_outliers(outliers: OutlyingExamples, run_id: str, out: Path, console: Console) -> dict[str, Any]:
    """Print the groups, draw them where they are images, and return the numbers.

    Args:
        outliers: what was found.
        run_id: of the run.
        out: folder for the picture.
        console: to print to.
    """
    from landscape_ray.files import write_atomic
    from landscape_ray.reports.examples import groups_picture, groups_sentence, groups_table

    found, changes = outliers.found, outliers.changes.tolist()
    examples = [*found.decreasing.tolist(), *found.increasing.tolist()]
    targets = [_spoken(target) for target in outliers.targets.tolist()]
    said = groups_sentence(
        found.cosine.value,
        found.cosine.standard_error,
        found.p_value.value,
        found.movement_share,
        outliers.num_examples,
        len(found.decreasing),
    )
    console.print(said, highlight=False, soft_wrap=True)
    console.print(groups_table(examples, changes, targets, outliers.texts), highlight=False, crop=False)
    if outliers.inputs.dim() == 4:
        picture = out / f"outliers-{run_id}.png"
        title = f"Examples with opposing signals: {run_id}"
        write_atomic(picture, groups_picture(outliers.inputs.numpy(), changes, targets, title))
        console.print(f"figure: {shown(picture)}", highlight=False, soft_wrap=True)
    return {
        "cosine": found.cosine.value,
        "cosine_standard_error": found.cosine.standard_error,
        "p_value": found.p_value.value,
        "movement_share": found.movement_share,
        "curvature_share": found.curvature_share,
        "num_examples": outliers.num_examples,
        "decreasing": found.decreasing.tolist(),
        "increasing": found.increasing.tolist(),
        "loss_changes": changes,
    }


def _spoken(target: Any) -> str:
    """Return a target as it is read: a class, or the first values of several."""
    if not isinstance(target, list):
        return str(target)
    more = " ..." if len(target) > 6 else ""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in target[:6]) + more
