"""File systems that fail as those of networks do, for tests of storages."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from landscape_ray.tracking.storage import Storage, open_storage


class Faults(fs.FileSystemHandler):
    """A folder behind a network: it may be down, slow, or cut a write off.

    Args:
        folder: what is behind it.
    """

    def __init__(self, folder: Path) -> None:
        self.inner = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self.down = False
        self.seconds = 0.0
        self.cut_after = -1
        """Writes to go until one is cut off in its middle; negative for never."""
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def _asked(self, what: str, path: str) -> None:
        with self._lock:
            self.calls.append((what, path))
        if self.down:
            raise OSError(f"no route to https://ada:s3cret@store.example.org while {what}")
        time.sleep(self.seconds)

    def get_type_name(self) -> str:
        return "faults"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def get_file_info(self, paths: list[str]) -> Any:
        self._asked("stat", str(paths))
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        self._asked("list", selector.base_dir)
        return self.inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._asked("create", path)
        self.inner.create_dir(path, recursive=recursive)

    def delete_file(self, path: str) -> None:
        self._asked("delete", path)
        self.inner.delete_file(path)

    def open_input_stream(self, path: str) -> Any:
        self._asked("read", path)
        return self.inner.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        self._asked("read", path)
        return self.inner.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._asked("write", path)
        stream = self.inner.open_output_stream(path)
        with self._lock:
            self.cut_after -= 1
            if self.cut_after == -1:
                stream.write(b"half of ")
                stream.close()
                raise OSError("connection reset by peer")
        return stream

    # not used by storages; the class asks for all of them
    def delete_dir(self, path: str) -> None:
        raise NotImplementedError

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError

    def normalize_path(self, path: str) -> str:
        return path


def faulty(folder: Path) -> tuple[Storage, Faults]:
    """Return a storage that can be made to fail, and its switch."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = Faults(folder)
    return Storage(fs.PyFileSystem(handler), "store", "faults://store"), handler


@contextlib.contextmanager
def s3() -> Iterator[Storage]:
    """Serve a bucket by the protocol of S3, or skip the test where nothing here can."""
    server = pytest.importorskip("moto.server", reason="an S3 server for tests: pip install moto[server]")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
        system, _ = fs.FileSystem.from_uri(f"s3://key:secret@bucket?{options}")
        system.create_dir(f"bucket-{port}")
        yield open_storage(f"s3://key:secret@bucket-{port}/store?{options}")
    finally:
        running.stop()
