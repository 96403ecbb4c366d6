"""Tests of `training_batches`: a step sees the same images however it is divided, interrupted, loaded or streamed."""

import random
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from image_files import encoded, noise
from PIL import Image

from hieratok_hf.data.aspect_buckets import aspect_buckets, buckets_of_sizes, group_by_aspect
from hieratok_hf.data.image_dataset import Images
from hieratok_hf.data.training_batches import BatchPlan, plan_draws, random_crop, to_pixel_values, training_loader
from hieratok_hf.utils.images import ImageError, from_uint8, to_uint8

ROWS = 7
BOTH = pytest.mark.parametrize("streaming", [False, True])


def as_data(images, streaming, broken=()):
    """The images as PNG files in a data set, two shards if it is streamed."""
    contents = [b"no image" if i in broken else encoded(image) for i, image in enumerate(images)]
    files = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]
    table = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    return Images(table.to_iterable_dataset(num_shards=min(2, len(files))) if streaming else table, "here")


def data(streaming=False, broken=()):
    """Images of one colour each, so that crops tell their row: `(30 * i, 30 * i, 30 * i)` is row `i`."""
    return as_data([Image.new("RGB", (12 + i, 12), (30 * i,) * 3) for i in range(ROWS)], streaming, broken)


def noise_data(streaming=False):
    """Images of noise, so that no two crops are alike."""
    return as_data([Image.fromarray(noise(20, 14 + i, seed=i)) for i in range(ROWS)], streaming)


def rows_of(batch):
    """Which rows of `data` the images of a batch are."""
    colours = batch["pixel_values"].flatten(1)
    assert (colours == colours[:, :1]).all()
    return (colours[:, 0] // 30).tolist()


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["rows"], b["rows"])
        assert all(a[name] == b[name] for name in ("step", "part", "count", "skipped"))


