"""Kernels in one call of PyTorch's interpreter are the same kernels called one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from landscape_ray.training.cohort import Cohort, recording, sequence
from landscape_ray.training.cohort.sequence import Interpreted, Number, OneByOne, Step, graph_of

from .conftest import Configs, memory

aten = torch.ops.aten


def steps(scale: float) -> tuple[list[Step], list[Tensor]]:
    """Return steps of every kind on tensors of their own, and where their results will be."""
    x, y = torch.arange(6.0).view(2, 3) * scale, torch.zeros(2, 3)
    places = [
        torch.zeros(2, 3),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(4, 3),
        torch.zeros(2, 3),
    ]
    return [
        Step(aten.relu.out, (x,), {"out": y}, []),
        Step(aten.mul.Tensor, (y, x), {}, [places[0]]),
        Step(aten.max.dim, (x, 1), {"keepdim": False}, [places[1], places[2]]),
        Step(aten.cat.out, ([x, y],), {"out": places[3]}, []),
        Step(aten.add_.Tensor, (places[4], y), {"alpha": 2}, []),
        Step(aten.clone.default, (y,), {"memory_format": torch.contiguous_format}, [y]),
    ], places


def test_all_kinds_of_steps_on_any_tensors() -> None:
    first, _ = steps(1.0)
    graph = graph_of(first)
    assert isinstance(graph, Interpreted)
    for scale in (1.0, 3.0):
        found = []
        for each in (graph, OneByOne()):
            own, places = steps(scale)
            run = each.on(own)
            for _ in range(3):
                places[4].zero_()
                run()
            found.append(places)
        assert all(map(torch.equal, *found))
        assert all(place.any() for place in found[0])


def test_tensors_of_a_list_are_written_to() -> None:
    x = [torch.ones(2), torch.ones(3)]
    more = [
        Step(aten._foreach_add_.Scalar, (x, 1.0), {}),
        Step(aten._foreach_mul_.List, (x, [x[0], torch.zeros(3)]), {}),
    ]
    run = Interpreted(more).on(more)
    run()
    assert [each.tolist() for each in x] == [[4.0, 4.0], [0.0, 0.0, 0.0]]


def test_numbers_are_given_at_every_call() -> None:
    found = []
    for graph in (Interpreted(_adamw(0)), OneByOne()):
        own = _adamw(1)
        run = graph.on(own)
        for lr in (0.1, 0.2):
            run(lr, 0.9, 0.95, 0.1, 1e-8, 2 * lr, 0.8, 0.9, 0.0, 1e-6)
        found.append([tensor for step in own for each in step.args[:4] for tensor in each])
    assert all(map(torch.equal, *found))
    assert all(tensor.any() for tensor in found[0])


def _adamw(seed: int) -> list[Step]:
    """Return the updates of two rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randn(5, generator=generator) for _ in range(2)] for _ in range(2)]
    names = ("lr", "beta1", "beta2", "weight_decay", "eps")
    return [
        Step(
            aten._fused_adamw_.default,
            ([weight], [gradient], [torch.zeros(5)], [torch.zeros(5)], [], [torch.tensor(1.0)]),
            {name: Number() for name in names} | {"amsgrad": False, "maximize": False, "grad_scale": torch.tensor(2.0)},
        )
        for weight, gradient in rows
    ]


def test_tensors_that_cannot_be_given_are_no_constants() -> None:
    x, index, place = torch.arange(3.0), torch.tensor([2, 0]), torch.zeros(2)
    steps = [Step(aten.index.Tensor, (x, [index]), {}, [place])]
    with pytest.raises(TypeError, match="cannot be given"):
        Interpreted(steps)
    graph_of(steps).on(steps)()
    assert place.tolist() == [2.0, 0.0]


def test_what_is_no_constant_of_a_graph_is_called_one_by_one() -> None:
    x, place = torch.ones(2), torch.zeros(2, dtype=torch.float64)
    strange = Step(aten.clone.default, (x,), {"memory_format": object()}, [place])
    with pytest.raises(TypeError):
        Interpreted([strange])
    assert isinstance(graph_of([strange]), OneByOne)


def test_results_that_are_left_out_have_no_place_in_a_graph() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="leaves some results out"):
        Interpreted([Step(aten.max.dim, (x, 1), {}, [torch.zeros(2)])])


def test_a_pytorch_with_other_graphs_gives_the_same_bits(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: Any) -> None:
        raise AttributeError("module 'torch._C' has no attribute 'Graph'")

    whole = Cohort.create(configs(), route="recorded", chunk=2)
    list(whole.train())
    monkeypatch.setattr(sequence.Interpreted, "__init__", other)
    plain = Cohort.create(configs(), route="recorded", chunk=2)
    list(plain.train())
    assert recording.graph_of is graph_of
    for k in range(3):
        assert all(map(torch.equal, memory(whole, k), memory(plain, k)))
