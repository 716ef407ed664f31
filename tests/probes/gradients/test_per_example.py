from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from landscape_ray.errors import UserError
from landscape_ray.models import GPTConfig, MLPConfig, build_model
from landscape_ray.models.resnet import CNNConfig
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.gradients.per_example import ExampleGradients, example_losses, examples_at
from landscape_ray.probes.gradients.units import MicroBatchGradients, num_examples
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.signature import Images, Tokens, Vectors

LOSS = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(module, num=7, features=6):
    return module.double().eval(), (
        torch.randn(num, features, generator=seeded(1)).double(),
        torch.randint(3, (num,), generator=seeded(2)),
    )


def network(name):
    """Return a tiny network in float64 with its batch."""
    if name in ("mlp", "mlp_norm"):
        config = MLPConfig(depth=2, width=8, norm="layer" if name == "mlp_norm" else "none", dropout=0.3)
        return vectors(build_model(config, Vectors(num_features=6, num_outputs=3, targets="classes"), seeded()))
    if name == "cnn":
        module = build_model(
            CNNConfig(depth=3, width=8), Images(channels=1, height=8, width=8, num_classes=3), seeded()
        )
        return module.double(), (torch.randn(5, 1, 8, 8, generator=seeded(1)).double(), torch.tensor([0, 1, 2, 1, 0]))
    module = build_model(GPTConfig(depth=1, width=8), Tokens(vocab_size=7, context_length=6), seeded())
    tokens = torch.randint(7, (5, 7), generator=seeded(1))
    return module.double(), (tokens[:, :-1], tokens[:, 1:])


@torch.enable_grad()
def written_out(module, batch):
    """Return the gradients of the examples one by one: the slow twin."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for x, t in zip(*batch, strict=True):
        outputs = module(x[None])
        value = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), t.reshape(-1))
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)]))
    return torch.stack(rows)


def agree(gradients, rows):
    size = rows.shape[1]
    probe = torch.randn(size, generator=seeded(3), dtype=torch.float64)
    norms, mean, unit_mean = gradients.means()
    torch.testing.assert_close(norms, rows.square().sum(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(unit_mean, F.normalize(rows).mean(0), rtol=1e-8, atol=1e-12)
    products = gradients.products(probe, mean)
    torch.testing.assert_close(products, torch.stack([rows @ probe, rows @ mean]), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradients.gram(), rows @ rows.mT, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradients.row(1), rows[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "route"), [("mlp", "factored"), ("mlp_norm", "factored"), ("cnn", "vmap"), ("gpt", "vmap")]
)
def test_every_route_gives_the_gradients_of_single_examples(name, route):
    module, batch = network(name)
    rows = written_out(module.eval(), batch)
    with observing(module, LOSS, [batch]) as function:
        assert ExampleGradients(function, LOSS).route == route
        for way in {route, "vmap", "loop"}:
            agree(ExampleGradients(function, LOSS, route=way), rows)
        losses = example_losses(function, LOSS)
        assert float(losses.mean()) == pytest.approx(function.value(), rel=1e-12)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_what_does_not_fit_into_memory_is_computed_again(name):
    module, (inputs, targets) = network(name)
    rows = written_out(module.eval(), (inputs, targets))
    batches = [((inputs[:2], targets[:2]), 2), ((inputs[2:], targets[2:]), len(inputs) - 2)]
    with observing(module, LOSS, batches) as function:
        agree(ExampleGradients(function, LOSS, max_bytes=1), rows)
        agree(ExampleGradients(function, LOSS, route="vmap", max_bytes=2 * rows[0].nbytes), rows)
        spent = function.spent_gradients
        kept = ExampleGradients(function, LOSS, route="vmap")
        kept.means(), kept.products(kept.means()[1]), kept.gram()
        assert function.spent_gradients - spent == pytest.approx(2.5)


def test_frozen_and_tied_parameters():
    module, batch = network("mlp")
    module.layers[0].weight.requires_grad_(False)
    with observing(module, LOSS, [batch]) as function:
        agree(ExampleGradients(function, LOSS), written_out(module.eval(), batch))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.layer(torch.tanh(self.layer(x))))

    module, batch = vectors(Twice())
    with observing(module, LOSS, [batch]) as function:
        gradients = ExampleGradients(function, LOSS)
        assert gradients.route == "vmap"  # a weight that is used twice has no factors
        agree(gradients, written_out(module, batch))


def test_a_network_that_only_the_loop_can_do():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, generator=seeded()))

        def forward(self, x):
            return (x if float(x.sum()) > 0 else 2 * x) @ self.weight.mT

    module, batch = vectors(Branches())
    with observing(module, LOSS, [batch]) as function:
        gradients = ExampleGradients(function, LOSS)
        assert gradients.route == "loop"
        agree(gradients, written_out(module, batch))


def test_activations_in_place_do_not_fool_the_factors():
    module, batch = vectors(nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)))
    with observing(module, LOSS, [batch]) as function:
        agree(ExampleGradients(function, LOSS), written_out(module, batch))


def test_micro_batches_weigh_by_their_examples():
    module, (inputs, targets) = network("mlp")
    rows = written_out(module.eval(), (inputs, targets))
    batches = [((inputs[:2], targets[:2]), 2), ((inputs[2:], targets[2:]), 5)]
    with observing(module, LOSS, batches) as function:
        gradients = MicroBatchGradients(function)
        norms, mean, _ = gradients.means()
        assert function.spent_gradients == pytest.approx(1.0)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(norms, torch.stack([rows[:2].mean(0), rows[2:].mean(0)]).square().sum(1))
    assert gradients.sizes.tolist() == [2, 5]


def test_examples_at_gives_the_rows():
    inputs, targets = torch.arange(10.0).view(5, 2), torch.arange(5)
    found = examples_at([((inputs[:3], targets[:3]), 3), ((inputs[3:], targets[3:]), 2)], torch.tensor([4, 0, 3]))
    assert torch.equal(found[0], inputs[[4, 0, 3]])
    assert found[1].tolist() == [4, 0, 3]


def test_batches_of_many_kinds_tell_their_examples():
    class Counted:
        num_examples = 9

    assert num_examples(Counted()) == 9
    assert num_examples({"tokens": torch.zeros(3, 2)}) == 3
    with pytest.raises(UserError, match="must have num_examples or begin with a tensor"):
        num_examples("text")


def test_what_cannot_be_taken_apart_is_refused():
    module, batch = network("mlp")
    with observing(module, LOSS, [batch[0]]) as function, pytest.raises(UserError, match="pair of tensors"):
        ExampleGradients(function, LOSS)
    with observing(module, LOSS, [batch]) as function, pytest.raises(UserError, match="max_bytes must be at least 1"):
        ExampleGradients(function, LOSS, max_bytes=0)
    mixing, batch = vectors(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    with observing(mixing, LOSS, [batch]) as function, pytest.raises(UserError, match="must use running statistics"):
        ExampleGradients(function, LOSS)
