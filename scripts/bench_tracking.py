"""What tracking costs, beside Ray's MLflowLoggerCallback: requests and driver time a result, what a dead server does,
a million points from four writers, and the three ways to read a thousand runs back. `lengths` tells what a sweep
costs from what a result does, by two sweeps of different lengths.

The server is `mlflow server --workers 1` on SQLite, on 127.0.0.1, ended here. One table: ours, peer, ratio.

Usage:
    python scripts/bench_tracking.py [--part callback|lengths|rate|crash|million|collect|all] [--points 1000000]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_collect import make_sweep
from rich.console import Console

from landscape_ray.errors import UserError
from landscape_ray.records import EvalRecord, ProbeRecord, RunSummary
from landscape_ray.tracking import server
from landscape_ray.tracking.collect import collect, collect_mlflow
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.tracking.projector import Projector, SyncReport

SPEC = """
name = "tracked"
seed = 1
commit_steps = {every}
[train]
num_steps = {steps}
batch_size = 8
device = "cpu"
data = {{ name = "images", source = "digits" }}
model = {{ name = "mlp", depth = 1, width = 16 }}
schedule = {{ name = "constant", peak_lr = 0.01 }}
eval = {{ every_steps = {every}, num_batches = 1, batch_size = 16 }}
[space]
"schedule.peak_lr" = {{ log_uniform = [1e-4, 1e-1] }}
[population]
num_members = 4
interval_steps = {interval}
[resources]
cpus_per_trial = 0.25
max_failures = 0
"""


_HISTORY_RUNS = 20


class Table:
    """Rows of what, ours, peer, ratio."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, what: str, ours: float | str, peer: float | str = "", unit: str = "") -> None:
        ratio = f"{peer / ours:.0f}" if isinstance(ours, float) and isinstance(peer, float) and ours else ""
        texts = [f"{_text(value)} {unit}".strip() if isinstance(value, float) else value for value in (ours, peer)]
        self.rows.append((what, *texts, ratio))  # type: ignore[arg-type]
        print("  ".join(self.rows[-1]), file=sys.stderr, flush=True)

    def show(self) -> None:
        for row in [("what", "ours", "peer", "peer / ours"), *self.rows]:
            print(f"{row[0]:<58}{row[1]:>26}{row[2]:>34}{row[3]:>12}")


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Server:
    """`mlflow server` with one worker on a port of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri, self.folder, self.database = f"http://127.0.0.1:{self.port}", folder, folder / "mlflow.db"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = subprocess.Popen(
            command,
            env=os.environ | quiet,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            start_new_session=True,
        )
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            time.sleep(0.2)
        raise SystemExit("the MLflow server did not start within two minutes")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads its own group: itself and its worker
            self.process.wait()
            self.process = None


class Meter:
    """Requests of this process, and the time that its threads spend on tracking."""

    def __init__(self) -> None:
        self.results = 0
        self.by_endpoint: Counter[str] = Counter()
        self.cpu_seconds, self.wall_seconds = 0.0, 0.0
        self._busy = threading.local()

    @property
    def requests(self) -> int:
        return self.by_endpoint.total()

    def count(self, original: Any) -> Any:
        def send(adapter: Any, request: Any, *arguments: Any, **keywords: Any) -> Any:
            path = request.path_url.partition("?")[0].partition("/mlflow")[2]
            self.by_endpoint["artifact" if path.startswith("-artifacts") else path.strip("/")] += 1
            return original(adapter, request, *arguments, **keywords)

        return send

    def timed(self, original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if getattr(self._busy, "inside", False):
                return original(*arguments, **keywords)
            self._busy.inside = True
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return original(*arguments, **keywords)
            finally:
                self._busy.inside = False
                self.wall_seconds += time.perf_counter() - wall
                self.cpu_seconds += time.thread_time() - cpu

        return call


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    import requests.adapters

    meter, original = Meter(), requests.adapters.HTTPAdapter.send
    requests.adapters.HTTPAdapter.send = meter.count(original)  # type: ignore[method-assign]
    try:
        yield meter
    finally:
        requests.adapters.HTTPAdapter.send = original  # type: ignore[method-assign]


def run_population(
    folder: Path, name: str, uri: str, steps: int, peer: dict[str, Any] | None, after: Any = None
) -> tuple[Meter, Meter, float, str]:
    """Run the sweep with our projector, or with Ray's callback instead.

    Returns:
        What tracking does, what of it the driver waits for, seconds, how it ended.
    """
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune import Callback, RunConfig

    from landscape_ray.sweep.session import new_sweep
    from landscape_ray.sweep.spec import read_spec
    from landscape_ray.sweep.tuner import drive

    path = folder / f"{name}.toml"
    path.write_text(SPEC.format(steps=steps, every=10, interval=40))
    spec, text = read_spec(path)

    class Counting(Callback):
        """Counts results; never leaves this process, though Ray pickles it into a state that is not read."""

        def __reduce__(self) -> Any:
            return dict, ()

        def on_trial_result(self, *_: Any, **__: Any) -> None:
            meter.results += 1
            if after is not None:
                after(meter.results)

    originals = {key: getattr(Projector, key) for key in ("start", "_sync", "close", "set_parent")}
    held = Meter()
    original_init = RunConfig.__init__
    with metered() as meter:
        extra: list[Any] = [Counting()]
        if peer is None:
            Projector._sync = meter.timed(originals["_sync"])  # type: ignore[method-assign]
            for key in ("start", "close", "set_parent"):
                setattr(Projector, key, held.timed(originals[key]))
        else:
            callback = MLflowLoggerCallback(tracking_uri=uri, experiment_name="callback", **peer)
            held = meter  # all of it is done in the driver's loop
            for key in ("log_trial_start", "log_trial_result", "log_trial_end"):
                setattr(callback, key, meter.timed(getattr(callback, key)))
            type(callback).__reduce__ = lambda self: (dict, ())
            extra.append(callback)
            Projector.start = lambda self: None  # type: ignore[method-assign]
            Projector.close = lambda self, timeout_seconds=0.0: SyncReport()  # type: ignore[method-assign]

        def init(self: Any, *arguments: Any, **keywords: Any) -> None:
            keywords["callbacks"] = [*(keywords.get("callbacks") or []), *extra]
            original_init(self, *arguments, **keywords)

        RunConfig.__init__ = init  # type: ignore[method-assign]
        begun = time.perf_counter()
        try:
            sweep = new_sweep(spec, text, folder / "runs", name, uri)
            outcome = drive(sweep, Console(file=io.StringIO()), None, uri)
            ended = f"{outcome.status}" + (f", {outcome.sync.error}" if outcome.sync.error else "")
        except Exception as error:
            cause = error.__cause__ or error
            ended = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"[:150]
        finally:
            RunConfig.__init__ = original_init  # type: ignore[method-assign]
            for key, value in originals.items():
                setattr(Projector, key, value)
    return meter, held, time.perf_counter() - begun, ended


def part_callback(table: Table, folder: Path, steps: int) -> None:
    """Requests, driver time and wall time of one population, tracked by either."""
    with Server(folder) as mlflow:
        ours, our_wait, our_seconds, our_end = run_population(folder, "ours", mlflow.uri, steps, None)
        late = {"log_params_on_trial_end": True}  # otherwise its first exploit ends it, see the part `crash`
        peer, peer_wait, peer_seconds, peer_end = run_population(folder, "peer", mlflow.uri, steps, late)
    table.add("how it ended", our_end, peer_end[:34])
    table.add("results", float(ours.results), float(peer.results))
    per = (max(1, ours.results), max(1, peer.results))
    table.add("requests a result", ours.requests / per[0], peer.requests / per[1])
    table.add("CPU of tracking, a result", 1e3 * ours.cpu_seconds / per[0], 1e3 * peer.cpu_seconds / per[1], "ms")
    waits = (1e3 * our_wait.wall_seconds / per[0], 1e3 * peer_wait.wall_seconds / per[1])
    table.add("driver waits for it, a result (ours: at the end)", *waits, "ms")
    table.add("wall time of the sweep", our_seconds, peer_seconds, "s")


def part_lengths(table: Table, folder: Path, lengths: list[int]) -> None:
    """What a sweep costs whatever its length, and what each result adds: a line through sweeps of two lengths."""
    measured = []
    with Server(folder) as mlflow:
        for steps in lengths:
            done, wait, seconds, ended = run_population(folder, f"steps{steps}", mlflow.uri, steps, None)
            figures = (float(done.requests), 1e3 * done.cpu_seconds, 1e3 * wait.wall_seconds)
            measured.append((done.results, figures))
            where = ", ".join(f"{name} {count}" for name, count in done.by_endpoint.most_common())
            table.add(f"{done.results:,} results in {seconds:.0f} s: how it ended", ended)
            table.add("requests: where to", where)
            per = [figure / done.results for figure in figures]
            table.add("requests a result", per[0])
            table.add("CPU of tracking, a result", per[1], "", "ms")
            table.add("driver waits for it, a result (at the end)", per[2], "", "ms")
    (short, before), (long, after) = measured[0], measured[-1]
    names = (("requests", ""), ("CPU of tracking", "ms"), ("driver waits", "ms"))
    for (name, unit), first, last in zip(names, before, after, strict=True):
        slope = (last - first) / max(1, long - short)
        table.add(f"{name}: a sweep, and each result", f"{first - slope * short:.4g} + {slope:.3g} {unit}".strip())


def part_rate(table: Table, folder: Path, seconds: float) -> None:
    """Requests and driver time a result where many results come: four trials, two results a second each."""
    sweep = SweepFolder.create(folder / "rate", spec_text='name = "rate"\n', meta={"experiment": "rate"})

    def train(trial_id: str) -> None:
        trial, writer = sweep.trial(trial_id), PartWriter(sweep.trial(trial_id))
        for step in range(1, round(2 * seconds) + 1):
            place = {"step": step, "num_tokens": step, "flops": 1.0, "elapsed_seconds": 0.5 * step}
            writer.append(EvalRecord(**place, time_unix=time.time(), cost_seconds=0.0, loss_nats=1 / step))
            status: Any = "running" if step < round(2 * seconds) else "finished"
            trial.commit(
                RunSummary(run_id=trial_id, status=status, config={"lr": 0.1}, varied={}, step=step), writer.flush()
            )
            time.sleep(0.5)

    original = Projector._sync
    with Server(folder) as mlflow, metered() as meter:
        Projector._sync = meter.timed(original)  # type: ignore[method-assign]
        try:
            projector = Projector(sweep, mlflow.uri, "rate")
            projector.start()
            trials = [threading.Thread(target=train, args=(f"t{k}",)) for k in range(4)]
            for trial in trials:
                trial.start()
            for trial in trials:
                trial.join()
            begun = time.perf_counter()
            report = projector.close()
            closing = time.perf_counter() - begun
        finally:
            Projector._sync = original  # type: ignore[method-assign]
    results = 4 * round(2 * seconds)
    table.add(f"{results:,} results in {seconds:.0f} s: requests a result", meter.requests / results)
    table.add("CPU of tracking, a result", 1e3 * meter.cpu_seconds / results, "", "ms")
    table.add("driver waits for it, a result (at the end)", 1e3 * closing / results, "", "ms")
    table.add("points behind, error", f"{report.behind}, {report.error or 'none'}")


def part_crash(table: Table, folder: Path, steps: int) -> None:
    """What an exploit, and a server that dies after forty results, do to the sweep."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"  # its default would let the peer hang for four minutes first
    with Server(folder) as mlflow:
        table.add("a member goes on under another learning rate", "a point and an event", exploited(mlflow.uri))

        def after(results: int) -> None:
            if results == 40:
                mlflow.kill()

        ours, _, seconds, our_end = run_population(folder, "ours-dead", mlflow.uri, steps, None, after)
        mlflow.start()
        peer, _, peer_seconds, peer_end = run_population(
            folder, "peer-dead", mlflow.uri, steps, {"log_params_on_trial_end": True}, after
        )
        table.add("server dies at result 40: results made", float(ours.results), float(peer.results))
        table.add("server dies: how the sweep ended", our_end[:60], peer_end[:120])
        table.add("server dies: wall time", seconds, peer_seconds, "s")
        mlflow.kill()
        mlflow.database.unlink()  # it comes back empty
        mlflow.start()
        sweep = SweepFolder.open(folder / "runs" / "ours-dead")
        report = Projector(sweep, mlflow.uri, sweep.meta["experiment"]).close(timeout_seconds=120)
        stored, distinct = _count(mlflow.database)
    table.add("server back, empty: points sent by sync", f"{report.points:,} {report.error}".strip(), "0")
    table.add("points of trials stored, of them distinct", f"{stored:,}, {distinct:,}", "0")


