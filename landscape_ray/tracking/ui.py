"""The MLflow UI on a results folder: one server process, on this machine only unless told otherwise."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from landscape_ray.errors import UserError
from landscape_ray.signals import termination_as_interrupt
from landscape_ray.tracking.uris import mask_secrets, resolve_tracking_uri, sqlite_path

START_SECONDS = 60.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    results: Path,
    *,
    host: str,
    port: int,
    tracking_uri: str | None,
    console: Console,
    names: Sequence[str] = (),
) -> None:
    """Run the MLflow UI until it is interrupted.

    Args:
        results: folder with the sweeps and their store.
        host: address to listen on.
        port: to listen on.
        tracking_uri: store to show; None for the environment's or the results folder's.
        console: where the address is printed.
        names: under which browsers may ask for the server, beside its address.

    Raises:
        UserError: no store there, the port is taken, or the server does not come up.
    """
    uri = resolve_tracking_uri(tracking_uri, results)
    if uri.startswith(("http://", "https://")):
        console.print(f"the runs are on an MLflow server already: {mask_secrets(uri)}", highlight=False)
        from landscape_ray.tracking.server import bounded_http

        with (
            contextlib.suppress(Exception),
            bounded_http(5),
        ):  # the address is what was asked for; the view is an extra
            page = f"{mask_secrets(uri).rstrip('/')}/#/{start_page(uri)}"
            console.print(f"its runs with their searched values: {page}", highlight=False, soft_wrap=True)
        return
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        raise UserError(
            f"no tracked runs in {results} ({database.name} is missing); run a sweep first or give --results"
        )
    check_port(host, port)
    if host not in LOOPBACK:
        console.print(
            f"[yellow]anybody who reaches {host}:{port} can read and delete runs; it has no password. Safer: leave it "
            f"on 127.0.0.1 and come by `ssh -L {port}:127.0.0.1:{port}`, or put a proxy with TLS and passwords in "
            "front[/yellow]",
            soft_wrap=True,
        )
    with termination_as_interrupt(), contextlib.suppress(KeyboardInterrupt):
        process = start_server(uri, host=host, port=port, names=names)
        try:
            with console.status("starting the MLflow UI ..."):
                page = f"{address(host, port)}/#/{start_page(uri)}"  # from the store itself, while the server starts
                wait_until_up(process, host, port)
            console.print(f"MLflow UI: {page}\nCtrl-C ends it", highlight=False, soft_wrap=True)
            process.wait()
        finally:
            stop_server(process)


def start_page(uri: str) -> str:
    """Return the page to open: the runs of the latest experiment, with results and searched values as columns.

    It is the view for training, not the one for agents.
    """
    from landscape_ray.tracking.labels import VIEW, show_what_matters
    from landscape_ray.tracking.server import open_client  # slow to import, and the server takes longer still

    client = open_client(uri)
    experiments = client.search_experiments(order_by=["last_update_time DESC"])
    named = [experiment for experiment in experiments if experiment.experiment_id != "0"]  # 0 is MLflow's empty default
    if not named:
        return "experiments?workflowType=machine_learning"
    place = named[0].experiment_id
    show_what_matters(client, place)
    return f"experiments/{place}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def allowed_hosts(host: str, port: int, names: Sequence[str] = ()) -> list[str]:
    """Return the values of the header Host that the server answers to.

    Without a list MLflow admits names such as 192.168.evil.example, which its patterns for private addresses match: a
    page there could read the runs through a visitor's browser (DNS rebinding).

    >>> allowed_hosts("127.0.0.1", 5000)
    ['127.0.0.1:5000', 'localhost:5000', '[::1]:5000']
    """
    own = [] if host in LOOPBACK else [socket.gethostname(), socket.getfqdn(), host]
    if host in ("0.0.0.0", "::"):
        own = own[:2]  # every address of this machine is listened on: others than its names must be given
    known = dict.fromkeys(["127.0.0.1", "localhost", "[::1]", *own])
    return [f"{name}:{port}" for name in known] + list(names)


def start_server(uri: str, *, host: str, port: int, names: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start `mlflow server` with one worker and without its job runner: two processes instead of thirteen.

    It answers to its own names only and takes changes from its own pages only.
    """
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_BACKEND_STORE_URI"] = uri  # not an argument: those are shown to every user of the machine
    for name in ("MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"):
        environment.pop(name, None)  # the options below are what counts
    hosts = allowed_hosts(host, port, names)
    origins = [f"{scheme}://{name}" for name in hosts for scheme in ("http", "https")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def address(host: str, port: int) -> str:
    """Return the URL to open in a browser on this machine."""
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"


def check_port(host: str, port: int) -> None:
    """Raise when somebody listens there already.

    Raises:
        UserError: the port is taken, or the address is not one of this machine.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror or error}); give another --port") from None


def wait_until_up(process: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Return once the server answers.

    Raises:
        UserError: it ended, or does not answer in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            text = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
            last = text.splitlines()[-1] if text else f"exit status {process.returncode}"
            raise UserError(f"the MLflow server ended at once: {last}; check --tracking-uri and the installation")
        try:
            with urllib.request.urlopen(f"{address(host, port)}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(
        f"the MLflow server did not answer on {host}:{port} within {START_SECONDS:.0f} s; try another --port"
    )
