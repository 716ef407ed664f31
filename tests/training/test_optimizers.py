import io
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape_ray.config import Model, parse
from landscape_ray.errors import UserError
from landscape_ray.models import MLPConfig, build_model
from landscape_ray.models.layers import Embedding, LayerNorm, Linear
from landscape_ray.models.network import Group, Network
from landscape_ray.models.parametrisation import Rule
from landscape_ray.signature import Vectors
from landscape_ray.training.optimizers import (
    OPTIMIZERS,
    AdamWConfig,
    AnyOptimizerConfig,
    MuonConfig,
    Optimizer,
    OptimizerConfig,
    ScheduleFreeConfig,
    SGDConfig,
    build_optimizer,
)

PEAK = 0.01


class Kernel(nn.Module):
    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 2, 3, 3))
        self.rules = {"weight": rule}


class Toy(Network):
    """Every kind of parameter, each with a learning-rate factor of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(Vectors(num_features=6, num_outputs=3, targets="classes"))
        vector = Rule(init_std=0.1, lr_sgd=2.0)
        self.table = Embedding(5, 6, rule=Rule(init_std=0.5, lr_sgd=2.0))
        self.norm = LayerNorm(6, rule=vector)
        self.kernel = Kernel(Rule(init_std=0.3))
        self.hidden = Linear(6, 8, rule=Rule(init_std=0.4, lr_adam=0.5), bias_rule=vector)
        self.head = Linear(8, 3, rule=Rule(init_std=0.5, multiplier=0.5, lr_sgd=4.0))
        self.initialise(torch.Generator().manual_seed(seed))

    def group_of(self, name: str) -> Group:
        match name.split(".")[0], name.split(".")[-1]:
            case "table", _:
                return "embedding"
            case "norm", _:
                return "norm"
            case "head", _:
                return "head"
            case _, "bias":
                return "bias"
        return "hidden"

    def forward_flops_per_unit(self) -> float:
        return 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(inputs + self.table(torch.arange(5).repeat(2))[: len(inputs)])
        picture = F.conv2d(x.repeat(1, 3).view(-1, 2, 3, 3), self.kernel.weight).flatten(1)  # (B, 4)
        return self.head(torch.tanh(self.hidden(x)) + F.pad(picture, (0, 4)))


class Single(Network):
    """One layer's weight, for closed forms."""

    def __init__(self, rows: int = 1, columns: int = 1, **rule: float) -> None:
        super().__init__(Vectors(num_features=columns, num_outputs=rows, targets="values"))
        self.layer = Linear(columns, rows, rule=Rule(init_std=1.0, **rule))
        self.initialise(torch.Generator().manual_seed(0))

    def group_of(self, name: str) -> Group:
        return "hidden"

    def forward_flops_per_unit(self) -> float:
        return 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


BATCHES = [
    (torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g))
    for g in (torch.Generator().manual_seed(seed) for seed in range(20))
]


def schedule(step: int) -> float:
    return PEAK * (1.0 - step / 20)


