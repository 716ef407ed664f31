"""The Hessian against another library's, on the same function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators import HessianOperator


@pytest.mark.acceptance
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # it keeps the graph in .grad
def test_products_are_those_of_pyhessian(case):
    pyhessian = pytest.importorskip("pyhessian")
    from pyhessian.utils import hessian_vector_product

    operator = HessianOperator(FixedLoss(case.module, case.loss, [case.batch]))
    vectors = torch.randn(3, operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [operator(v) for v in vectors]

    def criterion(outputs, targets):
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    with sdpa_kernel(SDPBackend.MATH):
        theirs = pyhessian.hessian(case.module, criterion, data=case.batch, cuda=False)
        for v, ours in zip(vectors, expected, strict=True):
            parts = operator.function.unflatten(v)
            product = hessian_vector_product(theirs.gradsH, theirs.params, parts)
            flat = operator.function.flatten(product)
            assert float((ours - flat).norm()) <= 1e-9 * float(flat.norm())
