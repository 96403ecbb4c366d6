"""Say what comes of a command: its lines, its table, its one line of error."""

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..utils.extras import MissingExtra

__all__ = [
    "Problem",
    "align_table",
    "complain",
    "end",
    "one_line",
    "run_script",
    "show_on",
    "suit_terminal",
    "tell_failures",
]


class Problem(Exception):
    """Say in one line why a request of the user cannot be met."""


def suit_terminal() -> None:
    """Let what is printed suit any terminal, or none."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # it was closed before Python began
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115 (open as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def one_line(error: BaseException) -> str:
    """Give an error's message, or its type's name, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def align_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns, the first to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def end(lines: Sequence[str], status: int = 0) -> int:
    """
    Print lines and give the exit status: 2 after an error where they cannot be written, as on a full disk.

    Nothing is said where nobody reads, as after `script | head`.
    """
    try:
        if lines:
            print("\n".join(lines))
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # Python tries once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            complain(f"error: the standard output cannot be written: {one_line(error)}\n")
            return 2
    return status


def complain(text: str) -> None:
    """Write to the standard error, if anybody is there to be told."""
    with contextlib.suppress(OSError):  # nobody is there to be told
        sys.stderr.write(text)
        sys.stderr.flush()


def show_on(bar: Any) -> Callable[[int, int | None], None]:
    """Make a function that shows on a bar how many are done, of how many."""

    def progress(done: int, todo: int | None) -> None:
        bar.total = todo
        bar.update(done - bar.n)

    return progress


def tell_failures(failures: Mapping[str, str]) -> None:
    """Write to the standard error, a line each, which images failed, and why."""
    # Some of the reasons begin with the name.
    reasons = {f"{name!r}: ": reason for name, reason in failures.items()}
    complain("".join(f"failed: {name}{reason.removeprefix(name)}\n" for name, reason in reasons.items()))


def run_script(run: Callable[[Namespace], list[str] | tuple[list[str], int]], args: Namespace, where: str = "") -> int:
    """
    Run a script and print its lines; the exit status: 0 or that which it gives beside its lines, or 2 after a
    `Problem` or for want of an extra, which goes to stderr with `where` it was met.
    """
    try:
        made = run(args)
    except (MissingExtra, Problem) as problem:
        complain(f"error{where}: {problem}\n")
        return end([], 2)
    return end(*made) if isinstance(made, tuple) else end(made)
