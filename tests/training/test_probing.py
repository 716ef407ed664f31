import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.probes import Estimate, FixedLoss, Host, Probe
from landscape_ray.records import ProbeRecord
from landscape_ray.training import TrainConfig, TrainState, train
from landscape_ray.training.inspection import inspect
from landscape_ray.training.probing import probed_weights

BASE: dict[str, Any] = {
    "num_steps": 8,
    "batch_size": 64,
    "data": {"name": "images", "source": "digits"},
    "model": {"name": "mlp", "width": 8, "activation": "gelu"},
    "eval": {"every_steps": 8, "num_batches": 1, "batch_size": 8},
}


def config(**probes: Any) -> TrainConfig:
    return parse(TrainConfig, BASE | {"probes": probes}, "probing")


def examples(state: TrainState, name: str) -> list[int]:
    return [weight for _, weight in state.monitor.probes[name].batches]


class Weigher(Probe):
    """A probe of a user: the norm of the weights, in a unit of the user's."""

    name = "weight"

    def __init__(self, batches: Any, *, unit: float = 1.0, seed: int = 0) -> None:
        super().__init__(batches, seed=seed)
        self.unit = unit

    @property
    def price_gradients(self) -> float:
        return 0.0

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        return {"weight": Estimate(value=float(function.weights.norm()) / self.unit)}


@pytest.fixture
def users_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("users_probes")
    module.Weigher = Weigher  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_probes", module)


