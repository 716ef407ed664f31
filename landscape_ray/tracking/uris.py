"""Tracking addresses: the default one, which one wins, and how to write one down without its password."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "***"
_USER_INFO = re.compile(r"(?<=://)\S*@")  # up to the last @: a password may hold a slash
_SECRET = re.compile(
    r"(?i)((?:password|passwd|secret|(?<!per_)token|api[_-]?key|access[_-]?key(?:[_-]?id)?)[\"']?\s*[=:]\s*"
    r"(?!null\b)[\"']?"
    r"(?:bearer\s+)?|\bbearer\s+)[^\s&,;\"']+"
)


def default_tracking_uri(results: Path) -> str:
    """Return the address of the MLflow store that lies beside the sweeps: `sqlite:///<results>/mlflow.db`, absolute.

    >>> default_tracking_uri(Path("/data/results"))
    'sqlite:////data/results/mlflow.db'
    """
    return f"sqlite:///{results.expanduser().absolute() / 'mlflow.db'}"


def resolve_tracking_uri(explicit: str | None, results: Path, kept: str | None = None) -> str:
    """Return the address to use: the explicit one, else MLFLOW_TRACKING_URI, else the kept one, else the store there.

    Args:
        explicit: given by the user.
        results: folder of the sweeps, which holds the default store.
        kept: the address that a sweep was launched with.

    >>> resolve_tracking_uri("http://127.0.0.1:5000", Path("results"))
    'http://127.0.0.1:5000'
    """
    return explicit or os.environ.get("MLFLOW_TRACKING_URI") or kept or default_tracking_uri(results)


def mask_secrets(text: str) -> str:
    """Return the text with every `user:password@` of an address, and what follows `password=` and its like, masked.

    >>> mask_secrets("no answer from https://ada:s3cret@mlflow.example.org/api?token=abc")
    'no answer from https://***@mlflow.example.org/api?token=***'
    >>> mask_secrets('{"api_key": "abc", "token": null, "bytes_per_token": 3.2}')
    '{"api_key": "***", "token": null, "bytes_per_token": 3.2}'
    """
    return _SECRET.sub(rf"\g<1>{MASK}", _USER_INFO.sub(f"{MASK}@", text))


_SECRET_NAME = re.compile(r"(?i)(?:password|passwd|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?)$")


def masked(value: Any, name: str = "") -> Any:
    """Return a value of JSON with the secrets in its texts masked, and the texts whose name says that they are one.

    Text by text: in the JSON itself, a number behind a name that ends in `token` would be taken for a secret.

    >>> masked({"source": "https://ada:s3cret@example.org", "bytes_per_token": 3.5, "hf": {"token": "abc"}})
    {'source': 'https://***@example.org', 'bytes_per_token': 3.5, 'hf': {'token': '***'}}
    """
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    if isinstance(value, str):
        return MASK if _SECRET_NAME.search(name) else mask_secrets(value)
    return value


def is_postgres(tracking_uri: str) -> bool:
    """Return whether an address is one of a PostgreSQL database, with or without the name of a driver.

    >>> is_postgres("postgresql://host/db"), is_postgres("postgresql+psycopg2://host/db"), is_postgres("http://host")
    (True, True, False)
    """
    return tracking_uri.partition("://")[0].partition("+")[0] == "postgresql"


def sqlite_path(tracking_uri: str) -> Path | None:
    """Return the file behind a `sqlite:///...` address, None for any other address.

    >>> sqlite_path("sqlite:////data/mlflow.db")
    PosixPath('/data/mlflow.db')
    """
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0])
