"""Groups of examples with opposing signals: the examples themselves, in a table or a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from numpy.typing import ArrayLike
from rich.text import Text

from landscape_ray import text
from landscape_ray.reports.figures import palette
from landscape_ray.tables import TextTable

MAX_SHOWN = 8
"""Examples of each group."""

MAX_CHARACTERS = 60
"""Of a text; its end, which is what the last prediction goes by."""

NAMES = ("loss falls", "loss rises")


def groups_sentence(cosine: float, error: float, p_value: float, movement: float, num_examples: int, k: int) -> str:
    """Return what was found about the two groups, in one sentence.

    Args:
        cosine: of their mean gradients.
        error: standard error of it.
        p_value: of the opposition.
        movement: share of the groups in all changes of losses.
        num_examples: that were searched.
        k: examples in each group.
    """
    opposed = cosine < 0 and p_value <= 0.05
    how = "pull against each other" if opposed else "do not pull against each other beyond chance"
    return (
        f"The {text.plural(k, 'example')} whose loss the next update lowers most and the {k} whose loss it raises "
        f"most, of {num_examples}, {how}: cosine of their gradients {text.signed(cosine, 2)} ± "
        f"{text.number(error, 2)}, p = {text.number(p_value, 2)}; they make {text.percent(movement)} of all changes."
    )


def groups_table(
    numbers: Sequence[int], changes: Sequence[float], targets: Sequence[str], texts: Sequence[str] | None
) -> TextTable:
    """Return the examples of both groups as a table, those whose loss falls most first.

    Args:
        numbers: of the examples in the probe batch, both groups beside each other.
        changes: of their losses.
        targets: as they are to be read.
        texts: what the inputs say, where they are text.
    """
    last = "text" if texts is not None else "target"
    table = TextTable(("group", "example", "loss change", last), right=("example", "loss change"), flexible=("text",))
    half = len(numbers) // 2
    for group, name in enumerate(NAMES):
        for place in range(group * half, group * half + min(half, MAX_SHOWN)):
            said = targets[place] if texts is None else repr(texts[place][-MAX_CHARACTERS:])[1:-1]
            first = Text(name if place == group * half else "")
            table.add_row(first, str(numbers[place]), text.signed(changes[place]), Text(said))
    return table


def groups_picture(images: ArrayLike, changes: Sequence[float], targets: Sequence[str], title: str) -> bytes:
    """Return the images of both groups as PNG, one row a group, with class and change of the loss below each.

    Args:
        images: (2 k, channels, height, width), any numbers: stretched to the range of all.
        changes: of their losses.
        targets: their classes, as they are to be read.
        title: above all.
    """
    pixels = np.asarray(images, dtype=np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    pixels = (pixels - low) / ((high - low) or 1.0)
    half = len(pixels) // 2
    shown = min(half, MAX_SHOWN)
    colors = palette("light")
    canvas = Canvas(figsize=(8.0, 4.0), dpi=160, layout="constrained", facecolor=colors["ground"])
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(2, shown, squeeze=False)
    for group, name in enumerate(NAMES):
        for column in range(shown):
            place, ax = group * half + column, grid[group][column]
            image = pixels[place].transpose(1, 2, 0)
            ax.imshow(image[..., 0] if image.shape[2] != 3 else image, cmap="gray", vmin=0.0, vmax=1.0)
            caption = f"class {targets[place]}\n{text.signed(changes[place], 3)}"
            ax.set_xlabel(caption, fontsize=8, color=colors["faint"])
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set_visible(False)
        grid[group][0].set_ylabel(name, fontsize=10, color=colors["text"])
    canvas.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=colors["text"])
    out = io.BytesIO()
    canvas.savefig(out, format="png", facecolor=colors["ground"], metadata={"Software": None})
    return out.getvalue()
