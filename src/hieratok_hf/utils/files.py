"""Write files whole or not at all, and read JSON with errors that name the file."""

import errno
import json
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # on Windows, where what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

__all__ = ["name_when_full", "read_json", "remove_leftovers", "write_whole"]

_NO_WAIT, _NO_LINK = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """
    Open a file to write, which takes the place of `path` once it is whole; after an error the old one stays.

    The new file has the mode of the old one. A link at `path` stays, and the file that it leads to is replaced; a
    device or a pipe is written to, and so is a file that is this process's standard output or error, as `/dev/stdout`
    may be, behind what was printed. Of several writers at a time the last one wins.

    Raises:
        OSError: The file cannot be written, the disk is full, or nobody reads the pipe; the error names the file.
    """
    with name_when_full(path):
        stream, mode = _look_at(path)
        if stream is not None:
            with stream:
                yield stream
            return
        target = os.path.realpath(path)
        with _create_beside(Path(target), 0o666 if mode is None else mode) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if mode is not None:  # which the umask may have cut
                    os.chmod(file.name, mode)
                if fcntl is None:
                    file.close()
                os.replace(file.name, target)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)  # before its lock is gone
                raise


@contextmanager
def name_when_full(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what libraries raise where they cannot write, as on a full disk, into an `OSError` that names the file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # that of torch's writer
            raise
        if not isinstance(error, OSError) or error.errno is None:
            reason = f"The disk may be full ({' '.join(str(error).split())})"
            raise OSError(errno.EIO, reason, os.fspath(path)) from error
        if error.filename is None or str(error.filename).startswith(os.fspath(path)):
            error.filename = os.fspath(path)
        raise


def _look_at(path: str | os.PathLike[str]) -> tuple[IO[bytes] | None, int | None]:
    """Open what a path leads to if that is no file, and give the mode if it is one."""
    try:
        # The system follows links where it lets us; a pipe that nobody reads is an error instead of a wait.
        descriptor = os.open(path, os.O_WRONLY | _NO_WAIT)
    except FileNotFoundError:
        return None, None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        os.close(descriptor)
        for number, printed in ((1, sys.stdout), (2, sys.stderr)):
            with suppress(OSError):  # of one that is closed
                if os.path.samestat(os.fstat(number), os.stat(path)):
                    if printed is not None:
                        printed.flush()
                    return open(os.dup(number), "wb"), None
        return None, stat.S_IMODE(mode)
    os.set_blocking(descriptor, True)
    return open(descriptor, "wb"), None


def _create_beside(target: Path, mode: int) -> IO[bytes]:
    """Create a file under the first name that is free or a dead process has left, locked as long as it is open."""
    stem, numbers = f".hieratok-{zlib.crc32(os.fsencode(target.name)):08x}", count()
    while True:
        path = target.with_name(f"{stem}-{next(numbers)}.tmp")
        _remove_if_dead(path)
        try:
            file = open(path, "xb", opener=partial(os.open, mode=mode))  # noqa: SIM115 (the caller closes it)
        except FileExistsError:
            continue
        except OSError as error:
            error.filename = str(target)
            raise
        if _lock(file.fileno(), unknown=True) and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # somebody took it for dead before it was locked


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | _NO_WAIT | _NO_LINK)
        try:
            found = os.fstat(descriptor)
            is_dead = stat.S_ISREG(found.st_mode) and _lock(descriptor, unknown=False)
            if is_dead and os.path.samestat(found, os.lstat(path)):
                os.unlink(path)  # which nobody does without the lock, nor renames it
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had half written to a folder by `write_whole`."""
    for path in folder.glob(".hieratok-*.tmp"):
        _remove_if_dead(path)


def _lock(descriptor: int, unknown: bool) -> bool:
    """Lock an open file; `False` where another process holds the lock, `unknown` where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        return unknown
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON object in a file, `None` where there is no file; `ValueError` where it is no JSON object."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())  # which tells the encoding from the first bytes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(value).__name__}.")
    return value