def exploited(uri: str) -> str:
    """Return how Ray's callback takes what Ray's own population does to a member: a start with another value."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    class Member:
        config = {"lr": 0.1}

        def __str__(self) -> str:
            return "t0"

    callback, member = MLflowLoggerCallback(tracking_uri=uri, experiment_name="exploit"), Member()
    callback.setup()
    callback.log_trial_start(member)
    member.config = {"lr": 0.02}
    try:
        callback.log_trial_start(member)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:60]
    return "goes on"


def _count(database: Path) -> tuple[int, int]:
    """Return how many points the runs of trials hold, and how many different ones."""
    trials = "metrics WHERE run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'landscape_ray.trial_id')"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (stored,) = connection.execute(f"SELECT COUNT(*) FROM {trials}").fetchone()
        (distinct,) = connection.execute(
            f"SELECT COUNT(*) FROM (SELECT DISTINCT run_uuid, key, step, timestamp, value FROM {trials})"
        ).fetchone()
    return stored, distinct


def write_rows(path: Path, trial_id: str, num_rows: int) -> None:
    """Write probe rows of two points each, in parts of 5,000, as a trial does; for a process of its own."""
    trial = SweepFolder.open(path).trial(trial_id)
    writer = PartWriter(trial)
    for step in range(1, num_rows + 1):
        place = {"step": step, "num_tokens": step, "flops": 1.0, "elapsed_seconds": 0.01 * step}
        writer.append(
            ProbeRecord(
                **place, time_unix=1.7e9 + 0.01 * step, cost_seconds=0.0, probe="sharpness", value=math.sqrt(step),
                standard_error=0.1 + step, num_matvecs=1,
            )
        )  # fmt: skip
        if step % 5000 == 0 or step == num_rows:
            status: Any = "finished" if step == num_rows else "running"
            summary = RunSummary(run_id=trial_id, status=status, config={"lr": 0.1}, varied={}, step=step)
            trial.commit(summary, writer.flush())


def part_million(table: Table, folder: Path, points: int) -> None:
    """Many points from four writers at the same time, through one projector, to a server and to a file."""
    sweep = SweepFolder.create(folder / "million", spec_text='name = "million"\n', meta={"experiment": "million"})
    rows = points // 8
    context = multiprocessing.get_context("spawn")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with Server(folder) as mlflow:
        started = time.perf_counter()
        writers = [context.Process(target=write_rows, args=(sweep.path, f"t{k}", rows)) for k in range(4)]
        for writer in writers:
            writer.start()
        projector = Projector(sweep, mlflow.uri, "million")
        projector.start()
        for writer in writers:
            writer.join()
        written = time.perf_counter() - started
        report = projector.close(timeout_seconds=1200)
        seconds = time.perf_counter() - started
        stored, distinct = _count(mlflow.database)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        client = server.open_client(mlflow.uri)
        run_id = client.create_run(client.create_experiment("one by one")).info.run_id
        started = time.perf_counter()
        for step in range(200):
            client.log_metric(run_id, "probe/sharpness", 1.0 + step, step=step)
        one_by_one = 200 / (time.perf_counter() - started)
    table.add("points: asked, sent, stored, distinct", f"{8 * rows:,} {report.total:,} {stored:,} {distinct:,}")
    table.add("four writers done after", written, "", "s")
    table.add("all on the server after (HTTP, SQLite)", seconds, "", "s")
    table.add("points a second (HTTP, SQLite)", stored / seconds, one_by_one)  # a log_metric for each
    table.add("peak memory of the driver above its start", peak - before, "", "MiB")


def part_collect(table: Table, folder: Path, runs: int, points: int) -> None:
    """Read a thousand runs of a thousand points back: Parquet parts, the store, metric by metric.

    The last takes minutes: it is timed on a few runs, and extrapolated by their number.
    """
    make_sweep(folder / "large", runs, points)
    begun = time.perf_counter()
    rows = len(collect(folder / "large").records)
    parquet = time.perf_counter() - begun
    table.add(f"collect {runs:,} runs x {points:,} points, {rows:,} rows: Parquet", parquet, "", "s")
    shutil.rmtree(folder / "large")
    with Server(folder) as mlflow:
        few = min(runs, _HISTORY_RUNS)
        fill_store(mlflow, "large", runs, points)
        fill_store(mlflow, "few", few, points)
        for what, uri, route, experiment, times in (
            ("the SQLite file", f"sqlite:///{mlflow.database}", "bulk", "large", 1.0),
            ("a server, bulk interface", mlflow.uri, "bulk", "large", 1.0),
            (f"a server, metric by metric ({few} runs)", mlflow.uri, "history", "few", runs / few),
        ):
            begun = time.perf_counter()
            got = len(collect_mlflow(uri, experiment, route=route).records)  # type: ignore[arg-type]
            seconds = time.perf_counter() - begun
            table.add(f"{got:,} rows of one metric: {what}", "", seconds, "s")
            if times > 1:
                table.add(f"extrapolated to {runs:,} runs", parquet, times * seconds, "s")


def fill_store(mlflow: Server, name: str, runs: int, points: int) -> None:
    """Put runs with the history of one metric into the store, behind MLflow's back: through it takes minutes."""
    client = server.open_client(mlflow.uri)
    experiment = client.create_experiment(name)
    template = client.create_run(experiment).info.run_id
    client.log_metric(template, "eval/loss_nats", 1.0, timestamp=1, step=0)
    with contextlib.closing(sqlite3.connect(mlflow.database)) as connection, connection:

        def copies(table: str, changes: dict[str, Any]) -> tuple[str, list[Any]]:
            cursor = connection.execute(f"SELECT * FROM {table} WHERE run_uuid = ?", (template,))
            row = dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True)) | changes
            marks = ",".join("?" * len(row))
            return f"INSERT INTO {table} ({','.join(row)}) VALUES ({marks})", list(row.values())

        for number in range(runs):
            run_id = f"{name[:8]}{number:0{32 - len(name[:8])}x}"
            for table in ("runs", "latest_metrics"):
                connection.execute(*copies(table, {"run_uuid": run_id} | ({"name": run_id} if table == "runs" else {})))
            changes = {"run_uuid": run_id, "step": 0, "timestamp": 0, "value": 0.0}
            statement, _ = copies("metrics", changes)
            columns = statement.partition("(")[2].partition(")")[0].split(",")
            base = dict(zip(columns, copies("metrics", changes)[1], strict=True))
            connection.executemany(
                statement,
                [
                    list((base | {"step": step, "timestamp": 1000 * step, "value": 1 / step}).values())
                    for step in range(1, points + 1)
                ],
            )
        connection.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (template,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=["callback", "lengths", "rate", "crash", "million", "collect", "all"], default="all"
    )
    parser.add_argument("--steps", type=int, default=1000, help="updates of each of the four members; 10 a result")
    parser.add_argument("--lengths", type=int, nargs=2, default=[500, 2500], help="updates, of the part `lengths`")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the part `rate`")
    parser.add_argument("--points", type=int, default=1_000_000, help="of the part `million`")
    parser.add_argument("--runs", type=int, default=1000, help="of the part `collect`")
    parser.add_argument("--run-points", type=int, default=1000, help="of each of them")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended here too
    table = Table()
    parts = {
        "callback": lambda folder: part_callback(table, folder, options.steps),
        "lengths": lambda folder: part_lengths(table, folder, options.lengths),
        "rate": lambda folder: part_rate(table, folder, options.seconds),
        "crash": lambda folder: part_crash(table, folder, options.steps),
        "million": lambda folder: part_million(table, folder, options.points),
        "collect": lambda folder: part_collect(table, folder, options.runs, options.run_points),
    }
    for name, part in parts.items():
        if options.part in (name, "all"):
            with tempfile.TemporaryDirectory() as temporary:
                try:
                    part(Path(temporary))
                except UserError as error:
                    raise SystemExit(f"{name}: {error}") from None
    table.show()


if __name__ == "__main__":
    main()
