"""The command line. Every verb imports what it needs when it is called, so that --help answers at once."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from landscape_ray.reports.figures import Figure
    from landscape_ray.sweep.session import Outcome
    from landscape_ray.tracking.folder import SweepFolder
    from landscape_ray.training import TrainConfig

app = typer.Typer(
    name="landscape-ray",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Hyperparameter search and population training on Ray that understands the loss landscape it moves in.",
)

DEFAULT_RESULTS = Path("runs")

Results = Annotated[
    Path, typer.Option("--results", envvar="LANDSCAPE_RAY_RESULTS", help="Folder that holds the sweeps.")
]
Spec = Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The sweep file; examples are in search_spaces/.")]
Name = Annotated[str | None, typer.Option("--name", help="Folder name; default: name in the file, date and time.")]
Address = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_ADDRESS", help="Ray cluster to attach to; default: start Ray here."),
]
Tracking = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="MLflow store or server; default: $MLFLOW_TRACKING_URI, else RESULTS/mlflow.db."
    ),
]
Sweeps = Annotated[
    list[str] | None, typer.Argument(metavar="[SWEEP]...", help="Names or folders of sweeps; default: the newest.")
]
OneSweep = Annotated[
    str | None, typer.Argument(metavar="[SWEEP]", help="Name or folder of a sweep; default: the newest.")
]


@app.command()
def sweep(
    spec: Spec,
    name: Name = None,
    results: Results = DEFAULT_RESULTS,
    address: Address = None,
    tracking_uri: Tracking = None,
) -> None:
    """Run a sweep: every trial a training run, tracked in MLflow and as Parquet."""
    from landscape_ray.sweep.session import new_sweep
    from landscape_ray.sweep.spec import read_spec
    from landscape_ray.sweep.tuner import check_address, drive

    check_address(address)
    parsed, text = read_spec(spec)
    if parsed.search is None and parsed.population is None:
        raise UserError(f"{spec} must have a [search] or a [population] table; for a single run: landscape-ray train")
    console = _console()
    folder = new_sweep(parsed, text, results, name, tracking_uri)
    console.print(f"sweep [bold]{folder.path.name}[/bold] in {_shown(folder.path)}", soft_wrap=True)
    _finish(drive(folder, console, address, tracking_uri), console)


@app.command()
def resume(
    sweep: Annotated[
        str | None, typer.Argument(metavar="[SWEEP]", help="Name or folder; default: the newest unfinished sweep.")
    ] = None,
    results: Results = DEFAULT_RESULTS,
    address: Address = None,
    tracking_uri: Tracking = None,
) -> None:
    """Go on with a sweep that was stopped, killed or left with failed trials."""
    folder = _open(sweep, results, unfinished=True)
    console = _console()
    console.print(f"resuming [bold]{folder.path.name}[/bold] in {_shown(folder.path)}", soft_wrap=True)
    if folder.meta.get("single_run"):
        from landscape_ray.sweep.session import train_one

        _finish(train_one(folder, console, tracking_uri), console)
    else:
        from landscape_ray.sweep.tuner import drive

        _finish(drive(folder, console, address, tracking_uri), console)


@app.command()
def train(spec: Spec, name: Name = None, results: Results = DEFAULT_RESULTS, tracking_uri: Tracking = None) -> None:
    """Train the [train] table of a file as one run in this process, without Ray; searched values take their low end."""
    from landscape_ray.sweep.session import new_sweep, train_one
    from landscape_ray.sweep.spec import read_spec

    parsed, text = read_spec(spec)
    console = _console()
    folder = new_sweep(parsed, text, results, name, tracking_uri)
    folder.update_meta(single_run=True)
    console.print(f"run [bold]{folder.path.name}[/bold] in {_shown(folder.path)}", soft_wrap=True)
    _finish(train_one(folder, console, tracking_uri), console)


@app.command()
def fit(
    sweeps: Sweeps = None,
    results: Results = DEFAULT_RESULTS,
    num_bootstrap: Annotated[int, typer.Option(min=0, help="Resamples behind the intervals.")] = 200,
) -> None:
    """Fit the annealing law to a sweep's curves and test it on schedules that it has not seen."""
    from landscape_ray.reports.analysis import fit_sweep
    from landscape_ray.reports.terminal import fit_tables

    console = _console()
    for folder in _open_all(sweeps, results):
        with console.status(f"fitting {folder.path.name} ..."):
            result = fit_sweep(folder, num_bootstrap=num_bootstrap)
        console.print(fit_tables(folder.path.name, result))
        console.print(f"saved in {_shown(folder.fits_path)}", highlight=False, soft_wrap=True)


