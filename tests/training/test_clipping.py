import io
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.training.clipping import Clipper, ClippingConfig

NAMES: tuple[Literal["none", "norm", "coordinate", "auto"], ...] = ("none", "norm", "coordinate", "auto")


def with_gradients(*gradients: Tensor) -> list[Tensor]:
    parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return [*parameters, torch.zeros(3, requires_grad=True)]  # the last one has none


def gradients_of(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def of_norm(norm: float) -> list[Tensor]:
    return with_gradients(torch.tensor([0.6 * norm]), torch.tensor([[0.0, -0.8 * norm]]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_norm_is_the_one_before_clipping(name: Literal["none", "norm", "coordinate", "auto"], scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    given = [scale * torch.randn(*shape, generator=g) for shape in ((4, 3), (5,), (2, 3, 1))]
    norm = Clipper(ClippingConfig(name=name))(with_gradients(*given))
    assert norm.shape == ()
    assert norm.item() == pytest.approx(torch.cat([x.flatten().double() for x in given]).norm().item(), rel=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_norm_is_torch_to_the_bit(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    given = [scale * torch.randn(*shape, generator=g) for shape in ((4, 3), (5,), (2, 3, 1))]
    ours, theirs = with_gradients(*given), with_gradients(*given)
    norm = Clipper(ClippingConfig(threshold=0.7))(ours)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, 0.7))
    for a, b in zip(gradients_of(ours), gradients_of(theirs), strict=True):
        assert torch.equal(a, b)


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6), st.floats(0.1, 3.0))
def test_coordinates_are_cut(values: list[float], threshold: float) -> None:
    parameters = with_gradients(torch.tensor(values))
    Clipper(ClippingConfig(name="coordinate", threshold=threshold))(parameters)
    expected = np.clip(np.array(values, np.float32), -np.float32(threshold), np.float32(threshold))
    np.testing.assert_array_equal(gradients_of(parameters)[0].numpy(), expected)


def test_none_does_nothing() -> None:
    parameters = of_norm(1e6)
    Clipper(ClippingConfig(name="none"))(parameters)
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(parameters), gradients_of(of_norm(1e6)), strict=True))


@pytest.mark.parametrize("window", [5, 100])
@pytest.mark.parametrize("percentile", [10.0, 50.0, 100.0])
def test_auto_clips_to_the_percentile_of_the_last_norms(window: int, percentile: float) -> None:
    clipper = Clipper(ClippingConfig(name="auto", percentile=percentile, window=window))
    history: list[float] = []
    for norm in np.random.default_rng(0).lognormal(size=20):
        parameters = of_norm(norm)
        history.append(clipper(parameters).item())
        threshold = np.percentile(history[-window:], percentile)
        after = torch.cat([x.flatten() for x in gradients_of(parameters)]).norm().item()
        assert after == pytest.approx(min(norm, threshold), rel=1e-4)
    assert history == pytest.approx(np.random.default_rng(0).lognormal(size=20))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_left_and_forgotten(
    name: Literal["none", "norm", "coordinate", "auto"], bad: float
) -> None:
    clipper, twin = (Clipper(ClippingConfig(name=name, percentile=50.0)) for _ in range(2))
    gradient = torch.tensor([bad, 5.0, -7.0])
    parameters = with_gradients(gradient)
    assert not clipper(parameters).isfinite()
    assert torch.equal(gradients_of(parameters)[0].nan_to_num(nan=1.5), gradient.nan_to_num(nan=1.5))
    for norm in (3.0, 1.0, 2.0):
        a, b = of_norm(norm), of_norm(norm)
        clipper(a)
        twin(b)
        assert all(torch.equal(x, y) for x, y in zip(gradients_of(a), gradients_of(b), strict=True))


def test_no_gradients_have_norm_zero() -> None:
    for name in NAMES:
        assert Clipper(ClippingConfig(name=name))([torch.zeros(2, requires_grad=True)]).item() == 0.0


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(clipper: Clipper, norms: list[float]) -> list[Tensor]:
    out = []
    for norm in norms:
        parameters = of_norm(norm)
        clipper(parameters)
        out += gradients_of(parameters)
    return out


@pytest.mark.acceptance
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [2, 4, 7, 11])
def test_resume_is_bit_exact(name: Literal["none", "norm", "coordinate", "auto"], before: int) -> None:
    config = ClippingConfig(name=name, percentile=40.0, window=4)
    norms = [float(x) for x in np.random.default_rng(1).lognormal(size=20)]
    whole = run(Clipper(config), norms)
    first, second = Clipper(config), Clipper(config)
    found = run(first, norms[:before])
    second.load_state_dict(through_disk(first.state_dict()))
    found += run(second, norms[before:])
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize(("theirs", "ours"), [(8, 3), (3, 8), (8, 8)])
def test_a_history_fits_another_window(theirs: int, ours: int) -> None:
    """What a member of a population gets with a donor's state when its own window has mutated."""
    norms = [float(x) for x in np.random.default_rng(2).lognormal(size=14)]
    donor = Clipper(ClippingConfig(name="auto", percentile=30.0, window=theirs))
    run(donor, norms[:10])
    clipper = Clipper(ClippingConfig(name="auto", percentile=30.0, window=ours))
    clipper.load_state_dict(donor.state_dict())
    for i in range(10, 14):
        parameters = of_norm(norms[i])
        clipper(parameters)
        oldest = max(10 - min(theirs, ours), i + 1 - ours, 0)
        threshold = np.percentile(norms[oldest : i + 1], 30.0)
        after = torch.cat([x.flatten() for x in gradients_of(parameters)]).norm().item()
        assert after == pytest.approx(min(norms[i], threshold), rel=1e-4)


def test_a_history_is_dropped_where_none_is_kept() -> None:
    donor = Clipper(ClippingConfig(name="auto"))
    run(donor, [1.0, 2.0])
    clipper = Clipper(ClippingConfig(name="norm"))
    clipper.load_state_dict(donor.state_dict())
    assert len(clipper.state_dict()["history"]) == 0
    back = Clipper(ClippingConfig(name="auto"))
    back.load_state_dict(clipper.state_dict())
    run(back, [3.0])
    assert back.state_dict()["count"] == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "value"}, "'name' input should be 'none', 'norm', 'coordinate' or 'auto', got 'value'"),
        ({"threshold": 0.0}, "'threshold' input should be greater than 0, got 0.0"),
        ({"percentile": 101.0}, "'percentile' input should be less than or equal to 100, got 101.0"),
        ({"window": 0}, "'window' input should be greater than or equal to 1, got 0"),
    ],
)
def test_mistakes_in_the_table_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ClippingConfig, table, "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait(name: Literal["none", "norm", "coordinate", "auto"]) -> None:
    clipper = Clipper(ClippingConfig(name=name))
    gradients = [[g.cuda() for g in gradients_of(of_norm(norm))] for norm in (1.0, 3.0, 2.0)]
    clipper._history, clipper._count = clipper._history.cuda(), clipper._count.cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for each in gradients:
            clipper(with_gradients(*each))
    finally:
        torch.cuda.set_sync_debug_mode("default")
