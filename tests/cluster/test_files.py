"""The files of cluster/: each is what its reader accepts, they agree with each other, none opens more than it must."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if "==" in line
)
TEXTS = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.name != ".env")
LAUNCHERS = ("ssh.yaml", "aws.yaml")


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = (each for each in documents(name) if each["kind"] == kind)
    return found


def ray_specs() -> list[dict[str, Any]]:
    return [
        of_kind("raycluster.yaml", "RayCluster")["spec"],
        of_kind("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"],
    ]


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["template"]


def test_everything_is_there() -> None:
    names = {str(path.relative_to(CLUSTER)) for path in TEXTS}
    assert names == {
        *("ssh.yaml", "aws.yaml", "slurm.sh", "Containerfile", "compose.yaml", "compose.env.example"),
        *("kuberay/storage.yaml", "kuberay/mlflow.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"),
    }


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_versions_are_those_of_the_project(path: Path) -> None:
    """Ray of another version cannot join a cluster; a driver of another package writes what its trials cannot read."""
    text = path.read_text()
    for pattern, wanted in (
        (r"rayproject/ray:([0-9.]+)", CONSTRAINTS["ray"]),
        (r"RAY_VERSION=([0-9.]+)", CONSTRAINTS["ray"]),
        (r"ray\[default\]==([0-9.]+)", CONSTRAINTS["ray"]),
        (r'rayVersion: "([0-9.]+)"', CONSTRAINTS["ray"]),
        (r"landscape-ray(?:-mlflow)?:([0-9.]+)", PROJECT["version"]),
    ):
        assert set(re.findall(pattern, text)) <= {wanted}, pattern
    for python in re.findall(r"(?:PYTHON_VERSION=|python)(3\.\d+)", text):
        assert tuple(map(int, python.split("."))) >= (3, 11)
    assert "scripts/constraints.txt" in text or not re.search(r"pip install[^\n]*editable", text)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_secret_and_no_open_door_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert "password=" not in text.lower() or path.name == "compose.env.example"
    assert not re.search(r"(minioadmin|s3admin|postgres:postgres)", text)
    for line in text.splitlines():
        if "dashboard-host" in line and "kuberay" not in str(path):
            assert "127.0.0.1" in line, line


# --- Ray's launcher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_pass_ray_s_own_validator(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(name))
    validate_config(config)
    wrong = {**config, "max_worker": 3}
    with pytest.raises(Exception, match=r"max_worker"):
        validate_config(wrong)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launched_nodes_ask_for_a_token(name: str) -> None:
    config = load(name)
    for start in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in start
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert config["rsync_filter"] == [".gitignore"]


def test_the_cloud_has_gpu_workers_that_come_and_go() -> None:
    config = load("aws.yaml")
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0
    assert 0 < gpu["max_workers"] <= config["max_workers"]
    assert gpu["resources"]["GPU"] >= 1
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0


# --- Kubernetes -------------------------------------------------------------------------------------------------------

RAY_CLUSTER_FIELDS = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"),
    *("workerGroupSpecs", "suspend", "gcsFaultToleranceOptions", "headServiceAnnotations", "managedBy"),
}
GROUP_FIELDS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
    "idleTimeoutSeconds",
}
JOB_FIELDS = {
    *("submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "entrypoint"),
    *("rayClusterSpec", "runtimeEnvYAML", "activeDeadlineSeconds", "clusterSelector", "jobId", "metadata", "suspend"),
}
API_VERSIONS = {
    "RayCluster": "ray.io/v1",
    "RayJob": "ray.io/v1",
    "Deployment": "apps/v1",
    "Service": "v1",
    "PersistentVolumeClaim": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@pytest.mark.parametrize("name", ["storage.yaml", "mlflow.yaml", "raycluster.yaml", "rayjob.yaml"])
def test_manifests_are_objects_of_kubernetes(name: str) -> None:
    for each in documents(name):
        assert each["apiVersion"] == API_VERSIONS[each["kind"]]
        assert DNS_LABEL.fullmatch(each["metadata"]["name"])
        assert set(each) == {"apiVersion", "kind", "metadata", "spec"}


@pytest.mark.parametrize("spec", ray_specs(), ids=["RayCluster", "RayJob"])
def test_ray_clusters_have_the_fields_that_kuberay_knows(spec: dict[str, Any]) -> None:
    assert set(spec) <= RAY_CLUSTER_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    assert set(spec["headGroupSpec"]) <= {"serviceType", "rayStartParams", "template"}
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert DNS_LABEL.fullmatch(group["groupName"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay wants text"
    for pod in pods(spec):
        check_pod(pod["spec"])
        assert pod["metadata"]["labels"]["app"] == "landscape-ray"


def check_pod(spec: dict[str, Any]) -> None:
    """Every mounted volume is there and used, quantities are quantities, names are unique."""
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert len(volumes) == len(spec["volumes"])
    mounted = set()
    for container in spec["containers"]:
        mounted |= {mount["name"] for mount in container.get("volumeMounts", [])}
        assert all(mount["mountPath"].startswith("/") for mount in container["volumeMounts"])
        for amounts in container["resources"].values():
            for amount in amounts.values():
                assert isinstance(amount, str)
                assert QUANTITY.fullmatch(amount)
        requests, limits = container["resources"]["requests"], container["resources"].get("limits", {})
        assert limits["memory"] == requests["memory"] or "ray" not in container["name"], "Ray counts on its memory"
        names = [entry["name"] for entry in container.get("env", [])]
        assert len(names) == len(set(names))
    assert mounted == volumes


def test_the_job_and_the_cluster_are_the_same_but_for_the_sweep_file() -> None:
    cluster, job = ray_specs()
    head = job["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [each for each in head["volumes"] if each["name"] != "sweep"]
    container = head["containers"][0]
    container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] != "sweep"]
    assert job == cluster


def test_selectors_and_claims_meet() -> None:
    deployment = of_kind("mlflow.yaml", "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    service = of_kind("mlflow.yaml", "Service")
    assert deployment["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    policy = of_kind("mlflow.yaml", "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    ((rule,),) = [[source["podSelector"]["matchLabels"] for source in each["from"]] for each in policy["ingress"]]
    for spec in ray_specs():
        assert all(rule.items() <= pod["metadata"]["labels"].items() for pod in pods(spec))
    check_pod(deployment["template"]["spec"])

    (container,) = deployment["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (port,) = service["spec"]["ports"]
    assert ports[port["targetPort"]] == port["port"]
    claims = {
        each["metadata"]["name"]: each["spec"]["accessModes"]
        for name in ("storage.yaml", "mlflow.yaml")
        for each in documents(name)
        if each["kind"] == "PersistentVolumeClaim"
    }
    used = [pod["spec"] for spec in ray_specs() for pod in pods(spec)]
    for spec in used:
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert claims[claim["claimName"]] == ["ReadWriteMany"], "every pod of the cluster writes there"
    for spec in ray_specs():
        for pod in pods(spec):
            environment = {entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]}
            assert environment["MLFLOW_TRACKING_URI"] == f"http://{service['metadata']['name']}:{port['port']}"
            (mount,) = (m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "shared")
            assert environment["LANDSCAPE_RAY_RESULTS"].startswith(mount["mountPath"] + "/")
    hosts = next(arg for arg in container["args"] if arg.startswith("--allowed-hosts="))
    assert f"{service['metadata']['name']}:{port['port']}" in hosts


def test_the_job_s_fields_and_command() -> None:
    job = of_kind("rayjob.yaml", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB_FIELDS
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    policy = of_kind("rayjob.yaml", "NetworkPolicy")["spec"]
    callers = [
        source.get("podSelector", {}).get("matchLabels", {}) for rule in policy["ingress"] for source in rule["from"]
    ]
    assert {"batch.kubernetes.io/job-name": job["metadata"]["name"]} in callers
    words = spec["entrypoint"]
    script = re.fullmatch(r"bash -c '(.*)'", words, re.DOTALL)
    assert script is not None
    subprocess.run(["bash", "-n", "-c", script[1]], check=True)
    assert "landscape-ray resume" in words
    assert "landscape-ray sweep" in words


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_the_slurm_script_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)
    if (checker := shutil.which("shellcheck")) is not None:
        subprocess.run([checker, str(CLUSTER / "slurm.sh")], check=True)


SHIMS = {
    "scontrol": 'printf "node1\\nnode2\\nnode3\\n"',
    "srun": """
        while [[ "$1" == --* ]]; do [[ "$1" == --nodelist=* ]] && node="${1#--nodelist=}"; shift; done
        echo "srun $node $*" >>"$CALLS"
        case "$1" in hostname) echo 127.0.0.1 ;; *) exec "$@" ;; esac""",
    "ray": """
        echo "ray $RAY_AUTH_MODE $*" >>"$CALLS"
        case "$1" in start) trap 'echo "stopped $2" >>"$CALLS"; exit' TERM
            case "$*" in *--head*) exec python3 -c "$LISTEN" "$RAY_PORT" ;; esac
            while :; do sleep 0.05; done ;; esac""",
    "landscape-ray": """
        echo "driver $*" >>"$CALLS"
        trap 'echo "driver told to stop" >>"$CALLS"; exit 130' TERM
        for _ in $(seq "${DRIVER_TICKS:-1}"); do sleep 0.05; done
        exit "${DRIVER_STATUS:-0}" """,
}
LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Stand-ins for Slurm's commands that write down how they are called and run the rest here."""
    import socket

    for name, script in SHIMS.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    calls = tmp_path / "calls"
    calls.touch()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "LISTEN": LISTEN,
        "RAY_PORT": str(port),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_ON_NODE": "8",
    }
    return environment, calls


