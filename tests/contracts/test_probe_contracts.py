"""What every registered probe has to keep, on networks with everything that makes measuring difficult."""

import copy
import io
import math
import random
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.probes import PROBES, Estimate, Probe
from landscape_ray.records import ProbeRecord
from landscape_ray.training import TrainConfig, TrainState, train
from landscape_ray.training.cohort import Cohort
from landscape_ray.training.probe_tables import ProbesConfig
from landscape_ray.training.probing import host_of, remember_update, weights_before
from tests.contracts.examples import DATA, MINE, MODEL, PROBE, SUITS
from tests.contracts.test_contracts import assert_resumes_to_the_bit, assert_same

HOSTS = {"mlp": {"dropout": 0.1}, "cnn": {}, "gpt": {"dropout": 0.1}}
"""Kinks and dropout; batch statistics; fused attention and tied weights."""


def config(probe: str, model: str, **tables: Any) -> TrainConfig:
    table = {"every_steps": 2, "batch_size": 4} | PROBE[probe]
    base = {
        "num_steps": 6,
        "batch_size": 8,
        "data": DATA[SUITS[model]],
        "model": MODEL[model] | HOSTS[model],
        "optimizer": {"name": "adamw", "eps": 1e-3},
        "schedule": {"name": "constant", "peak_lr": 0.01},
        "eval": {"every_steps": 3, "num_batches": 1, "batch_size": 8},
        "probes": {probe: table},
    }
    return parse(TrainConfig, base | tables, "contract")


def prepared(probe: str, model: str, **tables: Any) -> TrainState:
    """Return a run after two updates, in training mode, with gradients and a pending update."""
    state = TrainState.create(config(probe, model, **tables))
    list(train(state, until_step=2))
    before = [p.detach().clone() for p in state.optimizer.parameters]
    state.module.train()
    state.loss(state.data.batch(0, 2, 8)).backward()
    state.optimizer.step()
    state.step = 3
    state.last_update = [p.detach() - b for p, b in zip(state.optimizer.parameters, before, strict=True)]
    return state


def measure(state: TrainState, probe: Probe) -> dict[str, Estimate]:
    return probe.measure(state.module, state.objective, host_of(state))


def values(found: dict[str, Estimate]) -> dict[str, tuple[float, float, int, bool]]:
    return {name: (e.value, e.standard_error, e.num_matvecs, e.converged) for name, e in found.items()}


def test_everything_registered_is_in_the_suite_and_has_a_table() -> None:
    tables = set(ProbesConfig.model_fields) - {"budget", "custom"}
    assert set(PROBES) == set(PROBE) == tables
    assert all(name == probe.name for name, probe in PROBES.items())


def choices() -> list[tuple[str, str, str]]:
    """Return every word that a field of a probe's table may be set to."""
    found = []
    for name in PROBE:
        (table, _) = typing.get_args(ProbesConfig.model_fields[name].annotation)
        for field, info in table.model_fields.items():
            words = typing.get_args(info.annotation) if typing.get_origin(info.annotation) is Literal else ()
            found += [(name, field, word) for word in words]
    return found


@pytest.mark.parametrize(("name", "field", "word"), choices())
def test_every_choice_of_a_table_works(name: str, field: str, word: str) -> None:
    parts = {"num_batches": 3} if word == "micro_batches" else {}
    run = config(name, "mlp", probes={name: {"every_steps": 2, "batch_size": 4} | PROBE[name] | {field: word} | parts})
    state = TrainState.create(run)
    found = [r for r in train(state) if isinstance(r, ProbeRecord) and r.probe == name]
    assert math.isfinite(found[-1].value)


