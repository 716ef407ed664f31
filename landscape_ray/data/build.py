"""A source becomes a corpus folder in two passes: weigh and divide the documents, then write them.

Two passes keep the memory small (32 bytes per document) and let the division aim at a fraction of the bytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from landscape_ray.data.documents import Skipped
from landscape_ray.data.shards import (
    SPLITS,
    FileEntry,
    Manifest,
    SkippedFile,
    SplitName,
    SplitWriter,
    Tokens,
    file_sha256,
    smallest_dtype,
    write_manifest,
)
from landscape_ray.data.sources import Source
from landscape_ray.errors import UserError

NUM_BYTE_VALUES = 256

Advance = Callable[[int], None]


class Survey(NamedTuple):
    """What the first pass knows of the documents, one entry each, in order."""

    content: np.ndarray[Any, np.dtype[np.uint64]]
    """First 8 bytes of the SHA-256 of the content."""
    key: np.ndarray[Any, np.dtype[np.uint64]]
    """First 8 bytes of a hash of name and content (of the content alone where names are positions)."""
    num_tokens: np.ndarray[Any, np.dtype[np.int64]]
    is_text: bool
    max_token: int
    files: tuple[FileEntry, ...]
    """For a source of whole files: one entry a document; its split is not known yet."""
    skipped: tuple[SkippedFile, ...]


def build_corpus(source: Source, folder: Path, *, text_field: str, fraction: float, advance: Advance) -> Manifest:
    """Return the manifest of the corpus that has been written to an existing, empty folder.

    Args:
        source: what to read; it is read twice.
        folder: where to write.
        text_field: the column or field with the text, for tables and JSONL.
        fraction: share of the bytes to hold out, in (0, 1); unused where the source has splits of its own.
        advance: called with the number of tokens handled, twice for each.

    Raises:
        UserError: nothing readable, fewer than two different documents, or the source changed meanwhile.
        OSError: the folder cannot be written.
    """
    survey = _survey(source, text_field, advance)
    if source.has_splits:
        rule = "the splits that the source came with"
        held_out = None
    else:
        unit = "file" if source.kind == "files" else "document"
        rule = (
            f"by {unit}, in the order of a hash of {'path and content' if unit == 'file' else 'the content'}: held out "
            f"while validation stays within {fraction:g} of the bytes; equal content goes to one split"
        )
        held_out = choose_held_out(survey.content, survey.key, survey.num_tokens, fraction)
        if not held_out.any():
            raise UserError(
                f"{source.label} must hold at least two different {unit}s that are not empty to hold one out; "
                f"add text, or give data.source a larger corpus"
            )
    vocab_size = NUM_BYTE_VALUES if survey.is_text else survey.max_token + 1
    dtype = smallest_dtype(vocab_size - 1)
    writers = {name: SplitWriter(folder, name, dtype) for name in SPLITS}
    try:
        written = _write(source, text_field, survey, held_out, writers, advance)
        finished = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    manifest = Manifest(
        source=source.label,
        split_rule=rule,
        validation_fraction=fraction,
        vocab_size=vocab_size,
        dtype=dtype,
        splits={name: totals for name, (totals, _) in finished.items()},
        shards=tuple(shard for _, shards in finished.values() for shard in shards),
        files=written,
        skipped=survey.skipped,
    )
    write_manifest(folder, manifest)
    return manifest


def choose_held_out(
    content: np.ndarray[Any, np.dtype[np.uint64]],
    key: np.ndarray[Any, np.dtype[np.uint64]],
    size: np.ndarray[Any, np.dtype[np.int64]],
    fraction: float,
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which documents to hold out: as near to `fraction` of the bytes as fits, without exceeding it.

    Documents of equal content form a group, whose key is the smallest of theirs. Groups are visited in the order of
    their keys, and each that still fits is held out. If none fits (few, large documents) the smallest one is. With
    fewer than two groups that are not empty, nothing is held out.

    Args:
        content: (n,) hash of each document's content.
        key: (n,) hash that orders the documents.
        size: (n,) number of bytes (or tokens) of each document, >= 0.
        fraction: share to hold out, in (0, 1).

    Returns:
        (n,) True where the document is held out. It does not depend on the order of the documents.

    >>> hashes = np.arange(10, dtype=np.uint64)
    >>> choose_held_out(hashes, hashes, np.full(10, 7), 0.2).nonzero()[0].tolist()
    [0, 1]
    """
    _, group = np.unique(content, return_inverse=True)
    num_groups = int(group.max()) + 1 if len(group) else 0
    group_size = np.zeros(num_groups, dtype=np.int64)
    np.add.at(group_size, group, size)
    group_key = np.full(num_groups, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(group_key, group, key)

    held_out = np.zeros(num_groups, dtype=np.bool_)
    order = np.argsort(group_key, kind="stable")
    order = order[group_size[order] > 0]
    if len(order) < 2:
        return held_out[group]
    room = fraction * float(group_size.sum())
    for index in order.tolist():
        if group_size[index] <= room:
            held_out[index] = True
            room -= int(group_size[index])
    if not held_out.any():
        held_out[order[np.argmin(group_size[order])]] = True
    return held_out[group]


def _survey(source: Source, text_field: str, advance: Advance) -> Survey:
    content, key, num_tokens = array("Q"), array("Q"), array("q")
    files: list[FileEntry] = []
    skipped = list(source.skipped)
    kinds: set[bool] = set()
    max_token = 0
    for _, item in source.documents(text_field):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        digest = _sha256(item.tokens)
        label = item.name if source.kind == "files" else ""
        content.append(_first64(digest.digest()))
        key.append(_first64(hashlib.sha256(label.encode() + b"\0" + digest.digest()).digest()))
        num_tokens.append(len(item.tokens))
        kinds.add(item.tokens.dtype == np.uint8)
        if item.tokens.dtype != np.uint8:
            max_token = max(max_token, int(item.tokens.max(initial=0)))
        if source.kind == "files":
            size = len(item.tokens)
            files.append(FileEntry(path=item.name, sha256=digest.hexdigest(), size_bytes=size, split="train"))
        advance(len(item.tokens))
    if not sum(num_tokens):
        reasons = ", ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise UserError(
            f"{source.label} holds no readable text{f' ({reasons})' if reasons else ''}; "
            f"data.source must lead to UTF-8 text that is not empty"
        )
    if len(kinds) > 1:
        raise UserError(f"{source.label} must hold either text or tokens, got both; choose one with data.text_field")
    return Survey(
        np.frombuffer(content, dtype=np.uint64),
        np.frombuffer(key, dtype=np.uint64),
        np.frombuffer(num_tokens, dtype=np.int64),
        kinds.pop(),
        max_token,
        tuple(files),
        tuple(SkippedFile(path=name, reason=reason) for name, reason in sorted(skipped)),
    )


