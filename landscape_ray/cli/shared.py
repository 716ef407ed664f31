"""What the verbs share: options, the console, sweeps by name, progress bars."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from landscape_ray.reports.figures import Figure
    from landscape_ray.tracking.folder import SweepFolder

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
StorageUri = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="LANDSCAPE_RAY_STORAGE",
        help="Place that every machine reaches, to keep the sweep in as well: s3://bucket/folder, gs://, file:// ...",
    ),
]
Sweeps = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SWEEP]...", help="Names, folders or STORAGE/NAME of sweeps; default: the newest."),
]
OneSweep = Annotated[
    str | None, typer.Argument(metavar="[SWEEP]", help="Name, folder or STORAGE/NAME of a sweep; default: the newest.")
]


def new_console() -> Console:
    """Return the console that verbs print to."""
    from rich.console import Console

    return Console()


@contextlib.contextmanager
def advancing(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar with an estimate of the end; called with a few words after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=console) as bar:
        task = bar.add_task(title, total=total, news="")
        yield lambda news: bar.update(task, advance=1, news=news)


@contextlib.contextmanager
def counting(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with an estimate of the end; called with what has been done so far."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def shown(path: Path) -> str:
    """Return the path as a person would type it from here."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def open_sweep(name: str | None, results: Path, *, unfinished: bool = False, checkpoints: bool = False) -> SweepFolder:
    """Return the sweep with this name or at this path; without one, the newest (unfinished) sweep.

    Args:
        name: a name, a folder, or an address in a storage, from which the sweep is brought into `results` first.
        results: folder of the sweeps.
        unfinished: whether the newest must be one that has not ended.
        checkpoints: whether checkpoints are brought as well.
    """
    from landscape_ray.tracking.folder import SweepFolder, find_sweeps

    if name is not None and "://" in name:
        from landscape_ray.tracking.cache import bring_sweep
        from landscape_ray.tracking.storage import open_storage, split_address

        uri, plain_name = split_address(name)
        sweep, target = open_storage(uri).at(plain_name), results / plain_name
        with new_console().status(f"bringing {sweep.shown} to {shown(target)} ..."):
            return bring_sweep(sweep, target, checkpoints=checkpoints)
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


def open_all(names: list[str] | None, results: Path) -> list[SweepFolder]:
    """Return the sweeps of these names; without any, the newest."""
    return [open_sweep(name, results) for name in names] if names else [open_sweep(None, results)]


def tracking_uri_of(folder: SweepFolder, explicit: str | None = None) -> str:
    """Return where the runs of a sweep are tracked."""
    from landscape_ray.tracking.uris import resolve_tracking_uri

    return resolve_tracking_uri(explicit, folder.path.parent, folder.meta.get("tracking_uri"))


def plain(value: Any) -> Any:
    """Return arrays and tuples as lists that JSON can hold: None where a number is not finite."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_study(figure: Figure, numbers: Mapping[str, object], out: Path, console: Console) -> None:
    """Write figure and numbers, and print what the figure shows."""
    import json

    from landscape_ray.files import write_atomic
    from landscape_ray.reports.static import render

    write_atomic(out / f"{figure.key}.json", json.dumps(plain(numbers), indent=1) + "\n")
    write_atomic(out / f"{figure.key}.png", render(figure))
    console.print(figure.takeaway, highlight=False, soft_wrap=True)
    console.print(f"figure: {shown(out / f'{figure.key}.png')}", highlight=False, soft_wrap=True)


def warn(console: Console, warnings: tuple[str, ...]) -> None:
    """Print warnings, one a line."""
    for warning in warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
