from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.gradients.opposing import OpposingSignalsProbe, opposing_groups, opposition_p_value
from landscape_ray.probes.gradients.per_example import ExampleGradients, examples_at
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.probe import Host

SQUARES = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets) ** 2, likelihood="gaussian")


def regression(seed, *, opposing):
    """Return a linear module after an update, its batch and the update.

    Opposing: twenty of 200 examples share a feature ten times as large as all others; ten want it up, ten want it down.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    targets = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    if opposing:
        inputs[:20, 0] = 10.0
        targets[:10], targets[10:20] = 3.0, -3.0
    update = 0.02 * torch.randn(20, generator=generator, dtype=torch.float64)
    if opposing:
        update[0] = 0.05
    module = nn.Linear(20, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(0.5 * update)
    return module, (inputs, targets), update


def rate(p_values, level=0.05):
    return sum(p <= level for p in p_values) / len(p_values)


@pytest.mark.acceptance
def test_opposing_outliers_are_found_and_can_be_looked_at():
    for seed in range(10):
        module, batch, update = regression(seed, opposing=True)
        found = opposing_groups(module, SQUARES, [batch], update, seed=seed)
        assert sorted(found.decreasing.tolist()) == list(range(10))
        assert sorted(found.increasing.tolist()) == list(range(10, 20))
        assert found.opposing()
        assert found.cosine.value < -0.9
        assert found.p_value.value <= 0.01
        assert found.movement_share > 0.4
        assert found.curvature_share > 0.5  # of a tenth of the examples
        inputs, targets = examples_at([batch], found.increasing)
        assert (inputs[:, 0] == 10).all()
        assert (targets == -3).all()


@pytest.mark.acceptance
def test_data_without_opposing_groups_are_not_flagged_beyond_the_level():
    found = [opposing_groups(*null, num_permutations=99, seed=s) for s in range(80) for null in [_null(s)]]
    # 5 % and 2.6 binomial standard deviations
    assert rate([f.p_value.value for f in found]) <= 0.113
    assert sum(f.opposing() for f in found) / 80 <= 0.113


def _null(seed):
    module, batch, update = regression(seed, opposing=False)
    return module, SQUARES, [batch], update


@pytest.mark.acceptance
@pytest.mark.parametrize("heavy", [False, True])
def test_p_value_keeps_its_level_where_comparing_with_random_groups_would_not(heavy):
    p_values, fooled = [], []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(60, 25, generator=generator, dtype=torch.float64)
        if heavy:  # large residuals make large gradients, and the update is minus their mean
            rows *= torch.randn(60, 1, generator=generator, dtype=torch.float64)
        direction = F.normalize(-rows.mean(0), dim=0) if heavy else F.normalize(torch.ones(25).double(), dim=0)
        along = rows @ direction
        order = along.argsort()
        chosen = rows[torch.cat([order[:6], order[-6:]])]
        gram = chosen @ chosen.mT
        p_values.append(opposition_p_value(gram, chosen @ direction, num_permutations=99, seed=seed))
        fooled.append(opposition_p_value(gram, torch.zeros(12).double(), num_permutations=99, seed=seed))
    assert rate(p_values) <= 0.083  # 5 % and three binomial standard deviations
    assert rate(p_values, 0.5) <= 0.575
    assert rate(fooled) > 0.3


def test_p_value_is_that_of_all_divisions():
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:4, 0] += 1.0

    def cosine(first):
        second = [i for i in range(8) if i not in first]
        return float(F.cosine_similarity(rows[list(first)].sum(0), rows[second].sum(0), dim=0))

    divisions = list(itertools.combinations(range(8), 4))
    exact = sum(cosine(d) <= cosine(range(4)) + 1e-12 for d in divisions) / len(divisions)
    found = opposition_p_value(rows @ rows.mT, torch.zeros(8).double(), num_permutations=4000)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


def test_gradients_along_the_update_say_nothing():
    along = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0]).double()
    assert opposition_p_value(torch.outer(along, along), along) == 1.0


def test_a_quadratic_has_all_of_it_in_closed_form():
    module, (inputs, targets), update = regression(3, opposing=True)
    found = opposing_groups(module, SQUARES, [(inputs, targets)], [update.view(1, 20)], fraction=0.08)
    residuals = module(inputs).detach() - targets
    before = residuals - (inputs @ update)[:, None]
    changes = 0.5 * (residuals**2 - before**2).flatten()
    torch.testing.assert_close(found.loss_changes, changes)
    order = changes.argsort()
    assert found.decreasing.tolist() == order[:16].tolist()
    assert found.increasing.tolist() == order[-16:].flip(0).tolist()
    rows = residuals * inputs
    tails = torch.cat([found.decreasing, found.increasing])
    wanted = F.cosine_similarity(rows[found.decreasing].mean(0), rows[found.increasing].mean(0), dim=0)
    assert found.cosine.value == pytest.approx(float(wanted))
    curvatures = (inputs @ update).square()
    assert found.curvature_share == pytest.approx(float(curvatures[tails].sum() / curvatures.sum()))
    assert found.movement_share == pytest.approx(float(changes[tails].abs().sum() / changes.abs().sum()))


def test_error_of_the_cosine_is_the_jackknife_over_both_groups():
    module, (inputs, targets), update = regression(4, opposing=False)
    found = opposing_groups(module, SQUARES, [(inputs, targets)], update)
    rows = (module(inputs).detach() - targets) * inputs
    first, second = rows[found.decreasing], rows[found.increasing]
    variance = 0.0
    for group, other in ((first, second), (second, first)):
        left = torch.stack([F.cosine_similarity(group.sum(0) - row, other.sum(0), dim=0) for row in group])
        variance += float(9 / 10 * (left - left.mean()).square().sum())
    assert found.cosine.standard_error == pytest.approx(math.sqrt(variance))


def test_micro_batches_are_one_batch():
    module, (inputs, targets), update = regression(0, opposing=True)
    whole = opposing_groups(module, SQUARES, [(inputs, targets)], update)
    parts = [
        ((inputs[:7], targets[:7]), 7),
        ((inputs[7:150], targets[7:150]), 143),
        ((inputs[150:], targets[150:]), 50),
    ]
    split = opposing_groups(module, SQUARES, parts, update)
    assert torch.equal(split.decreasing, whole.decreasing)
    assert torch.equal(split.increasing, whole.increasing)
    assert split.cosine.value == pytest.approx(whole.cosine.value)
    assert split.p_value == whole.p_value
    assert split.curvature_share == pytest.approx(whole.curvature_share)


def test_probe_needs_an_update():
    module, batch, update = regression(0, opposing=True)
    probe = OpposingSignalsProbe([batch])
    assert probe.needs == {"update"}
    for host in (Host(), Host(update=[torch.zeros(1, 20)])):
        found = probe.measure(module, SQUARES, host)
        assert list(found) == ["opposing_signals"]
        assert math.isnan(found["opposing_signals"].value)
    found = probe.measure(module, SQUARES, Host(update=[update.view(1, 20)]))
    assert list(found) == [
        f"opposing_signals{part}" for part in ("", "/p_value", "/movement_share", "/curvature_share")
    ]
    alone = opposing_groups(module, SQUARES, [batch], update)
    assert found["opposing_signals"].value == alone.cosine.value
    assert found["opposing_signals/p_value"].value == alone.p_value.value
    assert probe.price_gradients == found["opposing_signals"].price_gradients
    assert 2.6 < alone.cosine.price_gradients < 3.5


def test_a_loss_that_is_not_finite_before_the_update_is_unknown():
    module, batch, update = regression(0, opposing=True)
    blown = update.clone()
    blown[0] = 1e200
    assert math.isnan(opposing_groups(module, SQUARES, [batch], blown).cosine.value)
    found = OpposingSignalsProbe([batch]).measure(module, SQUARES, Host(update=[blown.view(1, 20)]))
    assert list(found) == ["opposing_signals"]
    assert math.isnan(found["opposing_signals"].value)


def test_arguments_out_of_range():
    module, batch, update = regression(0, opposing=False)
    with pytest.raises(UserError, match=r"fraction must be above 0 and at most 0\.5, got 0\.6"):
        opposing_groups(module, SQUARES, [batch], update, fraction=0.6)
    with pytest.raises(UserError, match="num_permutations must be at least 19, got 3"):
        OpposingSignalsProbe([batch], num_permutations=3)
    with pytest.raises(UserError, match="update must have 20 entries"):
        opposing_groups(module, SQUARES, [batch], update[:3])
    with pytest.raises(UserError, match="update must be finite and not zero"):
        opposing_groups(module, SQUARES, [batch], 0 * update)
    with pytest.raises(UserError, match="at least 4 examples, got 3"):
        opposing_groups(module, SQUARES, [tuple(part[:3] for part in batch)], update)
    nn.init.constant_(module.weight, math.inf)
    with pytest.raises(UserError, match="weights must be finite"):
        opposing_groups(module, SQUARES, [batch], update)


class MeanSquares:
    """A loss of which one mean is all there is."""

    likelihood = None

    def per_target(self, outputs, targets):
        return 0.5 * (outputs - targets).square().mean()

    def __call__(self, module, batch):
        return self.per_target(module(batch[0]), batch[1])


def test_losses_that_are_one_mean_are_refused():
    module, batch, update = regression(0, opposing=False)
    host = Host(update=[update[None]])
    with pytest.raises(
        UserError, match="loss must give one value for each target where single examples are told apart"
    ):
        OpposingSignalsProbe([batch]).measure(module, MeanSquares(), host)
    with observing(module, MeanSquares(), [batch]) as function:  # the gradient of an example needs no more than that
        route = ExampleGradients(function, function.loss).route
    assert route == "vmap"
