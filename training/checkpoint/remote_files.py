"""Files below a URL, read and written through fsspec: in an object store, on a shared file system, in memory.

fsspec reads options and keys from the environment and from its own configuration files. None of them is in the URL, in
the configuration of a run, or in a message. This module does not import torch, so that the command line can use it.
"""

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from common.errors import CheckpointError, expect, require
from common.files import explain_os_error, fsync, open_binary
from common.text import first_line, one_line
from training.checkpoint.peers import Peers, RemoteError

PIECE = 1 << 23
"""Bytes that are read and written at once."""
BLOCK = 1 << 26
"""Bytes of a request to an object store. S3 takes at most 10,000 for a file."""
URL = re.compile(r"([A-Za-z][\w+.-]*)://(([^/]*).*)")
"""A URL; its groups are the protocol, what is behind `://`, and the part of it before the first `/`."""
NAMED_PROTOCOLS = ("abfs", "abfss", "arrow_hdfs", "az", "ftp", "hdfs", "sftp", "smb", "ssh", "webhdfs")
"""In URLs of these protocols, a user or a container can be before an `@`."""
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL|SAS|CONNECTION|ACCOUNT|AUTH", re.IGNORECASE)
"""Names of variables of the environment whose values are taken out of messages."""
MIN_SECRET = 6
"""The fewest characters of a text that is taken out of messages."""
R = TypeVar("R")
Moved: TypeAlias = Callable[[int, int], None]
"""Is called with the bytes that have been moved so far, and with all bytes that are to be moved."""


def is_url(text: str) -> bool:
    """Return whether `text` is a URL and not a path."""
    return URL.fullmatch(text) is not None


def check_url(field: str, url: str) -> None:
    """Check that `url` names a directory of a protocol whose library is installed, and has no key or password.

    Nothing is connected to.

    Args:
        field: the configuration key, for the message.

    Raises:
        ConfigError: it does not. The message has no part of the URL that can be a secret.
    """
    from fsspec.registry import get_filesystem_class

    found, shown = URL.fullmatch(url), without_secrets(re.sub("://.*@", "://***@", url))
    wanted = "a URL such as s3://bucket/directory or file:///directory"
    expect(found is not None and found[2].strip("/") != "" and url.isprintable(), field, shown, wanted)
    assert found is not None
    protocol, rest, host = found.groups()
    # A password can have a slash.
    secret = ":" in rest.rpartition("@")[0] or ("@" in host and protocol not in NAMED_PROTOCOLS)
    expect(
        not secret and not set("?#") & set(url),
        field,
        shown,
        "a URL without keys and passwords, which the environment or the configuration of fsspec gives",
    )
    expect("::" not in url and not re.search(r"\s", url), field, shown, "a single URL without spaces")
    try:
        get_filesystem_class(protocol)
    except ValueError:
        expect(False, field, shown, f"a protocol that fsspec knows, such as s3, gs, abfs or file, not {protocol}")
    except Exception as error:  # Besides ImportError, a library that does not fit another one raises many types.
        reason = one_line(str(error)) if isinstance(error, ImportError) else first_line(error)
        expect(False, field, shown, f"the library for {protocol}:// to be installed ({reason})")