@app.command()
def rank(
    sweeps: Sweeps = None,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for figure and numbers; default: fits/ of the first sweep.")
    ] = None,
) -> None:
    """Rank study: which probe tells how a run generalises, over all runs and at equal settings?"""
    from landscape_ray.reports.ranking import rank_figure, rank_study, rank_tables

    console = _console()
    folders = _open_all(sweeps, results)
    with console.status("comparing runs ..."):
        study = rank_study(folders)
    console.print(rank_tables(study), highlight=False, crop=False)
    _save_study(rank_figure(study), study.to_json(), out if out is not None else folders[0].fits_path, console)


@app.command()
def predict(
    sweep: OneSweep = None,
    schedule: Annotated[str, typer.Option(help="constant | linear | cosine | wsd")] = "wsd",
    num_steps: Annotated[int | None, typer.Option(min=1, help="Updates; default: as in the fitted runs.")] = None,
    peak_lr: Annotated[float | None, typer.Option(min=0, help="Default: the peak that the law was fitted at.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Default: as in the fitted runs.")] = None,
    final_ratio: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    cooldown_fraction: Annotated[float, typer.Option(min=0, max=1)] = 0.2,
    cooldown_shape: Annotated[str, typer.Option(help="linear | sqrt | cosine")] = "linear",
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Forecast the final loss of a schedule from a sweep's fitted law, with its interval."""
    from landscape_ray.reports.analysis import load_fit
    from landscape_ray.reports.forecast import forecast_schedule

    folder = _open(sweep, results)
    fitted = load_fit(folder)
    if fitted is None:
        raise UserError(
            f"sweep '{folder.path.name}' has no fitted law; run `landscape-ray fit {folder.path.name}` first"
        )
    forecast = forecast_schedule(
        folder,
        fitted,
        schedule=schedule,
        num_steps=num_steps,
        peak_lr=peak_lr,
        warmup_steps=warmup_steps,
        final_ratio=final_ratio,
        cooldown_fraction=cooldown_fraction,
        cooldown_shape=cooldown_shape,
    )
    console = _console()
    console.print(forecast.sentence, highlight=False, soft_wrap=True)
    for warning in forecast.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", soft_wrap=True)


@app.command()
def report(
    sweeps: Sweeps = None,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: report.html of the sweep.")] = None,
    figures: Annotated[Path | None, typer.Option("--figures", help="Also write every figure as PNG here.")] = None,
) -> None:
    """Write one HTML page about one or several sweeps; it needs no network to be read."""
    import tempfile

    from landscape_ray.reports.page import export_figures, write_report

    console = _console()
    folders = _open_all(sweeps, results)
    paths = [folder.path for folder in folders]
    with console.status("writing the report ..."):
        page = write_report(paths, out)
        if figures is not None:
            export_figures(paths, figures)
    console.print(f"report: {_shown(page)}", highlight=False, soft_wrap=True)
    with console.status("adding it to MLflow ..."), tempfile.TemporaryDirectory() as temporary:
        images = export_figures(paths, Path(temporary))
        for folder in folders:
            _attach(folder, [page, *images], console)


@app.command()
def sync(sweeps: Sweeps = None, results: Results = DEFAULT_RESULTS, tracking_uri: Tracking = None) -> None:
    """Send to the tracking server what it has not received yet; sending twice changes nothing."""
    from landscape_ray.tracking.projector import Projector

    console = _console()
    for folder in _open_all(sweeps, results):
        with folder.lock():
            uri = _tracking_uri(folder, tracking_uri)
            Projector.check(uri)
            outcome = Projector(folder, uri, folder.meta["experiment"]).close(timeout_seconds=600.0)
        if outcome.error:
            raise UserError(f"sweep '{folder.path.name}' is not fully sent ({outcome.error}); run the command again")
        console.print(f"{folder.path.name}: {outcome.points} points sent, the server is up to date", soft_wrap=True)


@app.command()
def ui(
    results: Results = DEFAULT_RESULTS,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than 127.0.0.1 open it to the network.")
    ] = "127.0.0.1",
    tracking_uri: Tracking = None,
) -> None:
    """Open the MLflow UI on the results, on this machine only. Ctrl-C ends it."""
    from landscape_ray.tracking.ui import serve

    serve(results, host=host, port=port, tracking_uri=tracking_uri, console=_console())