def test_the_slurm_script_starts_a_head_workers_and_the_driver(slurm: tuple[dict[str, str], Path]) -> None:
    environment, calls = slurm
    arguments = ["sweep", "a file.toml", "--name", "x"]
    done = subprocess.run(
        [CLUSTER / "slurm.sh", *arguments], env={**environment, "DRIVER_STATUS": "2", "DRIVER_TICKS": "20"}, timeout=60
    )
    assert done.returncode == 2, "the driver's exit status is the job's"
    lines = calls.read_text().splitlines()
    address = f"127.0.0.1:{environment['RAY_PORT']}"
    starts = [line for line in lines if line.startswith("srun") and "ray start" in line]
    assert sorted(line.split()[1] for line in starts) == ["node1", "node2", "node3"]
    assert [("--head" in line) for line in sorted(starts)] == [True, False, False]
    assert all(f"--address={address}" in line for line in starts if "--head" not in line)
    assert all("--num-cpus=8" in line for line in starts)
    assert f"driver sweep a file.toml --name x --address {address}" in lines
    assert all(line.split()[1] == "token" for line in lines if line.startswith("ray "))


def test_the_slurm_script_passes_the_end_of_the_allocation_on(slurm: tuple[dict[str, str], Path]) -> None:
    import signal
    import time

    environment, calls = slurm
    with subprocess.Popen([CLUSTER / "slurm.sh", "resume", "x"], env={**environment, "DRIVER_TICKS": "2000"}) as script:
        try:
            deadline = time.monotonic() + 60
            while "driver resume" not in calls.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            script.send_signal(signal.SIGTERM)
            assert script.wait(60) == 130
        finally:
            script.kill()
    assert "driver told to stop" in calls.read_text()


