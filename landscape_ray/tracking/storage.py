"""A place for sweeps that every machine reaches: whatever file system pyarrow opens, an object store above all.

Below the address of the storage a sweep is a tree of units: the sweep itself, and each of its trials.

    <URI>/<sweep>/manifests/000002-000017.json                   what the driver keeps: spec, sweep.json, journal ...
    <URI>/<sweep>/objects/<sha256>.toml ...
    <URI>/<sweep>/trials/<trial_id>/manifests/000001-000042.json
    <URI>/<sweep>/trials/<trial_id>/objects/<sha256>.parquet, <sha256>.pt, <sha256>.json

An object is named after its content and never changes. A manifest names the files of a unit at one moment, by size and
SHA-256; it is written when all of its objects are there, under a name of its own, and what it replaces goes afterwards.
So nothing that is asked of the file system needs to be atomic, no rename, no overwriting, no lock: a write that was cut
off is a manifest that does not verify, or an object that no manifest names. Readers take the last manifest that
verifies, and check what they fetch.

The first number of a manifest's name is its generation: whoever takes a unit over, a driver on another machine or a
trial on another node, counts it up. A process that was cut off and finds a later generation than its own stops writing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pyarrow import fs

from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic_with
from landscape_ray.tracking.uris import MASK, mask_secrets

FORMAT_VERSION: Final = 1
ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""How the address of a storage begins, and no name of a sweep or path does."""
CHUNK_BYTES: Final = 8 * 2**20
ATTEMPTS: Final = 3
"""To read what is being replaced meanwhile."""

_STEP = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_RELATIVE = re.compile(rf"{_STEP}(/{_STEP}){{0,4}}")
_MANIFEST = re.compile(r"(\d{6,})-(\d{6,})\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_address(text: str) -> bool:
    """Return whether a text is the address of something in a storage, and not a name or a path.

    >>> is_address("s3://bucket/first"), is_address("runs/first")
    (True, False)
    """
    return ADDRESS.match(text) is not None


def is_plain(relative: str) -> bool:
    """Return whether a path may be in a manifest: it leads into its folder and nowhere else.

    >>> is_plain("records/part-000000.parquet"), is_plain("../evil"), is_plain("a/.hidden")
    (True, False, False)
    """
    return _RELATIVE.fullmatch(relative) is not None


@dataclasses.dataclass(frozen=True)
class Stored:
    """One file of a unit."""

    sha256: str
    size_bytes: int

    def object_name(self, relative: str) -> str:
        """Return the name of its object, which ends like the file.

        >>> Stored("ab" * 32, 3).object_name("records/part-000000.parquet")[-12:]
        'abab.parquet'
        """
        return f"objects/{self.sha256}{Path(relative).suffix}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a unit at one moment, by their path in its folder."""

    generation: int
    serial: int
    files: dict[str, Stored]

    @property
    def version(self) -> tuple[int, int]:
        """What orders the manifests of a unit."""
        return self.generation, self.serial

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"manifests/{self.generation:06d}-{self.serial:06d}.json"

    def objects(self) -> set[str]:
        """Return the names of its objects."""
        return {stored.object_name(relative) for relative, stored in self.files.items()}

    def to_bytes(self) -> bytes:
        """Return the content of its file, with a checksum of its own."""
        files = {relative: [stored.sha256, stored.size_bytes] for relative, stored in self.files.items()}
        content = json.dumps({"format_version": FORMAT_VERSION, "files": files}, sort_keys=True)
        return json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content}).encode()

    @classmethod
    def from_bytes(cls, version: tuple[int, int], content: bytes) -> Manifest:
        """Return the manifest that `to_bytes` wrote.

        Raises:
            ValueError: cut off, changed, or naming a file outside of its folder.
            UserError: written by a newer version.
        """
        try:
            outer = json.loads(content)
            text = outer["content"]
            if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
                raise ValueError("its checksum differs")
            inner = json.loads(text)
            written = int(inner["format_version"])
            files = {}
            for relative, (digest, size) in inner["files"].items() if written <= FORMAT_VERSION else ():
                if not is_plain(relative) or not _DIGEST.fullmatch(digest) or int(size) < 0:
                    raise ValueError(f"it names {relative!r}")
                files[relative] = Stored(digest, int(size))
        except (KeyError, TypeError, AttributeError, UnicodeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"it is no manifest ({error})") from None
        if written > FORMAT_VERSION:
            raise UserError(
                f"a manifest has format version {written}, this landscape_ray reads up to {FORMAT_VERSION}; "
                "upgrade landscape_ray"
            )
        return cls(*version, files)


