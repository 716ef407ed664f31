"""The command line. Every verb imports what it needs when it is called, so that --help answers at once."""

from __future__ import annotations

import contextlib
import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from landscape_ray.cli import laws
from landscape_ray.cli.checks import check
from landscape_ray.cli.probing import probe
from landscape_ray.cli.shared import (
    DEFAULT_RESULTS,
    Address,
    Name,
    OneSweep,
    Results,
    Spec,
    StorageUri,
    Sweeps,
    Tracking,
    new_console,
    open_all,
    open_sweep,
    save_study,
    shown,
    tracking_uri_of,
)
from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from landscape_ray.sweep.session import Outcome
    from landscape_ray.tracking.folder import SweepFolder

app = typer.Typer(
    name="landscape-ray",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Hyperparameter search and population training on Ray that understands the loss landscape it moves in.",
)
app.add_typer(check, name="check")
for verb in (laws.fit, laws.predict, laws.recommend, probe):
    app.command()(verb)


@app.command()
def sweep(
    spec: Spec,
    name: Name = None,
    results: Results = DEFAULT_RESULTS,
    address: Address = None,
    tracking_uri: Tracking = None,
    storage: StorageUri = None,
) -> None:
    """Run a sweep: every trial a training run, tracked in MLflow and as Parquet."""
    from landscape_ray.sweep.session import new_sweep
    from landscape_ray.sweep.spec import read_spec
    from landscape_ray.sweep.tuner import check_address, drive

    check_address(address)
    parsed, text = read_spec(spec)
    if parsed.search is None and parsed.population is None:
        raise UserError(f"{spec} must have a [search] or a [population] table; for a single run: landscape-ray train")
    console = new_console()
    folder = new_sweep(parsed, text, results, name, tracking_uri, storage)
    console.print(f"sweep [bold]{folder.path.name}[/bold] in {shown(folder.path)}", soft_wrap=True)
    _finish(drive(folder, console, address, tracking_uri, storage), console)


@app.command()
def resume(
    sweep: Annotated[
        str | None,
        typer.Argument(metavar="[SWEEP]", help="Name, folder or STORAGE/NAME; default: the newest unfinished sweep."),
    ] = None,
    num_trials: Annotated[
        int | None, typer.Option("--num-trials", min=1, help="Go on to so many trials; for a search.")
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option("--num-steps", min=1, help="Go on to so many updates; for a population or a run.")
    ] = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", help="Changed sweep file; differences that spoil the sweep are refused.")
    ] = None,
    results: Results = DEFAULT_RESULTS,
    address: Address = None,
    tracking_uri: Tracking = None,
    storage: StorageUri = None,
) -> None:
    """Go on with a sweep that was stopped, killed or left with failed trials, perhaps further than it was to go."""
    from landscape_ray.sweep.extension import extend

    folder = open_sweep(sweep, results, unfinished=num_trials is None and num_steps is None and spec is None)
    console = new_console()
    storage = _storage_of(folder, sweep, storage, console)
    for name, value in extend(folder, spec, num_trials, num_steps).items():
        console.print(f"{name} is now {value}", highlight=False)
    console.print(f"resuming [bold]{folder.path.name}[/bold] in {shown(folder.path)}", soft_wrap=True)
    if folder.meta.get("single_run"):
        from landscape_ray.sweep.session import train_one

        _finish(train_one(folder, console, tracking_uri, storage), console)
    else:
        from landscape_ray.sweep.tuner import drive

        _finish(drive(folder, console, address, tracking_uri, storage), console)


@app.command()
def train(
    spec: Spec,
    name: Name = None,
    results: Results = DEFAULT_RESULTS,
    tracking_uri: Tracking = None,
    storage: StorageUri = None,
) -> None:
    """Train a file as one run in this process, without Ray; searched values take their low end."""
    from landscape_ray.sweep.session import check_alone, new_sweep, train_one
    from landscape_ray.sweep.spec import read_spec

    parsed, text = read_spec(spec)
    check_alone(parsed)
    console = new_console()
    folder = new_sweep(parsed, text, results, name, tracking_uri, storage)
    folder.update_meta(single_run=True)
    console.print(f"run [bold]{folder.path.name}[/bold] in {shown(folder.path)}", soft_wrap=True)
    _finish(train_one(folder, console, tracking_uri, storage), console)