def without_secrets(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a message without `secrets`, without the values of variables whose name says that they are secret, and
    without users, passwords and queries of URLs."""
    named = [value for name, value in os.environ.items() if SECRET_NAME.search(name)]
    for secret in sorted({*secrets, *named}, key=len, reverse=True):
        if len(secret) >= MIN_SECRET:
            text = text.replace(secret, "***")
    text = re.sub(r"://([^/\s@]*|[^\s@]*:[^\s@]*)@", "://***@", text)
    return re.sub(r"(://[^\s?#]*)[?#]\S+", r"\1?***", text)


class RemoteFiles:
    """Files below a directory of a URL.

    A thread calls the library. The caller waits for as long as bytes move, and `peers.timeout_s` longer.

    Args:
        url: of which `check_url` holds.
        directory: path below the URL. It can have any characters.
        peers: the ranks, which wait for as long as this rank waits for the store.
    """

    def __init__(self, url: str, directory: str, peers: Peers) -> None:
        self.url = f"{url.rstrip('/')}/{directory}"
        """The URL of the directory, for messages."""
        self._url, self._directory, self._peers = url, directory, peers

    def names(self, directory: str = "") -> dict[str, int | None]:
        """Return name -> bytes of what is in a directory, None for a directory in it. Empty if there is no such one.

        Raises:
            RemoteError: the store refused or did not answer. All methods raise it.
        """

        def work(files: "_Files", moved: Moved) -> dict[str, int | None]:
            files.system.invalidate_cache()
            try:
                found = files.system.ls(files.path(directory), detail=True)
            except FileNotFoundError:
                return {}
            return {_name(info): None if info["type"] == "directory" else info["size"] for info in found}

        return self._wait_for(directory, work)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the content of a file, or None if there is no such file.

        Raises:
            CheckpointError: it has more than `limit` bytes.
        """

        def work(files: "_Files", moved: Moved) -> bytes | None:
            content = bytearray()
            try:
                with files.open(name) as source:
                    while len(content) <= limit and (piece := source.read(min(PIECE, limit + 1))):
                        content += piece
                        moved(len(content), limit)
            except FileNotFoundError:
                return None
            require(len(content) <= limit, CheckpointError, f"{self._name(name)} has more than {limit} bytes")
            return bytes(content)

        return self._wait_for(name, work)

    def write(self, name: str, content: bytes) -> None:
        """Write a file. In an object store, and on a file system of this machine, it is replaced in one step."""

        def work(files: "_Files", moved: Moved) -> None:
            suffix = ".new" if files.is_local else ""
            with files.create(name + suffix) as target:
                target.write(content)
            if files.is_local:
                fsync(Path(files.path(name + suffix)))
                os.replace(files.path(name + suffix), files.path(name))

        self._wait_for(name, work)

    def upload(self, file: Path, name: str, sha256: str) -> None:
        """Copy the local `file` to the file `name`.

        Raises:
            CheckpointError: the content of the local file does not have this SHA-256.
        """

        def work(files: "_Files", moved: Moved) -> None:
            digest, done, size = hashlib.sha256(), 0, file.stat().st_size
            with open_binary(file) as source, files.create(name) as target:
                while piece := source.read(PIECE):
                    digest.update(piece)
                    target.write(piece)
                    done += len(piece)
                    moved(done, size)
            actual = digest.hexdigest()
            require(actual == sha256, CheckpointError, f"{file}: found sha256 {actual}, expected {sha256}")

        self._wait_for(name, work)

    def download(self, name: str, file: Path, size: int) -> None:
        """Copy the file `name` to the local `file`, and flush it. At most one byte more than `size` is copied. Nothing
        is copied if there is no such file.

        Raises:
            CheckpointError: the local file cannot be written.
        """

        def work(files: "_Files", moved: Moved) -> None:
            done = 0
            with _disk_errors(file, size):
                target = file.open("wb", buffering=0)
            with target:
                try:
                    with files.open(name) as source:
                        while done <= size and (piece := source.read(min(PIECE, size + 1 - done))):
                            with _disk_errors(file, size):
                                _write_all(target, piece)
                            done += len(piece)
                            moved(done, size)
                except FileNotFoundError:
                    file.unlink()
                with _disk_errors(file, size):
                    os.fsync(target.fileno())

        self._wait_for(name, work)

    def sha256(self, name: str) -> tuple[int, str] | None:
        """Return the number of bytes and the SHA-256 of a file, or None if there is no such file."""

        def work(files: "_Files", moved: Moved) -> tuple[int, str] | None:
            digest, done = hashlib.sha256(), 0
            try:
                with files.open(name) as source:
                    while piece := source.read(PIECE):
                        digest.update(piece)
                        done += len(piece)
                        moved(done, 0)
            except FileNotFoundError:
                return None
            return done, digest.hexdigest()

        return self._wait_for(name, work)

    def delete(self, name: str) -> None:
        """Delete a file, if there is one."""

        def work(files: "_Files", moved: Moved) -> None:
            with suppress(FileNotFoundError):
                files.system.rm_file(files.path(name))

        self._wait_for(name, work)

    def delete_directory(self, directory: str, first: str) -> None:
        """Delete the files of a directory, the one named `first` before the others."""
        for name in sorted(self.names(directory), key=lambda name: name != first):
            self.delete(f"{directory}/{name}")

        def work(files: "_Files", moved: Moved) -> None:
            with suppress(Exception):  # Object stores have no directories.
                files.system.rmdir(files.path(directory))

        self._wait_for(directory, work)

    def _name(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _wait_for(self, name: str, work: Callable[["_Files", Moved], R]) -> R:
        """Call `work` in a thread, and return its result. Tell the other ranks that this one waits.

        Args:
            name: what it reads or writes, for messages.
        """
        results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        state = {"moved_at": time.monotonic(), "done": 0, "total": 0}
        given_up = threading.Event()

        def moved(done: int, total: int) -> None:
            if given_up.is_set():
                raise TimeoutError  # Nobody waits for this thread any more.
            state.update(moved_at=time.monotonic(), done=done, total=total)

        def call() -> None:
            try:
                results.put((work(_Files(self._url, self._directory), moved), None))
            except Exception as error:
                results.put((None, error))

        shown = self._name(name)
        # The interpreter does not wait for this thread at its end: the library may never return.
        threading.Thread(target=call, name=f"store-{name}", daemon=True).start()
        while True:
            timeout_s = self._peers.timeout_s  # Another thread can shorten it meanwhile.
            try:
                result, error = results.get(timeout=min(0.5, timeout_s / 5))
                break
            except queue.Empty:
                if time.monotonic() - state["moved_at"] > timeout_s:
                    given_up.set()
                    raise RemoteError(
                        f"{shown}: no progress for {timeout_s:g} s: expected a store that answers, or a larger "
                        "checkpoint.io_timeout_s"
                    ) from None
                self._peers.progress(shown, int(state["done"]), int(state["total"]))
        if isinstance(error, CheckpointError):
            raise error
        if error is not None:
            # The cause is left out of the traceback, because its message can have a secret.
            raise RemoteError(f"{shown}: {without_secrets(first_line(error), _options(self._url))}") from None
        return result


class _Files:
    """The file system of a URL, and the path of a directory in it."""

    def __init__(self, url: str, directory: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.system, self._base = url_to_fs(url)
        self.is_local = isinstance(self.system, LocalFileSystem)
        self._root = f"{self._base.rstrip('/')}/{directory}"

    def path(self, name: str) -> str:
        """Return the path of a file or directory as the file system takes it."""
        return f"{self._root}/{name}" if name else self._root

    def open(self, name: str) -> IO[bytes]:
        """Open a file to read it."""
        return self.system.open(self.path(name), "rb", block_size=BLOCK)

    def create(self, name: str) -> IO[bytes]:
        """Open a file to write it, and make its directory where the store has directories."""
        path = self.path(name)
        try:
            return self.system.open(path, "wb", block_size=BLOCK)
        except FileNotFoundError:
            # No bucket and no mount point is made: a name that is misspelt must be an error.
            if not self.system.exists(self._base[: (self._base + "/").index("/", 1)]):
                raise
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self.system.open(path, "wb", block_size=BLOCK)


@contextmanager
def _disk_errors(file: Path, size: int) -> Iterator[None]:
    """Turn an error of the local disk into one line, so that it is not taken for one of the store."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(explain_os_error(error, file.parent, size)) from error


def _write_all(target: Any, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:  # One call can write less than it was given.
        rest = rest[target.write(rest) :]


def _name(info: dict[str, Any]) -> str:
    return str(info["name"]).rstrip("/").rpartition("/")[2]


def _options(url: str) -> Iterable[str]:
    """The texts in the options that fsspec has for the protocol of `url`."""
    from fsspec.config import conf

    rest, texts = [conf.get(url.partition("://")[0], {})], []
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, list | tuple):
            rest += value
        elif isinstance(value, str) and not is_url(value):  # An endpoint is no secret, and helps to find a mistake.
            texts.append(value)
    return texts
