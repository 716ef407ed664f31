"""The rank study of a sweep: what is compared with what, what is left out, and what it says."""

import dataclasses
import io
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from landscape_ray import cli
from landscape_ray.errors import UserError
from landscape_ray.laws.ranking import Association, kendall
from landscape_ray.records import EvalRecord, ProbeRecord, RunSummary, StepRecord, VariantRecord
from landscape_ray.reports.rank_figure import rank_figure
from landscape_ray.reports.rank_tables import rank_tables
from landscape_ray.reports.ranking import RankStudy, definitions, rank_study
from landscape_ray.reports.static import render
from landscape_ray.text import signed
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter

RATES, DECAYS, STEPS = (0.001, 0.004, 0.016, 0.064), (0.0, 0.01, 0.1, 1.0), 40


def write(folder: SweepFolder, run_id: str, lr: float, wd: float, measures: dict[str, float], **more: Any) -> None:
    """Write a run whose training loss falls to 0.5 in the last tenth and whose held-out loss is `loss`."""
    clock = {"num_tokens": 1, "flops": 1.0, "elapsed_seconds": 1.0, "time_unix": 1.75e9}
    cost = {"cost_seconds": 0.1}
    rates = {"lr": lr, "weight_decay": wd, "momentum": 0.9, "grad_norm": 1.0}
    loss, error, shifted, status = more["loss"], more["error"], more["shifted"], more.get("status", "finished")
    writer = PartWriter(folder.trial(run_id))
    for step in range(1, STEPS + 1):
        train = 0.5 if step > STEPS - 10 else 2.0
        writer.append(StepRecord(step=step, loss_nats=train, **clock, **cost, **rates))
    writer.append(EvalRecord(step=STEPS, loss_nats=loss, accuracy=1 - error, **clock, **cost))
    averaged = {"variant": "ema", "loss_nats": 1.0, "accuracy": 0.5}
    for variant in (averaged, {"variant": "noise_3", "loss_nats": shifted, "accuracy": 1 - shifted}):
        writer.append(VariantRecord(step=STEPS, **variant, **clock, **cost))
    for name, value in measures.items():
        for step, seen in ((STEPS // 2, -value), (STEPS, value)):  # the last one counts
            spent = {"probe": name, "value": seen, "standard_error": 0.0, "num_matvecs": 1}
            writer.append(ProbeRecord(step=step, **spent, **clock, **cost))
    config = {
        "seed": more.get("seed", 0),
        "schedule": {"name": "cosine", "peak_lr": lr},
        "optimizer": {"name": "adamw", "weight_decay": wd},
        "eval": {"shifts": ["noise_3"]},
        "averaging": {"name": "ema"},
        "data": {"name": "images", "augment": more.get("augment", "none")},
    }
    summary = RunSummary(
        run_id=run_id,
        status=status,
        config=config,
        varied={"schedule.peak_lr": lr, "optimizer.weight_decay": wd},
        step=STEPS,
        num_steps=STEPS,
        final_loss_nats=loss,
        final_accuracy=1 - error,
        unit="image",
        loss_unit=more.get("unit", "nats/image"),
    )
    folder.trial(run_id).commit(summary, writer.flush())


def make(path: Path, *, measures: bool = True, num: int = 16, **more: Any) -> SweepFolder:
    """Write a grid of runs. Sharpness and gap follow the learning rate and nothing else; norm follows the gap."""
    folder = SweepFolder.create(path, spec_text="", meta={"name": path.name, "created_unix": 1.75e9})
    rng = np.random.default_rng(0)
    for index in range(num):
        lr, wd = RATES[index // 4], DECAYS[index % 4]
        gap = math.log(lr / 0.001) / 10 + 0.02 * rng.standard_normal() + 0.1
        found = {"sharpness": 2 / lr * math.exp(0.2 * rng.standard_normal()), "norms/last": gap + 1}
        fields = {"loss": 0.5 + gap, "error": 0.2 - 0.1 * gap, "shifted": 0.3 + 0.01 * rng.standard_normal()} | more
        write(folder, f"t{index:04d}", lr, wd, found if measures else {}, **fields)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> RankStudy:
    folder = make(tmp_path_factory.mktemp("rank") / "grid")
    rest = {"loss": 9.0, "error": 0.9, "shifted": 0.9}
    write(folder, "t0098", 0.1, 0.0, {"sharpness": 1e9}, status="diverged", **rest)
    write(folder, "t0099", 0.1, 0.0, {"sharpness": 1e9}, status="failed", **rest)
    return rank_study([folder])


def cell(study: RankStudy, measure: str, compared: str, target: str) -> Association:
    rows = [r for r in (*study.overall, *study.conditional) if (r.measure, r.compared) == (measure, compared)]
    found = rows[0].cells[target]
    assert isinstance(found, Association), found
    return found


def test_values_are_those_of_the_end_and_runs_without_a_result_are_left_out(study: RankStudy) -> None:
    assert study.excluded == {"t0098": "diverged", "t0099": "failed"}
    assert len(study.runs) == study.num_configurations == 16
    assert list(study.targets) == ["gap", "held-out loss", "held-out error", "noise_3 error"]  # no averaged weights
    assert list(study.measures) == ["sharpness", "norms/last"]
    assert list(study.settings) == ["schedule.peak_lr", "optimizer.weight_decay"]
    assert min(study.measures["sharpness"]) > 0
    assert np.array(study.targets["gap"]) == pytest.approx(np.array(study.targets["held-out loss"]) - 0.5)


@pytest.mark.acceptance
def test_the_table_of_all_runs_and_the_one_at_equal_settings(study: RankStudy) -> None:
    whole = cell(study, "sharpness", "all runs", "gap")
    assert whole == kendall(study.measures["sharpness"], study.targets["gap"])
    assert whole.high < -0.5
    assert cell(study, "sharpness", "all runs", "held-out error").tau == pytest.approx(-whole.tau)
    assert cell(study, "sharpness", "only schedule.peak_lr differs", "gap").tau == -1
    inside = cell(study, "sharpness", "schedule.peak_lr is equal", "gap")
    assert inside.low < 0 < inside.high
    assert inside == cell(study, "sharpness", "only optimizer.weight_decay differs", "gap")
    assert cell(study, "norms/last", "schedule.peak_lr is equal", "gap").tau == 1
    assert (0, "gap") in study.significant(study.overall)
    assert (0, "noise_3 error") not in study.significant(study.overall)


def test_what_a_user_sees(study: RankStudy) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(rank_tables(study), crop=False)
    shown = out.getvalue()
    said = " ".join(shown.split())
    assert "rank study of grid: 16 runs of 16 configurations (left out: 1 diverged, 1 failed)" in said
    assert "first table: 8 comparisons, 6 marked" in said
    assert "mean training loss of the last tenth of the updates (at least 10)" in said
    assert "…" not in shown
    figure = rank_figure(study)
    tau = signed(cell(study, "sharpness", "all runs", "gap").tau, 2)
    assert [panel.y.label for panel in figure.panels] == ["norms/last (τ +1.00)", f"sharpness (τ {tau})"]
    assert figure.takeaway.startswith("norms/last ranks the gap best: τ +1.00 (")
    assert "At equal schedule.peak_lr: τ +1.00" in figure.takeaway
    assert figure.colorbar is not None
    assert render(figure)[:4] == b"\x89PNG"
    numbers = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert numbers["overall"]["num_comparisons"] == 8
    assert numbers["overall"]["rows"][1]["found"]["gap"]["tau"] == 1


def test_a_gap_beside_augmented_examples_is_no_absolute_number(study: RankStudy, tmp_path: Path) -> None:
    assert "augmented" not in definitions(study)
    assert "That one is of augmented examples" in definitions(rank_study([make(tmp_path / "a", augment="crop")]))


def test_of_a_measure_and_its_parts_the_figure_shows_one(study: RankStudy) -> None:
    row = next(row for row in study.overall if row.measure == "sharpness")
    part = dataclasses.replace(row, measure="sharpness/part")
    values = {**study.measures, "sharpness/part": study.measures["sharpness"]}
    more = dataclasses.replace(study, measures=values, overall=(*study.overall, part))
    assert [panel.y for panel in rank_figure(more).panels] == [panel.y for panel in rank_figure(study).panels]


def test_seeds_are_one_configuration_and_sweeps_are_compared_together(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2)]
    found = rank_study(folders)
    assert (len(found.runs), found.num_configurations) == (32, 16)
    assert cell(found, "sharpness", "all runs", "gap").num_configurations == 16
    assert set(found.runs) >= {"a/t0000", "b/t0000"}


def test_a_measure_that_few_runs_have_says_so(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    write(folder, "t0097", 0.1, 0.0, {"late": 1.0, "sharpness": math.nan}, loss=2.0, error=0.1, shifted=0.2)
    found = rank_study([folder])
    assert found.overall[2].cells["gap"] == "too few runs: 1, needs 5"
    assert cell(found, "sharpness", "all runs", "gap").num_runs == 16
    assert found.to_json()["measures"]["sharpness"][-1] is None
    assert len(rank_figure(found).panels) == 2


def test_four_runs_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got 4 among 4 finished runs; set search.num_trials to 16 or more"):
        rank_study([make(tmp_path / "a", num=4)])


def test_a_constant_gap_is_said(tmp_path: Path) -> None:
    found = rank_study([make(tmp_path / "a", loss=1.0)])
    assert rank_figure(found).takeaway == "No measure can be ranked with the gap: all values are equal."


def test_what_cannot_be_ranked(tmp_path: Path, fabricate: ModuleType) -> None:
    with pytest.raises(UserError, match=r"got 0 among 16 finished runs; add \[train.probes.sharpness\] in the sweep"):
        rank_study([make(tmp_path / "a", measures=False)])
    with pytest.raises(UserError, match=r"got 0 among 0 finished runs \(left out: 16 failed\); set search.num_trials"):
        rank_study([make(tmp_path / "b", status="failed")])
    with pytest.raises(UserError, match="losses of one kind, got nats/image and nats/token; rank them one by one"):
        rank_study([make(tmp_path / "c"), make(tmp_path / "d", unit="nats/token")])
    population = rank_study_error([fabricate.make_population(tmp_path / "e", steps=100)])
    assert "2 changed by a population" in population


def rank_study_error(folders: list[SweepFolder]) -> str:
    with pytest.raises(UserError) as found:
        rank_study(folders)
    return str(found.value)


def test_without_training_losses_the_held_out_loss_is_shown(study: RankStudy) -> None:
    rows = [dataclasses.replace(row, cells={k: v for k, v in row.cells.items() if k != "gap"}) for row in study.overall]
    rest = {name: values for name, values in study.targets.items() if name != "gap"}
    figure = rank_figure(dataclasses.replace(study, overall=tuple(rows), conditional=(), targets=rest))
    assert figure.title == "How measures rank the held-out loss"
    assert figure.takeaway.startswith("norms/last ranks the held-out loss best: τ +1.00 (")


def test_the_command_prints_tables_and_leaves_figure_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "grid")
    make(tmp_path / "runs" / "bare", measures=False)

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["landscape-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    assert run("rank", "grid") == 0
    out = capsys.readouterr().out
    assert "rank study of grid: 16 runs" in out
    assert "figure: runs/grid/fits/rank.png" in out
    assert (tmp_path / "runs/grid/fits/rank.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "runs/grid/fits/rank.json").read_text())["sweeps"] == ["grid"]
    assert run("rank", "grid", "--out", "found") == 0
    assert (tmp_path / "found" / "rank.json").is_file()
    assert "only schedule.peak_lr differs" in out
    assert "only optimizer.weight_decay differs" not in out
    assert "Not shown: the same for optimizer.weight_decay" in " ".join(out.split())
    capsys.readouterr()
    assert run("rank", "grid", "--given", "all") == 0
    assert "only optimizer.weight_decay differs" in capsys.readouterr().out
    assert run("rank", "grid", "--given", "optimizer.weight_decay") == 0
    assert "only schedule.peak_lr differs" not in capsys.readouterr().out
    assert run("rank", "grid", "--given", "depth") == 2
    assert "--given must be a setting that the runs differ in" in " ".join(capsys.readouterr().err.split())
    assert run("rank", "bare") == 2
    assert "add [train.probes.sharpness] in the sweep file" in " ".join(capsys.readouterr().err.split())
