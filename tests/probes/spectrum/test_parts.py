from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators.hessian import HessianOperator
from landscape_ray.probes.spectrum.eigenpairs import eigenvalues
from landscape_ray.probes.spectrum.parts import class_eigenvalues, layer_eigenvalues

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")


@pytest.mark.acceptance
def test_layers_are_diagonal_blocks_and_interlace(smooth_case, dense_hessian):
    H = dense_hessian(smooth_case)
    found = layer_eigenvalues(smooth_case.module, smooth_case.loss, [smooth_case.batch], k=2, num_smallest=1, tol=1e-7)
    assert list(found) == ["0", "2", "4"]
    first = 0
    for name, spectrum in found.items():
        last = first + sum(p.numel() for p in smooth_case.module[int(name)].parameters())
        exact = torch.linalg.eigvalsh(H[first:last, first:last])
        measured = [estimate.value for estimate in (*spectrum.largest, *spectrum.smallest)]
        assert measured == pytest.approx([*exact.flip(0)[:2].tolist(), float(exact[0])], rel=1e-6)
        assert spectrum.price_gradients == pytest.approx(1.2 + 2.3 * spectrum.num_matvecs)
        first = last
    whole = eigenvalues(smooth_case.module, smooth_case.loss, [smooth_case.batch], tol=1e-7)
    assert max(spectrum.largest[0].value for spectrum in found.values()) <= whole.largest[0].value


@pytest.mark.acceptance
def test_classes_are_the_losses_on_their_examples(case):
    inputs, targets = case.batch
    found = class_eigenvalues(case.module, CROSS_ENTROPY, [case.batch], tol=1e-7)
    assert list(found) == targets.unique().tolist()
    for number, spectrum in found.items():

        def loss(module, batch, number=number):
            rows = module(inputs).flatten(0, -2)[targets.flatten() == number]
            return nn.functional.cross_entropy(rows, torch.full((len(rows),), number))

        dense = HessianOperator(FixedLoss(case.module, loss, [0])).dense()
        assert spectrum.largest[0].value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-6)


def test_few_parameters_and_not_finite_weights():
    module = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    batch = torch.ones(3, 2), torch.tensor([0, 1, 1])
    found = layer_eigenvalues(module, CROSS_ENTROPY, [batch], k=3, num_smallest=2)
    assert [(len(each.largest), len(each.smallest)) for each in found.values()] == [(2, 0), (2, 0)]
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    for measured in (
        layer_eigenvalues(module, CROSS_ENTROPY, [batch]),
        class_eigenvalues(module, CROSS_ENTROPY, [batch]),
    ):
        assert all(math.isnan(each.largest[0].value) for each in measured.values())


def test_refused_arguments():
    for measured in (layer_eigenvalues, class_eigenvalues):
        with pytest.raises(UserError, match="tol must be positive and finite"):
            measured(nn.Linear(1, 1), CROSS_ENTROPY, [0], tol=-1.0)
        with pytest.raises(UserError, match="curvature must be one of"):
            measured(nn.Linear(1, 1), CROSS_ENTROPY, [0], curvature="ntk")


def test_progress_names_every_part_before_it_is_solved(case):
    told: list = []
    found = class_eigenvalues(case.module, CROSS_ENTROPY, [case.batch], max_matvecs=3, progress=told.append)
    assert told == list(found)
    told.clear()
    blocks = layer_eigenvalues(case.module, CROSS_ENTROPY, [case.batch], max_matvecs=3, progress=told.append)
    assert told == list(blocks)
