"""The command line as a user meets it: what it prints, and that a mistake is one sentence and exit status 2."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from landscape_ray import cli
from landscape_ray.tracking.folder import SweepFolder

SPEC = """
name = "small"
commit_steps = 5
[train]
num_steps = 10
batch_size = 4
data = { context_length = 16 }
model = { depth = 1, width = 16, num_heads = 2 }
schedule = { peak_lr = 0.01 }
eval = { every_steps = 5, num_batches = 1, batch_size = 4 }
"""
SEARCH = SPEC + '[space]\n"schedule.peak_lr" = { log_uniform = [1e-3, 1e-2] }\n[search]\nnum_trials = 2\n'


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit status, output and errors."""
    before = sys.argv
    sys.argv = ["landscape-ray", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, " ".join(captured.err.split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "search.toml").write_text(SEARCH)
    (tmp_path / "train.toml").write_text(SPEC)
    return tmp_path


@pytest.fixture
def stored(here: Path, store_template: Path) -> None:
    """For tests of something else than the first run of all: the MLflow store beside the runs is there already."""
    (here / "runs").mkdir()
    shutil.copy(store_template, here / "runs" / "mlflow.db")


def left_behind(here: Path) -> list[str]:
    return [p.name for p in (here / "runs").iterdir()] if (here / "runs").exists() else []


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_steps = 10", "num_stepss = 10"), "unknown key 'num_stepss'; did you mean 'num_steps'?"),
        (("num_steps = 10", 'num_steps = "ten"'), "'num_steps' input should be a valid integer, got 'ten'"),
        (("batch_size = 4\nd", "batch_size = 0\nd"), "'batch_size' input should be greater than or equal to 1, got 0"),
        (("[1e-3, 1e-2]", "[1e-2, 1e-3]"), "log_uniform must be [low, high] with low < high"),
        (("num_trials", "numtrials"), "unknown key 'search.numtrials'; did you mean 'num_trials'?"),
        (("context_length = 16", 'context_length = 16, source = "nowhere"'), "nowhere"),
        (("[search]\nnum_trials = 2\n", ""), "must have a [search] or a [population] table"),
        (("name =", "name = ="), "is not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(here: Path, capsys: Any, change: tuple[str, str], message: str) -> None:
    (here / "bad.toml").write_text(SEARCH.replace(*change))
    code, _, err = run(capsys, "sweep", "bad.toml")
    assert code == 2
    assert message in err
    assert err.startswith("error:")
    assert "Traceback" not in err
    assert left_behind(here) == []


def test_a_missing_file_is_named(here: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "sweep", "serach.toml")
    assert (code, "no such file: serach.toml" in err, "search.toml" in err) == (2, True, True)


@pytest.mark.acceptance
def test_an_empty_or_tiny_corpus_is_refused_before_anything_starts(here: Path, capsys: Any) -> None:
    for content in ("", "short\n"):
        corpus = here / "corpus"
        corpus.mkdir(exist_ok=True)
        (corpus / "a.txt").write_text(content)
        (here / "bad.toml").write_text(SEARCH.replace("context_length = 16", 'context_length = 16, source = "corpus"'))
        code, _, err = run(capsys, "sweep", "bad.toml")
        assert code == 2
        assert "corpus" in err
        assert left_behind(here) == []


@pytest.mark.acceptance
def test_a_sweep_that_exists_is_not_overwritten(here: Path, capsys: Any) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "precious").write_text("x")
    code, _, err = run(capsys, "sweep", "search.toml", "--name", "mine")
    assert code == 2
    assert "runs/mine exists; use another --name, or `landscape-ray resume mine`" in err
    assert (here / "runs" / "mine" / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["../out", "a/b", "/tmp/abs"])
def test_a_name_is_a_plain_name(here: Path, capsys: Any, name: str) -> None:
    code, _, err = run(capsys, "sweep", "search.toml", "--name", name)
    assert (code, f"--name must be letters, digits, '.', '_' or '-', got '{name}'" in err) == (2, True)
    assert left_behind(here) == []


def test_a_results_folder_that_is_a_file_is_named(here: Path, capsys: Any) -> None:
    (here / "file").write_text("")
    code, _, err = run(capsys, "sweep", "search.toml", "--results", "file")
    assert code == 2
    assert "file; check the path and its permissions" in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("stored")
def test_data_that_changed_since_the_launch_is_refused(here: Path, capsys: Any) -> None:
    (here / "a.txt").write_text("".join(f"paragraph {i} of a small text\n\n" for i in range(100)))
    (here / "t.toml").write_text(SPEC.replace("context_length = 16", 'context_length = 16, source = "a.txt"'))
    assert run(capsys, "train", "t.toml", "--name", "one")[0] == 0
    (here / "a.txt").write_text("".join(f"paragraph {i} of another text\n\n" for i in range(100)))
    code, _, err = run(capsys, "resume", "one")
    assert (code, "the data of sweep 'one' changed since its launch" in err) == (2, True)


@pytest.mark.acceptance
def test_a_tracking_server_that_does_not_answer_is_named(here: Path, capsys: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, _, err = run(capsys, "sweep", "search.toml", "--tracking-uri", f"http://user:secret@127.0.0.1:{port}")
    assert code == 2
    assert "does not answer" in err
    assert "secret" not in err
    assert left_behind(here) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
        ("ray://127.0.0.1:1", "--address must be host:port or auto, got 'ray://127.0.0.1:1'"),
        ("here", "--address must be host:port or auto, got 'here'"),
    ],
)
def test_a_cluster_that_does_not_answer_is_named(here: Path, capsys: Any, address: str, message: str) -> None:
    code, _, err = run(capsys, "sweep", "search.toml", "--address", address)
    assert code == 2
    assert message in err
    assert left_behind(here) == []