def test_the_slurm_script_without_arguments_says_how_it_is_used() -> None:
    done = subprocess.run([CLUSTER / "slurm.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


# --- containers -------------------------------------------------------------------------------------------------------


def test_the_container_file_is_made_of_known_instructions_and_existing_files() -> None:
    text = (CLUSTER / "Containerfile").read_text()
    joined = re.sub(r"\\\n\s*", " ", text)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", joined, re.MULTILINE)
    assert [stage for _, stage in stages] == ["mlflow", "ray"]
    known = {"FROM", "ARG", "COPY", "RUN", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "WORKDIR"}
    for line in joined.splitlines():
        if not line or line.startswith("#"):
            continue
        instruction, _, rest = line.partition(" ")
        assert instruction in known, line
        if instruction == "COPY":
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line
        if instruction == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    assert "USER 1000" in joined
    assert "RAY_AUTH_MODE=token" in joined


def test_the_compose_file_keeps_to_loopback_and_asks_for_every_password() -> None:
    text = (CLUSTER / "compose.yaml").read_text()
    compose = yaml.safe_load(text)
    assert set(compose) == {"name", "services", "volumes", "networks"}
    named = {*compose["volumes"]}
    for name, service in compose["services"].items():
        assert ("image" in service) or ("build" in service), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        for other, wish in service.get("depends_on", {}).items():
            assert wish["condition"] in ("service_healthy", "service_completed_successfully")
            assert wish["condition"] != "service_healthy" or "healthcheck" in compose["services"][other]
        assert {mount.partition(":")[0] for mount in service.get("volumes", [])} <= named
        assert set(service["networks"]) <= set(compose["networks"])
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY|STORE_URI", key):
                assert re.search(r"\$\{[A-Z0-9_]+:\?", value), f"{name}: {key} needs a variable without a default"
        assert not re.search(r"PASSWORD|SECRET", str(service.get("command", ""))), "arguments are seen by all users"
    assert compose["networks"]["store"]["internal"] is True
    assert [name for name, s in compose["services"].items() if "outside" in s["networks"]] == ["mlflow"]
    build = compose["services"]["mlflow"]["build"]
    assert (CLUSTER / build["context"] / build["dockerfile"]).resolve() == CLUSTER / "Containerfile"
    wanted = set(re.findall(r"\$\{([A-Z0-9_]+):\?", text))
    offered = dict(
        line.split("=") for line in (CLUSTER / "compose.env.example").read_text().splitlines() if "=" in line
    )
    assert set(offered) == wanted
    assert not any(offered.values()), "no default passwords"
    command = " ".join(compose["services"]["mlflow"]["command"])
    assert "--allowed-hosts=" in command
    assert "--cors-allowed-origins=" in command


def test_passwords_stay_out_of_git() -> None:
    assert "/cluster/.env" in (ROOT / ".gitignore").read_text().splitlines()


# --- README -----------------------------------------------------------------------------------------------------------


def test_what_the_text_tells_to_type_exists() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    assert "cluster/" in blocks
    subprocess.run(["bash", "-n", "-c", blocks], check=True)
    for path in re.findall(r"(?:cluster|search_spaces)/[\w./-]+", blocks):
        assert (ROOT / path).exists(), path


def test_every_row_of_the_fault_matrix_has_its_test() -> None:
    text = re.split(r"\n##+ ", (ROOT / "README.md").read_text().split("### When something fails")[1])[0]
    rows = re.findall(r"^\| (.*) \|$", text, flags=re.MULTILINE)[1:]
    assert len(rows) == 16
    for row in rows:
        *_, named = row.split(" | ")
        path, _, test = named.strip("`").partition("::")
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), flags=re.MULTILINE), named
