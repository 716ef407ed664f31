"""What `landscape-ray probe --layers --classes --batch-sizes` prints and draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landscape_ray.cli.shared import save_study
from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from landscape_ray.probes.spectrum.batch_size import BatchSizeEffect
    from landscape_ray.probes.spectrum.eigenpairs import Eigenvalues
    from landscape_ray.reports.spectra import Part
    from landscape_ray.training.spectra import PartSpectrum, Spectra

LAYER_NOTE = (
    "Eigenvalues of the diagonal block of each layer; all lie between the smallest and the largest of the whole."
)
CLASS_NOTE = "Eigenvalues of the Hessian of the mean loss on the targets of each class; weighted by shares they sum."

BAND_NOTE = "Bands hold the values by how often they occur, the most frequent first, about as many targets in each."


def parsed_sizes(given: str) -> tuple[int, ...]:
    """Return the sizes that `--batch-sizes` lists.

    Raises:
        UserError: something that is no number.
    """
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--batch-sizes must be numbers separated by commas, such as 8,32,128, got '{given}'")
    return tuple(int(part) for part in parts)


def show_spectra(spectra: Spectra, run_id: str, num_params: int, out: Path, console: Console) -> dict[str, Any]:
    """Print and draw what was measured, and return the numbers.

    Args:
        spectra: of the parts of the run.
        run_id: of the run.
        num_params: of the whole network.
        out: folder for the figures.
        console: to print to.
    """
    numbers: dict[str, Any] = {}
    if spectra.whole is not None and spectra.layers:
        numbers["layers"] = _show_parts(
            "layer", "parameters", spectra.whole, f"{num_params:,}", spectra.layers, run_id, out, console
        )
    if spectra.whole is not None and spectra.classes:
        what = "band" if spectra.bands else "class"
        numbers["classes"] = _show_parts(what, "share", spectra.whole, "", spectra.classes, run_id, out, console)
    if spectra.batch_sizes is not None:
        numbers["batch_sizes"] = _show_batch_sizes(spectra.batch_sizes, run_id, out, console)
    return numbers


def _show_parts(
    what: str,
    size: str,
    whole: Eigenvalues,
    whole_size: str,
    parts: Mapping[str, PartSpectrum],
    run_id: str,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    from landscape_ray import text
    from landscape_ray.reports.spectra import part_table, parts_figure

    rows = [_part("whole network" if what == "layer" else "all targets", whole_size, whole)]
    for name, part in parts.items():
        rows.append(_part(name, f"{int(part.size):,}" if what == "layer" else text.percent(part.size), part.found))
    notes = {
        "layer": LAYER_NOTE,
        "class": CLASS_NOTE,
        "band": f"{CLASS_NOTE} {BAND_NOTE}",
    }
    plurals = {"layer": "layers", "class": "classes", "band": "bands of frequency"}
    console.print(part_table(f"spectra of the {plurals[what]}", what, size, rows), highlight=False, crop=False)
    key = f"spectrum-{'layers' if what == 'layer' else 'classes'}-{run_id}"
    figure = parts_figure(key, f"Spectra of the {plurals[what]}: {run_id}", what, rows, note=notes[what])
    numbers = {row.name: {"size": row.size, "largest": row.largest, "smallest": row.smallest} for row in rows}
    save_study(figure, numbers, out, console)
    return numbers


def _part(name: str, size: str, found: Eigenvalues) -> Part:
    from landscape_ray.reports.spectra import Part

    return Part(
        name=name,
        size=size,
        largest=[(e.value, e.standard_error) for e in found.largest],
        smallest=[(e.value, e.standard_error) for e in found.smallest],
        converged=found.converged,
        price_gradients=found.price_gradients,
    )


def _show_batch_sizes(effect: BatchSizeEffect, run_id: str, out: Path, console: Console) -> dict[str, Any]:
    import numpy as np

    from landscape_ray.reports.spectra import SizeRow, batch_size_figure, batch_size_table

    assert effect.full_smallest is not None  # the Hessian has one
    rows = [
        SizeRow(size, (high.value, high.standard_error), (low.value, low.standard_error), effect.predict(size))
        for size, high, low in zip(effect.batch_sizes, effect.largest, effect.smallest, strict=True)
    ]
    high, low = effect.full_largest, effect.full_smallest
    whole = effect.predict(effect.num_examples)
    rows.append(SizeRow(effect.num_examples, (high.value, high.standard_error), (low.value, low.standard_error), whole))
    console.print(batch_size_table("extremal eigenvalues by batch size", rows), highlight=False, crop=False)
    sizes = np.geomspace(effect.batch_sizes[0], effect.num_examples, 60).clip(max=effect.num_examples)
    law = np.array([effect.predict(float(size)) for size in sizes])
    misfit = effect.fit_error_largest, effect.fit_error_smallest
    numbers = {
        "num_examples": effect.num_examples,
        "batch_sizes": effect.batch_sizes,
        "largest": [row.largest for row in rows],
        "smallest": [row.smallest for row in rows],
        "law": [row.expected for row in rows],
        "misfit": misfit,
        "price_gradients": effect.price_gradients,
    }
    save_study(batch_size_figure(run_id, rows, sizes, (law[:, 0], law[:, 1]), misfit), numbers, out, console)
    return numbers