@pytest.mark.acceptance
def test_a_full_disk_is_named_before_anything_starts(here: Path, capsys: Any, monkeypatch: Any) -> None:
    import shutil

    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 * 2**20))
    code, _, err = run(capsys, "sweep", "search.toml")
    assert code == 2
    assert "no space left for runs: 10 MiB free, at least 256 MiB needed" in err
    assert left_behind(here) == []


@pytest.mark.acceptance
def test_train_runs_without_ray_and_every_verb_reads_the_result(here: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "train", "train.toml", "--name", "one")
    assert code == 0
    assert "sweep one finished" in out
    assert "1 finished" in out
    summary = SweepFolder.open(here / "runs" / "one").trial("t0000").summary()
    assert summary is not None
    assert summary.status == "finished"

    assert "one" in run(capsys, "list")[1]
    code, out, _ = run(capsys, "sync", "one")
    assert (code, "the server is up to date" in out) == (0, True)
    code, _, err = run(capsys, "fit", "one")
    assert (code, "[[search.initial]]" in err) == (2, True)
    code, _, err = run(capsys, "predict", "one")
    assert (code, "has no fitted law; run `landscape-ray fit one`" in err) == (2, True)
    code, out, _ = run(capsys, "report", "one")
    assert code == 0
    page = (here / "runs" / "one" / "report.html").read_text()
    assert "t0000" in page
    code, out, _ = run(capsys, "status", "one")
    assert (code, "one: 1/1 trials ended" in out) == (0, True)
    code, out, _ = run(capsys, "export", "one")
    assert (code, "tensorboard --logdir runs/one/tensorboard" in out) == (0, True)
    assert list((here / "runs" / "one" / "tensorboard" / "t0000").glob("events.*"))
    code, _, err = run(capsys, "export", "one")
    assert (code, "exists; delete it" in err) == (2, True)
    code, out, _ = run(capsys, "refine", "one", "--num-points", "5")
    assert (code, '[train.schedule]\nname = "table"' in out) == (0, True)
    code, _, err = run(capsys, "resume")
    assert (code, "no unfinished sweep in runs" in err) == (2, True)
    code, out, _ = run(capsys, "resume", "one")
    assert (code, "sweep one finished" in out) == (0, True)


def test_sweeps_that_are_not_there_are_named(here: Path, capsys: Any) -> None:
    for verb in ("fit", "predict", "report", "sync", "resume", "status", "export"):
        code, _, err = run(capsys, verb, "nothing")
        assert code == 2, verb
        assert "no sweep 'nothing' in runs; there: none" in err, verb
    assert run(capsys, "list")[0] == 0
    code, _, err = run(capsys, "report")
    assert (code, "no sweep in runs" in err) == (2, True)
    code, _, err = run(capsys, "fit", str(here / "elsewhere"))
    assert (code, "not a sweep folder" in err) == (2, True)


@pytest.mark.usefixtures("stored")
def test_a_sweep_is_run_by_one_process_at_a_time(here: Path, capsys: Any) -> None:
    run(capsys, "train", "train.toml", "--name", "one")
    with SweepFolder.open(here / "runs" / "one").lock():
        code, _, err = run(capsys, "resume", "one")
    assert code == 2
    assert f"already being run by process {os.getpid()}" in err