@pytest.mark.acceptance
@pytest.mark.parametrize("model", HOSTS)
@pytest.mark.parametrize("name", PROBE)
def test_the_host_is_untouched(name: str, model: str) -> None:
    state = prepared(name, model)
    module = state.module
    module.get_submodule(next(n for n, _ in module.named_children())).eval()  # modes are each module's own

    def host() -> dict[str, Any]:
        return {
            "weights": {n: p.detach().clone() for n, p in module.named_parameters()},
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
            "asked": {n: p.requires_grad for n, p in module.named_parameters()},
            "buffers": {n: b.clone() for n, b in module.named_buffers()},
            "modes": [m.training for m in module.modules()],
            "identities": [(id(p), p.data_ptr(), id(p.grad), p._version) for p in module.parameters()],
            "optimizer": copy.deepcopy(state.optimizer.state_dict()),
            "torch": torch.get_rng_state(),
            "python": repr(random.getstate()),
            "numpy": repr(np.random.get_state()),  # noqa: NPY002 - a host may use it
        }

    loss = state.loss(state.data.batch(0, 3, 8))
    before = host()
    found = measure(state, state.monitor.probes[name])
    assert_same(host(), before, name)
    loss.backward()  # the host's graph is still good
    first, *others = found
    assert first == name
    assert all(other.startswith(f"{name}/") for other in others)
    assert math.isfinite(found[name].value)
    assert all(e.standard_error >= 0 for e in found.values() if math.isfinite(e.value))
    assert found[name].price_gradients > 0 or name == "distance_from_init"  # which looks at nothing but weights
    assert found[name].cost_seconds > 0
    assert all(found[other].cost_seconds == 0 for other in others)


LOSS: dict[str, dict[str, Any]] = {
    "squared_error": {"name": "squared_error"},
    "z_loss": {"name": "cross_entropy", "z_loss": 1e-3, "label_smoothing": 0.1},
    "users_mean": {"name": f"{MINE}:mean_loss"},
}


REFUSED = {
    ("logit_sharpness", "z_loss"),
    ("logit_sharpness", "users_mean"),
    ("ggn_trace", "z_loss"),
    ("ggn_trace", "users_mean"),
    ("opposing_signals", "users_mean"),
}
"""Probes that need to know the likelihood, or the losses of single examples."""


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("name", PROBE)
def test_any_loss_is_measured_or_refused_in_a_sentence(name: str, loss: str) -> None:
    if (name, loss) in REFUSED:
        with pytest.raises(UserError, match=r"^loss"):
            prepared(name, "mlp", loss=LOSS[loss], batch_size=10)
        return
    state = prepared(name, "mlp", loss=LOSS[loss], batch_size=10)
    assert math.isfinite(measure(state, state.monitor.probes[name])[name].value)


EXACT = ("sharpness", "gradient_norms", "sam_sharpness", "preconditioned_sharpness", "logit_sharpness")


@pytest.mark.parametrize("name", PROBE)
def test_unequal_batches_are_one(name: str) -> None:
    state = prepared(name, "mlp")
    probe = state.monitor.probes[name]
    inputs, targets = state.data.probe_batch(0, 24)
    cuts = ((0, 5), (5, 12), (12, 24))
    probe.batches = [((inputs[a:b], targets[a:b]), b - a) for a, b in cuts]
    parts = measure(state, probe)
    assert math.isfinite(parts[name].value)
    if name in EXACT:
        whole = TrainState.create(config(name, "mlp")).monitor.probes[name]
        whole.batches = [((inputs, targets), 24)]
        expected = measure(state, whole)[name]
        slack = 2 * (expected.standard_error + parts[name].standard_error)
        assert parts[name].value == pytest.approx(expected.value, rel=1e-3, abs=slack)


@pytest.mark.parametrize("name", PROBE)
def test_double_precision(name: str) -> None:
    state = prepared(name, "mlp")
    probe = state.monitor.probes[name]
    probe.double = True
    found = measure(state, probe)
    assert math.isfinite(found[name].value)
    assert all(p.dtype == torch.float32 for p in state.module.parameters())


@pytest.mark.parametrize("name", PROBE)
def test_the_same_again_to_the_bit_also_through_a_file(name: str) -> None:
    state = prepared(name, "mlp")
    one, other = (TrainState.create(config(name, "mlp")).monitor.probes[name] for _ in range(2))
    assert values(measure(state, one)) == values(measure(state, other))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    resumed = TrainState.create(config(name, "mlp")).monitor.probes[name]
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert values(measure(state, resumed)) == values(measure(state, one))
    assert resumed.price_gradients == one.price_gradients


