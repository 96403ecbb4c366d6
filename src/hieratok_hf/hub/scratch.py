"""Keep temporary folders of pushes, and take away those that killed processes have left."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..utils.files import fcntl

__all__ = ["scratch_folder"]

_NEW, _LOCKED = "hieratok-new-", "hieratok-push-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a temporary folder, after those that are left of pushes that were killed are gone."""
    for left in Path(tempfile.gettempdir()).glob(f"{_LOCKED}*") if fcntl else ():
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix=_NEW))
    with _locked(made):
        folder = made.rename(made.with_name(made.name.replace(_NEW, _LOCKED)))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder as long as the process lives; `OSError` where another one has, or where it is a link."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
