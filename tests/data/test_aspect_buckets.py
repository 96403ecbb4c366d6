"""Tests of `aspect_buckets`: sides, areas and aspects of the shapes, and the nearest of them."""

import math

import numpy as np
import pytest

from hieratok_hf.data.aspect_buckets import aspect_buckets, group_by_aspect


@pytest.mark.parametrize(("size", "multiple"), [(256, 16), (256, 64), (128, 8), (96, 32), (64, 4), (32, 32)])
@pytest.mark.parametrize("max_aspect", [1, 1.5, 2.0, 4])
def test_shapes_have_about_the_area_of_the_square_and_no_more(size, multiple, max_aspect):
    shapes = aspect_buckets(size, multiple, max_aspect)
    assert (size, size) in shapes and len(set(shapes)) == len(shapes)
    assert shapes == sorted(shapes) and set(shapes) == {(width, height) for height, width in shapes}
    for height, width in shapes:
        assert height % multiple == width % multiple == 0 and max(height, width) <= max_aspect * min(height, width)
        # Another `multiple` on the longer side would be too much.
        assert height * width <= size**2 < (max(height, width) + multiple) * min(height, width)
    # None is left out: each shorter side that allows the aspect is there.
    shorter = {min(shape) for shape in shapes}
    for side in range(multiple, size + 1, multiple):
        assert (side in shorter) == (size**2 // side // multiple * multiple <= max_aspect * side)


def test_a_square_alone_where_no_other_is_allowed():
    assert aspect_buckets(64, 8, 1.0) == [(64, 64)]
    assert aspect_buckets(64, 16) == [(48, 80), (64, 64), (80, 48)]


def test_every_image_goes_to_the_nearest_shape():
    shapes = aspect_buckets(256, 16, 3)
    sizes = np.random.default_rng(0).integers(20, 2000, (500, 2))
    buckets = group_by_aspect(sizes, shapes)
    assert sorted(np.concatenate(list(buckets.values())).tolist()) == list(range(500))
    for shape, rows in buckets.items():
        assert (np.diff(rows) > 0).all()
        for height, width in sizes[rows]:
            distances = {x: abs(math.log(height / width) - math.log(x[0] / x[1])) for x in shapes}
            assert distances[shape] <= min(distances.values()) + 1e-8
    assert set(buckets) <= set(shapes) and len(buckets) > 10


def test_squares_go_to_the_square_and_thin_images_to_the_ends():
    shapes = aspect_buckets(64, 16)
    sizes = np.array([(7, 7), (1000, 1000), (1, 5000), (5000, 1)])
    found = {shape: rows.tolist() for shape, rows in group_by_aspect(sizes, shapes).items()}
    assert found == {(64, 64): [0, 1], (48, 80): [2], (80, 48): [3]}


@pytest.mark.parametrize(
    "values", [{"max_aspect": 0.9}, {"max_aspect": math.nan}, {"multiple": 0}, {"size": 24}, {"size": 8}, {"size": 0}]
)
def test_bad_arguments_are_refused(values):
    with pytest.raises(ValueError, match=f"`{next(iter(values))}`"):
        aspect_buckets(**{"size": 64, "multiple": 16, **values})