def advance(module: Network, optimizer: Optimizer, config: AnyOptimizerConfig, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs, targets = BATCHES[step]
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.set_values(schedule(step), config.weight_decay, config.momentum)
        optimizer.step()


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def vector_of(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.fixture(params=OPTIMIZERS)
def config(request: pytest.FixtureRequest) -> AnyOptimizerConfig:
    if request.param == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    return OPTIMIZERS[request.param].config(weight_decay=0.1)


# Contract of every optimizer


def test_registry_and_configurations_agree() -> None:
    for name, entry in OPTIMIZERS.items():
        assert entry.config().name == name


@pytest.mark.acceptance
def test_resume_is_bit_exact(config: AnyOptimizerConfig) -> None:
    whole, first, second = Toy(), Toy(), Toy(seed=1)
    advance(whole, build_optimizer(whole, config, peak_lr=PEAK), config, range(10))

    optimizer = build_optimizer(first, config, peak_lr=PEAK)
    advance(first, optimizer, config, range(5))
    saved = through_disk({"module": first.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = build_optimizer(second, config, peak_lr=PEAK)
    second.load_state_dict(saved["module"])
    resumed.load_state_dict(saved["optimizer"])
    advance(second, resumed, config, range(5, 10))

    assert torch.equal(vector_of(second), vector_of(whole))
    assert not torch.equal(vector_of(second), vector_of(first))


def test_a_restored_state_is_a_copy(config: AnyOptimizerConfig) -> None:
    donor, copy = Toy(), Toy()
    theirs, ours = (build_optimizer(module, config, peak_lr=PEAK) for module in (donor, copy))
    advance(donor, theirs, config, range(3))
    weights = vector_of(donor)
    copy.load_state_dict(donor.state_dict())
    ours.load_state_dict(theirs.state_dict())
    advance(copy, ours, config, range(3, 6))
    assert torch.equal(vector_of(donor), weights)
    advance(donor, theirs, config, range(3, 6))  # the copy's updates have not touched the donor's averages
    assert torch.equal(vector_of(donor), vector_of(copy))


def test_values_of_the_configuration_win_over_a_restored_state(config: AnyOptimizerConfig) -> None:
    mutated = type(config)(weight_decay=0.02, **({"eps": 1e-3, "beta2": 0.5} if config.name != "sgd" else {}))
    module = Toy()
    theirs = build_optimizer(module, config, peak_lr=PEAK)
    advance(module, theirs, config, range(3))
    ours = build_optimizer(module, mutated, peak_lr=2 * PEAK)
    ours.load_state_dict(theirs.state_dict())
    ours.set_values(0.015, mutated.weight_decay, 0.7)
    fresh = build_optimizer(Toy(), mutated, peak_lr=2 * PEAK)
    fresh.set_values(0.015, mutated.weight_decay, 0.7)
    progress = {"params", "k", "weight_sum", "lr_max", "scheduled_lr"}
    for part, other in zip(ours.parts, fresh.parts, strict=True):
        for group, expected in zip(part.param_groups, other.param_groups, strict=True):
            assert {k: v for k, v in group.items() if k not in progress} == {
                k: v for k, v in expected.items() if k not in progress
            }


def test_learning_rates_carry_the_factors_and_vectors_do_not_decay(config: AnyOptimizerConfig) -> None:
    module = Toy()
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    optimizer.set_values(0.004, 0.1, 0.8)
    sgd = {"table.weight": 2.0, "norm.weight": 2.0, "norm.bias": 2.0, "hidden.bias": 2.0, "head.weight": 4.0}
    factors = dict.fromkeys(dict(module.named_parameters()), 1.0)
    match config.name:
        case "sgd":
            factors |= sgd
        case "muon":
            assert isinstance(config, MuonConfig)
            factors |= dict.fromkeys(sgd, config.adamw_lr_ratio)
        case _:
            factors |= {"hidden.weight": 0.5}
    found = {}
    for group in itertools.chain.from_iterable(part.param_groups for part in optimizer.parts):
        for parameter in group["params"]:
            # Muon has the kernel as a flat copy
            names = [n for n, p in module.named_parameters() if p is parameter] or ["kernel.weight"]
            decay = group["shrinks"] / group["lr"] if config.name == "sgd" else group["weight_decay"]
            found[names[0]] = (group["lr"], pytest.approx(decay))
    assert found == {
        name: (
            0.004 * factor,
            0.1
            if name in dict(module.named_parameters()) and name.endswith("weight") and not name.startswith("norm")
            else 0.0,
        )
        for name, factor in factors.items()
    }


def test_parameters_without_gradient_stay(config: AnyOptimizerConfig) -> None:
    module = Toy()
    module.hidden.weight.requires_grad_(False)
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert len(optimizer.parameters) == len(before) - 1
    optimizer.zero_grad()
    module.norm.weight.grad = torch.ones(6)
    optimizer.step()
    changed = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["norm.weight"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())


def test_every_optimizer_descends(config: AnyOptimizerConfig) -> None:
    module = Toy()
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    inputs, targets = BATCHES[0]
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(inputs), targets)
        loss.backward()
        optimizer.set_values(0.05 if config.name in ("sgd", "muon") else 0.01, 0.0, config.momentum)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Decay


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "schedule_free_adamw"])
@pytest.mark.parametrize("coupling", ["lr", "independent"])
def test_decay_closed_form(name: str, coupling: str) -> None:
    """With a zero gradient only the decay acts."""
    module = Single(2, 3, lr_adam=0.25, lr_sgd=0.5, multiplier=0.8)
    config = OPTIMIZERS[name].config(weight_decay=0.3, decay_coupling=coupling)
    optimizer = build_optimizer(module, config, peak_lr=0.2)
    w = module.layer.weight.detach().double()
    factor = {"adamw": 0.25, "sgd": 0.5, "muon": 1.25}[name]
    expected = w
    for lr in (0.2, 0.1, 0.05, 0.0):
        module.layer.weight.grad = torch.zeros(2, 3)
        optimizer.set_values(lr, 0.3, config.momentum)
        optimizer.step()
        expected = expected * (1 - (lr * factor * 0.3 if coupling == "lr" else lr / 0.2 * 0.3))
    torch.testing.assert_close(module.layer.weight.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_l2_is_a_term_of_the_gradient() -> None:
    a, b = Toy(), Toy()
    plain = build_optimizer(a, SGDConfig(weight_decay=0.0), peak_lr=PEAK)
    l2 = build_optimizer(b, SGDConfig(weight_decay=0.3, l2=True), peak_lr=PEAK)
    for inputs, targets in BATCHES[:5]:
        for module, optimizer in ((a, plain), (b, l2)):
            optimizer.zero_grad()
            F.cross_entropy(module(inputs), targets).backward()
        for parameter in a.parameters():
            if parameter.dim() > 1:
                parameter.grad = parameter.grad + 0.3 * parameter.detach()
        plain.set_values(PEAK, 0.0, 0.9)
        l2.set_values(PEAK, 0.3, 0.9)
        plain.step()
        l2.step()
    torch.testing.assert_close(vector_of(a), vector_of(b), rtol=1e-5, atol=1e-6)


# Each against its reference


def test_adamw_is_torch_with_two_groups() -> None:
    module, twin = Single(3, 4), Single(3, 4)
    config = AdamWConfig()
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    reference = torch.optim.AdamW(twin.parameters(), lr=PEAK, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for step, x in enumerate(torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))):
        for each in (module, twin):
            each.zero_grad()
            each(x).square().sum().backward()
        reference.param_groups[0]["lr"] = schedule(step)
        optimizer.set_values(schedule(step), 0.1, 0.9)
        optimizer.step()
        reference.step()
        assert torch.equal(module.layer.weight, twin.layer.weight)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_on_a_quadratic_is_the_linear_recursion(nesterov: bool) -> None:
    """L = h w^2 / 2: (w, v) moves by a constant matrix."""
    h, lr, mu, wd, steps = 3.0, 0.2, 0.8, 0.1, 25
    module = Single().double()
    optimizer = build_optimizer(module, SGDConfig(momentum=mu, nesterov=nesterov, weight_decay=wd), peak_lr=lr)
    start = module.layer.weight.item()
    # v' = mu v + h w;  w' = (1 - lr wd) w - lr u, with u = v', or h w + mu v' for Nesterov
    velocity = torch.tensor([[1.0, 0.0], [h, mu]], dtype=torch.float64)
    update = torch.tensor([[h, mu], [0.0, 1.0]] if nesterov else [[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    ahead = update @ velocity
    matrix = torch.stack([torch.tensor([1 - lr * wd, 0.0], dtype=torch.float64) - lr * ahead[0], velocity[1]])
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * h * module.layer.weight.square()).sum().backward()
        optimizer.set_values(lr, wd, mu)
        optimizer.step()
    expected = torch.linalg.matrix_power(matrix, steps) @ torch.tensor([start, 0.0], dtype=torch.float64)
    assert module.layer.weight.item() == pytest.approx(float(expected[0]), rel=1e-12, abs=1e-15)


def test_sgd_changes_its_momentum_between_updates() -> None:
    module = Single().double()
    optimizer = build_optimizer(module, SGDConfig(), peak_lr=1.0)
    w = v = 0.0
    with torch.no_grad():
        module.layer.weight.zero_()
    for mu in (0.9, 0.5, 0.0, 0.85):
        module.layer.weight.grad = torch.ones(1, 1, dtype=torch.float64)
        optimizer.set_values(0.1, 0.0, mu)
        optimizer.step()
        if mu:  # torch leaves the velocity alone while there is no momentum
            v = mu * v + 1.0
        w -= 0.1 * (v if mu else 1.0)
    assert module.layer.weight.item() == pytest.approx(w, rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (16, 4), (4, 16)])
def test_muon_updates_are_near_orthogonal(rows: int, columns: int) -> None:
    module = Single(rows, columns)
    optimizer = build_optimizer(module, MuonConfig(weight_decay=0.0), peak_lr=1.0)
    before = module.layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(2)
    module.layer.weight.grad = 1e-3 * torch.randn(rows, columns, generator=generator)
    optimizer.step()
    update = (before - module.layer.weight.detach()) / math.sqrt(max(1.0, rows / columns))
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_is_torch_on_matrices_and_flattened_kernels() -> None:
    module = Toy()
    config = MuonConfig()
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    matrices = [module.kernel.weight.detach().flatten(1).clone(), module.hidden.weight.detach().clone()]
    reference = torch.optim.Muon(matrices, lr=PEAK, weight_decay=0.1, momentum=0.95)
    for inputs, targets in BATCHES[:4]:
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        matrices[0].grad = module.kernel.weight.grad.flatten(1).clone()
        matrices[1].grad = module.hidden.weight.grad.clone()
        optimizer.set_values(PEAK, 0.1, 0.95)
        optimizer.step()
        reference.step()
        assert torch.equal(module.kernel.weight.flatten(1), matrices[0])
        assert torch.equal(module.hidden.weight, matrices[1])


def test_muon_survives_another_memory_format() -> None:
    a, b = Toy(), Toy()
    optimizers = [build_optimizer(module, MuonConfig(), peak_lr=PEAK) for module in (a, b)]
    b.kernel.weight.data = b.kernel.weight.data.contiguous(memory_format=torch.channels_last)
    for module, optimizer in zip((a, b), optimizers, strict=True):
        advance(module, optimizer, MuonConfig(), range(3))
    torch.testing.assert_close(a.kernel.weight, b.kernel.weight, rtol=1e-4, atol=1e-5)
    assert b.kernel.weight.is_contiguous(memory_format=torch.channels_last)


def test_muon_without_matrices_is_adamw() -> None:
    class Biases(Single):
        def group_of(self, name: str) -> Group:
            return "head"

    a, b = Biases(2, 2), Single(2, 2)
    muon = build_optimizer(a, MuonConfig(adamw_lr_ratio=1.0), peak_lr=PEAK)
    adamw = build_optimizer(b, AdamWConfig(), peak_lr=PEAK)
    for module, optimizer in ((a, muon), (b, adamw)):
        module(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
    assert torch.equal(a.layer.weight, b.layer.weight)


# Schedule-free


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("schedulefree")


def test_schedule_free_is_the_library(library: Any) -> None:
    module, twin = Single(3, 4), Single(3, 4)
    optimizer = build_optimizer(module, ScheduleFreeConfig(weight_decay=0.05), peak_lr=PEAK)
    reference = library.AdamWScheduleFree(twin.parameters(), lr=PEAK, betas=(0.9, 0.999), weight_decay=0.05)
    reference.train()
    for x in torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1)):
        for each in (module, twin):
            each.zero_grad()
            each(x).square().sum().backward()
        optimizer.set_values(PEAK, 0.05, 0.9)
        optimizer.step()
        reference.step()
        assert torch.equal(module.layer.weight, twin.layer.weight)
    optimizer.eval()
    reference.eval()
    assert torch.equal(module.layer.weight, twin.layer.weight)


def test_schedule_free_evaluates_the_average_of_the_iterates(library: Any) -> None:
    """At a constant learning rate, x is the mean of z_1 ... z_t."""
    module = Single(2, 2).double()
    config = ScheduleFreeConfig(weight_decay=0.0)
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    iterates = []
    for x in torch.randn(7, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.set_values(PEAK, 0.0, config.momentum)
        optimizer.step()
        iterates.append(optimizer.parts[0].state[module.layer.weight]["z"].clone())
    optimizer.eval()
    torch.testing.assert_close(module.layer.weight.detach(), torch.stack(iterates).mean(0))


def test_schedule_free_evaluation_leaves_no_trace(library: Any) -> None:
    a, b = Toy(), Toy()
    config = ScheduleFreeConfig()
    theirs, ours = (build_optimizer(module, config, peak_lr=PEAK) for module in (a, b))
    for step in range(6):
        advance(a, theirs, config, range(step, step + 1))
        advance(b, ours, config, range(step, step + 1))
        trained = vector_of(b)
        ours.eval()
        ours.eval()
        if step > 1:
            assert not torch.equal(vector_of(b), trained)
        ours.train()
        ours.train()
        assert torch.equal(vector_of(b), trained)
    assert torch.equal(vector_of(a), vector_of(b))


def test_schedule_free_resumes_from_a_checkpoint_made_in_evaluation(library: Any) -> None:
    config = ScheduleFreeConfig()
    whole, second = Toy(), Toy(seed=1)
    optimizer = build_optimizer(whole, config, peak_lr=PEAK)
    advance(whole, optimizer, config, range(5))
    optimizer.eval()
    saved = through_disk({"module": whole.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.train()
    advance(whole, optimizer, config, range(5, 10))

    resumed = build_optimizer(second, config, peak_lr=PEAK)
    second.load_state_dict(saved["module"])
    resumed.load_state_dict(saved["optimizer"])
    with pytest.raises(Exception, match="not in train mode"):
        advance(second, resumed, config, range(5, 6))
    resumed.train()
    advance(second, resumed, config, range(5, 10))
    assert torch.equal(vector_of(second), vector_of(whole))


def test_schedule_free_keeps_its_average_when_beta1_changes(library: Any) -> None:
    module, config = Toy(), ScheduleFreeConfig()
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    advance(module, optimizer, config, range(5))
    trained = vector_of(module)
    optimizer.eval()
    average = vector_of(module)
    optimizer.train()
    optimizer.set_values(PEAK, 0.1, 0.5)
    assert not torch.allclose(vector_of(module), trained, atol=1e-6)
    optimizer.eval()
    torch.testing.assert_close(vector_of(module), average)


def test_schedule_free_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match=r"got 'schedule_free_adamw' without .* run: pip install schedulefree"):
        build_optimizer(Toy(), ScheduleFreeConfig(), peak_lr=PEAK)


# What probes ask


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw"])
def test_preconditioner_closed_form(name: str) -> None:
    if name == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    module = Single(2, 3)
    module.layer.weight.requires_grad_(True)
    config = OPTIMIZERS[name].config(beta2=0.9, eps=0.25, weight_decay=0.0)
    optimizer = build_optimizer(module, config, peak_lr=PEAK)
    assert optimizer.preconditioner() is None
    gradients = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    for gradient in gradients:
        module.layer.weight.grad = gradient.clone()
        optimizer.set_values(PEAK, 0.0, 0.9)
        optimizer.step()
    ages = 0.9 ** torch.arange(2, -1, -1.0)
    expected = ((ages.view(-1, 1, 1) * gradients.square()).sum(0) / ages.sum()).sqrt() + 0.25
    (found,) = optimizer.preconditioner() or [torch.empty(0)]
    torch.testing.assert_close(found, expected)


def test_preconditioner_has_the_order_of_the_parameters() -> None:
    module = Toy()
    optimizer = build_optimizer(module, AdamWConfig(), peak_lr=PEAK)
    advance(module, optimizer, AdamWConfig(), range(2))
    found = optimizer.preconditioner() or []
    assert [t.shape for t in found] == [p.shape for p in module.parameters()]
    module.head.weight.grad = None  # a parameter that has no second moment counts as having none
    other = build_optimizer(module, AdamWConfig(eps=0.5), peak_lr=PEAK)
    other.step()
    assert torch.equal((other.preconditioner() or [])[-1], torch.full((3, 8), 0.5))


def test_there_is_no_preconditioner_of_muon() -> None:
    module = Toy()
    optimizer = build_optimizer(module, MuonConfig(), peak_lr=PEAK)
    advance(module, optimizer, MuonConfig(), range(1))
    assert optimizer.preconditioner() is None


def test_the_preconditioner_undoes_the_factors_of_the_learning_rate() -> None:
    """An update is lr times the gradient over it, whatever the parametrisation."""
    config = MLPConfig(width=32, parametrisation="mup", base_width=8)
    module = build_model(
        config, Vectors(num_features=3, num_outputs=2, targets="values"), torch.Generator().manual_seed(0)
    )
    optimizer = build_optimizer(module, SGDConfig(momentum=0.0), peak_lr=PEAK)
    before = [p.detach().clone() for p in optimizer.parameters]
    for parameter in optimizer.parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.set_values(PEAK, 0.0, 0.0)
    found = optimizer.preconditioner()
    assert found is not None
    optimizer.step()
    for old, new, root in zip(before, optimizer.parameters, found, strict=True):
        torch.testing.assert_close(new.detach(), old - PEAK * 3.0 / root)
    assert len({float(root.flatten()[0]) for root in found}) > 1


# Configuration and errors


class Table(Model):
    optimizer: OptimizerConfig = AdamWConfig()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, AdamWConfig()),
        ({"beta1": 0.8}, AdamWConfig(beta1=0.8)),
        ({"name": "sgd", "nesterov": True}, SGDConfig(nesterov=True)),
        ({"name": "muon", "ns_steps": 6}, MuonConfig(ns_steps=6)),
        ({"name": "schedule_free_adamw"}, ScheduleFreeConfig()),
    ],
)
def test_the_table_is_told_by_its_name(table: dict[str, Any], expected: AnyOptimizerConfig) -> None:
    found = parse(Table, {"optimizer": table}, "run").optimizer
    assert found == expected
    assert parse(Table, {"optimizer": found.model_dump(mode="json")}, "run").optimizer == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "adam"}, "'optimizer.name' must be a known name, got 'adam'; did you mean 'adamw'"),
        ({"name": "sgd", "beta1": 0.9}, "unknown key 'optimizer.beta1'"),
        ({"beta1": 1.0}, "'optimizer.beta1' input should be less than 1, got 1.0"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "momentum must be positive with nesterov = true"),
    ],
)
def test_mistakes_in_the_table_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Table, {"optimizer": table}, "run")


