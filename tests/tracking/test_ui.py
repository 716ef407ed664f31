"""The MLflow server answers to its own names, keeps its store's password off the command line, and warns."""

import contextlib
import io
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from landscape_ray.tracking import ui


def test_the_store_is_no_argument_and_hosts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "*")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: seen.update(command=command, **options))
    ui.start_server("postgresql://ada:s3cret@db/mlflow", host="127.0.0.1", port=5001, names=["runs.example.org"])
    assert "s3cret" not in " ".join(seen["command"])
    assert seen["env"]["MLFLOW_BACKEND_STORE_URI"] == "postgresql://ada:s3cret@db/mlflow"
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in seen["env"]
    options = dict(zip(seen["command"][4::2], seen["command"][5::2], strict=True))
    assert options["--host"] == "127.0.0.1"
    hosts = options["--allowed-hosts"].split(",")
    assert hosts == ["127.0.0.1:5001", "localhost:5001", "[::1]:5001", "runs.example.org"]
    assert "*" not in options["--allowed-hosts"] + options["--cors-allowed-origins"]


def test_an_open_address_has_the_machine_s_names() -> None:
    hosts = ui.allowed_hosts("0.0.0.0", 5000)
    assert f"{socket.gethostname()}:5000" in hosts
    assert not any("0.0.0.0" in host or "*" in host for host in hosts)
    assert "10.0.0.7:5000" in ui.allowed_hosts("10.0.0.7", 5000)


def test_an_open_address_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_template: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(store_template.read_bytes())

    class EndedError(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise EndedError

    monkeypatch.setattr(ui, "start_server", stop)
    out = io.StringIO()
    with pytest.raises(EndedError):
        ui.serve(tmp_path, host="0.0.0.0", port=0, tracking_uri=None, console=Console(file=out, width=300))
    assert "it has no password" in out.getvalue()
    assert "ssh -L" in out.getvalue()


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_foreign_page_gets_nothing(tmp_path: Path, store_template: Path) -> None:
    """Refused: a foreign Host (DNS rebinding), also one that looks like a private address, and cross-site requests."""
    (tmp_path / "mlflow.db").write_bytes(store_template.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = ui.start_server(f"sqlite:///{tmp_path}/mlflow.db", host="127.0.0.1", port=port)
    try:
        ui.wait_until_up(process, "127.0.0.1", port)

        def ask(host: str, origin: str | None = None) -> int:
            headers = {"Host": host, "Content-Type": "application/json", **({"Origin": origin} if origin else {})}
            url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search"
            request = urllib.request.Request(url, data=b'{"max_results": 1}', headers=headers)
            with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
            return 403

        assert ask(f"127.0.0.1:{port}") == 200
        assert ask(f"localhost:{port}", f"http://localhost:{port}") == 200
        assert ask("evil.example") == 403
        assert ask(f"192.168.evil.example:{port}") == 403
        assert ask(f"127.0.0.1:{port}", "http://evil.example") == 403
    finally:
        ui.stop_server(process)
