import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from landscape_ray.config import parse, with_values
from landscape_ray.errors import UserError
from landscape_ray.sweep.spec import read_spec
from landscape_ray.training import TrainConfig
from landscape_ray.training.stability_studies import follow_edge, sgd_stability, sharpness_transfer

FILES = Path(__file__).parents[2] / "search_spaces"
CHEAP = {"probes__sharpness__cold_every": 10, "probes__sharpness__tolerance": 0.01}


def from_file(name: str, **values: Any) -> TrainConfig:
    spec, _ = read_spec(FILES / f"{name}.toml")
    config = spec.train_config(spec.first_values(), 0)
    return with_changes(config, {key.replace("__", "."): value for key, value in values.items()})


def with_changes(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    return parse(TrainConfig, with_values(config.model_dump(mode="json", exclude_none=True), changes), "study")


@pytest.mark.acceptance
def test_momentum_sharpens_progressively_and_then_stays_at_its_edge() -> None:
    """(2 + 2 beta) / lr = 76 at beta 0.9 and lr 0.05, within 10 % over the second half; it starts at 20."""
    seen: list[int] = []
    run = follow_edge(from_file("edge_momentum", num_steps=2600, **CHEAP), progress=seen.append)
    assert run.probe == "sharpness"
    assert np.allclose(run.thresholds, 76.0)
    assert run.curvature[0] < 0.3 * 76
    early = run.curvature[: len(run.curvature) // 4]
    assert (np.diff(early) > 0).mean() > 0.8
    half = run.curvature[len(run.curvature) // 2 :]
    assert run.state.state == "at the edge"
    assert abs(half.mean() / 76 - 1) < 0.1
    assert len(run.losses) == seen[-1] == 2600


@pytest.mark.acceptance
def test_with_clean_labels_momentum_stays_below_its_edge() -> None:
    run = follow_edge(from_file("edge_momentum_below", num_steps=1200, **CHEAP))
    assert run.state.state == "below"
    assert run.state.ratio < 0.5


@pytest.mark.acceptance
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "threshold"), [("edge_gradient_descent", 40.0), ("edge_momentum", 76.0), ("edge_adam", 38_000.0)]
)
def test_the_second_half_of_a_run_is_at_the_edge(file: str, threshold: float) -> None:
    run = follow_edge(from_file(file))
    assert np.allclose(run.thresholds, threshold)
    half = run.curvature[len(run.curvature) // 2 :]
    assert run.curvature[0] < 0.6 * threshold
    assert abs(half.mean() / threshold - 1) < 0.1
    assert (np.abs(half / threshold - 1) < 0.13).mean() > 0.9
    assert run.state.state == "at the edge"


@pytest.mark.acceptance
@pytest.mark.slow
def test_cross_entropy_leaves_the_edge() -> None:
    run = follow_edge(from_file("edge_cross_entropy"))
    assert run.curvature[-1] < 0.05 * run.thresholds[-1]


@pytest.mark.acceptance
def test_sgd_on_single_examples_is_stable_up_to_its_bound_on_the_trace() -> None:
    study = sgd_stability(np.linspace(1.7, 2.3, 7).tolist())
    assert study.measured_threshold == pytest.approx(2.0, abs=1e-3)
    assert study.trace * study.measured_threshold == pytest.approx(2.0, abs=1e-3)
    error = np.maximum(study.standard_error, 1e-9 * study.expected)
    near = np.abs(study.lrs - 2.0) < 0.25  # farther away the mean is ruled by runs that are too rare to be seen
    assert np.all(np.abs(study.growth - study.expected)[near] < 4 * error[near])
    # gradient descent on the full loss would be stable ten times as far
    assert 2 / study.sharpness == pytest.approx(10 * 2 / study.trace)


def test_the_threshold_of_sgd_is_not_known_where_nothing_grows() -> None:
    assert math.isnan(sgd_stability([0.5, 1.0], num_steps=20, num_repetitions=100).measured_threshold)


@pytest.mark.acceptance
def test_sharpness_coincides_over_widths_under_mup_and_not_under_standard() -> None:
    told: list[str] = []
    small = {"num_steps": 60, "eval__every_steps": 60, "probes__preconditioned_sharpness__every_steps": 20}
    mup, standard = (
        sharpness_transfer(
            from_file("width_sharpness", model__parametrisation=name, **small), [128, 512], progress=told.append
        )
        for name in ("mup", "standard")
    )
    assert mup.steps.tolist() == [0, 20, 40, 60]
    assert abs(mup.slope) < 0.15
    assert standard.slope > 0.3  # in the dip of the first updates; 0.67 over the whole run, which is the slow test
    assert mup.spread.max() < 1.35 < standard.spread.min()
    assert len(told) == 4


@pytest.mark.acceptance
@pytest.mark.slow
def test_sharpness_rises_alike_at_every_width_under_mup() -> None:
    mup, standard = (
        sharpness_transfer(from_file("width_sharpness", model__parametrisation=name), [128, 256, 512])
        for name in ("mup", "standard")
    )
    assert (mup.sharpness[:, -1] > 1.8 * mup.sharpness.min(axis=1)).all()  # progressive sharpening at each width
    assert abs(mup.slope) < 0.15
    assert standard.slope > 0.5
    assert mup.spread.max() < 1.5 < 1.8 < standard.spread.min()


def test_seeds_are_averaged_on_a_logarithmic_scale() -> None:
    small = {"num_steps": 4, "eval__every_steps": 4, "probes__preconditioned_sharpness__every_steps": 2}
    both, first, second = (
        sharpness_transfer(from_file("width_sharpness", seed=seed, **small), [8, 16], num_seeds=number)
        for seed, number in ((0, 2), (0, 1), (1, 1))
    )
    np.testing.assert_allclose(both.sharpness, np.sqrt(first.sharpness * second.sharpness), rtol=1e-6)


def test_studies_refuse_what_they_cannot_look_at() -> None:
    edge = from_file("edge_momentum", num_steps=100)
    with pytest.raises(UserError, match=r"must be one with a known threshold \(sgd, .*\), got 'muon'"):
        follow_edge(with_changes(edge, {"optimizer": {"name": "muon"}}))
    with pytest.raises(UserError, match=r"add \[train.probes.preconditioned_sharpness\]"):
        follow_edge(with_changes(edge, {"optimizer": {"name": "adamw"}}))
    with pytest.raises(UserError, match=r"live for four measurements, got 1 \(diverged: .*lower the learning rate"):
        follow_edge(with_changes(edge, {"schedule.peak_lr": 50.0}))
    with pytest.raises(UserError, match=r"batch_size must be data\.train_size, got 100 of 200"):
        follow_edge(with_changes(edge, {"batch_size": 100}))
    with pytest.raises(UserError, match="lrs must hold two or more positive learning rates"):
        sgd_stability([1.0])
    with pytest.raises(UserError, match="lrs must hold two or more positive learning rates"):
        sgd_stability([-1.0, 1.0])
    with pytest.raises(UserError, match=r"add \[train.probes.preconditioned_sharpness\]"):
        sharpness_transfer(edge, [8, 16])
    wide = from_file("width_sharpness")
    with pytest.raises(UserError, match="widths must hold two or more different widths"):
        sharpness_transfer(wide, [8])
    with pytest.raises(UserError, match=r"the run at width 8 must be measured, got no value \(muon\)"):
        sharpness_transfer(with_changes(wide, {"optimizer": {"name": "muon"}, "num_steps": 2}), [8, 16])


def test_an_independent_decay_enters_the_threshold_as_it_is_applied() -> None:
    tables = {
        "num_steps": 40,
        "probes.sharpness.every_steps": 10,
        "optimizer.momentum": 0.0,
        "optimizer.weight_decay": 0.3,
    }
    coupled, independent = (
        follow_edge(with_changes(from_file("edge_momentum"), tables | {"optimizer.decay_coupling": how}))
        for how in ("lr", "independent")
    )
    # weights shrink by lr wd, or by wd: 2 / lr (1 - that / 2)
    assert coupled.thresholds[-1] == pytest.approx(40 * (1 - 0.05 * 0.3 / 2))
    assert independent.thresholds[-1] == pytest.approx(40 * (1 - 0.3 / 2))
