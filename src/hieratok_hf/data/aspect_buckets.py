"""Aspect buckets: rectangles of about the same area, to the nearest of which every image is cut."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..utils.numbers import real_number, whole_number

__all__ = ["Buckets", "Shape", "aspect_buckets", "buckets_of_sizes", "group_by_aspect"]

Shape = tuple[int, int]
"""A height and a width in pixels."""

Buckets = dict[Shape, np.ndarray]
"""The rows `(n,)`, int64 and rising, of the images of every shape that has any."""


def aspect_buckets(size: int, multiple: int, max_aspect: float = 2.0) -> list[Shape]:
    """
    List the rectangles whose sides are multiples of `multiple` and whose area is at most `size * size` and as near to
    it as their shorter side allows, from the lowest to the highest.

    Args:
        size (`int`): Side of the square of the largest area in pixels, itself one of the rectangles.
        multiple (`int`): What all sides are multiples of, such as a model's patch size.
        max_aspect (`float`, defaults to 2.0): Largest ratio of the longer to the shorter side.

    Raises:
        ValueError: An argument is out of its range, or `size` is no multiple of `multiple`.
    """
    size, multiple = whole_number("size", size, 1), whole_number("multiple", multiple, 1)
    max_aspect = real_number("max_aspect", max_aspect, 1)
    if size % multiple:
        raise ValueError(f"`size` must be a multiple of {multiple}, got {size}.")
    low = [(short, size**2 // short // multiple * multiple) for short in range(multiple, size, multiple)]
    low = [(short, long) for short, long in low if long <= short * max_aspect]
    return [*low, (size, size), *((long, short) for short, long in reversed(low))]


def group_by_aspect(sizes: np.ndarray, shapes: Iterable[Shape]) -> Buckets:
    """
    Give every image to the shape whose ratio of sides is nearest to its own, by their quotient.

    Args:
        sizes (`np.ndarray` of shape `(n, 2)`): Heights and widths of the images in pixels.
        shapes (iterable of `Shape`): The shapes to choose from, such as those of `aspect_buckets`.
    """
    known = sorted(shapes, key=lambda shape: shape[0] / shape[1])
    # Rounded, so that of two shapes that are as near the same is chosen everywhere.
    aspects = np.log([height / width for height, width in known])
    bounds = ((aspects[1:] + aspects[:-1]) / 2).round(9)
    nearest = np.searchsorted(bounds, np.log(sizes[:, 0] / sizes[:, 1]).round(9))
    rows = {shape: np.flatnonzero(nearest == index) for index, shape in enumerate(known)}
    return {shape: found for shape, found in rows.items() if len(found)}


def buckets_of_sizes(
    sizes: np.ndarray, crop_sizes: Sequence[int], multiple: int, max_aspect: float
) -> tuple[Buckets, ...]:
    """Group images of `sizes` `(n, 2)` by the shapes of `aspect_buckets` for each crop size, for a `BatchPlan`."""
    return tuple(group_by_aspect(sizes, aspect_buckets(size, multiple, max_aspect)) for size in crop_sizes)