@app.command(name="list")
def list_sweeps(results: Results = DEFAULT_RESULTS) -> None:
    """List the sweeps in the results folder, newest first."""
    from landscape_ray.reports.terminal import sweep_table
    from landscape_ray.tracking.folder import find_sweeps

    console = _console()
    found = find_sweeps(results)
    if not found:
        console.print(
            f"no sweeps in {_shown(results)}; start one with `landscape-ray sweep search_spaces/quickstart.toml`"
        )
        return
    console.print(sweep_table(found))


check = typer.Typer(no_args_is_help=True, help="Small studies of a model before a sweep; each draws a figure.")
app.add_typer(check, name="check")

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

    console = _console()
    for name in _parametrisations(parametrisations):
        config = _study_config(spec, name)
        with _advancing(console, f"{name}", len(_numbers(widths)) * num_seeds) as progress:
            found = coordinate_check(
                config, _numbers(widths), num_steps=num_steps, num_seeds=num_seeds, progress=progress
            )
        figure = coordinate_figure(
            found.widths, found.change, found.slopes(), num_steps=num_steps, parametrisation=name
        )
        numbers = {"slopes": found.slopes(), "widths": found.widths, "num_steps": num_steps, "num_seeds": num_seeds}
        numbers["change"] = {layer: values.tolist() for layer, values in found.change.items()}
        _save_study(figure, numbers, out, console)


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

    names, grid = _parametrisations(parametrisations), _words(peak_lrs)
    try:
        low, high, number = float(grid[0]), float(grid[1]), int(grid[2])
    except (ValueError, IndexError):
        raise UserError(
            f"--peak-lrs must be low,high,number, got '{peak_lrs}'; 0.001,0.064,7 doubles six times"
        ) from None
    if not (0 < low < high and number >= 3):
        raise UserError(f"--peak-lrs must be 0 < low < high and three or more, got '{peak_lrs}'; try 0.001,0.064,7")
    rates = np.geomspace(low, high, number).tolist()
    console = _console()
    panels, numbers = {}, {}
    for name in names:
        config = _study_config(spec, name)
        with _advancing(console, name, len(_numbers(widths)) * number * num_seeds) as progress:
            found = lr_transfer(config, _numbers(widths), rates, num_seeds=num_seeds, progress=progress)
        panels[name] = (found.widths, found.peak_lrs, found.loss)
        numbers[name] = {
            "widths": found.widths,
            "peak_lrs": found.peak_lrs,
            "loss": [[value if math.isfinite(value) else None for value in row] for row in found.loss.tolist()],
            "best_lr": [found.peak_lrs[place] for place in found.best],
            "interpolated_best_lr": found.optimum.tolist(),
            "drift_steps": found.drift,
        }
    _save_study(transfer_figure(panels, loss_unit=found.loss_unit), numbers, out, console)


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

    console = _console()
    with console.status(f"{num_steps} updates ..."):
        curve = range_test(_study_config(spec), low=low, high=high, num_steps=num_steps)
    found = analyse_range(curve.lrs, curve.losses)
    figure = range_figure(
        curve.lrs,
        curve.losses,
        suggested_lr=found.suggested_lr,
        steepest_lr=found.steepest_lr,
        open_end=found.open_end,
        loss_unit="",
    )
    _save_study(figure, {**dataclasses.asdict(found), **curve._asdict()}, out, console)


