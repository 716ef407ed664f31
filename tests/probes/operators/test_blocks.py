from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators.blocks import by_class, frequency_bands, layers
from landscape_ray.probes.operators.fisher import EmpiricalFisher, SampledFisher
from landscape_ray.probes.operators.gauss_newton import GGNOperator
from landscape_ray.probes.operators.hessian import HessianOperator

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.acceptance
def test_layers_are_the_diagonal_blocks(case):
    function = FixedLoss(case.module, CROSS_ENTROPY, [case.batch])
    dense = HessianOperator(function).dense()
    positions = dict(zip(function.parameters, function.unflatten(torch.arange(function.size).double()), strict=True))
    seen = []
    for own in layers(case.module).values():
        rows = torch.cat([positions[p].flatten() for p in own]).long()
        block = HessianOperator(FixedLoss(case.module, CROSS_ENTROPY, [case.batch], parameters=own)).dense()
        close(block, dense[rows][:, rows])
        seen += own
    assert [id(p) for p in seen] == [id(p) for p in case.module.parameters()]


def test_layers_own_their_parameters():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.embedding = nn.Embedding(4, 2)
            self.body = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            self.head = nn.Linear(2, 4, bias=False)
            self.head.weight = self.embedding.weight
            self.body[1].requires_grad_(False)
            self.body[2].bias.requires_grad_(False)

    model = Model()
    found = layers(model)
    assert {name: len(own) for name, own in found.items()} == {
        "root": 1,
        "embedding": 1,
        "body.0": 2,
        "body.2": 1,
        "normed": 3,
    }
    assert found["embedding"][0] is model.head.weight
    assert {name: len(own) for name, own in layers(nn.Linear(2, 3)).items()} == {"root": 2}
    model.root = nn.Linear(1, 1)
    assert {name: len(own) for name, own in layers(model).items() if "root" in name} == {"root_": 1, "root": 2}