def test_a_users_probe_is_one_table_away(users_module: None) -> None:
    table = {"path": "users_probes:Weigher", "arguments": {"unit": 2.0}, "every_steps": 4}
    state = TrainState.create(config(custom={"weight": table}))
    records = [r for r in train(state) if isinstance(r, ProbeRecord)]
    assert [(r.step, r.probe) for r in records] == [(0, "weight"), (4, "weight"), (8, "weight")]
    total = math.sqrt(sum(float(p.detach().square().sum()) for p in state.module.parameters()))
    assert records[-1].value == pytest.approx(total / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"other": {"path": "users_probes:Weigher"}},
            "custom.other must be called as its probe, got one of name 'weight'",
        ),
        ({"weight": {"path": "users_probes:Weigher", "arguments": {"mass": 1}}}, "custom.weight.arguments: .*'mass'"),
        ({"weight": {"path": "users_probes:Gone"}}, "cannot import 'users_probes:Gone'"),
        ({"weight": {"path": "sharp"}}, "path must be a known name or a path"),
    ],
)
def test_a_users_probe_is_refused_with_a_reason(users_module: None, table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainState.create(config(custom=table))


def test_the_probe_batch_follows_from_the_budget() -> None:
    """64 examples x 5 % x 100 updates / 15 gradients, the price of the sharpness by its route auto."""
    state = TrainState.create(config(budget=0.05, sharpness={"every_steps": 100, "batch_size": "auto"}))
    price = TrainState.create(config(sharpness={})).monitor.probes["sharpness"].price_gradients
    assert examples(state, "sharpness") == [int(64 * 0.05 * 100 / price)]
    # two share it; one that is cheap gets no more than the training batch, and nobody gets none
    two = TrainState.create(
        config(
            budget=0.05,
            sharpness={"every_steps": 100, "batch_size": "auto"},
            gradient_norms={"every_steps": 100, "batch_size": "auto"},
            trace={"every_steps": 1, "batch_size": "auto"},
        )
    )
    assert examples(two, "sharpness") == [int(64 * 0.05 * 100 / 3 / price)]
    assert examples(two, "gradient_norms") == [64]
    assert examples(two, "trace") == [1]


def test_measurements_start_from_a_random_vector_as_often_as_asked() -> None:
    tables: dict[str, Any] = {
        "sharpness": {"every_steps": 2, "cold_every": 1},
        "preconditioned_sharpness": {"every_steps": 2, "cold_every": 4},
    }
    probes = TrainState.create(config(**tables)).monitor.probes
    assert (probes["sharpness"].cold_every, probes["preconditioned_sharpness"].cold_every) == (1, 4)
    with pytest.raises(UserError, match=r"cold_every. input should be greater than or equal to 1, got 0"):
        config(sharpness={"every_steps": 2, "cold_every": 0})


def test_several_batches_are_parts_of_one() -> None:
    state = TrainState.create(config(gradient_norms={"batch_size": 4, "num_batches": 3}))
    whole = TrainState.create(config(gradient_norms={"batch_size": 12}))
    parts = [batch for batch, _ in state.monitor.probes["gradient_norms"].batches]
    ((inputs, targets), _) = whole.monitor.probes["gradient_norms"].batches[0]
    assert torch.equal(torch.cat([x for x, _ in parts]), inputs)
    assert torch.equal(torch.cat([y for _, y in parts]), targets)
    one, other = (
        next(iter(s.monitor.probes["gradient_norms"].measure(s.module, s.objective).values())) for s in (state, whole)
    )
    assert one.value == pytest.approx(other.value, rel=1e-5)


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        (
            {"sharpness": {"every_steps": "auto"}},
            "sharpness.every_steps must be a number where",
        ),
        ({"trace": {"batch_size": "auto"}}, "trace.batch_size must be a number where probes.budget is not set"),
        (
            {"budget": 0.1, "trace": {"batch_size": "auto", "every_steps": "auto"}},
            "every_steps or batch_size must be a number, got 'auto' for both",
        ),
        ({"trace": {"every_steps": 0}}, "every_steps must be at least 1, got 0"),
        ({"trace": {"batch_size": 0}}, "batch_size must be at least 1, got 0"),
        ({"sharpness": {"tf32": True}}, "route must be 'exact' with tf32 = true, got 'auto'; the difference of two"),
        ({"budget": 0.0}, "probes.budget"),
        ({"gradient_noise_scale": {"source": "micro_batches"}}, "num_batches must be at least 3"),
        ({"gradient_noise_scale": {"num_products": 1}}, "num_products must be 0 or at least 2, got 1"),
        ({"sharpnes": {}}, "unknown key 'probes.sharpnes'"),
        ({"sam_sharpness": {"radii": [-1.0]}}, "sam_sharpness.radi"),
        ({"trace": {"batch_size": 10**6}}, "probes.trace.batch_size is too large: .*1000000"),
        ({"linf_smoothness": {"num_vectors": 2}}, "linf_smoothness.num_vectors must"),
        ({"worst_case_sharpness": {"radii": []}}, "worst_case_sharpness.radii must"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(probes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainState.create(config(**probes))


def test_a_checkpoint_can_be_measured_with_other_probes_and_batches(tmp_path: Path, users_module: None) -> None:
    table = {"path": "users_probes:Weigher", "every_steps": 8}
    state = TrainState.create(config(sharpness={"every_steps": 8}, custom={"weight": table}))
    own = [r for r in train(state) if isinstance(r, ProbeRecord)]
    state.save(tmp_path / "state.pt")

    names: list[str] = []
    found = inspect(tmp_path / "state.pt", batch_size=4, progress=names.append)
    assert names == ["sharpness", "weight"]
    assert found.step == 8
    assert found.num_params == sum(p.numel() for p in state.module.parameters())
    # the run's was a warm start, this is a cold one; both to 1 % of residual
    last = {r.probe: r.value for r in own}
    assert found.estimates["sharpness"].value == pytest.approx(last["sharpness"], rel=0.05)
    assert found.estimates["weight"].value == last["weight"]

    asked = ["directional_sharpness", "preconditioned_sharpness", "trace"]
    more = inspect(tmp_path / "state.pt", asked, batch_size=32, num_batches=2, density=True)
    assert more.num_examples == dict.fromkeys(asked, 64)
    assert not more.unknown
    assert all(math.isfinite(more.estimates[name].value) for name in asked)
    assert more.density is not None
    assert more.density.trace.value == pytest.approx(more.estimates["trace"].value, rel=0.5)
    with pytest.raises(UserError, match=r"--probes must name registered probes .* got 'sharp'"):
        inspect(tmp_path / "state.pt", ["sharp"])


@pytest.mark.parametrize("schedule", [{"name": "constant", "peak_lr": 0.1}, {"name": "cosine", "peak_lr": 0.1}])
def test_probes_of_an_update_look_at_the_weights_after_it(tmp_path: Path, schedule: dict[str, Any]) -> None:
    """Critical sharpness is 2 / lr times the smallest multiple of the update that raises the loss, from before it."""
    run = parse(TrainConfig, BASE | {"schedule": schedule, "optimizer": {"name": "sgd", "momentum": 0.0}}, "probing")
    state = TrainState.create(run)
    list(train(state))
    state.save(tmp_path / "state.pt")
    found = inspect(tmp_path / "state.pt", ["critical_sharpness"], batch_size=64).estimates["critical_sharpness"]

    twin, _ = TrainState.load(tmp_path / "state.pt")
    before = [p.detach().clone() for p in twin.optimizer.parameters]
    twin.optimizer.set_values(0.1, 0.0, 0.0)
    batch = twin.data.batch(0, 8, 64)
    twin.loss(batch).backward()
    twin.clipper(twin.optimizer.parameters)
    twin.optimizer.step()
    update = [p.detach() - old for p, old in zip(twin.optimizer.parameters, before, strict=True)]
    inputs, targets = twin.data.probe_batch(0, 64)
    twin.module.eval()

    def loss_at(multiple: float) -> float:
        for parameter, old, step in zip(twin.optimizer.parameters, before, update, strict=True):
            parameter.data.copy_(old + multiple * step)
        with torch.no_grad():
            return float(twin.objective(twin.module, (inputs, targets)))

    multiples = torch.logspace(-2, 4, 400).tolist()
    first = next(m for m in multiples if loss_at(m) > loss_at(0.0))
    assert found.value == pytest.approx(2 / (0.1 * first), rel=0.15)


def test_the_distance_from_init_is_that_of_the_run(tmp_path: Path) -> None:
    state = TrainState.create(config(distance_from_init={"every_steps": 8}))
    records = [r for r in train(state) if isinstance(r, ProbeRecord) and r.probe == "distance_from_init"]
    state.save(tmp_path / "state.pt")
    found = inspect(tmp_path / "state.pt").estimates["distance_from_init"]
    assert found.value == records[-1].value > 0
    without = TrainState.create(config(sharpness={"every_steps": 8}))
    without.save(tmp_path / "without.pt")
    lost = inspect(tmp_path / "without.pt", ["distance_from_init"])
    assert "nothing tells where it began" in lost.unknown["distance_from_init"]
    assert lost.estimates == {}


def test_double_precision_on_request(tmp_path: Path) -> None:
    state = TrainState.create(config(trace={"double": True, "batch_size": 16}))
    assert state.monitor.probes["trace"].double
    (record,) = [r for r in train(state, 0) if isinstance(r, ProbeRecord) and r.probe == "trace"]
    plain = TrainState.create(config(trace={"batch_size": 16}))
    (other,) = [r for r in train(plain, 0) if isinstance(r, ProbeRecord) and r.probe == "trace"]
    assert record.value != other.value
    assert record.value == pytest.approx(other.value, rel=1e-3)
    state.save(tmp_path / "state.pt")
    found = inspect(tmp_path / "state.pt", ["trace"], batch_size=16, double=True)
    assert found.estimates["trace"].value == pytest.approx(record.value, rel=1e-9)


def test_schedule_free_updates_are_those_of_the_weights_that_are_probed() -> None:
    pytest.importorskip("schedulefree")
    table = {"optimizer": {"name": "schedule_free_adamw"}, "probes": {"directional_sharpness": {"every_steps": 2}}}
    state = TrainState.create(parse(TrainConfig, BASE | table, "probing"))
    list(train(state, until_step=1))
    before = probed_weights(state)
    list(train(state, until_step=2))
    assert state.last_update is not None
    for old, new, update in zip(before, probed_weights(state), state.last_update, strict=True):
        assert torch.equal(new - old, update)
    assert any(bool((update != 0).any()) for update in state.last_update)


def test_what_does_not_apply_is_said(tmp_path: Path) -> None:
    run = parse(TrainConfig, BASE | {"optimizer": {"name": "muon"}}, "probing")
    state = TrainState.create(run)
    list(train(state, until_step=2))
    state.save(tmp_path / "state.pt")
    found = inspect(tmp_path / "state.pt", ["preconditioned_sharpness"], batch_size=8)
    assert found.unknown == {"preconditioned_sharpness": "the optimizer 'muon' has no preconditioner"}
    assert not found.estimates
