"""Check and write the files of a command, with a line of error that names the option; nothing here imports torch."""

import contextlib
import glob
import json
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..utils.files import write_whole
from .terminal import Problem, one_line

__all__ = ["as_written", "check_writable", "identify", "lies_in", "write_or_explain", "write_report"]


def check_writable(
    option: str, path: Path, folder: bool = False, *, overwrite: bool = True, inputs: Collection[Any] = ()
) -> None:
    """
    Make the folder that an output goes to, and fail before the work where the output could not be written: raise a
    `Problem` where no file can be made in the folder, or there is something where the file should be that must not be
    replaced, as none of `inputs`, which `identify` gives, must ever be.
    """
    where = f"{option} {str(path)!r}"
    try:
        parent = path if folder else path.parent
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
        is_there = path.exists() or path.is_symlink()  # OSError of a name that is too long
    except (OSError, ValueError) as error:  # ValueError of a zero byte
        raise Problem(f"{where} cannot be written: {one_line(error)}") from error
    if folder or not is_there:
        return
    if not path.is_file():
        raise Problem(f"{where} cannot be written: it is a {'folder' if path.is_dir() else 'link or a device'}")
    if identify([path]) & set(inputs):
        raise Problem(f"{where} cannot be written: it is an input")
    if not overwrite:
        raise Problem(f"{where} is there already: add --overwrite, or take another name")


def identify(sources: Iterable[str | Path]) -> set[tuple[int, int]]:
    """Identify the files among paths and patterns, whatever name leads to them."""
    found = set()
    for path in (path for source in sources for path in [source, *glob.glob(str(source))]):
        with contextlib.suppress(OSError, ValueError):  # what else is wrong with an input is told where it is read
            facts = os.stat(path)
            found.add((facts.st_dev, facts.st_ino))
    return found


def lies_in(path: Path, folder: Path) -> bool:
    """Tell whether a path is a folder or lies in it, wherever links lead."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def write_or_explain(option: str, path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; a `Problem` where it cannot be written."""
    try:
        with write_whole(path) as file:
            file.write(content)
    except OSError as error:
        raise Problem(f"{option} {str(path)!r} cannot be written: {one_line(error)}") from error


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the file of `--json` by `write_or_explain`, as `as_written` makes it."""
    write_or_explain("--json", path, f"{json.dumps(as_written(report), indent=2)}\n".encode())


def as_written(report: dict[str, Any]) -> dict[str, Any]:
    """Give a report as JSON holds it; what is infinite or no number becomes null."""
    return json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