def with_batches() -> tuple[nn.Module, list[tuple[tuple[Tensor, Tensor], float]]]:
    """Return a network and micro-batches whose classes are far from even; class 2 is in the second only."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    X = normal(20, 3)
    y = torch.tensor([0] * 9 + [1] * 2 + [4] * 3 + [2, 2, 0, 0, 0, 4])
    return module, [((X[:14], y[:14]), 14), ((X[14:], y[14:]), 6)]


@pytest.mark.acceptance
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, EmpiricalFisher])
def test_classes_sum_to_the_whole(operator):
    module, batches = with_batches()
    parts = by_class(CROSS_ENTROPY, batches)
    assert {number: part.share for number, part in parts.items()} == pytest.approx(
        {0: 12 / 20, 1: 2 / 20, 2: 2 / 20, 4: 4 / 20}
    )
    whole = FixedLoss(module, CROSS_ENTROPY, batches)
    dense = [operator(FixedLoss(module, part.loss, part.batches)).dense() for part in parts.values()]
    shares = [part.share for part in parts.values()]
    close(sum(share * block for share, block in zip(shares, dense, strict=True)), operator(whole).dense())
    # one class by hand
    X, y = (torch.cat(tensors) for tensors in zip(*[batch for batch, _ in batches], strict=True))
    fours = FixedLoss(module, CROSS_ENTROPY, [(X[y == 4], y[y == 4])])
    close(dense[-1], operator(fours).dense())


def test_classes_of_examples_keep_their_likelihood():
    module, batches = with_batches()
    part = by_class(CROSS_ENTROPY, batches)[0]
    assert part.loss is CROSS_ENTROPY
    fisher = SampledFisher(FixedLoss(module, part.loss, part.batches))
    assert fisher(torch.ones(fisher.size)).isfinite().all()


@pytest.mark.acceptance
@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0, 1, 7]])
def test_token_groups_sum_to_the_whole(groups):
    module = nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 6)).double()
    tokens = torch.randint(6, (7, 5), generator=torch.Generator().manual_seed(3))
    tokens[:3, 1:] = 2  # sequences of a single class, so that others are left out of them
    X, y = tokens[:, :-1], tokens[:, 1:]
    batches = [((X[:4], y[:4]), 1.0), ((X[4:], y[4:]), 5.0)]  # weights that are not the sizes
    parts = by_class(CROSS_ENTROPY, batches, groups)
    assert set(parts) == set(y.flatten().tolist() if groups is None else [groups[t] for t in y.flatten().tolist()])
    assert sum(part.share for part in parts.values()) == pytest.approx(1.0, rel=1e-12)
    whole = FixedLoss(module, CROSS_ENTROPY, batches)
    functions = [(part.share, FixedLoss(module, part.loss, part.batches)) for part in parts.values()]
    assert sum(share * f.value() for share, f in functions) == pytest.approx(whole.value(), rel=1e-12)
    close(sum(share * f.gradient()[1] for share, f in functions), whole.gradient()[1])
    for operator in (HessianOperator, GGNOperator):
        close(sum(share * operator(f).dense() for share, f in functions), operator(whole).dense())
    assert any(len(batch[0]) < 4 for part in parts.values() for batch, _ in part.batches)


def test_loss_of_a_class_is_the_mean_over_its_targets():
    module = nn.Linear(2, 3).double()
    X, y = normal(4, 5, 2), torch.randint(3, (4, 5), generator=torch.Generator().manual_seed(1))
    part = by_class(CROSS_ENTROPY, [(X, y)])[1]
    losses = CROSS_ENTROPY.per_target(module(X), y).detach()
    expected = float(losses[y.flatten() == 1].mean())
    assert FixedLoss(module, part.loss, part.batches).value() == pytest.approx(expected, rel=1e-12)
    (batch, _), *_ = part.batches
    each = part.loss.per_target(module(batch[0]), batch[1])
    assert len(each) == batch[1].numel()
    assert not each[batch[1].flatten() != 1].any()


def test_refused_targets_and_losses():
    X = torch.zeros(2, 2)
    with pytest.raises(UserError, match="loss must have per_target and likelihood for class-wise curvature"):
        by_class(lambda m, b: m(b[0]).mean(), [(X, torch.zeros(2).long())])
    with pytest.raises(UserError, match=r"targets must be classes, integers >= 0, got torch.float32 from 0;"):
        by_class(CROSS_ENTROPY, [(X, torch.zeros(2))])
    with pytest.raises(UserError, match=r"targets must be classes, integers >= 0, got torch.int64 from -100;"):
        by_class(CROSS_ENTROPY, [(X, torch.tensor([0, -100]))])
    with pytest.raises(UserError, match="groups must give every target its class, got 2 for targets up to 2"):
        by_class(CROSS_ENTROPY, [(X, torch.tensor([0, 2]))], groups=[0, 1])


def test_losses_that_are_one_mean_have_no_classes():
    class Mean:
        likelihood = None

        def per_target(self, outputs, targets):
            return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

        def __call__(self, module, batch):
            return self.per_target(module(batch[0]), batch[1])

    module, batch = nn.Linear(2, 3), (torch.ones(4, 5, 2), torch.arange(20).reshape(4, 5) % 3)
    part = by_class(Mean(), [batch])[1]
    with pytest.raises(UserError, match="per_target must give one value for each of 20 targets for class-wise"):
        part.loss(module, part.batches[0][0])


def test_bands_hold_about_as_many_targets_each():
    generator = torch.Generator().manual_seed(0)
    targets = torch.multinomial(1 / torch.arange(1, 201.0), 4000, replacement=True, generator=generator).view(40, 100)
    bands = frequency_bands(targets, 6)
    counts = torch.bincount(targets.flatten(), minlength=200)
    held = torch.bincount(bands, weights=counts.double())
    assert len(bands) == int(targets.max()) + 1
    assert len(held) == 6
    assert float(held.min()) > 0.5 * 4000 / 6
    assert float(held.max()) < 1.5 * 4000 / 6
    for band in range(5):  # every value of a band is at least as frequent as those of the next
        assert int(counts[: len(bands)][bands == band].min()) >= int(counts[: len(bands)][bands == band + 1].max())


def test_a_value_more_frequent_than_a_band_leaves_no_band_empty():
    targets = torch.tensor([3] * 90 + [0] * 5 + [1] * 5)
    bands = frequency_bands(targets, 4)
    assert bands[3] == 0
    assert bands.unique().tolist() == list(range(int(bands.max()) + 1))
    assert set(by_class(CROSS_ENTROPY, [(torch.zeros(100, 2), targets)], bands)) == {0, int(bands.max())}
    with pytest.raises(UserError, match="num_bands must be at least 1, got 0"):
        frequency_bands(targets, 0)
