"""Names to things: explicit dictionaries, and dotted paths for what users bring themselves."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from landscape_ray.errors import UserError

T = TypeVar("T")


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message: the nearest valid name if one is near, and all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}valid: {', '.join(names)}"


def resolve(name: str, registry: Mapping[str, T], field: str) -> T:
    """Return the entry called `name`, or the object at the dotted path `package.module:Name`.

    Args:
        name: a key of `registry`, or a dotted path with one colon.
        registry: the known entries.
        field: where the name was written, for the error message (`train.model.name`).

    Raises:
        UserError: the name is not known, or the dotted path cannot be imported.
    """
    if name in registry:
        return registry[name]
    if ":" not in name:
        raise UserError(
            f"{field} must be a known name or a path 'package.module:Name', got '{name}'; {suggest(name, registry)}"
        )
    module_name, _, attribute = name.partition(":")
    try:
        found: T = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{field}: cannot import '{name}' ({error}); check the path and the installation") from None
    return found
