"""`landscape-ray check`: small studies, each of which draws a figure."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from landscape_ray.cli.shared import Spec, advancing, counting, new_console, save_study
from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from landscape_ray.training import TrainConfig

check = typer.Typer(
    no_args_is_help=True, help="Small studies of models, optimizers and curvature; each draws a figure."
)

Widths = Annotated[str, typer.Option("--widths", help="Values of model.width, separated by commas.")]
Figures = Annotated[Path, typer.Option("--out", help="Folder for the figure (PNG) and the numbers (JSON).")]
Parametrisations = Annotated[
    str, typer.Option("--parametrisations", help="Which of standard, ntk, mup to compare, separated by commas.")
]


@check.command()
def coordinates(
    spec: Spec,
    widths: Widths = "64,128,256,512,1024",
    parametrisations: Parametrisations = "standard,mup",
    num_steps: Annotated[int, typer.Option(min=1, help="Updates before activations are compared.")] = 8,
    num_seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Figures = Path("checks"),
) -> None:
    """Coordinate check: do activations move alike at every width? Flat lines mean that settings transfer."""
    from landscape_ray.reports.studies import coordinate_figure
    from landscape_ray.training.studies import coordinate_check

    console = new_console()
    for name in parametrisations_of(parametrisations):
        config = study_config(spec, name)
        with advancing(console, f"{name}", len(whole_numbers(widths)) * num_seeds) as progress:
            found = coordinate_check(
                config, whole_numbers(widths), num_steps=num_steps, num_seeds=num_seeds, progress=progress
            )
        figure = coordinate_figure(
            found.widths, found.change, found.slopes(), num_steps=num_steps, parametrisation=name
        )
        numbers = {"slopes": found.slopes(), "widths": found.widths, "num_steps": num_steps, "num_seeds": num_seeds}
        numbers["change"] = {layer: values.tolist() for layer, values in found.change.items()}
        save_study(figure, numbers, out, console)


@check.command()
def transfer(
    spec: Spec,
    widths: Widths = "64,128,256,512",
    peak_lrs: Annotated[
        str, typer.Option("--peak-lrs", help="Lowest and highest peak learning rate and their number: low,high,number.")
    ] = "0.0005,0.032,7",
    parametrisations: Parametrisations = "standard,mup",
    num_seeds: Annotated[int, typer.Option(min=1)] = 1,
    out: Figures = Path("checks"),
) -> None:
    """Learning-rate transfer: does the best peak learning rate stay where it is when the model gets wider?"""
    import numpy as np

    from landscape_ray.reports.studies import transfer_figure
    from landscape_ray.training.studies import lr_transfer

    names, grid = parametrisations_of(parametrisations), words(peak_lrs)
    try:
        low, high, number = float(grid[0]), float(grid[1]), int(grid[2])
    except (ValueError, IndexError):
        raise UserError(
            f"--peak-lrs must be low,high,number, got '{peak_lrs}'; 0.001,0.064,7 doubles six times"
        ) from None
    if not (0 < low < high and number >= 3):
        raise UserError(f"--peak-lrs must be 0 < low < high and three or more, got '{peak_lrs}'; try 0.001,0.064,7")
    rates = np.geomspace(low, high, number).tolist()
    console = new_console()
    panels, numbers = {}, {}
    for name in names:
        config = study_config(spec, name)
        with advancing(console, name, len(whole_numbers(widths)) * number * num_seeds) as progress:
            found = lr_transfer(config, whole_numbers(widths), rates, num_seeds=num_seeds, progress=progress)
        panels[name] = (found.widths, found.peak_lrs, found.loss)
        numbers[name] = {
            "widths": found.widths,
            "peak_lrs": found.peak_lrs,
            "loss": [[value if math.isfinite(value) else None for value in row] for row in found.loss.tolist()],
            "best_lr": [found.peak_lrs[place] for place in found.best],
            "interpolated_best_lr": found.optimum.tolist(),
            "drift_steps": found.drift,
        }
    save_study(transfer_figure(panels, loss_unit=found.loss_unit), numbers, out, console)


@check.command(name="range")
def lr_range(
    spec: Spec,
    low: Annotated[float, typer.Option(min=0.0, help="First learning rate.")] = 1e-6,
    high: Annotated[float, typer.Option(min=0.0, help="Last learning rate.")] = 1.0,
    num_steps: Annotated[int, typer.Option(min=20)] = 200,
    out: Figures = Path("checks"),
) -> None:
    """Learning-rate range test: one short run under a growing learning rate suggests a peak."""
    from landscape_ray.reports.studies import range_figure
    from landscape_ray.schedules import analyse_range
    from landscape_ray.training.range_test import range_test

    console = new_console()
    with console.status(f"{num_steps} updates ..."):
        curve = range_test(study_config(spec), low=low, high=high, num_steps=num_steps)
    found = analyse_range(curve.lrs, curve.losses)
    figure = range_figure(
        curve.lrs,
        curve.losses,
        suggested_lr=found.suggested_lr,
        steepest_lr=found.steepest_lr,
        open_end=found.open_end,
        loss_unit="",
    )
    save_study(figure, {**dataclasses.asdict(found), **curve._asdict()}, out, console)


@check.command()
def edge(
    specs: Annotated[
        list[Path],
        typer.Argument(
            metavar="SPEC.toml...", help="Runs on full batches, such as search_spaces/edge_gradient_descent.toml."
        ),
    ],
    out: Figures = Path("checks"),
) -> None:
    """Edge of stability: does the curvature rise to the threshold of the optimizer, and stay there?"""
    from landscape_ray.reports.stability import formula_of
    from landscape_ray.reports.stability_studies import edge_figure
    from landscape_ray.sweep.spec import read_spec
    from landscape_ray.training.stability_studies import follow_edge

    console = new_console()
    for spec in specs:
        name, config = read_spec(spec)[0].name, study_config(spec)
        with counting(console, name, config.num_steps) as progress:
            found = follow_edge(config, progress=progress)
        values = dataclasses.asdict(found)
        state, losses = values.pop("state"), values.pop("losses")
        figure = edge_figure(
            name,
            probe=found.probe,
            formula=formula_of(config.optimizer.model_dump()) or found.optimizer,
            steps=found.steps,
            curvature=found.curvature,
            thresholds=found.thresholds,
            losses=losses,
            ratio=state["ratio"],
            state=state["state"],
        )
        save_study(figure, values | state, out, console)


@check.command(name="sgd-stability")
def sgd(
    dimension: Annotated[int, typer.Option(min=2, help="Number of weights.")] = 10,
    num_steps: Annotated[int, typer.Option(min=1)] = 300,
    num_repetitions: Annotated[int, typer.Option(min=100)] = 2000,
    out: Figures = Path("checks"),
) -> None:
    """SGD's own bound: on single examples it is stable as long as LR times the trace of the Hessian is below 2."""
    import numpy as np

    from landscape_ray.reports.stability_studies import sgd_figure
    from landscape_ray.training.stability_studies import sgd_stability

    console = new_console()
    with console.status(f"{num_steps} updates of {num_repetitions} runs at 13 learning rates ..."):
        found = sgd_stability(
            np.linspace(1.7, 2.3, 13).tolist(),
            dimension=dimension,
            num_steps=num_steps,
            num_repetitions=num_repetitions,
        )
    figure = sgd_figure(
        found.lrs,
        found.growth,
        found.standard_error,
        found.expected,
        trace=found.trace,
        sharpness=found.sharpness,
        measured_threshold=found.measured_threshold,
        num_steps=num_steps,
    )
    numbers = dataclasses.asdict(found) | {"measured_threshold": found.measured_threshold}
    save_study(figure, numbers, out, console)