@BOTH
@pytest.mark.parametrize(("world_size", "parts"), [(1, 4), (2, 2)])
def test_a_step_is_the_same_however_it_is_divided(streaming, world_size, parts):
    images, sizes = noise_data(streaming), (8, 16, 4)
    whole = list(training_loader(images, BatchPlan(16, sizes, 6, seed=3)))
    assert {batch["count"] for batch in whole} == {4, 16, 64}
    shares = [BatchPlan(16, sizes, 6, 3, world_size, rank, parts) for rank in range(world_size)]
    pieces = [list(training_loader(images, share)) for share in shares]
    for mine in pieces:
        assert [(x["step"], x["part"]) for x in mine] == [(step, part) for step in range(6) for part in range(parts)]
    for expected in whole:
        mine = [piece for piece in chain(*pieces) if piece["step"] == expected["step"]]
        count = expected["count"]
        assert {(piece["count"], len(piece["rows"])) for piece in mine} == {(count, count // (world_size * parts))}
        rows, crops = (torch.cat([piece[name] for piece in mine]) for name in ("rows", "pixel_values"))
        assert torch.equal(rows.sort().values, expected["rows"])
        assert torch.equal(crops[rows.argsort()], expected["pixel_values"])


@BOTH
@pytest.mark.parametrize("num_workers", [0, 2])
def test_from_any_step_on_it_is_the_uninterrupted_sequence(streaming, num_workers):
    images, plan = noise_data(streaming), BatchPlan(4, (8, 12, 8), 7, seed=1, parts=2)
    whole = list(training_loader(images, plan))
    assert len({batch["pixel_values"].shape[-1] for batch in whole}) == 2
    assert sum(len(batch["rows"]) for batch in whole) > 2 * ROWS  # several epochs
    for first_step in (0, 5) if num_workers else range(7):
        rest = list(training_loader(images, plan, first_step=first_step, num_workers=num_workers))
        same(rest, whole[2 * first_step :])
    assert list(training_loader(images, plan, first_step=7)) == []


@BOTH
def test_every_row_is_seen_once_an_epoch_in_another_order(streaming):
    plan = BatchPlan(3, (8,), 2 * ROWS, seed=2)
    rows = list(chain(*map(rows_of, training_loader(data(streaming), plan))))
    epochs = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    assert len(epochs) == 6 and all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 3
    other = training_loader(data(streaming), BatchPlan(3, (8,), 2 * ROWS, seed=3))
    assert list(chain(*map(rows_of, other))) != rows


@BOTH
def test_an_image_is_cropped_anew_each_time(streaming):
    images, plan = as_data([Image.fromarray(noise(20, 20))], streaming), BatchPlan(2, (8,), 20)
    crops = [x for batch in training_loader(images, plan, crop_scale=(0, 0)) for x in batch["pixel_values"]]
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 30


def test_a_step_has_about_the_same_pixels_at_every_size():
    plan = BatchPlan(8, (32, 64, 16, 48), 50, seed=0, world_size=2)
    counts = {step.shape[0]: step.total for step in plan.each_step()}
    assert counts == {32: 8, 64: 2, 16: 32, 48: 2}  # 48 pixels would allow 3.6, which two processes cannot share
    before = 0
    for number, step in enumerate(plan.each_step()):
        assert (step.number, step.before, step.shape[0]) == (number, before, step.shape[1])
        before += step.total
    assert list(plan.each_step(20)) == list(plan.each_step())[20:]


@pytest.mark.parametrize(
    "values", [{"batch_size": 6, "world_size": 2, "parts": 2}, {"batch_size": 0}, {"crop_sizes": (8, 0)}]
)
def test_a_plan_that_does_not_divide_is_refused(values):
    with pytest.raises(ValueError, match=f"`{next(iter(values))}`"):
        BatchPlan(**{"batch_size": 8, "crop_sizes": (8,), "steps": 1, **values})


@BOTH
@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_rows_are_replaced_counted_and_named(streaming, num_workers):
    broken = (1, 4, 5)
    plan = BatchPlan(7, (8,), 4, seed=0)
    batches = list(training_loader(data(streaming, broken), plan, num_workers=num_workers))
    for batch in batches:
        rows = rows_of(batch)
        assert len(rows) == 7 and set(rows) == {0, 2, 3, 6}
        # Row 4 is replaced through row 5, so that row may be met twice in an epoch.
        assert {reason.split(":")[0] for reason in batch["skipped"]} == {f"'{i}.png'" for i in broken}
        assert all("is no image" in reason for reason in batch["skipped"])
    clean = list(training_loader(data(streaming), plan))
    same(list(training_loader(data(streaming, broken), plan, first_step=2)), batches[2:])
    for ours, theirs in zip(batches, clean):
        unbroken = [(a, b) for a, b in zip(rows_of(ours), rows_of(theirs)) if b not in broken]
        assert len(unbroken) == 4 and all(a == b for a, b in unbroken)  # the others stay in their places


@BOTH
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_of_broken_rows_is_refused(streaming, num_workers):
    images = data(streaming, broken=range(ROWS))
    message = r"^here: \d+ images in a row cannot be decoded; '\d\.png': is no image.*$"
    with pytest.raises(ImageError, match=message) as caught:
        next(iter(training_loader(images, BatchPlan(2, (8,), 1), num_workers=num_workers)))
    assert "\n" not in str(caught.value)


def test_pixel_values_are_the_levels_in_minus_one_to_one():
    (batch,) = training_loader(noise_data(), BatchPlan(4, (8,), 1))
    levels, values = batch["pixel_values"], to_pixel_values(batch)
    assert levels.shape == (4, 3, 8, 8) and levels.dtype == torch.uint8
    assert values.dtype == torch.float32 and torch.equal(to_uint8(values), levels)
    assert from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def places_of(crop, image):
    """Where a crop is cut exactly from an image, mirrored or not."""
    size, found = len(crop), []
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))  # (h, w, 3, size, size)
    for mirrored, candidate in ((False, crop), (True, crop[:, ::-1])):
        same_pixels = (windows == candidate.transpose(2, 0, 1)).all((2, 3, 4))
        found += [(top, left, mirrored) for top, left in np.argwhere(same_pixels).tolist()]
    return found


def test_a_scale_of_zero_cuts_pixels_exactly_everywhere_mirrored_half_the_time():
    levels = noise(12, 10)
    image, rng, seen = Image.fromarray(levels), random.Random(0), []
    for _ in range(600):
        crop = random_crop(image, (8, 8), rng, (0, 0))
        assert crop.size == (8, 8) and crop.mode == "RGB"
        seen += places_of(np.asarray(crop), levels)
    assert len(seen) == 600
    assert {place[:2] for place in seen} == {(top, left) for top in range(5) for left in range(3)}
    assert 240 < sum(mirrored for *_, mirrored in seen) < 360


