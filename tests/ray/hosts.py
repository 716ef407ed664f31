"""Ray nodes on hosts of their own, as far as one machine has them: a network namespace and a /tmp/ray for each."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import landscape_ray

PORT = 6379
PACKAGE = Path(landscape_ray.__file__).parent


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class Hosts:
    """Hosts on one bridge; the first is the head.

    Args:
        num_hosts: how many; Ray is started on each by `start_node`.
        private: a folder that is another one on each host, see `disk`; None where they share everything but /tmp/ray.
    """

    def __init__(self, num_hosts: int, private: Path | None = None) -> None:
        self.private = private
        tag = uuid.uuid4().hex[:6]
        self.net = f"10.231.{int(tag[:2], 16)}"
        self.bridge = f"lr{tag}"
        self.names = [f"lr{tag}{index}" for index in range(num_hosts)]
        self.head_address = f"{self.net}.10:{PORT}"
        self.folder = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))  # short: sockets have short paths
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_USAGE_STATS_ENABLED": "0",
            # a node is given up after five seconds without an answer
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.started: list[subprocess.Popen[bytes]] = []

    def address(self, index: int) -> str:
        return f"{self.net}.{10 + index}"

    def build(self) -> None:
        (self.folder / "empty").mkdir()
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.net}.1/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        for index, name in enumerate(self.names):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", f"{name}v", "master", self.bridge, "up")
            run("ip", "-n", name, "addr", "add", f"{self.address(index)}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            (self.folder / name).mkdir()
            self.disk(index).mkdir(parents=True)

    def disk(self, index: int) -> Path:
        """Return what a host sees under the private path."""
        return self.folder / "disks" / self.names[index]

    def command(self, index: int, *words: str, bare: bool = False) -> list[str]:
        """Return a command that runs on a host, with that host's own /tmp/ray; a bare one has no code of ours."""
        inside = f'mkdir -p /tmp/ray && mount --bind "{self.folder / self.names[index]}" /tmp/ray && '
        if self.private is not None:
            inside += f'mount --bind "{self.disk(index)}" "{self.private}" && '
        inside += f'mount --bind "{self.folder / "empty"}" "{PACKAGE}" && exec "$@"' if bare else 'exec "$@"'
        return ["ip", "netns", "exec", self.names[index], "unshare", "--mount", "bash", "-c", inside, "bash", *words]

    def launch(self, index: int, *words: str, bare: bool = False, **options: object) -> subprocess.Popen[bytes]:
        given: dict[str, object] = {"env": self.environment, "start_new_session": True, **options}
        process: subprocess.Popen[bytes] = subprocess.Popen(self.command(index, *words, bare=bare), **given)  # type: ignore[call-overload]
        self.started.append(process)
        return process

    def start_node(self, index: int, num_cpus: int, *more: str, dashboard: bool = False) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        where = (
            ["--head", f"--port={PORT}", f"--include-dashboard={str(dashboard).lower()}"]
            if index == 0
            else [f"--address={self.head_address}"]
        )
        with open(self.folder / f"{index}.log", "wb") as log:
            self.launch(
                index, sys.executable, ray, "start", "--block", *where, f"--node-ip-address={self.address(index)}",
                f"--num-cpus={num_cpus}", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats",
                *more,
                stdout=log, stderr=subprocess.STDOUT, cwd="/", bare=not dashboard,
            )  # fmt: skip

    def wait_for_nodes(self, number: int, seconds: float = 120.0) -> None:
        code = (
            "import ray, logging; ray.init(address='auto', log_to_driver=False, logging_level=logging.ERROR);"
            "print(sum(n['Alive'] for n in ray.nodes()))"
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            words = self.command(0, sys.executable, "-c", code)
            environment = {**self.environment, "RAY_ADDRESS": self.head_address}
            found = subprocess.run(words, env=environment, capture_output=True, text=True)
            if found.returncode == 0 and int(found.stdout.split()[-1]) >= number:
                return
            time.sleep(1)
        pytest.fail(f"{number} nodes did not come: {found.stdout[-500:]} {found.stderr[-1500:]}")

    def ask(self, code: str) -> str:
        """Return what Python code prints on the head."""
        environment = {**self.environment, "RAY_ADDRESS": self.head_address}
        words = self.command(0, sys.executable, "-c", code)
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        return done.stdout

    def kill_host(self, index: int) -> None:
        """End everything on a host at once, as a power cut would."""
        for pid in run("ip", "netns", "pids", self.names[index]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        for index, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill_host(index)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        for process in self.started:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def hosts(number: int, private: Path | None = None) -> Iterator[Hosts]:
    """Make hosts, or skip the test where this machine does not allow it; they do not outlive the test."""
    made = Hosts(number, private)
    try:
        try:
            made.build()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are refused here: {error}")
        yield made
    finally:
        made.close()
