"""Storages: any file system of pyarrow, manifests that name what is whole, and errors that say what to do."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from landscape_ray.errors import UserError
from landscape_ray.tracking.storage import (
    Manifest,
    Storage,
    Stored,
    digest_of,
    open_storage,
    reason_of,
    split_address,
)
from tests.tracking.storages import faulty, s3


def memory() -> Storage:
    return Storage(fs.FileSystem.from_uri("mock:///")[0], "store", "mock:///store")


@pytest.fixture(params=["file", "subtree", "memory", "python", pytest.param("s3", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "file":
        yield open_storage(f"file://{tmp_path}/store")
    elif request.param == "subtree":
        yield Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "store", "subtree")
    elif request.param == "memory":
        yield memory()
    elif request.param == "python":
        yield faulty(tmp_path / "behind")[0]
    else:
        with s3() as place:
            yield place


@pytest.mark.acceptance
def test_every_file_system_keeps_what_it_is_given(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    assert storage.names("") == []
    source = tmp_path / "source.bin"
    source.write_bytes(bytes(range(256)) * 50_000)  # more than one chunk
    storage.put("a/objects/x.bin", source)
    storage.put("a/objects/y", b"")
    assert storage.at("a").names("objects") == storage.names("a/objects")
    assert sorted(storage.names("a/objects")) == ["x.bin", "y"]
    assert "a" in storage.folders("")
    assert storage.names("absent") == []
    assert storage.at("absent").latest() is None
    assert storage.get("a/objects/y") == b""
    storage.fetch("a/objects/x.bin", digest_of(source), tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == source.read_bytes()
    storage.put("a/objects/y", b"again")
    assert storage.get("a/objects/y") == b"again"
    storage.delete(["a/objects/x.bin", "a/objects/x.bin", "a/objects/never"])
    assert storage.names("a/objects") == ["y"]
    with pytest.raises(FileNotFoundError):
        storage.get("a/objects/x.bin")
    for version in ((1, 9), (1, 10), (2, 1)):
        manifest = Manifest(*version, {"trial.json": digest_of(b"%d" % version[1])})
        storage.put(f"a/{manifest.name}", manifest.to_bytes())
    assert storage.at("a").versions() == [(1, 9), (1, 10), (2, 1)]
    assert storage.at("a").latest() == manifest


def test_what_is_fetched_is_whole_and_right_or_absent(tmp_path: Path) -> None:
    storage, path = memory(), tmp_path / "deep" / "file"
    storage.put("x", b"good")
    with pytest.raises(UserError, match=r"mock:///store/x is damaged: 4 bytes, of 4, whose checksum differs; restore"):
        storage.fetch("x", Stored(hashlib.sha256(b"evil").hexdigest(), 4), path)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        storage.fetch("absent", digest_of(b""), path)
    path.parent.rmdir()
    path.parent.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*; choose a place that you may write to"):
        storage.fetch("x", digest_of(b"good"), path)
    assert digest_of(b"good") == Stored(hashlib.sha256(b"good").hexdigest(), 4)


def test_an_error_of_the_network_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    storage, switch = faulty(tmp_path / "behind")
    storage.put("x", b"good")
    switch.down = True
    with pytest.raises(OSError, match="no route to") as caught:
        storage.fetch("x", digest_of(b"good"), tmp_path / "x")
    assert not isinstance(caught.value, UserError)
    assert "s3cret" not in reason_of(caught.value)
    with pytest.raises(UserError, match=r"faults://store cannot be used \(no route to https://\*\*\*@store.*; check"):
        storage.check()


def test_the_last_manifest_that_verifies_counts(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}")
    good = Manifest(1, 4, {"trial.json": digest_of(b"x")})
    storage.put(good.name, good.to_bytes())
    late = Manifest(2, 1, {"trial.json": digest_of(b"y")}).to_bytes()
    for damaged in (late[:-30], late.replace(b"trial.json", b"trial.jsoo"), b"", b"[]", b"\xff\xfe", b'{"content": 3}'):
        storage.put("manifests/000002-000001.json", damaged)
        assert storage.latest() == good
    storage.put("manifests/foreign.txt", b"")
    assert storage.versions() == [(1, 4), (2, 1)]
    storage.delete([good.name])
    with pytest.raises(UserError, match=r"file://.* is damaged \(.*\); restore it from a copy, or delete it"):
        storage.latest()


def resealed(files: object, version: int = 1) -> bytes:
    content = json.dumps({"format_version": version, "files": files})
    return json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content}).encode()


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "records/../../evil",
        "a//b",
        ".ssh/x",
        "records/.hidden",
        "a/b/c/d/e/f",
        "a\\..\\b",
        "",
    ],
)
def test_names_of_a_manifest_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="it names"):
        Manifest.from_bytes((1, 1), resealed({name: ["0" * 64, 1]}))


@pytest.mark.parametrize("entry", [["0" * 63, 1], ["../" * 20 + "0000", 1], ["0" * 64, -1], ["0" * 64], 3, [None, 1]])
def test_entries_of_a_manifest_are_checked(entry: object) -> None:
    with pytest.raises(ValueError, match=r"it names|it is no manifest|unpack"):
        Manifest.from_bytes((1, 1), resealed({"trial.json": entry}))


def test_a_manifest_of_a_newer_version_is_not_guessed_at() -> None:
    with pytest.raises(UserError, match="format version 2, this landscape_ray reads up to 1; upgrade"):
        Manifest.from_bytes((1, 1), resealed({"new": "form"}, 2))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_an_error_of_value(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"it is no manifest|its checksum"):
        Manifest.from_bytes((1, 1), content)


@settings(max_examples=40)
@given(st.data())
def test_a_manifest_comes_back_and_no_flipped_byte_does(data: st.DataObject) -> None:
    names = st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,8}(/[a-z0-9_][a-z0-9_.-]{0,8}){0,3}", fullmatch=True)
    files = data.draw(st.dictionaries(names, st.binary(max_size=9).map(digest_of), max_size=4))
    manifest = Manifest(3, 7, files)
    content = bytearray(manifest.to_bytes())
    assert Manifest.from_bytes((3, 7), bytes(content)) == manifest
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ValueError):
        assert Manifest.from_bytes((3, 7), bytes(content)) == manifest  # the same text in other letters


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("runs/store", "--storage must be an address such as s3://bucket/folder"),
        ("foo://k:s3cret@bucket/x", r"pyarrow opens, got 'foo://\*\*\*@bucket/x' \(Unrecognized filesystem type"),
        ("s3://?region=x", "must name a bucket or a folder, got 's3://'"),
        ("file:///", "must name a bucket or a folder, got 'file:///'"),
        ("file://elsewhere/x", "pyarrow opens, got 'file://elsewhere/x'"),
        ("s3://***@bucket/x", "was noted without its credentials; give it again with --storage"),
    ],
)
def test_addresses_that_are_none(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_storage(uri)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://bucket/first", ("s3://bucket", "first")),
        ("s3://bucket/a/b/first/", ("s3://bucket/a/b", "first")),
        ("s3://k:s@bucket/first?region=x&scheme=http", ("s3://k:s@bucket?region=x&scheme=http", "first")),
        ("file:///shared/first", ("file:///shared", "first")),
    ],
)
def test_the_address_of_a_sweep_is_taken_apart(uri: str, parts: tuple[str, str]) -> None:
    assert split_address(uri) == parts


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://", "s3://k:s3cret@bucket", "s3://bucket/..", "s3://bucket/a b"])
def test_an_address_without_a_sweep(uri: str) -> None:
    with pytest.raises(UserError, match=r"must be STORAGE/NAME, got .*s3://bucket/first is") as caught:
        split_address(uri)
    assert "s3cret" not in str(caught.value)


def test_a_place_that_loses_what_it_is_given_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"file://{tmp_path}")
    honest: Callable[..., bytes] = Storage.get
    monkeypatch.setattr(Storage, "get", lambda self, name: honest(self, name)[:-1])
    with pytest.raises(UserError, match="what was written is not what is read back; choose another --storage"):
        storage.check()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_arrow_is_one_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, switch = faulty(tmp_path / "behind")

    def refuse(*_: object) -> None:
        raise pa.ArrowInvalid("no such option")

    monkeypatch.setattr(switch, "open_input_stream", refuse)
    with pytest.raises(OSError, match="no such option"):
        storage.get("x")
