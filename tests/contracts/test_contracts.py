"""What everything that is registered has to keep: data, models, optimizers, schedules, and runs of any of them."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.config import parse, with_values
from landscape_ray.data import DATASETS, Data, open_data
from landscape_ray.errors import UserError
from landscape_ray.models import MODELS, Network, build_model
from landscape_ray.records import EvalRecord, Record, StepRecord, VariantRecord
from landscape_ray.schedules import SCHEDULES
from landscape_ray.signature import Images, Tokens, Vectors
from landscape_ray.training import TrainConfig, TrainState, train
from landscape_ray.training.cohort import Cohort
from landscape_ray.training.optimizers import OPTIMIZERS
from tests.contracts.examples import DATA, MINE, MODEL, NEEDS, OPTIMIZER, SCHEDULE, SUITS, suits

BASE: dict[str, Any] = {
    "num_steps": 10,
    "batch_size": 8,
    "schedule": {"name": "wsd", "peak_lr": 0.01, "warmup_steps": 2},
    "eval": {"every_steps": 5, "num_batches": 1, "batch_size": 16},
    "probes": {"sharpness": {"every_steps": 5, "batch_size": 4, "tolerance": 0.1}},
}


def config(**tables: Any) -> TrainConfig:
    return parse(TrainConfig, BASE | tables, "contract")


def needs(*names: str) -> None:
    for name in names:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            pytest.skip(f"{NEEDS[name]} is not installed")


@pytest.mark.parametrize(
    ("registry", "examples"),
    [(DATASETS, DATA), (MODELS, MODEL), (OPTIMIZERS, OPTIMIZER), (SCHEDULES, SCHEDULE)],
    ids=["data", "models", "optimizers", "schedules"],
)
def test_everything_registered_is_in_the_suites(registry: dict[str, Any], examples: dict[str, Any]) -> None:
    assert set(registry) == set(examples)


@pytest.fixture(params=DATA)
def data(request: pytest.FixtureRequest) -> Data:
    return open_data(config(data=DATA[request.param], model=MODEL["mlp"]).data)


def equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


class TestData:
    def test_shapes_are_those_of_the_signature(self, data: Data) -> None:
        inputs, targets = data.batch(0, 0, 4)
        match signature := data.signature:
            case Tokens():
                assert inputs.shape == (4, signature.context_length)
                assert inputs.dtype == torch.int64
                assert 0 <= int(inputs.min()) <= int(inputs.max()) < signature.vocab_size
                assert targets.shape == (inputs.shape if signature.num_classes is None else (4,))
            case Images():
                assert inputs.shape == (4, signature.channels, signature.height, signature.width)
                assert inputs.dtype == torch.float32
                assert targets.shape == (4,)
            case Vectors():
                assert inputs.shape == (4, signature.num_features)
                assert inputs.dtype == torch.float32
                assert targets.shape == ((4,) if signature.classifies else (4, signature.num_outputs))
        if signature.classifies:
            assert targets.dtype == torch.int64
            assert 0 <= int(targets.min()) <= int(targets.max()) < signature.num_outputs
        else:
            assert targets.dtype == torch.float32

    def test_a_batch_is_a_function_of_seed_and_step(self, data: Data) -> None:
        first = data.batch(3, 7, 5)
        data.batch(0, 0, 9)
        assert equal(first, data.batch(3, 7, 5))
        assert not torch.equal(first[0], data.batch(3, 8, 5)[0])
        assert not torch.equal(first[0], data.batch(4, 7, 5)[0])

    def test_stacked_batches_are_the_single_ones(self, data: Data) -> None:
        for seeds in ([1, 2, 5], [4, 4]):
            inputs, targets = data.batches(seeds, 3, 6)
            for k, seed in enumerate(seeds):
                assert equal((inputs[k], targets[k]), data.batch(seed, 3, 6))

    def test_held_out_batches_never_change(self, data: Data) -> None:
        first, again = data.validation_batches(2, 8), data.validation_batches(2, 8)
        assert len(first) == 2
        assert all(equal(a, b) for a, b in zip(first, again, strict=True))
        assert equal(data.probe_batch(0, 6), data.probe_batch(0, 6))
        with pytest.raises(UserError, match=r"num_batches|held.out|validation"):
            data.validation_batches(10**7, 8)

    def test_shift_sets_fit_the_model_too(self, data: Data) -> None:
        clean = data.validation_batches(1, 8)[0]
        for name in data.shifts[:3]:
            inputs, targets = data.shift_batches(name, 1, 8)[0]
            assert (inputs.shape, inputs.dtype, targets.dtype) == (clean[0].shape, clean[0].dtype, clean[1].dtype)
        with pytest.raises(UserError, match=r"eval.shifts must name .*, got 'nowhere'"):
            data.shift_batches("nowhere", 1, 8)

    def test_identity_is_a_function_of_the_settings(self, data: Data) -> None:
        assert data.corpus_id

    def test_no_generator_is_drawn_from(self, data: Data) -> None:
        before = torch.get_rng_state()
        data.batch(0, 0, 4)
        data.validation_batches(1, 4)
        data.probe_batch(0, 4)
        assert torch.equal(before, torch.get_rng_state())


def build(name: str, seed: int = 0, **changes: Any) -> tuple[Network, Data]:
    needs(name)
    run = config(data=DATA[SUITS[name]], model=MODEL[name] | changes)
    data = open_data(run.data)
    return build_model(run.model, data.signature, torch.Generator().manual_seed(seed)), data


@pytest.mark.parametrize("name", MODEL)
class TestModels:
    def test_outputs_have_their_shape(self, name: str) -> None:
        module, data = build(name)
        inputs, targets = data.batch(0, 0, 3)
        outputs = module(inputs)
        assert outputs.shape == (*targets.shape, data.signature.num_outputs)
        assert bool(outputs.isfinite().all())

    def test_groups_add_up(self, name: str) -> None:
        module, _ = build(name)
        counts = module.count_params()
        assert sum(counts.values()) == sum(p.numel() for p in module.parameters()) == module.num_params()
        assert module.num_params(embedding=False) == module.num_params() - counts["embedding"] - counts["head"]
        assert set(module.weights()) == {n for n, _ in module.named_parameters()}
        assert module.flops_per_unit() == 3 * module.forward_flops_per_unit() > 0

    def test_seeds_decide_and_the_global_generator_does_not(self, name: str) -> None:
        before = torch.get_rng_state()
        one, again, other = (build(name, seed)[0].state_dict() for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(one[key], again[key]) for key in one)
        assert any(not torch.equal(one[key], other[key]) for key in one)

    def test_stacked_members_are_the_single_ones(self, name: str) -> None:
        modules, data = zip(*(build(name, seed) for seed in (1, 2)), strict=True)
        if not modules[0].stackable:
            pytest.skip("not stackable")
        stacked = {
            key: torch.stack([dict(m.named_parameters())[key] for m in modules])
            for key, _ in modules[0].named_parameters()
        }
        inputs, _ = data[0].batches([1, 2], 0, 3)
        together = torch.func.functional_call(modules[0], stacked, (inputs,))
        for k, module in enumerate(modules):
            torch.testing.assert_close(together[k], module(inputs[k]), rtol=1e-4, atol=1e-5)


def essence(records: list[Record]) -> list[tuple[Any, ...]]:
    out = []
    for r in records:
        fields = {k: getattr(r, k) for k in r.__dataclass_fields__ if not k.endswith(("seconds", "unix"))}
        out.append((r.kind, *fields.items()))
    return out


def assert_resumes_to_the_bit(run: TrainConfig, path: Path) -> list[Record]:
    """10 steps = 5 + save + load + 5: records, weights and all other state."""
    whole = TrainState.create(run)
    expected = list(train(whole))
    first = TrainState.create(run)
    records = list(train(first, until_step=5))
    first.save(path)
    second, _ = TrainState.load(path)
    records += list(train(second))
    assert essence(records) == essence(expected)
    whole.save(path)
    one = torch.load(path, weights_only=True)
    second.save(path)
    other = torch.load(path, weights_only=True)
    for part in ("module", "optimizer", "averager"):
        assert_same(one[part], other[part], part)
    assert_same(one["probes"]["probes"], other["probes"]["probes"], "probes")  # beside them are readings of the clock
    return records


def assert_same(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)), where


@pytest.mark.acceptance
@pytest.mark.parametrize("optimizer", OPTIMIZER)
@pytest.mark.parametrize("model", MODEL)
def test_every_model_and_optimizer_resumes_to_the_bit(model: str, optimizer: str, tmp_path: Path) -> None:
    needs(model, optimizer)
    dropout = {"dropout": 0.1} if model in ("gpt", "mlp", "vit") else {}
    run = config(data=DATA[SUITS[model]], model=MODEL[model] | dropout, optimizer=OPTIMIZER[optimizer])
    records = assert_resumes_to_the_bit(run, tmp_path / "state.pt")
    evals = [r.loss_nats for r in records if isinstance(r, EvalRecord)]
    assert all(map(math.isfinite, evals))


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        # each of both by default; all pairs are resumed alone above, and in a cohort among the slow tests
        pytest.param(model, optimizer, marks=[] if model == "mlp" or optimizer == "adamw" else pytest.mark.slow)
        for model in MODEL
        for optimizer in OPTIMIZER
    ],
)
def test_every_model_and_optimizer_resumes_to_the_bit_in_a_cohort(model: str, optimizer: str, tmp_path: Path) -> None:
    needs(model, optimizer)
    table = {"data": DATA[SUITS[model]], "model": MODEL[model], "optimizer": OPTIMIZER[optimizer], "probes": {}}
    members = [
        config(seed=seed, schedule={"name": "constant", "peak_lr": lr}, **table) for seed, lr in ((0, 0.01), (1, 0.02))
    ]
    probing = Cohort.create(members)
    list(probing.train(1))
    assert probing.choice is not None
    route = probing.choice.route  # another measurement might choose another one
    whole, first = (Cohort.create(members, route=route) for _ in range(2))
    expected = list(whole.train())
    records = list(first.train(5))
    first.save(tmp_path / "cohort")
    second, _ = Cohort.load(tmp_path / "cohort")
    records += list(second.train())
    for k in range(2):
        got, wanted = ([r for member, r in rs if member == k] for rs in (records, expected))
        assert essence(got) == essence(wanted)
        assert_same(second.read(k), whole.read(k), f"member {k}")


EXTRAS: dict[str, dict[str, Any]] = {
    "sam": {"sam": {"rho": 0.05}},
    "asam": {"sam": {"rho": 0.5, "adaptive": True}},
    "ema": {"averaging": {"name": "ema", "decay": 0.8}},
    "swa": {"averaging": {"name": "swa", "start_fraction": 0.2, "every_steps": 2}},
    "autoclip": {"clipping": {"name": "auto", "window": 4}},
    "coordinate": {"clipping": {"name": "coordinate", "threshold": 0.01}},
    "accumulation": {"accumulation_steps": 4},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
    "simulated": {"simulated_precision": {"mantissa_bits": 3, "exponent_bits": 4}},
    "z_loss": {"loss": {"z_loss": 1e-3, "label_smoothing": 0.1}},
    "squared_error": {"loss": {"name": "squared_error"}},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_option_of_a_step_resumes_to_the_bit(extra: str, tmp_path: Path) -> None:
    run = config(data=DATA["images"], model=MODEL["mlp"], **EXTRAS[extra])
    plain = list(train(TrainState.create(config(data=DATA["images"], model=MODEL["mlp"]))))
    records = assert_resumes_to_the_bit(run, tmp_path / "state.pt")
    if extra in ("ema", "swa"):
        assert [r.variant for r in records if isinstance(r, VariantRecord)].count(extra) >= 1
    elif extra == "accumulation":
        losses = [[r.loss_nats for r in rs if isinstance(r, StepRecord)] for rs in (plain, records)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    else:
        assert essence(records) != essence(plain)


@pytest.mark.parametrize("name", DATA)
def test_every_task_can_be_trained_on(name: str, tmp_path: Path) -> None:
    data = open_data(config(data=DATA[name], model=MODEL["mlp"]).data)
    run = config(data=DATA[name], model=suits(data.signature), num_steps=10)
    records = assert_resumes_to_the_bit(run, tmp_path / "state.pt")
    accuracies = [r.accuracy for r in records if isinstance(r, EvalRecord)]
    assert all((a is not None and 0 <= a <= 1) if data.signature.classifies else a is None for a in accuracies)


@pytest.mark.parametrize("name", SCHEDULE)
def test_every_schedule_drives_a_run(name: str) -> None:
    run = config(
        data=DATA["images"], model=MODEL["mlp"], schedule={"name": name, "peak_lr": 0.01} | SCHEDULE[name], probes={}
    )
    records = [r for r in train(TrainState.create(run)) if isinstance(r, StepRecord)]
    schedule = run.schedule.build(10)
    assert [r.lr for r in records] == [schedule(k) for k in range(10)]
    assert [r.momentum for r in records] == [schedule.momentum(k, 0.9) for k in range(10)]
    assert TrainConfig.model_validate(run.model_dump()) == run
    assert parse(TrainConfig, run.model_dump(mode="json"), "json") == run


class TestUsersOwn:
    def test_model_loss_and_data_by_dotted_path(self, tmp_path: Path) -> None:
        data = {"name": f"{MINE}:Waves", "options": {"frequency": 2.0}}
        run = config(data=data, model=MODEL["mlp"], loss={"name": f"{MINE}:absolute_error"})
        records = assert_resumes_to_the_bit(run, tmp_path / "state.pt")
        assert isinstance(records[-1].num_tokens, int)
        assert TrainState.create(run).objective.unit == f"{MINE}:absolute error"

    def test_a_module_of_the_users_with_its_own_randomness(self, tmp_path: Path) -> None:
        model = {"name": f"{MINE}:Noisy", "options": {"width": 8, "num_outputs": 10}}
        before = torch.get_rng_state()
        assert_resumes_to_the_bit(config(data=DATA["images"], model=model), tmp_path / "state.pt")
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"name": f"{MINE}:Nothing"}, r"data.name: cannot import .*Nothing"),
            ({"name": f"{MINE}:Waves"}, r"data.name .*Waves' cannot be called with data.options .*frequency"),
            (
                {"name": f"{MINE}:suits", "options": {"signature": 1}},
                r"data.name must lead to a landscape_ray.data.Data",
            ),
        ],
    )
    def test_data_that_is_none_is_refused(self, table: dict[str, Any], message: str) -> None:
        run = config(data=table, model=MODEL["mlp"])
        with pytest.raises(UserError, match=message):
            open_data(run.data)


class TestErrors:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"model.name": "gtp"}, r"'model.name' must be a known name, or a path .*, got 'gtp'; did you mean 'gpt'"),
            ({"data.name": "txt"}, r"'data.name' must be a known name.*, got 'txt'; did you mean 'text'"),
            ({"optimizer.name": "adam"}, r"'optimizer.name' must be a known name, got 'adam'; did you mean 'adamw'"),
            ({"optimizer.name": "a.b:C"}, r"'optimizer.name' must be a known name, got 'a.b:C'; valid: adamw"),
            ({"model.name": "custom"}, r"'model.name' must be a known name, or a path .*, got 'custom'; valid: cnn"),
            ({"model.name": 3}, r"'model.name' must be a known name, or a path .*, got 3; valid: cnn"),
            ({"schedule.points": 3}, r"'schedule.points' input should be a valid list, got 3"),
            ({"model.widht": 3}, r"unknown key 'model.widht'; did you mean 'width'"),
            ({"accumulation_steps": 3}, r"accumulation_steps must divide batch_size = 8, got 3"),
            ({"schedule.warmup_steps": 11}, r"schedule.warmup_steps must be at most num_steps = 10, got 11"),
            ({"schedule": {"name": "table"}}, r"schedule.points must be two or more pairs"),
            ({"eval.num_batches": 0}, r"eval: num_batches must be at least 1, got 0"),
            ({"compile": True, "simulated_precision": {"mantissa_bits": 3, "exponent_bits": 4}}, r"got compile = true"),
            ({"precision": "float16", "sam": {}}, r"sam must run in float32 or bfloat16, got precision = 'float16'"),
            ({"loss.name": "squared_error", "loss.z_loss": 0.1}, r"z_loss need the loss cross_entropy"),
            ({"loss.name": "hinge"}, r"loss.name must be a known name .*, got 'hinge'"),
        ],
    )
    def test_configurations_that_make_no_sense(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            parse(TrainConfig, with_values(BASE, values), "contract")

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            ({"name": "cross_entropy"}, r"loss.name must suit targets that are values, got 'cross_entropy'"),
            ({"z_loss": 0.1}, r"z_loss need the loss cross_entropy, got 'squared_error'"),
        ],
    )
    def test_losses_that_do_not_suit_the_data(self, loss: dict[str, Any], message: str) -> None:
        run = config(data=DATA["teacher"], model=MODEL["mlp"], loss=loss)
        with pytest.raises(UserError, match=message):
            TrainState.create(run)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": MODEL["mlp"] | {"width": 8}}, r"was made with model = .*; keep model or start a new run"),
            ({"optimizer": {"name": "sgd"}}, r"was made with optimizer.name = 'adamw', the run asks for 'sgd'"),
            (
                {"averaging": {"name": "ema"}},
                r"averaging.name must be None to continue .*, got 'ema'",
            ),
        ],
    )
    def test_a_checkpoint_of_something_else(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        state = TrainState.create(config(data=DATA["images"], model=MODEL["mlp"]))
        state.save(tmp_path / "state.pt")
        with pytest.raises(UserError, match=message):
            TrainState.load(tmp_path / "state.pt", config(**({"data": DATA["images"], "model": MODEL["mlp"]} | change)))