class Storage:
    """A folder of a pyarrow file system.

    Args:
        system: the file system.
        root: path of the folder in it.
        shown: its address for people, without secrets.
    """

    def __init__(self, system: Any, root: str, shown: str) -> None:
        self._system, self._root, self.shown = system, root.rstrip("/"), shown

    def __repr__(self) -> str:
        return f"Storage({self.shown!r})"

    def at(self, name: str) -> Storage:
        """Return a folder below this one."""
        return Storage(self._system, f"{self._root}/{name}", f"{self.shown.rstrip('/')}/{name}")

    def put(self, name: str, content: bytes | Path) -> None:
        """Write a file, from memory or from another one.

        Raises:
            OSError: of the file system.
        """
        path = f"{self._root}/{name}"
        try:
            self._write(path, content)
        except FileNotFoundError:  # object stores have no folders to make, and mark those that are made
            if isinstance(content, Path) and not content.exists():
                raise
            self._system.create_dir(path.rpartition("/")[0], recursive=True)
            self._write(path, content)

    def _write(self, path: str, content: bytes | Path) -> None:
        with _as_os_error(), self._system.open_output_stream(path) as stream:
            if isinstance(content, bytes):
                stream.write(content)
                return
            with open(content, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    stream.write(chunk)

    def get(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            OSError: of the file system; FileNotFoundError for no such file.
        """
        with _as_os_error(), self._system.open_input_stream(f"{self._root}/{name}") as stream:
            return bytes(stream.readall())

    def fetch(self, name: str, stored: Stored, path: Path) -> None:
        """Bring a file to this machine: whole and right, or not at all.

        Raises:
            OSError: of the file system.
            UserError: what came is not what was stored, or cannot be written here.
        """

        def copy(file: Any) -> None:
            digest, size = hashlib.sha256(), 0
            for chunk in self._chunks(name):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            if (digest.hexdigest(), size) != (stored.sha256, stored.size_bytes):
                raise UserError(
                    f"{self.shown}/{name} is damaged: {size} bytes, of {stored.size_bytes}, whose checksum differs; "
                    "restore it from a copy"
                )

        try:
            write_atomic_with(path, copy)
        except _UnreachableError as error:
            raise error.cause from None

    def _chunks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file; its errors are not those of the disk that it is written to."""
        try:
            with _as_os_error(), self._system.open_input_stream(f"{self._root}/{name}") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise _UnreachableError(error) from None

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder; none where there is no such folder.

        Raises:
            OSError: of the file system.
        """
        return [info.base_name for info in self._infos(folder) if info.type == fs.FileType.File]

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder; none where there is no such folder.

        Raises:
            OSError: of the file system.
        """
        return [info.base_name for info in self._infos(folder) if info.type == fs.FileType.Directory]

    def _infos(self, folder: str) -> Any:
        with _as_os_error():
            path = f"{self._root}/{folder}".rstrip("/")
            return self._system.get_file_info(fs.FileSelector(path, allow_not_found=True))

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that are gone already don't matter.

        Raises:
            OSError: of the file system.
        """
        for name in names:
            try:
                with _as_os_error():
                    self._system.delete_file(f"{self._root}/{name}")
            except FileNotFoundError:
                continue

    # --- units ----------------------------------------------------------------------------------------------------

    def versions(self) -> list[tuple[int, int]]:
        """Return the versions of the manifests of this unit, in order; damaged ones included.

        Raises:
            OSError: of the file system.
        """
        found = (_MANIFEST.fullmatch(name) for name in self.names("manifests"))
        return sorted((int(match[1]), int(match[2])) for match in found if match is not None)

    def manifests(self) -> Iterator[Manifest]:
        """Yield the manifests of this unit that verify, the last one first; none for a unit that is not there.

        Raises:
            OSError: of the file system.
            UserError: there are manifests, and none can be read.
        """
        reason, found = "", False
        for _ in range(ATTEMPTS):  # all that were listed may be replaced before they are read
            versions = self.versions()
            for version in reversed(versions):
                try:
                    manifest = Manifest.from_bytes(version, self.get(Manifest(*version, {}).name))
                except FileNotFoundError as error:
                    reason = str(error)
                except ValueError as error:
                    if isinstance(error, UserError):
                        raise
                    reason = str(error)
                else:
                    found = True
                    yield manifest
            if found or not versions:
                return
        raise UserError(f"{self.shown} is damaged ({reason}); restore it from a copy, or delete it")

    def latest(self) -> Manifest | None:
        """Return the last manifest of this unit that verifies, None for a unit that is not there.

        Raises:
            OSError: of the file system.
            UserError: there are manifests, and none can be read.
        """
        return next(self.manifests(), None)

    def check(self) -> None:
        """Raise unless files can be written, listed, read and deleted here. For the start of a sweep.

        Raises:
            UserError: says what cannot be done, and what to do.
        """
        name, content = f".probe-{uuid.uuid4().hex[:12]}", uuid.uuid4().bytes
        begun = f"the storage {self.shown} cannot be used"
        try:
            self.put(name, content)
            try:
                if self.get(name) != content or name not in self.names(""):
                    raise UserError(f"{begun}: what was written is not what is read back; choose another --storage")
            finally:
                self.delete([name])
        except OSError as error:
            remedy = "check the address, the credentials and the network"
            raise UserError(f"{begun} ({reason_of(error)}); {remedy}") from None


def open_storage(uri: str) -> Storage:
    """Return the storage at an address; nothing is asked of it yet.

    Args:
        uri: such as `s3://bucket/folder`, `gs://...`, `abfs://...`, `hdfs://...` or `file:///folder`, with the options
            of `pyarrow.fs.FileSystem.from_uri`. Credentials are better left to the environment.

    Raises:
        UserError: not an address, or one of a kind that pyarrow does not know.
    """
    shown = mask_secrets(uri).partition("?")[0]
    if not is_address(uri):
        raise UserError(f"--storage must be an address such as s3://bucket/folder or file:///folder, got '{shown}'")
    if MASK in uri:
        raise UserError(f"the storage {shown} was noted without its credentials; give it again with --storage")
    try:
        system, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise UserError(
            f"--storage must be an address that pyarrow opens, got '{shown}' ({reason_of(error)}); "
            "s3://, gs://, abfs://, hdfs:// and file:// are"
        ) from None
    if not root.strip("/"):
        raise UserError(f"--storage must name a bucket or a folder, got '{shown}'; s3://bucket/folder does")
    return Storage(system, root, shown)


def split_address(uri: str) -> tuple[str, str]:
    """Return the address of the storage and the name of the sweep in it.

    >>> split_address("s3://bucket/runs/first?region=eu-central-1")
    ('s3://bucket/runs?region=eu-central-1', 'first')

    Raises:
        UserError: there is no name.
    """
    place, mark, options = uri.partition("?")
    parent, _, name = place.rstrip("/").rpartition("/")
    if not re.match(ADDRESS.pattern + ".", parent) or not re.fullmatch(_STEP, name):
        raise UserError(f"a sweep in a storage must be STORAGE/NAME, got '{mask_secrets(place)}'; s3://bucket/first is")
    return f"{parent}{mark}{options}", name


def digest_of(content: bytes | Path) -> Stored:
    """Return what a manifest says of a content.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(content, bytes):
        return Stored(hashlib.sha256(content).hexdigest(), len(content))
    with open(content, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Stored(digest, file.tell())


def reason_of(error: BaseException) -> str:
    """Return an error of a file system in one short line without secrets."""
    lines = [line.strip() for line in mask_secrets(str(error)).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:240]


class _UnreachableError(Exception):
    """Carries an error of the storage through a writer, which takes every OSError for one of the local disk."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _as_os_error:  # noqa: N801  # a context manager that is used like a function
    """Turn errors of Arrow that are not OSError (a file system in Python, an unsupported call) into OSError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, pa.ArrowException) and not isinstance(error, OSError):
            raise OSError(str(error)) from error
