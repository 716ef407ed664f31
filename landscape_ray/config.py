"""Strict configuration: TOML text to validated models, and errors that say what to write instead.

A file is data: nothing in it is executed. An unknown key is an error that lists the valid ones; a value out of range
is an error that names the field, the value and the bound. All problems of a file are reported at once.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from landscape_ray.errors import UserError
from landscape_ray.registry import suggest


class Model(BaseModel):
    """Base of every configuration model: immutable, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


M = TypeVar("M", bound=Model)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the parsed content of a TOML file.

    Raises:
        UserError: no such file, not readable, or not TOML (with line and column).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        listing = f"; in that folder: {', '.join(near)}" if near else ""
        raise UserError(f"no such file: {path}{listing}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a UTF-8 TOML file that you may read") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def parse(model: type[M], data: Mapping[str, Any], source: str) -> M:
    """Return `data` as a validated `model`.

    Args:
        model: the class to build.
        data: nested mapping, as read from TOML.
        source: what to call the data in error messages (a file name).

    Raises:
        UserError: one line per problem, each with the dotted field name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise UserError(f"{source}: " + "; ".join(lines)) from None


def _explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """Return one validation problem as a sentence: field, condition, value, remedy."""
    location = [part for part in problem["loc"] if not _is_union_branch(part)]
    field = ".".join(str(part) for part in location)
    kind = problem["type"]
    if kind == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        valid = owner.model_fields if owner else ()
        return f"unknown key '{field}'; {suggest(str(location[-1]), valid)}" if valid else f"unknown key '{field}'"
    if kind == "missing":
        return f"'{field}' is required and missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{field}: {message}" if field else message
    return f"'{field}' {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and (part.endswith("]") or part in {"float", "int", "str", "bool"})


def _model_at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    """Return the model class that a location points to, None where it is not a model."""
    current: Any = model
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return None
        if part not in current.model_fields:
            return None
        current = _model_of(current.model_fields[part].annotation)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _model_of(annotation: Any) -> Any:
    """Return the model class inside an annotation such as `Model | None` or `dict[str, Model]`."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return next((a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return annotation


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one level with dotted keys.

    >>> flatten({"model": {"depth": 4}, "seed": 0})
    {'model.depth': 4, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def with_values(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of `data` with the dotted keys of `values` set.

    >>> with_values({"model": {"depth": 4}}, {"model.depth": 6, "seed": 1})
    {'model': {'depth': 6}, 'seed': 1}
    """
    out = {key: with_values(value, {}) if isinstance(value, Mapping) else value for key, value in data.items()}
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        level = out
        for parent in parents:
            child = level.get(parent)
            level[parent] = level = dict(child) if isinstance(child, Mapping) else {}
        level[leaf] = value
    return out


def config_id(model: BaseModel | Mapping[str, Any]) -> str:
    """Return a short hash of the content: equal configurations have equal identifiers, in any key order."""
    data = model.model_dump(mode="json") if isinstance(model, BaseModel) else model
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
