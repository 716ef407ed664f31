"""The verb that measures a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landscape_ray.cli.outliers import show_outliers
from landscape_ray.cli.shared import (
    DEFAULT_RESULTS,
    OneSweep,
    Results,
    new_console,
    open_sweep,
    plain,
    save_study,
    shown,
)
from landscape_ray.cli.spectra import parsed_sizes, show_spectra


def probe(
    sweep: OneSweep = None,
    run: Annotated[str | None, typer.Option("--run", help="Identifier of the run; default: the best one.")] = None,
    probes: Annotated[
        str, typer.Option("--probes", help="Names, separated by commas; default: those that the run had.")
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in the probe batch.")] = 256,
    num_batches: Annotated[
        int | None, typer.Option(min=1, help="How many such batches; default: what each probe takes.")
    ] = None,
    double: Annotated[bool, typer.Option("--double", help="Measure in double precision.")] = False,
    density: Annotated[bool, typer.Option("--density", help="Draw the spectral density of the Hessian.")] = False,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Show the examples that the next update helps and harms most.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show the largest and smallest Hessian eigenvalues of each layer.")
    ] = False,
    classes: Annotated[
        bool, typer.Option("--classes", help="Show those of the loss on each class, or band of frequent tokens.")
    ] = False,
    batch_sizes: Annotated[
        str,
        typer.Option("--batch-sizes", help="Show those on batches of these sizes, against the whole: 8,32,128."),
    ] = "",
    num_eigenvalues: Annotated[
        int, typer.Option("--num-eigenvalues", min=1, help="Largest ones of each layer and class.")
    ] = 3,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for numbers and figures; default: fits/ of the sweep.")
    ] = None,
) -> None:
    """Measure the last checkpoint of a run: sharpness, trace, noise scale ... or the whole spectrum."""
    import json

    from landscape_ray.files import write_atomic
    from landscape_ray.reports.inspection import density_figure, probe_table
    from landscape_ray.sweep.run import checkpoint_of
    from landscape_ray.training.inspection import inspect

    console = new_console()
    sizes = parsed_sizes(batch_sizes)
    folder = open_sweep(sweep, results, checkpoints=True)
    run_id, path = checkpoint_of(folder, run)
    with console.status("measuring ...") as status:
        found = inspect(
            path,
            [name.strip() for name in probes.split(",") if name.strip()],
            batch_size=batch_size,
            num_batches=num_batches,
            density=density,
            outliers=outliers,
            by_layer=layers,
            by_target=classes,
            batch_sizes=sizes,
            num_eigenvalues=num_eigenvalues,
            double=double,
            progress=lambda name: status.update(f"measuring {name} ..."),
        )
    rows = {
        name: (
            e.value,
            e.standard_error,
            e.converged,
            e.price_gradients,
            e.cost_seconds,
            found.num_examples.get(name, 0),
        )
        for name, e in found.estimates.items()
    }
    title = f"{run_id} after {found.step} updates, on its training data"
    console.print(probe_table(title, rows), crop=False)
    for name, reason in found.unknown.items():
        console.print(f"[yellow]{name}: left out, {reason}[/yellow]", highlight=False)
    numbers: dict[str, object] = {"run_id": run_id, "step": found.step}
    fields = ("value", "standard_error", "converged", "price_gradients", "cost_seconds", "num_examples")
    numbers["estimates"] = {name: dict(zip(fields, row, strict=True)) for name, row in rows.items()}
    target = out if out is not None else folder.fits_path
    if found.density is not None:
        spectrum = found.density
        error = spectrum.density_error
        figure = density_figure(
            run_id,
            spectrum.grid.numpy(),
            spectrum.density.numpy(),
            None if error is None else error.numpy(),
            outliers=spectrum.outliers.numpy(),
            bulk=(spectrum.bulk_lower.value, spectrum.bulk_upper.value),
            trace=spectrum.trace.value,
            num_params=found.num_params,
        )
        points = {"grid": spectrum.grid.tolist(), "density": spectrum.density.tolist()}
        save_study(figure, {**points, "outliers": spectrum.outliers.tolist()}, target, console)
    if found.outliers is not None:
        numbers["outliers"] = show_outliers(found.outliers, run_id, target, console)
    if found.spectra is not None:
        numbers["spectra"] = show_spectra(found.spectra, run_id, found.num_params, target, console)
    write_atomic(target / f"probes-{run_id}.json", json.dumps(plain(numbers), indent=1) + "\n")
    console.print(f"saved in {shown(target)}", highlight=False, soft_wrap=True)