@app.command()
def rank(
    sweeps: Sweeps = None,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for figure and numbers; default: fits/ of the first sweep.")
    ] = None,
    given: Annotated[
        str | None,
        typer.Option("--given", help="Setting to compare at equal values of, or all; default: the learning rate."),
    ] = None,
) -> None:
    """Rank study: which probe tells how a run generalises, over all runs and at equal settings?"""
    from landscape_ray.reports.rank_figure import rank_figure
    from landscape_ray.reports.rank_tables import rank_tables
    from landscape_ray.reports.ranking import main_setting, rank_study

    console = new_console()
    folders = open_all(sweeps, results)
    with console.status("comparing runs ..."):
        study = rank_study(folders)
    shown_for = None if given == "all" else given or main_setting(study)
    console.print(rank_tables(study, shown_for), highlight=False, crop=False)
    save_study(rank_figure(study), study.to_json(), out if out is not None else folders[0].fits_path, console)


@app.command()
def report(
    sweeps: Sweeps = None,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: report.html of the sweep.")] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Also write every figure as PNG and SVG here.")
    ] = None,
) -> None:
    """Write one HTML page about one or several sweeps; it needs no network to be read."""
    import tempfile

    from landscape_ray.reports.page import export_figures, write_report

    console = new_console()
    folders = open_all(sweeps, results)
    paths = [folder.path for folder in folders]
    with console.status("writing the report ..."):
        page = write_report(paths, out)
        if figures is not None:
            export_figures(paths, figures)
    console.print(f"report: {shown(page)}", highlight=False, soft_wrap=True)
    with console.status("adding it to MLflow ..."), tempfile.TemporaryDirectory() as temporary:
        images = export_figures(paths, Path(temporary), ("png",))
        for folder in folders:
            _attach(folder, [page, *images], console)


@app.command()
def status(
    sweep: OneSweep = None,
    results: Results = DEFAULT_RESULTS,
    watch: Annotated[
        float | None, typer.Option("--watch", min=0.5, help="Show it anew every so many seconds until it has ended.")
    ] = None,
) -> None:
    """Show how a sweep is doing, from its folder alone: from another terminal, or another machine."""
    from landscape_ray.sweep.status import status_of
    from landscape_ray.sweep.status import watch as follow

    console = new_console()
    folder = open_sweep(sweep, results)
    if watch is None:
        console.print(status_of(folder)[1], highlight=False, crop=False)
        return
    with contextlib.suppress(KeyboardInterrupt):
        follow(folder, console, watch)


@app.command()
def export(
    sweeps: Sweeps = None,
    results: Results = DEFAULT_RESULTS,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Where to write; default: tensorboard/ of each sweep.")
    ] = None,
) -> None:
    """Write sweeps as TensorBoard event files, one run a trial, every row at full resolution."""
    from landscape_ray.tracking.tensorboard import write_events

    console = new_console()
    for folder in open_all(sweeps, results):
        out = folder.path / "tensorboard" if tensorboard is None else tensorboard / folder.path.name
        with console.status(f"writing the events of {folder.path.name} ..."):
            made = write_events(folder, out)
        console.print(f"{len(made)} runs written: tensorboard --logdir {shown(out)}", highlight=False, soft_wrap=True)


@app.command()
def sync(
    sweeps: Sweeps = None,
    results: Results = DEFAULT_RESULTS,
    tracking_uri: Tracking = None,
    storage: StorageUri = None,
) -> None:
    """Send to the storage and the tracking server what they have not received yet; twice changes nothing."""
    from landscape_ray.sweep.storing import send_sweep
    from landscape_ray.tracking.projector import Projector

    console = new_console()
    for folder in open_all(sweeps, results):
        with folder.lock():
            if (place := storage or folder.meta.get("storage")) is not None:
                send_sweep(folder, place)
                console.print(f"{folder.path.name}: the storage is up to date", soft_wrap=True)
            uri = tracking_uri_of(folder, tracking_uri)
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
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", help="Name, with the port, that browsers may ask for, such as mlflow.example.org:5000."
        ),
    ] = None,
    tracking_uri: Tracking = None,
) -> None:
    """Open the MLflow UI on the results, on this machine only. Ctrl-C ends it."""
    from landscape_ray.tracking.ui import serve

    serve(results, host=host, port=port, tracking_uri=tracking_uri, console=new_console(), names=allow or ())