@app.command()
def refine(
    sweep: OneSweep = None,
    run: Annotated[str | None, typer.Option("--run", help="Identifier of the run; default: the best one.")] = None,
    num_points: Annotated[int, typer.Option(min=2, max=1001, help="Corners of the new schedule.")] = 33,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Refine a schedule to the gradient norms of a finished run (Defazio et al. 2023); prints it as TOML."""
    from landscape_ray.reports.refinement import refined_schedule

    found = refined_schedule(_open(sweep, results), run, num_points=num_points)
    console = _console()
    console.print(f"# refined to {found.run_id}: put this into the sweep file", highlight=False, markup=False)
    console.print(found.toml, highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parametrisations(text: str) -> list[str]:
    names = _words(text)
    if not names:
        raise UserError(f"--parametrisations must name at least one, got '{text}'; standard,mup")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UserError(f"--widths must be whole numbers separated by commas, got '{text}'; 64,128,256") from None


def _study_config(spec: Path, parametrisation: str | None = None) -> TrainConfig:
    """Return the [train] table of a file at the first value of every domain, under another parametrisation."""
    from landscape_ray.sweep.spec import read_spec

    parsed, _ = read_spec(spec)
    values = parsed.first_values()
    if parametrisation is not None:
        values["model.parametrisation"] = parametrisation
    return parsed.train_config(values, 0)


@contextlib.contextmanager
def _advancing(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar with an estimate of the end; called with a few words after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=console) as bar:
        task = bar.add_task(title, total=total, news="")
        yield lambda news: bar.update(task, advance=1, news=news)


def _save_study(figure: Figure, numbers: Mapping[str, object], out: Path, console: Console) -> None:
    import json

    from landscape_ray.files import write_atomic
    from landscape_ray.reports.static import render

    write_atomic(out / f"{figure.key}.json", json.dumps(numbers, indent=1) + "\n")
    write_atomic(out / f"{figure.key}.png", render(figure))
    console.print(figure.takeaway, highlight=False, soft_wrap=True)
    console.print(f"figure: {_shown(out / f'{figure.key}.png')}", highlight=False, soft_wrap=True)


def _shown(path: Path) -> str:
    """Return the path as a person would type it from here."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _open(name: str | None, results: Path, *, unfinished: bool = False) -> SweepFolder:
    """Return the sweep with this name or at this path; without one, the newest (unfinished) sweep."""
    from landscape_ray.tracking.folder import SweepFolder, find_sweeps

    if name is None:
        found = [f for f in find_sweeps(results) if not (unfinished and f.meta.get("status") == "finished")]
        if not found:
            what = "unfinished sweep" if unfinished else "sweep"
            raise UserError(f"no {what} in {results}; give its folder, or --results where it is")
        return found[0]
    path = Path(name)
    if (path / "sweep.json").is_file() or path.is_absolute():
        return SweepFolder.open(path)
    if not (results / name / "sweep.json").is_file():
        known = ", ".join(f.path.name for f in find_sweeps(results)[:8]) or "none"
        raise UserError(f"no sweep '{name}' in {results}; there: {known}. Give --results if it is elsewhere")
    return SweepFolder.open(results / name)


def _open_all(names: list[str] | None, results: Path) -> list[SweepFolder]:
    return [_open(name, results) for name in names] if names else [_open(None, results)]


def _tracking_uri(folder: SweepFolder, explicit: str | None = None) -> str:
    from landscape_ray.tracking.uris import resolve_tracking_uri

    return resolve_tracking_uri(explicit, folder.path.parent, folder.meta.get("tracking_uri"))


def _attach(folder: SweepFolder, paths: list[Path], console: Console) -> None:
    """Log files to the sweep's parent run; a server that is away doesn't take the report with it."""
    from landscape_ray.tracking.projector import Projector

    try:
        uri = _tracking_uri(folder)
        Projector.check(uri)
        with folder.lock():  # the driver of a running sweep has its own view of the runs
            projector = Projector(folder, uri, folder.meta["experiment"])
            projector.log_artifacts(paths)
            problem = projector.close().error
    except UserError as error:
        problem = str(error)
    if problem:
        console.print(f"[yellow]not added to MLflow:[/yellow] {problem}", highlight=False, soft_wrap=True)


def _finish(outcome: Outcome, console: Console) -> None:
    """Print how a sweep ended and leave with its exit status."""
    from landscape_ray.sweep.session import exit_status, outcome_text

    console.print(outcome_text(outcome), highlight=False, soft_wrap=True)
    if code := exit_status(outcome):
        raise typer.Exit(code)


def main() -> NoReturn:
    """Run the command line; a mistake of the user, or a full disk, is one sentence and exit status 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        remedy = (
            "free some space, then `landscape-ray resume` goes on" if full else "check the path and its permissions"
        )
        _fail(f"{error.strerror or error}: {error.filename or 'while writing'}; {remedy}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
