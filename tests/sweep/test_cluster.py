"""What travels to the nodes of a cluster, and what does not."""

import os
import stat
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import landscape_ray
from landscape_ray.config import parse
from landscape_ray.sweep import cluster
from landscape_ray.sweep.cluster import code_env, named_modules, private_token, runtime_env
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.driver_mirror import DriverMirror
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.storage import open_storage

PACKAGE = str(Path(landscape_ray.__file__).parent)


def test_the_package_travels_and_no_variable(sweep_text: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    env = runtime_env(parse(SweepSpec, tomllib.loads(sweep_text()), "file"))
    assert env["py_modules"] == [PACKAGE]
    assert "s3cret" not in str(env)
    assert set(env) == {"py_modules", "excludes"}

    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**env)  # Ray accepts it


def test_modules_that_a_sweep_names_travel_too(
    sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_single.py").write_text(
        "import torch\ndef net(vocab_size):\n    return torch.nn.Embedding(vocab_size, vocab_size)\n"
    )
    (tmp_path / "mine_package").mkdir()
    (tmp_path / "mine_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    text = sweep_text(train={**tiny, "model": {"name": "mine_single:net"}, "probes": {}})
    env = runtime_env(parse(SweepSpec, tomllib.loads(text), "file"))
    assert env["py_modules"] == sorted([PACKAGE, str(tmp_path / "mine_single.py")])
    assert str(tmp_path / "mine_package") in code_env("mine_package")["py_modules"]
    assert code_env("torch", "json", "sys", "no_such_module")["py_modules"] == [PACKAGE], "installed, built in, absent"


def test_names_are_found_wherever_they_stand() -> None:
    params = {"a": "x.y:Z", "b": ["q:R", {"c": "s:T"}], "d": "http://x:80", "e": "C:\\x", "f": 3, "g": "two words:x"}
    assert named_modules(params) == {"x", "q", "s"}


def test_a_token_that_ray_makes_is_for_its_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    mask = os.umask(0o022)
    try:
        with private_token():
            path.write_text("secret")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with private_token():
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "the user's own choice stays"
    assert sys.modules.get("ray") is not None


def test_a_node_without_the_folder_reads_the_sweep_in_its_storage(folder: SweepFolder, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/store"
    assert cluster._stored_meta(uri, folder.path.name) is None  # nothing is there yet
    DriverMirror(folder, open_storage(uri).at(folder.path.name)).publish()
    stored = cluster._stored_meta(uri, folder.path.name)
    assert stored is not None
    absent = str(tmp_path / "elsewhere" / "sweep.json")
    assert cluster._look(absent, stored)["content"] == folder.meta_path.read_text()
    assert "No such file" in cluster._look(absent)["content"]
    assert cluster._look(str(folder.meta_path), ("file:///nowhere", "x"))["content"] == folder.meta_path.read_text()
    assert "No such file" in cluster._look(absent, (uri, "gone"))["content"]
    assert cluster._stored_meta("s5://bucket", "x") is None


def test_the_doctor_asks_nodes_for_the_folder_or_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from landscape_ray.sweep import doctor_ray

    uri, seen = f"file://{tmp_path}/store", []

    def ask(path: str, stored: tuple[str, str] | None) -> dict[str, dict[str, str]]:
        assert stored is not None
        seen.append(stored)
        return {"10.0.0.1": cluster._look(f"{path}.absent", stored), "10.0.0.2": cluster._look(f"{path}.absent")}

    monkeypatch.setattr(doctor_ray, "ask_nodes", ask)
    near, far = doctor_ray._each_node(tmp_path / "runs", uri)
    assert (near.status, near.found) == (
        "ok",
        "runs tasks, sees the results folder or the storage, has the same versions",
    )
    assert (far.status, far.remedy) == ("error", "give a --results folder that all nodes share, or --storage")
    assert seen[0][0] == uri
    assert list((tmp_path / "store").iterdir()) == []
    assert list((tmp_path / "runs").iterdir()) == []
