"""Durable and atomic file operations."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import RunError, UserError, require

PIECE = 1 << 22
"""Bytes of a file that are read at once."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""The errors of a disk that is full, read-only or broken, and of a used-up quota or limit of a file's size."""
KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"),
)


class UnusableFile(OSError, UserError):
    """A file is not a regular file, or is too large to be read. An `OSError`, so that code which explains those of a
    file explains this one, too."""

    def __init__(self, message: str) -> None:
        OSError.__init__(self, errno.EINVAL, message)
        self.field = None

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor. This never waits, as opening a named pipe would.

    Args:
        flags: as of `os.open`.

    Raises:
        UnusableFile: the file is not a regular file. The message names it.
        OSError: the file cannot be opened.
    """
    try:
        _expect_regular(path, os.stat(path, follow_symlinks=not flags & os.O_NOFOLLOW).st_mode)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    try:
        _expect_regular(path, os.fstat(descriptor).st_mode)  # It may have been replaced before it was opened.
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_binary(path: Path) -> IO[bytes]:
    """Open a regular file to read its bytes. Everything that the user or a stranger names is opened by this function.

    Raises:
        UnusableFile: the file is not a regular file.
        OSError: the file cannot be opened.
    """
    return os.fdopen(open_regular(path), "rb")


def read_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        UnusableFile: the file is not a regular file, or is larger.
        OSError: the file cannot be read.
    """
    with open_binary(path) as file:
        content = file.read(limit + 1)
    require(len(content) <= limit, UnusableFile, f"{path} has more than {limit} bytes")
    return content


def _expect_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "a device")
        raise UnusableFile(f"{path} is {kind}, not a regular file")


def fsync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_os_error(error: OSError, directory: Path, needed: int | None = None) -> str:
    """Return a one-line message for a file operation that failed.

    Args:
        directory: where the file is, if the error does not name it.
        needed: number of bytes that the operation had to write. A message about a full disk gives it, and the number of
            bytes that are free.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or directory}: {error.strerror or error}"
    place = Path(error.filename).parent if isinstance(error.filename, str) else directory
    needs = "" if needed is None else f"{needed} bytes are needed, "
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    return f"{place}: {error.strerror}: {needs}{shutil.disk_usage(existing).free} bytes are free"


@contextmanager
def disk_errors(directory: Path, warn: Callable[[str], None] | None = None) -> Iterator[None]:
    """A context manager that turns an error of the disk (full, read-only, a quota) into one line.

    Args:
        directory: where files are written.
        warn: receives the line. None: it is raised.

    Raises:
        RunError: the disk refused to write, and there is no `warn`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        line = explain_os_error(error, directory)
        if warn is None:
            raise RunError(line) from error
        warn(line)


def sha256_of(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits.

    Args:
        progress: called with the number of bytes that have been read, after each piece.

    Raises:
        OSError: the file cannot be read.
    """
    digest, done, piece = hashlib.sha256(), 0, bytearray(PIECE)
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(memoryview(piece)[:size])
            done += size
            progress(done)
    return digest.hexdigest()


def append_line(path: Path, line: str) -> None:
    """Append a line to a regular file in one write, and create the file if it is missing.

    It begins a new line also if the last one is incomplete, because a process was killed while it wrote.

    Raises:
        UnusableFile: the file is not a regular file.
        OSError: the line cannot be written.
    """
    descriptor = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" * torn + line.encode(errors="backslashreplace") + b"\n")
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Replace the file `path` by `content` in one step: a reader, or a process killed meanwhile, leaves the old file or
    the new one, and never a part. Returns `path`.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def atomic_file(path: Path, *, flush: bool = True) -> Iterator[IO[bytes]]:
    """A context manager that gives a file to write, which replaces the file `path` at the end, as `write_atomically`
    does. After an exception, `path` is as it was, and nothing else is left over.

    Args:
        flush: flush the content to the disk before. Otherwise a power cut can leave a part of it.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # also Ctrl-C
        partial.unlink(missing_ok=True)
        raise
