from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from landscape_ray.config import Model, config_id, flatten, parse, read_toml, with_values
from landscape_ray.errors import UserError
from landscape_ray.registry import resolve


class Inner(Model):
    depth: int = Field(default=2, ge=1)
    rate: float = 0.5


class Outer(Model):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None


def test_valid_data_becomes_a_model() -> None:
    outer = parse(Outer, {"name": "a", "inner": {"depth": 3}}, "file")
    assert outer.inner == Inner(depth=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"file: 'name' is required and missing"),
        ({"name": "a", "inner": {"dept": 3}}, r"unknown key 'inner.dept'; did you mean 'depth'\? valid: depth, rate"),
        ({"name": "a", "maybe": {"x": 3}}, r"unknown key 'maybe.x'; valid: depth, rate"),
        ({"name": "a", "inner": {"depth": 0}}, r"'inner.depth' input should be greater than or equal to 1, got 0"),
        ({"name": "a", "inner": {"depth": "3"}}, r"'inner.depth' input should be a valid integer, got '3'"),
        ({"name": "a", "inner": {"rate": float("nan")}}, r"'inner.rate' input should be a finite number, got nan"),
        ({"name": 1, "inner": {"depth": 1.5}}, r"'name' .*; 'inner.depth' "),
    ],
)
def test_every_problem_is_named_with_its_remedy(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Outer, data, "file")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "there.toml").write_text("")
    with pytest.raises(UserError, match=r"no such file: .*here\.toml; in that folder: .*there\.toml"):
        read_toml(tmp_path / "here.toml")


def test_other_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; give a TOML file"):
        read_toml(tmp_path)
    (tmp_path / "bad.toml").write_text("a = = 3")
    with pytest.raises(UserError, match=r"bad\.toml is not valid TOML: .*line 1"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with pytest.raises(UserError, match=r"cannot read .*latin\.toml.*UTF-8"):
        read_toml(tmp_path / "latin.toml")


keys = st.text("abc", min_size=1, max_size=2)
nested = st.recursive(st.integers(), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=8)


@given(st.dictionaries(keys, nested, max_size=4))
def test_flatten_and_with_values_are_inverse(data: dict[str, Any]) -> None:
    assert with_values({}, flatten(data)) == data


@given(st.dictionaries(keys, st.integers(), min_size=1), st.randoms(use_true_random=False))
def test_config_id_ignores_key_order(data: dict[str, int], random: Any) -> None:
    items = list(data.items())
    random.shuffle(items)
    assert config_id(dict(items)) == config_id(data)
    changed = {**data, items[0][0]: items[0][1] + 1}
    assert config_id(changed) != config_id(data)


def test_with_values_leaves_its_input_alone() -> None:
    data = {"a": {"b": 1}}
    assert with_values(data, {"a.b": 2, "a.c": 3}) == {"a": {"b": 2, "c": 3}}
    assert data == {"a": {"b": 1}}


def test_resolve_knows_names_and_paths() -> None:
    assert resolve("one", {"one": 1}, "field") == 1
    assert resolve("landscape_ray.config:flatten", {}, "field") is flatten
    with pytest.raises(UserError, match=r"field must be a known name .* got 'on'; did you mean 'one'\?"):
        resolve("on", {"one": 1}, "field")
    with pytest.raises(UserError, match=r"field: cannot import 'landscape_ray.nothing:x'"):
        resolve("landscape_ray.nothing:x", {}, "field")
    with pytest.raises(UserError, match=r"field: cannot import 'landscape_ray.config:nothing'"):
        resolve("landscape_ray.config:nothing", {}, "field")