@check.command(name="sharpness")
def sharpness_over_widths(
    spec: Spec,
    widths: Widths = "128,256,512",
    parametrisations: Parametrisations = "standard,mup",
    num_seeds: Annotated[int, typer.Option(min=1, help="Runs at each width, to average over.")] = 1,
    out: Figures = Path("checks"),
) -> None:
    """Sharpness transfer: does the sharpness along training coincide at every width?"""
    from landscape_ray.reports.stability_studies import width_figure
    from landscape_ray.training.stability_studies import sharpness_transfer

    console = new_console()
    panels, numbers = {}, {}
    for name in parametrisations_of(parametrisations):
        with advancing(console, name, len(whole_numbers(widths)) * num_seeds) as progress:
            found = sharpness_transfer(
                study_config(spec, name), whole_numbers(widths), num_seeds=num_seeds, progress=progress
            )
        panels[name] = (found.widths, found.steps, found.sharpness, found.slope)
        numbers[name] = {
            "widths": found.widths,
            "steps": found.steps,
            "sharpness": found.sharpness,
            "spread": found.spread,
            "slope": found.slope,
            "num_seeds": num_seeds,
        }
    save_study(width_figure(panels), numbers, out, console)


def words(text: str) -> list[str]:
    """Return what stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parametrisations_of(text: str) -> list[str]:
    """Return the parametrisations named in an option.

    Raises:
        UserError: none is.
    """
    names = words(text)
    if not names:
        raise UserError(f"--parametrisations must name at least one, got '{text}'; standard,mup")
    return names


def whole_numbers(text: str) -> list[int]:
    """Return the numbers in an option.

    Raises:
        UserError: something else is in it.
    """
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise UserError(f"--widths must be whole numbers separated by commas, got '{text}'; 64,128,256") from None


def study_config(spec: Path, parametrisation: str | None = None) -> TrainConfig:
    """Return the [train] table of a file at the first value of every domain, under another parametrisation."""
    from landscape_ray.sweep.spec import read_spec

    parsed, _ = read_spec(spec)
    values = parsed.first_values()
    if parametrisation is not None:
        values["model.parametrisation"] = parametrisation
    return parsed.train_config(values, 0)