def test_the_ui_needs_runs_and_a_free_port(here: Path, capsys: Any, store_template: Path) -> None:
    code, _, err = run(capsys, "ui")
    assert (code, "no tracked runs in runs" in err) == (2, True)
    (here / "runs").mkdir(exist_ok=True)
    shutil.copy(store_template, here / "runs" / "mlflow.db")
    run(capsys, "train", "train.toml", "--name", "one")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run(capsys, "ui", "--port", str(taken.getsockname()[1]))
    assert (code, "give another --port" in err) == (2, True)
    code, out, _ = run(capsys, "ui", "--tracking-uri", "http://name:word@example.org")
    assert (code, "http://***@example.org" in out) == (0, True)


@pytest.mark.usefixtures("stored")
def test_the_folder_says_how_it_was_made(here: Path, capsys: Any) -> None:
    run(capsys, "train", "train.toml", "--name", "one")
    folder = SweepFolder.open(here / "runs" / "one")
    assert folder.spec_text == SPEC
    meta = json.loads((folder.path / "sweep.json").read_text())
    assert meta["status"] == "finished"
    assert meta["versions"]["torch"]
    assert meta["hardware"]["cpus"] == os.cpu_count()


MLP = """
name = "mlp"
[train]
num_steps = 10
batch_size = 8
data = { name = "images" }
model = { name = "mlp", width = 16 }
schedule = { peak_lr = 0.01 }
eval = { every_steps = 10, num_batches = 1, batch_size = 8 }
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coordinates", "--widths", "8,x"), "--widths must be whole numbers separated by commas, got '8,x'"),
        (("coordinates", "--parametrisations", ","), "--parametrisations must name at least one, got ','"),
        (("coordinates", "--parametrisations", "mupp"), "'model.parametrisation' input should be 'standard', 'ntk' or"),
        (("transfer", "--peak-lrs", "0.1,1"), "--peak-lrs must be low,high,number, got '0.1,1'"),
        (("transfer", "--peak-lrs", "0,1,3"), "--peak-lrs must be 0 < low < high and three or more, got '0,1,3'"),
        (("range", "--low", "1", "--high", "0.1"), "low and high must satisfy 0 < low < high, got 1.0 and 0.1"),
    ],
)
def test_studies_that_make_no_sense(here: Path, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    (here / "mlp.toml").write_text(MLP)
    code, _, errors = run(capsys, "check", arguments[0], "mlp.toml", *arguments[1:])
    assert code == 2
    assert message in errors


def test_a_study_leaves_its_figure_and_its_numbers(here: Path, capsys: Any) -> None:
    (here / "mlp.toml").write_text(MLP)
    code, out, errors = run(
        capsys, "check", "transfer", "mlp.toml", "--widths", "8,16", "--peak-lrs", "0.001,0.1,3", "--out", "found"
    )
    assert code == 0, errors
    assert "the best learning rate moves by" in out
    assert (here / "found" / "lr-transfer.png").read_bytes()[:4] == b"\x89PNG"
    assert set(json.loads((here / "found" / "lr-transfer.json").read_text())) == {"standard", "mup"}


EDGE = """
name = "small-edge"
[train]
num_steps = 30
batch_size = 20
data = { name = "images", train_size = 20 }
model = { name = "mlp", width = 4, depth = 1 }
optimizer = { name = "sgd", momentum = 0.0 }
schedule = { name = "constant", peak_lr = 0.01 }
eval = { every_steps = 30, num_batches = 1, batch_size = 8 }
probes = { sharpness = { every_steps = 5, batch_size = 20 } }
"""


def test_the_edge_of_stability_is_drawn_for_every_file(here: Path, capsys: Any) -> None:
    (here / "edge.toml").write_text(EDGE)
    (here / "other.toml").write_text(EDGE.replace("small-edge", "other").replace("momentum = 0.0", "momentum = 0.9"))
    code, out, errors = run(capsys, "check", "edge", "edge.toml", "other.toml")
    assert code == 0, errors
    said = " ".join(out.split())
    assert "of the limit 2/LR = 200;" in said
    assert "of the limit (2 + 2β)/LR = 380;" in said
    for name, limit in (("small-edge", 200.0), ("other", 380.0)):
        assert (here / "checks" / f"edge-{name}.png").read_bytes()[:4] == b"\x89PNG"
        numbers = json.loads((here / "checks" / f"edge-{name}.json").read_text())
        assert numbers["thresholds"] == pytest.approx([limit] * 7)
        assert numbers["steps"] == [0, 5, 10, 15, 20, 25, 30]
        assert numbers["state"] == "below"


def test_the_bound_of_sgd_is_drawn(here: Path, capsys: Any) -> None:
    code, out, errors = run(capsys, "check", "sgd-stability", "--num-steps", "100", "--num-repetitions", "500")
    assert code == 0, errors
    assert "Weights grow above LR" in out
    numbers = json.loads((here / "checks" / "sgd-stability.json").read_text())
    assert numbers["measured_threshold"] == pytest.approx(2.0, abs=0.02)
    assert (here / "checks" / "sgd-stability.png").is_file()


def test_sharpness_over_widths_is_drawn(here: Path, capsys: Any) -> None:
    (here / "widths.toml").write_text(EDGE.replace("sharpness = {", "preconditioned_sharpness = {"))
    code, out, errors = run(capsys, "check", "sharpness", "widths.toml", "--widths", "4,8")
    assert code == 0, errors
    assert "muP: sharpness" in out
    numbers = json.loads((here / "checks" / "sharpness-widths.json").read_text())
    assert numbers["mup"]["widths"] == [4, 8]
    assert len(numbers["standard"]["sharpness"][1]) == 7
    (here / "edge.toml").write_text(EDGE)
    code, _, errors = run(capsys, "check", "sharpness", "edge.toml", "--widths", "4,8")
    assert (code, "add [train.probes.preconditioned_sharpness]" in errors) == (2, True)


@pytest.mark.usefixtures("stored")
def test_spectra_of_a_checkpoint_by_layer_class_and_batch_size(here: Path, capsys: Any) -> None:
    (here / "mlp.toml").write_text(MLP.replace("width = 16", "width = 4"))
    run(capsys, "train", "mlp.toml", "--name", "m")
    code, out, errors = run(
        capsys,
        *("probe", "m", "--probes", "sharpness, distance_from_init", "--batch-size", "64"),
        *("--layers", "--classes", "--batch-sizes", "4, 16", "--num-eigenvalues", "2"),
    )
    assert code == 0, errors
    said = " ".join(out.split())
    assert "The sharpest block is that of layer" in said
    assert "The loss is sharpest on class" in said
    assert "times that on all 64 examples" in said
    assert "64 (all)" in said
    assert "distance_from_init: left out, the run had no such probe" in said
    fits = here / "runs" / "m" / "fits"
    for name in ("layers", "classes", "batch-sizes"):
        assert (fits / f"spectrum-{name}-t0000.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((fits / "probes-t0000.json").read_text())["spectra"]
    whole, *layers = found["layers"].values()
    assert len(layers) == 3
    assert all(len(layer["largest"]) == 2 for layer in layers)
    # blocks interlace with the whole, up to the residuals
    assert max(layer["largest"][0][0] for layer in layers) <= whole["largest"][0][0] + whole["largest"][0][1]
    assert min(layer["smallest"][0][0] for layer in layers) >= whole["smallest"][0][0] - whole["smallest"][0][1]
    assert next(iter(found["classes"])) == "all targets"
    assert 2 <= len(found["classes"]) <= 11
    assert found["batch_sizes"]["batch_sizes"] == [4, 16]
    assert found["batch_sizes"]["largest"][0][0] > found["batch_sizes"]["largest"][-1][0]  # small batches are sharper
    assert json.loads((fits / "spectrum-layers-t0000.json").read_text()) == found["layers"]

    for given, message in (
        ("4,x", "--batch-sizes must be numbers separated by commas, such as 8,32,128, got '4,x'"),
        ("4", "batch_sizes must be two or more between 1 and 32, half of the examples, got [4]"),
    ):
        code, _, errors = run(capsys, "probe", "m", "--batch-size", "64", "--batch-sizes", given)
        assert (code, message in errors) == (2, True)


@pytest.mark.usefixtures("stored")
def test_a_checkpoint_is_measured(here: Path, capsys: Any) -> None:
    (here / "mlp.toml").write_text(MLP)
    run(capsys, "train", "mlp.toml", "--name", "m")
    code, out, errors = run(
        capsys, "probe", "m", "--probes", "trace, preconditioned_sharpness", "--batch-size", "16", "--density"
    )
    assert code == 0, errors
    assert "t0000 after 10 updates" in out
    assert " 16" in next(line for line in out.splitlines() if line.startswith("trace "))
    assert "Bulk from" in out
    fits = here / "runs" / "m" / "fits"
    numbers = json.loads((fits / "probes-t0000.json").read_text())
    assert set(numbers["estimates"]) == {"trace", "preconditioned_sharpness"}
    assert (fits / "spectrum-t0000.png").read_bytes()[:4] == b"\x89PNG"

    code, out, errors = run(capsys, "probe", "m", "--probes", "sharpness", "--batch-size", "16", "--outliers")
    assert code == 0, errors
    assert "examples whose loss the next update lowers most" in " ".join(out.split())
    assert sum(line.startswith(("loss falls", "loss rises")) for line in out.splitlines()) == 2
    assert (fits / "outliers-t0000.png").read_bytes()[:4] == b"\x89PNG"
    groups = json.loads((fits / "probes-t0000.json").read_text())["outliers"]
    assert len(groups["decreasing"]) == len(groups["increasing"]) == 4
    assert groups["loss_changes"] == sorted(groups["loss_changes"][:4]) + sorted(groups["loss_changes"][4:])[::-1]

    code, out, errors = run(capsys, "probe", "m", "--run", "t0000", "--out", "found")
    assert code == 0, errors
    assert "sharpness" in json.loads((here / "found" / "probes-t0000.json").read_text())["estimates"]

    code, _, errors = run(capsys, "probe", "m", "--probes", "sharp")
    assert (code, "--probes must name registered probes" in errors) == (2, True)
    code, _, errors = run(capsys, "probe", "m", "--run", "t7")
    assert (code, "--run must be a run with a checkpoint (t0000), got 't7'" in errors) == (2, True)
    shutil.rmtree(here / "runs" / "m" / "trials" / "t0000" / "checkpoint")
    code, _, errors = run(capsys, "probe", "m")
    assert (code, "no run of m has a checkpoint yet" in errors) == (2, True)


@pytest.mark.parametrize("verb", ["sweep", "train"])
def test_a_storage_that_is_none_is_named_before_the_start(here: Path, capsys: Any, verb: str) -> None:
    (here / "file").write_text("")
    for uri, message in (
        ("bucket/runs", "--storage must be an address such as s3://bucket/folder or file:///folder, got 'bucket/runs'"),
        ("s4://ada:s3cret@bucket/runs", "that pyarrow opens, got 's4://***@bucket/runs'"),
        (f"file://{here}/file/deep", "cannot be used"),
    ):
        code, out, err = run(capsys, verb, "search.toml", "--name", "x", "--storage", uri)
        assert (code, message in err) == (2, True), err
        assert "s3cret" not in out + err
        assert not (here / "runs" / "x").exists()


@pytest.mark.acceptance
def test_a_run_is_read_and_gone_on_with_from_its_storage(here: Path, capsys: Any, store_template: Path) -> None:
    uri = f"file://{here}/store"
    for home in ("runs", "other"):
        (here / home).mkdir()
        shutil.copy(store_template, here / home / "mlflow.db")
    assert run(capsys, "train", "train.toml", "--name", "one", "--storage", uri)[0] == 0
    code, _, err = run(capsys, "train", "train.toml", "--name", "one", "--storage", uri, "--results", "other")
    assert (code, f"{uri}/one exists; use another --name, or `landscape-ray resume {uri}/one`" in err) == (2, True)
    shutil.rmtree(here / "runs" / "one")
    code, out, _ = run(capsys, "status", f"{uri}/one", "--results", "other")
    assert (code, "1/1 trials ended" in out, f"storage {uri}: up to date" in out) == (0, True, True), out
    assert not (here / "other" / "one" / "trials" / "t0000" / "checkpoint").exists()
    code, out, _ = run(capsys, "resume", f"{uri}/one", "--results", "other", "--num-steps", "15")
    assert (code, "one finished" in out) == (0, True), out
    folder = SweepFolder.open(here / "other" / "one")
    assert folder.trial("t0000").summary().step == 15  # type: ignore[union-attr]
    code, out, _ = run(capsys, "sync", "one", "--results", "other")
    assert (code, "one: the storage is up to date" in out) == (0, True), out
    code, _, err = run(capsys, "status", f"{uri}/two")
    assert (code, f"no sweep at {uri}/two; give STORAGE/NAME as it was launched with --storage" in err) == (2, True)
    # an address with credentials is noted without them, and has to be given again
    folder.update_meta(storage="s3://***@bucket")
    code, out, err = run(capsys, "sync", "one", "--results", "other")
    assert (code, "was noted without its credentials; give it again with --storage" in err) == (2, True)