def test_crops_cover_the_share_that_is_asked_for():
    # A ramp of 2 levels a pixel: how far it rises over a crop says how wide the crop was.
    ramp = np.broadcast_to(np.arange(0, 120, dtype=np.uint8)[None, :, None] * 2, (80, 120, 3))
    image, rng = Image.fromarray(np.ascontiguousarray(ramp)), random.Random(0)
    shares, colours = [], []
    for _ in range(200):
        crop = np.asarray(random_crop(image, (16, 16), rng, (0.5, 1.0))).astype(float)
        assert crop.shape == (16, 16, 3)
        shares.append(abs(crop[8, 12, 0] - crop[8, 4, 0]) / 2 * 2 / 80)
        colours.append(crop[8, :, 0].mean() / 2)
    assert 0.45 < min(shares) < 0.55 and 0.95 < max(shares) < 1.05
    assert np.mean(shares) == pytest.approx(0.75, abs=0.03)
    assert min(colours) < 30 and max(colours) > 90


@pytest.mark.parametrize("scale", [(0, 0), (0.5, 1.0), (1.0, 1.0)])
def test_small_images_are_enlarged(scale):
    for size in ((5, 9), (9, 5), (1, 1)):
        crop = random_crop(Image.new("RGB", size, (7, 8, 9)), (16, 16), random.Random(0), scale)
        assert crop.size == (16, 16) and (np.asarray(crop) == (7, 8, 9)).all()
    whole = random_crop(Image.fromarray(noise(8, 8)), (8, 8), random.Random(0), (1.0, 1.0))
    assert len(places_of(np.asarray(whole), noise(8, 8))) == 1


CROPS = (32, 48)


@pytest.fixture(scope="module")
def mixed():
    """26 images of noise in unequal numbers of three aspects."""
    kinds = [(20, 20)] * 12 + [(16, 30)] * 8 + [(33, 17)] * 6
    order = np.random.default_rng(0).permutation(len(kinds))
    return as_data([Image.fromarray(noise(*kinds[i], seed=i)) for i in order], False)


def in_buckets(images, crops=CROPS):
    return buckets_of_sizes(images.read_sizes(), crops, 8, 2.0)


def test_a_step_is_of_one_bucket_of_about_the_same_pixels(mixed):
    buckets = in_buckets(mixed)
    assert [list(found) for found in buckets] == [[(24, 40), (32, 32), (40, 24)], [(40, 56), (48, 48), (56, 40)]]
    plan, seen = BatchPlan(8, CROPS, 60, seed=1, buckets=buckets), set()
    for batch in training_loader(mixed, plan):
        height, width = batch["pixel_values"].shape[2:]
        size = next(x for x, found in zip(CROPS, buckets) if (height, width) in found)
        seen.add((height, width))
        pixels, wanted = batch["count"] * height * width, 8 * CROPS[0] ** 2
        assert wanted * (1 - 8 / size) - size**2 < pixels <= wanted  # nearly one image less at the second size
    assert seen == set(buckets[0]) | set(buckets[1])


def test_with_buckets_every_image_is_seen_as_often(mixed):
    plan = BatchPlan(4, CROPS, 3000, seed=2, buckets=in_buckets(mixed))
    seen, first = np.zeros(len(mixed)), {}
    for (draws,) in ([draws] for draws in plan_draws(len(mixed), plan)):
        for draw in draws:
            assert draw.data_row in plan.rows_of(draw.shape)
            first.setdefault(draw.shape, []).append(draw.data_row)
            seen[draw.data_row] += 1
    assert seen.min() > 0.85 * seen.mean() and seen.max() < 1.15 * seen.mean()
    for shape, rows in first.items():  # each epoch of a bucket has all of its rows, in another order
        epochs = [rows[i : i + len(plan.rows_of(shape))] for i in range(0, len(rows), len(plan.rows_of(shape)))]
        assert all(sorted(epoch) == plan.rows_of(shape).tolist() for epoch in epochs[:-1])
        assert len(set(map(tuple, epochs))) > 3


