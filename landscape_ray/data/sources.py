"""Where text comes from: a source lists its files cheaply, and yields its documents as often as it is asked."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from landscape_ray.data.documents import Document, Skipped, SourceFile, jsonl_lines, list_file, paragraphs, whole_file
from landscape_ray.data.tables import arrow_documents, parquet_documents, saved_dataset_files
from landscape_ray.errors import UserError

Kind: TypeAlias = Literal["files", "paragraphs", "jsonl", "parquet", "arrow"]

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")

_READERS: dict[Kind, Callable[[SourceFile, str], Iterator[Any]]] = {
    "files": whole_file,
    "paragraphs": paragraphs,
    "jsonl": jsonl_lines,
    "parquet": parquet_documents,
    "arrow": arrow_documents,
}

STDLIB_SKIPPED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),  # not the library
        *("test", "tests", "idle_test", "idlelib", "lib2to3"),  # tests, an application, a removed tool with grammars
        *("encodings", "pydoc_data", "msilib"),  # generated: character tables, dumped manual, database schemas
    }
)
STDLIB_SKIPPED_FILES = re.compile(r"^(_sysconfigdata.*|_sysconfig_vars.*|config-.*|html/entities\.py)")


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of files that become one corpus."""

    label: str
    """What the manifest calls it; the same on every machine."""
    identity: str
    """What tells it from another source whose files look the same."""
    kind: Kind
    files: tuple[SourceFile, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def has_splits(self) -> bool:
        """Whether the source says itself what is held out."""
        return any(file.split for file in self.files)

    def documents(self, text_field: str) -> Iterator[tuple[SourceFile, Document | Skipped]]:
        """Yield every document with the file that it is in, in an order that does not change."""
        read = _READERS[self.kind]
        for file in self.files:
            for item in read(file, text_field):
                yield file, item


def find_source(name: str) -> Source:
    """Return the source called `stdlib`, or the one at a path.

    A folder that `datasets` wrote is read as such; any other folder as what most of its bytes are: Parquet, JSONL or
    text files. Hidden files and folders are passed over.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if name == "stdlib":
        return _stdlib()
    path = Path(name).expanduser()
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"data.source must be 'stdlib' or a path, got '{name}' ({reason}); "
            f"give a folder of text files, or a .txt, .jsonl or .parquet file"
        ) from None
    path = path.resolve()
    return _folder(path) if is_folder else _single_file(path)


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    version = f"{platform.python_implementation()} {platform.python_version()}"
    files = tuple(
        file
        for file in _walk(root, STDLIB_SKIPPED_FOLDERS)[0]
        if file.name.endswith(".py") and not STDLIB_SKIPPED_FILES.match(file.name)
    )
    if not files:
        raise UserError(f"{root} holds no Python source files (a zipped library?); set data.source to a folder of text")
    return Source(f"the standard library of {version}", f"stdlib {sys.version}", "files", files)


def _single_file(path: Path) -> Source:
    kind = _kind(path.name)
    file = list_file(path, _printable(path.name))
    return Source(_printable(path.name), str(path), "paragraphs" if kind == "files" else kind, (file,))


def _folder(folder: Path) -> Source:
    saved = saved_dataset_files(folder)
    if saved is not None:
        return Source(_printable(folder.name), str(folder), "arrow", saved)
    files, skipped = _walk(folder, frozenset({"__pycache__"}))
    if not files:
        raise UserError(f"{folder} holds no files; data.source must be a folder with text in it")
    num_bytes: dict[Kind, int] = {"files": 0, "jsonl": 0, "parquet": 0}
    for file in files:
        num_bytes[_kind(file.name)] += file.size_bytes
    kind = max(num_bytes, key=lambda name: num_bytes[name])
    chosen = tuple(file for file in files if _kind(file.name) == kind or kind == "files")
    if kind != "files":
        skipped += [Skipped(file.name, f"the folder is read as {kind}") for file in files if _kind(file.name) != kind]
    elif len(chosen) == 1:
        kind = "paragraphs"
    return Source(_printable(folder.name), str(folder), kind, chosen, tuple(skipped))


def _printable(name: str) -> str:
    """Return a file name as valid Unicode: bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _kind(name: str) -> Literal["files", "jsonl", "parquet"]:
    lower = name.lower()
    return "jsonl" if lower.endswith(JSONL_SUFFIXES) else "parquet" if lower.endswith(PARQUET_SUFFIXES) else "files"


def _walk(root: Path, skipped_folders: frozenset[str]) -> tuple[list[SourceFile], list[Skipped]]:
    """Return the regular files under a folder sorted by relative path, and what could not be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename} ({error.strerror}); make the folder readable") from None

    found: list[SourceFile] = []
    skipped: list[Skipped] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in skipped_folders and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            relative = _printable(path.relative_to(root).as_posix())
            if name.startswith("."):
                continue
            try:
                file = list_file(path, relative)
                if stat.S_ISREG(path.stat().st_mode):  # a named pipe would block for ever
                    found.append(file)
                else:
                    skipped.append(Skipped(relative, "not a regular file"))
            except OSError as error:
                skipped.append(Skipped(relative, f"cannot be read ({error.strerror})"))
    return sorted(found), sorted(skipped)