@app.command()
def doctor(
    results: Results = DEFAULT_RESULTS,
    address: Address = None,
    tracking_uri: Tracking = None,
    storage: StorageUri = None,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Also start Ray here, or ask the cluster.")] = True,
) -> None:
    """Check versions, GPU, storage, disk, tracking server and Ray, and say what to do; status 2 where a sweep fails."""
    from landscape_ray.sweep.doctor import examine, worst
    from landscape_ray.tracking.uris import resolve_tracking_uri

    console = new_console()
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    findings = []
    uri = resolve_tracking_uri(tracking_uri, results)
    for finding in examine(results, address, uri, ray=ray, storage_uri=storage):
        findings.append(finding)
        status = f"[{colours[finding.status]}]{finding.status:>7}[/{colours[finding.status]}]"
        console.print(f"{status}  {finding.name}: ", end="", highlight=False)
        console.print(finding.found, highlight=False, markup=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"         -> {finding.remedy}", highlight=False, markup=False, soft_wrap=True)
    verdict = {"ok": "everything is there", "warning": "sweeps run; see the warnings", "error": "mend the errors first"}
    console.print(verdict[worst(findings)])
    if worst(findings) == "error":
        raise typer.Exit(2)


@app.command(name="list")
def list_sweeps(
    results: Results = DEFAULT_RESULTS,
    show_laws: Annotated[bool, typer.Option("--laws", help="List the laws that can be fitted instead.")] = False,
) -> None:
    """List the sweeps in the results folder, newest first; or the laws."""
    if show_laws:
        from landscape_ray.reports.law_tables import law_table

        new_console().print(law_table(), crop=False)
        return
    from landscape_ray.reports.terminal import sweep_table
    from landscape_ray.tracking.folder import find_sweeps

    console = new_console()
    found = find_sweeps(results)
    if not found:
        console.print(
            f"no sweeps in {shown(results)}; start one with `landscape-ray sweep search_spaces/quickstart.toml`"
        )
        return
    console.print(sweep_table(found), crop=False)


@app.command()
def refine(
    sweep: OneSweep = None,
    run: Annotated[str | None, typer.Option("--run", help="Identifier of the run; default: the best one.")] = None,
    num_points: Annotated[int, typer.Option(min=2, max=1001, help="Corners of the new schedule.")] = 33,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Refine a schedule to the gradient norms of a finished run (Defazio et al. 2023); prints it as TOML."""
    from landscape_ray.reports.refinement import refined_schedule

    found = refined_schedule(open_sweep(sweep, results), run, num_points=num_points)
    console = new_console()
    console.print(f"# refined to {found.run_id}: put this into the sweep file", highlight=False, markup=False)
    console.print(found.toml, highlight=False, markup=False, soft_wrap=True)


def _storage_of(folder: SweepFolder, sweep: str | None, given: str | None, console: Console) -> str | None:
    """Return the address of a sweep's storage, after bringing the folder up to what another machine left there."""
    from landscape_ray.sweep.storing import bring_up_to_date
    from landscape_ray.tracking.storage import split_address
    from landscape_ray.tracking.uris import mask_secrets

    uri: str | None = split_address(sweep)[0] if sweep is not None and "://" in sweep else given
    uri = uri or folder.meta.get("storage")
    if uri is not None:
        if problem := bring_up_to_date(folder, uri):
            console.print(f"[yellow]going on with what is here: {problem}[/yellow]", highlight=False, soft_wrap=True)
        if (shown_uri := mask_secrets(uri)) != folder.meta.get("storage"):
            folder.update_meta(storage=shown_uri)
    return uri


def _attach(folder: SweepFolder, paths: list[Path], console: Console) -> None:
    """Log files to the sweep's parent run; a server that is away doesn't take the report with it."""
    from landscape_ray.tracking.projector import Projector

    try:
        uri = tracking_uri_of(folder)
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