@pytest.mark.parametrize(("world_size", "parts"), [(1, 2), (2, 1)])
def test_with_buckets_a_step_is_the_same_however_it_is_divided(mixed, world_size, parts):
    whole = list(training_loader(mixed, BatchPlan(8, (32, 64), 8, seed=3, buckets=in_buckets(mixed, (32, 64)))))
    shares = [
        BatchPlan(8, (32, 64), 8, 3, world_size, rank, parts, in_buckets(mixed, (32, 64)))
        for rank in range(world_size)
    ]
    pieces = list(chain(*(training_loader(mixed, share) for share in shares)))
    for expected in whole:
        mine = [piece for piece in pieces if piece["step"] == expected["step"]]
        rows, crops = (torch.cat([piece[name] for piece in mine]) for name in ("rows", "pixel_values"))
        assert torch.equal(rows.sort().values, expected["rows"])
        assert torch.equal(crops[rows.argsort()], expected["pixel_values"])
    assert len({batch["pixel_values"].shape[2:] for batch in whole}) > 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_with_buckets_from_any_step_on_it_is_the_uninterrupted_sequence(mixed, num_workers):
    plan = BatchPlan(4, CROPS, 12, seed=1, parts=2, buckets=in_buckets(mixed))
    whole = list(training_loader(mixed, plan))
    assert len({batch["pixel_values"].shape[2:] for batch in whole}) > 2
    for first_step in (5,) if num_workers else range(12):
        same(
            list(training_loader(mixed, plan, first_step=first_step, num_workers=num_workers)), whole[2 * first_step :]
        )


def test_squares_alone_are_cut_as_without_buckets():
    images = as_data([Image.fromarray(noise(20, 20, seed=i)) for i in range(5)], False)
    buckets = in_buckets(images, (16,))
    assert list(buckets[0]) == [(16, 16)]
    for batch in training_loader(images, BatchPlan(4, (16,), 5, buckets=buckets)):
        assert batch["pixel_values"].shape == (4, 3, 16, 16)


def test_broken_rows_are_replaced_by_others_of_their_bucket():
    images = [Image.new("RGB", (20, 20) if i < 3 else (10, 30), (30 * i,) * 3) for i in range(ROWS)]
    whole, data = as_data(images, False), as_data(images, False, broken=(1, 4, 5))
    # The sizes of files that break later.
    buckets = (group_by_aspect(whole.read_sizes(), aspect_buckets(32, 16, 4)),)
    plan = BatchPlan(7, (32,), 8, seed=0, buckets=buckets)
    for batch in training_loader(data, plan):
        is_square = batch["pixel_values"].shape[2] == batch["pixel_values"].shape[3]
        assert set(rows_of(batch)) == ({0, 2} if is_square else {3, 6})
    alone = as_data(images, False, broken=(3, 4, 5, 6))
    batch = next(x for x in training_loader(alone, plan) if x["pixel_values"].shape[2] != x["pixel_values"].shape[3])
    assert set(rows_of(batch)) <= {0, 1, 2} and len(batch["skipped"]) > 6  # all of its bucket are broken


def test_buckets_that_are_not_as_many_as_sizes_are_refused(mixed):
    with pytest.raises(ValueError, match="`buckets`"):
        BatchPlan(8, (32,), 1, buckets=in_buckets(mixed))


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (4, 16)])
def test_rectangles_are_cut_exactly_and_cover_the_image(shape):
    levels = noise(20, 24)
    image, rng = Image.fromarray(levels), random.Random(0)
    windows = np.lib.stride_tricks.sliding_window_view(levels, shape, axis=(0, 1))  # (h, w, 3, height, width)
    seen = set()
    for _ in range(800):
        crop = np.asarray(random_crop(image, shape, rng, (0, 0)))
        places = [np.argwhere((windows == x.transpose(2, 0, 1)).all((2, 3, 4))) for x in (crop, crop[:, ::-1])]
        ((place,),) = [found.tolist() for found in places if len(found)]
        seen.add(tuple(place))
    assert len(seen) > 0.9 * (21 - shape[0]) * (25 - shape[1])


def test_rectangles_are_not_distorted():
    # Levels that rise by 1 a row and 2 a column.
    ramp = np.arange(60)[:, None, None] + 2 * np.arange(80)[None, :, None] + np.zeros(3, int)
    image, rng = Image.fromarray(ramp.astype(np.uint8)), random.Random(0)
    for shape in ((16, 32), (32, 64), (16, 24)):
        for _ in range(20):
            crop = np.asarray(random_crop(image, shape, rng, (0.5, 1.0))).astype(float)
            assert crop.shape == (*shape, 3)
            down, along = crop[12, 8, 0] - crop[4, 8, 0], abs(crop[8, 12, 0] - crop[8, 4, 0])
            assert along == pytest.approx(2 * down, abs=2.5)