def _write(
    source: Source,
    text_field: str,
    survey: Survey,
    held_out: np.ndarray[Any, np.dtype[np.bool_]] | None,
    writers: dict[SplitName, SplitWriter],
    advance: Advance,
) -> tuple[FileEntry, ...]:
    """Write every document to its split and return the files with the split that they went to."""
    changed = UserError(f"{source.label} changed while it was read; try again when nothing writes to it")
    entries = list(survey.files)
    index = 0
    for file, item in source.documents(text_field):
        if isinstance(item, Skipped):
            continue
        if index == len(survey.content) or _first64(_sha256(item.tokens).digest()) != survey.content[index]:
            raise changed
        split = file.split or ("validation" if held_out is not None and held_out[index] else "train")
        writers[split].add(item.name, item.tokens)
        if survey.files:
            entries[index] = entries[index].model_copy(update={"split": split})
        index += 1
        advance(len(item.tokens))
    if index != len(survey.content):
        raise changed
    if survey.files:
        return tuple(entries)
    try:
        return tuple(
            FileEntry(
                path=file.name,
                sha256=file_sha256(file.path),
                size_bytes=file.size_bytes,
                split=file.split or "by document",
            )
            for file in source.files
        )
    except OSError:
        raise changed from None


def _sha256(tokens: Tokens) -> Any:
    """Return the hash of a document; for text, that of the very bytes of its file."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<")).data)


def _first64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
