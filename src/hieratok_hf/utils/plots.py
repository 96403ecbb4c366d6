"""Draw plots as PNG files."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

__all__ = ["draw"]


@contextmanager
def draw(
    target: str | os.PathLike[str] | BinaryIO,
    columns: int = 1,
    width_ratios: Sequence[float] | None = None,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """
    Give a figure of matplotlib and its axes side by side, and write it as a PNG file at the end.

    Args:
        target (`str`, `os.PathLike` or binary file): Where the file goes.
        columns (`int`, defaults to 1): Number of axes.
        width_ratios (`Sequence[float]`, *optional*): How wide the axes are, beside each other; alike unless given.
        options: Further arguments of `matplotlib.figure.Figure`, such as `figsize` in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    yield figure, figure.subplots(1, columns, squeeze=False, width_ratios=width_ratios)[0]
    figure.savefig(target, dpi=110, format="png")
