"""Documents, the unit that goes to one split as a whole, and how text files are read as documents.

A document is a file of a folder, a line of a JSONL file, a row of a table, or a paragraph of a single text file. Text
becomes its UTF-8 bytes, unchanged. Every reader takes a listed file and the name of the text field, and yields the
same documents in the same order each time.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from landscape_ray.data.shards import SplitName, Tokens
from landscape_ray.errors import UserError

MIN_PARAGRAPHS = 20
"""A single text with fewer blank-line separated paragraphs than this is split by line instead."""


class Document(NamedTuple):
    """One unit of text. Tokens are uint8 for text (its bytes) and uint32 for token identifiers from outside."""

    name: str
    tokens: Tokens


class Skipped(NamedTuple):
    """One file that was left out."""

    name: str
    reason: str


class SourceFile(NamedTuple):
    """One file of a source, as listed: nothing of it has been read."""

    name: str
    path: Path
    size_bytes: int
    mtime_ns: int
    split: SplitName | None = None


def list_file(path: Path, name: str, split: SplitName | None = None) -> SourceFile:
    """Return a file with the size and time that the cache key needs."""
    status = path.stat()
    return SourceFile(name, path, status.st_size, status.st_mtime_ns, split)


def record_text(text: bytes) -> Tokens:
    """Return a record's text as tokens, ended by a newline so that records do not run into each other.

    >>> record_text(b"ab").tolist()
    [97, 98, 10]
    """
    return np.frombuffer(text if text.endswith(b"\n") else text + b"\n", dtype=np.uint8)


def _read_text(file: SourceFile) -> bytes | Skipped:
    """Return the bytes of a UTF-8 text file, or why it is not one."""
    try:
        content = file.path.read_bytes()
        content.decode("utf-8")
    except OSError as error:
        return Skipped(file.name, f"cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        return Skipped(file.name, f"not UTF-8 (byte 0x{content[error.start]:02x} at {error.start})")
    return Skipped(file.name, "binary (has NUL bytes)") if b"\0" in content else content


def whole_file(file: SourceFile, text_field: str) -> Iterator[Document | Skipped]:
    """Yield a text file as one document."""
    content = _read_text(file)
    if isinstance(content, Skipped):
        yield content
    else:
        yield Document(file.name, np.frombuffer(content, dtype=np.uint8))


def paragraphs(file: SourceFile, text_field: str) -> Iterator[Document | Skipped]:
    """Yield the paragraphs of a text file, or its lines where it has fewer than :data:`MIN_PARAGRAPHS`."""
    content = _read_text(file)
    if isinstance(content, Skipped):
        yield content
        return
    # Neighbouring lines say much about each other: held-out text should be whole paragraphs where there are any.
    pieces = re.findall(rb".+?(?:\r?\n(?:[ \t]*\r?\n)+|\Z)", content, re.DOTALL)
    if len(pieces) < MIN_PARAGRAPHS:
        pieces = content.splitlines(keepends=True)
    start = 0
    for piece in pieces:
        yield Document(f"{file.name}:{start}", np.frombuffer(piece, dtype=np.uint8))
        start += len(piece)


def jsonl_lines(file: SourceFile, text_field: str) -> Iterator[Document]:
    """Yield the text field of every line of a JSONL file, compressed or not; blank lines and empty texts are none."""
    opened = gzip.open if file.name.lower().endswith(".gz") else open
    try:
        with opened(file.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _json_text(line, text_field, f"{file.path}, line {number}")
                    if text:
                        yield Document(f"{file.name}:{number}", record_text(text.encode("utf-8")))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file.path} cannot be read ({error}); give a readable file, compressed if it ends in .gz"
        ) from None


def _json_text(line: bytes, text_field: str, where: str) -> str:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except ValueError as error:  # also what UnicodeDecodeError is
        raise UserError(f"{where} is not JSON in UTF-8 ({error}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} must be a JSON object, got {type(record).__name__}; write one object per line")
    if text_field not in record:
        raise UserError(
            f"{where} must have the field '{text_field}', got {', '.join(record) or 'none'}; set data.text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: '{text_field}' must be text, got {type(text).__name__}; set data.text_field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: '{text_field}' has a lone surrogate, which is not text; mend the line") from None
    return text
