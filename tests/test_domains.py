from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from landscape_ray.domains import Domain, applies, in_order

floats = st.floats(1e-9, 1e9, allow_subnormal=False)


def pairs(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, min_size=2, max_size=2, unique=True).map(sorted)


domains = st.one_of(
    pairs(floats).map(lambda p: Domain(uniform=p)),
    pairs(floats).map(lambda p: Domain(log_uniform=p)),
    pairs(st.integers(-1000, 1000)).map(lambda p: Domain(integers=p)),
    st.lists(st.integers(), min_size=1, max_size=5, unique=True).map(lambda c: Domain(choices=c)),
)


@given(domains, st.floats(0, 1))
def test_every_position_lies_in_the_domain(domain: Domain, unit: float) -> None:
    assert domain.contains(domain.at(unit))


@given(domains)
def test_extremes_lie_in_the_domain(domain: Domain) -> None:
    assert all(domain.contains(value) for value in domain.extremes)


@given(domains.filter(lambda d: d.choices is None), st.floats(-1e12, 1e12))
def test_clip_lands_in_the_domain_and_keeps_what_is_inside(domain: Domain, value: float) -> None:
    clipped = domain.clip(value)
    assert domain.contains(clipped)
    low, high = domain.bounds
    if low <= value <= high and domain.integers is None:
        assert clipped == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "exactly one of uniform, log_uniform, integers, choices, got none"),
        ({"uniform": [0.0, 1.0], "choices": [1]}, "exactly one of"),
        ({"uniform": [1.0, 0.0]}, r"low < high, got \[1.0, 0.0\]"),
        ({"log_uniform": [0.0, 1.0]}, "low > 0, got 0.0"),
        ({"choices": [1, 1]}, "choices must differ"),
        ({"uniform": [1.0]}, "at least 2 items"),
    ],
)
def test_unsound_domains_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Domain(**data)


def test_conditions_order_the_space() -> None:
    space = {
        "c": Domain(uniform=[0.0, 1.0], when={"b": 1}),
        "b": Domain(choices=[0, 1], when={"a": True}),
        "a": Domain(choices=[True, False]),
    }
    assert [name for name, _ in in_order(space)] == ["a", "b", "c"]
    assert applies(space["b"], {"a": True})
    assert not applies(space["b"], {"a": False})
    assert not applies(space["c"], {"a": False})


def test_conditions_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"space.a.when names 'z', which is not searched"):
        list(in_order({"a": Domain(choices=[1], when={"z": 1})}))
    with pytest.raises(ValueError, match=r"space.a.when goes round in a circle"):
        list(in_order({"a": Domain(choices=[1], when={"b": 1}), "b": Domain(choices=[1], when={"a": 1})}))


def test_choices_have_no_bounds() -> None:
    with pytest.raises(TypeError, match="choices have no bounds"):
        _ = Domain(choices=[1]).bounds


def test_a_domain_knows_its_types() -> None:
    assert not Domain(integers=[1, 3]).contains(2.0)
    assert not Domain(integers=[0, 3]).contains(True)
    assert not Domain(choices=[1]).contains(True)
    assert Domain(uniform=[0.0, 3.0]).contains(2)