def test_momentum_is_the_name_in_records() -> None:
    found = [entry.config().momentum for entry in OPTIMIZERS.values()]
    assert found == [0.9, 0.9, 0.95, 0.9]


def freeze(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: build_optimizer(freeze(Toy()), AdamWConfig(), peak_lr=PEAK), "Toy must have parameters that require"),
        (
            lambda: build_optimizer(Toy(), AdamWConfig(), peak_lr=PEAK).load_state_dict(
                build_optimizer(Toy(), SGDConfig(), peak_lr=PEAK).state_dict()
            ),
            "optimizer.name must be 'sgd' to continue from this checkpoint, got 'adamw'; keep the name",
        ),
        (
            lambda: build_optimizer(Single(2, 2), AdamWConfig(), peak_lr=PEAK).load_state_dict(
                build_optimizer(Single(2, 3), AdamWConfig(), peak_lr=PEAK).state_dict()
            ),
            "state must be of the same network",
        ),
    ],
)
def test_errors(load: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_moves_between_devices(config: AnyOptimizerConfig) -> None:
    single, moved = Single(3, 4), Single(3, 4).cuda()
    here, there = (build_optimizer(each, config, peak_lr=PEAK) for each in (single, moved))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        single.zero_grad()
        single(x).square().sum().backward()
        here.step()
    moved.load_state_dict(single.state_dict())
    there.load_state_dict(through_disk(here.state_dict()))
    for each, optimizer in ((single, here), (moved, there)):
        each.zero_grad()
        each(x.to(each.layer.weight.device)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(moved.layer.weight.cpu(), single.layer.weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("config", [AdamWConfig(), SGDConfig(weight_decay=0.1), SGDConfig(momentum=0.0)], ids=str)
def test_an_update_can_be_left_out_without_the_host_knowing(config: AnyOptimizerConfig) -> None:
    """What a GPU does: the same kernels have the condition on the CPU."""
    ours, theirs = Single(3, 4), Single(3, 4)
    conditional, plain = (build_optimizer(each, config, peak_lr=PEAK) for each in (ours, theirs))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def gradient(module: Single) -> None:
        module.zero_grad()
        module(x).square().sum().backward()

    for finite in (False, True, False, True):
        gradient(ours)
        if not finite:
            for parameter in ours.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
        else:
            gradient(theirs)
            plain.step()
        conditional.step(torch.tensor(finite))
        assert torch.equal(ours.layer.weight, theirs.layer.weight)
    for a, b in zip(conditional.state_dict()["parts"], plain.state_dict()["parts"], strict=True):
        for one, other in zip(a["state"].values(), b["state"].values(), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other if other[key] is not None)


def test_what_waits_for_the_answer_is_not_conditional() -> None:
    for config in (MuonConfig(), AdamWConfig()):  # on the CPU nobody has to wait
        assert not build_optimizer(Single(3, 4), config, peak_lr=PEAK).conditional


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_updates_are_conditional_on_a_gpu() -> None:
    for config, conditional in ((AdamWConfig(), True), (SGDConfig(), True), (MuonConfig(), False)):
        assert build_optimizer(Single(3, 4).cuda(), config, peak_lr=PEAK).conditional == conditional
