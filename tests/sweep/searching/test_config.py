"""Wrong keys and values of the table [search], and of the runs that it asks for, give one sentence each."""

import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.schedules import Schedule, monotone_points
from landscape_ray.sweep.searching.knots import expand
from landscape_ray.sweep.spec import SweepSpec

LR = {"schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]}}
ASHA = {"name": "asha", "min_steps": 5}
MUP = {"depth": 1, "width": 16, "head_size": 8, "parametrisation": "mup", "base_width": 16}


@pytest.fixture
def read(sweep_text: Callable[..., str], tiny: dict[str, Any]) -> Callable[..., SweepSpec]:
    def make(train: dict[str, Any] | None = None, space: dict[str, Any] = LR, **rest: Any) -> SweepSpec:
        cohort = {"cohort": rest.pop("cohort")} if "cohort" in rest else {}
        search = {"num_trials": 4, **rest}
        text = sweep_text(train={**tiny, **(train or {})}, space=space, search=search, **cohort)
        return parse(SweepSpec, tomllib.loads(text), "file")

    return make


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samplr": "tpe"}, "unknown key 'search.samplr'; did you mean 'sampler'"),
        ({"sampler": "tpee"}, "search.sampler must be a known name .* did you mean 'tpe'"),
        ({"sampler": "cmaes", "objectives": ["loss_nats", "flops"]}, "'cmaes' optimises one objective, got 2"),
        ({"objectives": []}, r"objectives must be one or more different measures, got \[\]"),
        ({"objectives": ["loss_nats", "loss_nats"]}, "must be one or more different measures"),
        ({"objectives": ["los"]}, "search.objectives must name a measure or probe/<name>, got 'los'"),
        ({"constraints": {"memory": 1.0}}, "search.constraints must name a measure .*did you mean 'memory_bytes'"),
        ({"objectives": ["probe/trace"]}, r"'probe/trace' needs \[train.probes.trace\], configured: sharpness"),
        ({"lag": 0}, "'search.lag' input should be greater than or equal to 1, got 0"),
        ({"lag": 2, "stopping": ASHA}, "search.lag has no meaning with stopping"),
        ({"stopping": {"name": "ashaa"}}, "'search.stopping.name' must be a known name, got 'ashaa'; did you mean"),
        ({"stopping": {"name": "asha"}}, "'search.stopping.min_steps' is required and missing"),
        ({"stopping": {**ASHA, "eta": 3}}, "unknown key 'search.stopping.eta'"),
        ({"stopping": {**ASHA, "min_steps": 10}}, "min_steps must be below train.num_steps = 10, got 10"),
        ({"stopping": {**ASHA, "min_steps": 3}}, "must be a multiple of train.eval.every_steps = 5, got 3"),
        ({"stopping": ASHA, "objectives": ["flops"]}, "search.stopping needs objectives = "),
        ({"stopping": ASHA, "space": {"num_steps": {"choices": [10, 20]}}}, "space.num_steps cannot be searched with"),
        ({"stopping": ASHA, "fidelity": {"name": "num_steps", "values": [5, 10]}}, "at most one of stopping and fidel"),
        ({"fidelity": {"name": "num_steps", "values": [10, 10]}}, "values must increase from at least 1"),
        ({"fidelity": {"name": "num_stps", "values": [5, 10]}}, "unknown key 'num_stps'"),
        ({"fidelity": {"name": "eval.every_steps", "values": [5, 10]}}, "'eval.every_steps' is no fidelity"),
        ({"fidelity": {"name": "model.width", "values": [16, 32]}}, "needs train.model.parametrisation = 'mup'"),
        (
            {"train": {"model": MUP}, "fidelity": {"name": "model.depth", "values": [1, 2]}},
            "over model.depth needs train.model.base_depth",
        ),
        (
            {"space": {"batch_size": {"choices": [4]}}, "fidelity": {"name": "batch_size", "values": [4, 8]}},
            "search.fidelity.name 'batch_size' must not be searched as well",
        ),
        ({"trunk": {"every_steps": 0}}, "'search.trunk.every_steps' input should be greater than or equal to 1"),
        ({"warm_start": {"sources": []}}, "search.warm_start.sources"),
        ({"warm_start": {"sources": ["a"], "use": "all"}}, "'search.warm_start.use' input should be 'results' or 'po"),
        ({"cohort": {"num_members": 2}, "stopping": ASHA}, r"search.stopping cannot be used with \[cohort\]"),
        ({"space": {"schedule.points": {"monotone_knots": 0}}}, "monotone_knots must be a whole number from 1 to 32"),
        ({"space": {"schedule.points": {"monotone_knots": 2, "hight": 1}}}, "with monotone_knots must have .* 'hight'"),
        ({"space": {"schedule.peak_lr": {"monotone_knots": 2}}}, "cannot have monotone_knots"),
    ],
)
def test_mistakes_are_named(read: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


def test_rungs_are_steps_at_which_every_run_stops(read: Any) -> None:
    spec = read({"num_steps": 100}, stopping={**ASHA, "reduction_factor": 2})
    assert spec.milestones == (5, 10, 20, 40, 80)
    assert read().milestones == ()
    for name in ("median", "forecast"):
        assert read(stopping={"name": name}).milestones == ()


@pytest.mark.acceptance
def test_width_is_a_fidelity_under_mup_and_depth_with_a_base(read: Any) -> None:
    spec = read({"model": MUP}, fidelity={"name": "model.width", "values": [16, 32, 64]})
    assert spec.search.fidelity.build().rungs == (16, 32)
    assert read({"model": {**MUP, "base_depth": 1}}, fidelity={"name": "model.depth", "values": [1, 2]})


@pytest.mark.acceptance
def test_knots_are_domains_of_curves_that_fall(read: Any) -> None:
    """Every point of the domains is a schedule that rises once, to its peak, and never again."""
    space = {
        "schedule.name": {"choices": ["wsd", "table"]},
        "schedule.points": {"monotone_knots": 3, "warmup": [0.0, 0.2], "when": {"schedule.name": "table"}},
    }
    spec = read({"num_steps": 100, "schedule": {"peak_lr": 0.01}}, space)
    names = ["schedule.points.warmup", *(f"schedule.points.ratio_{k}" for k in (1, 2, 3))]
    assert [name for name in spec.space if name != "schedule.name"] == names
    values = {"schedule.name": "table", **dict(zip(names, (0.1, 0.9, 0.5, 0.2), strict=True))}
    config = spec.train_config(values, 0)
    expected = [(0.0, 0.1), (0.1, 1.0), (0.4, 0.9), (0.7, 0.45), (1.0, 0.09)]
    assert [tuple(point) for point in config.schedule.points] == [pytest.approx(point) for point in expected]
    rates = config.schedule.build(100).values()
    assert rates.max() == pytest.approx(0.01)
    top = int(rates.argmax())
    assert (rates[1 : top + 1] >= rates[:top]).all()
    assert (rates[top + 1 :] <= rates[top:-1]).all()
    assert spec.train_config({"schedule.name": "wsd"}, 0).schedule.points == []


@pytest.mark.parametrize(
    ("ratios", "warmup", "message"),
    [([], 0.0, "at least one, got"), ([1.1], 0.0, r"ratios in \[0, 1\]"), ([0.5], 1.0, r"points.warmup must be in")],
)
def test_coordinates_outside_their_range_are_refused(ratios: list[float], warmup: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        monotone_points(ratios, warmup)


def test_coordinates_make_points_that_a_schedule_takes() -> None:
    schedule = Schedule(name="table", peak=2.0, num_steps=10, points=monotone_points([0.5, 0.0], 0.2))
    assert schedule(2) == pytest.approx(2.0)
    assert schedule(10) == 0.0


@pytest.mark.parametrize("table", [{"ratio_2": 0.5}, {"warmup": 0.1}, {"ratio_1": 2.0}, {"ratio_1": "a"}])
def test_a_table_of_coordinates_must_be_whole(read: Any, table: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="points"):
        read({"schedule": {"name": "table", "points": table}})


def test_expand_wants_points() -> None:
    with pytest.raises(ValueError, match="cannot have monotone_knots"):
        expand("model.width", {"monotone_knots": 2})
