"""A disk that becomes full at a moment of a test's choosing, for whatever code writes: the system itself refuses."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAKES = {"os.mkdir": 0, "os.link": 1, "os.rename": 1}
_WRITES = os.O_WRONLY | os.O_RDWR

_watched: dict[str, list[int]] = {}


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Let no file grow beyond `free` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_after(steps: int, folder: Path) -> Iterator[list[int]]:
    """
    Let no file grow any more from a step of what Python makes in a folder: files that it opens to write, folders,
    links and renames. Gives a list of the one number of steps that there were.
    """
    before, count = resource.getrlimit(resource.RLIMIT_FSIZE), [0, steps]
    _watched[str(folder)] = count
    try:
        yield count
    finally:
        del _watched[str(folder)]
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _see(event: str, args: tuple) -> None:
    if not _watched or not (event in _MAKES or (event == "open" and (args[2] or 0) & _WRITES)):
        return
    path = args[_MAKES.get(event, 0)]
    for folder, count in _watched.items():
        if not isinstance(path, int) and os.fsdecode(path).startswith(folder):
            count[0] += 1
            if count[0] == count[1]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


sys.addaudithook(_see)  # for as long as the process lives, and idle where no folder is watched