@pytest.mark.parametrize("name", PROBE)
def test_what_is_not_finite_gives_nan_and_is_not_remembered(name: str) -> None:
    state = prepared(name, "mlp")
    probe = state.monitor.probes[name]
    measure(state, probe)
    remembered = copy.deepcopy(probe.state_dict())
    weight = state.optimizer.parameters[0]
    kept = weight.detach().clone()
    weight.data[0] = math.inf
    assert all(math.isnan(e.value) and not e.converged for e in measure(state, probe).values())
    weight.data.copy_(kept)
    state.optimizer.parameters[-1].data.fill_(3e38)  # finite weights, but no finite loss
    found = measure(state, probe)
    assert not any(math.isinf(e.value) for e in found.values())
    state.optimizer.parameters[-1].data.zero_()
    if math.isnan(found[name].value):
        assert_same(
            {k: v for k, v in probe.state_dict().items() if "price" not in k},
            {k: v for k, v in remembered.items() if "price" not in k},
            name,
        )


@pytest.mark.acceptance
@pytest.mark.parametrize("name", PROBE)
def test_a_run_with_it_resumes_to_the_bit_and_trains_as_without(name: str, tmp_path: Path) -> None:
    run = config(name, "mlp", num_steps=10, probes={name: {"every_steps": 5, "batch_size": 4} | PROBE[name]})
    records = assert_resumes_to_the_bit(run, tmp_path / "state.pt")
    assert any(isinstance(r, ProbeRecord) and r.probe == name and math.isfinite(r.value) for r in records)
    probed, plain = TrainState.create(run), TrainState.create(run.model_copy(update={"probes": ProbesConfig()}))
    list(train(probed)), list(train(plain))
    assert_same(dict(probed.module.state_dict()), dict(plain.module.state_dict()), name)


@pytest.mark.parametrize("name", ["directional_sharpness", "preconditioned_sharpness", "sharpness"])
def test_members_of_a_cohort_are_probed_as_alone(name: str) -> None:
    runs = [config(name, "mlp", seed=seed) for seed in (0, 1)]
    cohort = Cohort.create(runs, route="stacked")
    found: dict[int, list[tuple[int, str, float]]] = {0: [], 1: []}
    for member, record in cohort.train():
        if isinstance(record, ProbeRecord):
            found[member].append((record.step, record.probe, record.value))
    for member, run in enumerate(runs):
        alone = [r for r in train(TrainState.create(run)) if isinstance(r, ProbeRecord)]
        assert [(r.step, r.probe) for r in alone] == [entry[:2] for entry in found[member]]
        assert [r.value for r in alone] == pytest.approx([entry[2] for entry in found[member]], rel=0.1)
        assert len(alone) >= 3


def test_the_update_is_what_was_added_to_the_weights() -> None:
    state = TrainState.create(config("directional_sharpness", "mlp"))
    assert weights_before(state) is None  # due after updates 2, 4 and 6
    list(train(state, until_step=1))
    before = weights_before(state)
    assert before is not None
    for parameter in state.optimizer.parameters:
        parameter.data += 1.0
    remember_update(state, before)
    assert state.last_update is not None
    assert all(torch.allclose(update, torch.ones(())) for update in state.last_update)
    remember_update(state, None)
    assert state.last_update is None


def test_probes_keep_to_a_budget_along_a_run() -> None:
    tables = {name: {"every_steps": "auto", "batch_size": 4} | PROBE[name] for name in ("sharpness", "sam_sharpness")}
    run = config("sharpness", "mlp", num_steps=400, probes={"budget": 0.3} | tables)
    state = TrainState.create(run)
    records = [r for r in train(state) if isinstance(r, ProbeRecord)]
    training = state.elapsed_seconds - state.eval_seconds - state.probe_seconds
    assert {r.probe for r in records} >= set(tables)
    assert state.probe_seconds < 0.6 * training  # a clock of this machine; the rule itself is tested in tests/probes
    assert records[-1].step == 400
    assert records[0].step > 0
    assert state.probe_seconds == pytest.approx(sum(r.cost_seconds for r in records))
