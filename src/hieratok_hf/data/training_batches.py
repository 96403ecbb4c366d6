"""Batches of random crops for training: which step sees which crop is a function of the seed alone."""

import random
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..utils.images import ImageError, from_uint8, largest_crop
from .aspect_buckets import Buckets, Shape
from .image_dataset import Images, Row, image_of

__all__ = ["BatchPlan", "random_crop", "step_generator", "to_pixel_values", "training_loader"]

# Shape letters: B images of this process in one part of a step, H W pixels of a crop.

_TRIES = 100  # rows after a broken one, before the data counts as broken


def random_crop(image: Image.Image, shape: Shape, rng: random.Random, scale: tuple[float, float]) -> Image.Image:
    """
    Cut a random rectangle of an RGB image, mirror it half the time, and resize it bicubically to `shape`.

    Args:
        image (`PIL.Image.Image`): An image of mode RGB.
        shape (`tuple[int, int]`): Height and width of the result in pixels, whose aspect the rectangle has.
        rng (`random.Random`): The source of chance.
        scale (`tuple[float, float]`): Least and largest share of the sides of the largest such rectangle; `(0, 0)`
            cuts exactly `shape` and resizes only images that are smaller.
    """
    full = largest_crop(image, shape)
    share = min(1, shape[0] / full[0]) if scale[1] == 0 else rng.uniform(*scale)
    height, width = (max(1, round(side * share)) for side in full)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    if (height, width) != shape:
        crop = crop.resize(shape[::-1], Image.Resampling.BICUBIC)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


class Step(NamedTuple):
    """A step of a plan: its number, the shape of its images in pixels, their number, and how many came before it."""

    number: int
    shape: Shape
    total: int
    before: int
    before_in_bucket: int


@dataclass(frozen=True)
class BatchPlan:
    """
    Divide the images of every step over processes and parts, so that together they are always the same.

    A step draws one of `crop_sizes` and takes `batch_size` times the pixels of the first size, rounded to a multiple
    of processes times parts: where that rounds nothing, the images are the same however they are divided. With
    buckets it then draws one of that size, in proportion to the images in it, and as many images as of the square, so
    that every image of the data is as likely.

    Attributes:
        batch_size (`int`): Images of a step at the first crop size, of all processes together.
        crop_sizes (`tuple[int, ...]`): Sides in pixels; repeat one to draw it more often.
        steps (`int`): Steps of the whole training.
        seed (`int`): Decides sizes, order and crops.
        world_size, rank (`int`): Number of processes, and which of them this is.
        parts (`int`): Parts of a step whose gradients are accumulated.
        buckets (`tuple[Buckets, ...]`): For each crop size the rows of the data by the shape that they are cut to;
            empty for squares of all of the data.

    Raises:
        ValueError: `batch_size` is no multiple of processes times parts, a crop size is not positive, or `buckets`
            are not as many.
    """

    batch_size: int
    crop_sizes: tuple[int, ...]
    steps: int
    seed: int = 0
    world_size: int = 1
    rank: int = 0
    parts: int = 1
    buckets: tuple[Buckets, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % (self.world_size * self.parts):
            raise ValueError(
                f"`batch_size` must be a multiple of processes times accumulated parts, {self.world_size} x "
                f"{self.parts}, got {self.batch_size}."
            )
        if not self.crop_sizes or min(self.crop_sizes) < 1:
            raise ValueError(f"`crop_sizes` must be positive sides in pixels, got {self.crop_sizes}.")
        if self.buckets and len(self.buckets) != len(self.crop_sizes):
            raise ValueError(f"`buckets` must be as many as `crop_sizes`, {len(self.crop_sizes)}.")

    def rows_of(self, shape: Shape) -> np.ndarray | None:
        """Find the rows of the data that are cut to a shape, `None` for all of them."""
        return next((found[shape] for found in self.buckets if shape in found), None)

    def each_step(self, first_step: int = 0) -> Iterator[Step]:
        """Iterate over the steps from `first_step`."""
        rng, before, unit = random.Random(self.seed), 0, self.world_size * self.parts
        before_in: defaultdict[Shape, int] = defaultdict(int)
        weights = [list(map(len, found.values())) for found in self.buckets]
        for number in range(self.steps):
            chosen = rng.choice(range(len(self.crop_sizes)))
            size = self.crop_sizes[chosen]
            shape, total = (size, size), max(1, self.batch_size * self.crop_sizes[0] ** 2 // (size**2 * unit)) * unit
            if self.buckets:
                (shape,) = rng.choices(list(self.buckets[chosen]), weights[chosen])
            if number >= first_step:
                yield Step(number, shape, total, before, before_in[shape] if self.buckets else before)
            before += total
            before_in[shape] += total


def training_loader(
    images: Images,
    plan: BatchPlan,
    *,
    first_step: int = 0,
    crop_scale: tuple[float, float] = (0.5, 1.0),
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """
    Load the batches of one process, part after part, from `first_step` to the plan's last.

    An image that cannot be decoded is replaced by the next one of the data.

    Args:
        images (`Images`): The data.
        plan (`BatchPlan`): Decides what each step sees.
        first_step (`int`, defaults to 0): The step to begin with.
        crop_scale (`tuple[float, float]`, defaults to `(0.5, 1.0)`): The `scale` of `random_crop`.
        num_workers (`int`, defaults to 0): Processes that read and decode; of a stream at most one.

    Returns:
        Iterator of dictionaries: `pixel_values` `(B, 3, H, W)` uint8; `step` and `part`; `count`, the images of
        the whole step; `rows`, which of them these are; `labels` `(B,)`, -1 where there is none; `skipped`, the
        reasons of images left out.

    Raises:
        ImageError: While iterating: a hundred rows in a row cannot be decoded.
    """
    crops, pin = _Crops(images, plan, crop_scale), torch.cuda.is_available()
    if images.streaming:
        # One worker: several would each read the whole stream.
        stream = _StreamedCrops(crops, first_step)
        loader = DataLoader(stream, batch_size=None, num_workers=min(num_workers, 1), pin_memory=pin)
    else:
        draws = plan_draws(len(images), plan, first_step)
        loader = DataLoader(crops, batch_sampler=draws, num_workers=num_workers, collate_fn=_collate, pin_memory=pin)
    try:
        yield from loader
    except ImageError as error:
        # That of a worker holds the worker's traceback in its message, and in its own the loader, with workers that
        # then wait until a timeout.
        message = str(error).strip().splitlines()[-1].split("ImageError: ", 1)[-1]
        raise ImageError(message) from error.with_traceback(None)


def to_pixel_values(batch: dict[str, Any]) -> Tensor:
    """Give the images of a batch as models take them, `(B, 3, H, W)` float32 in [-1, 1]."""
    return from_uint8(batch["pixel_values"])


class Draw(NamedTuple):
    """A sample by its place in the whole training and in its step."""

    place: int
    row: int  # of the `total` samples of its step
    shape: Shape
    step: int
    part: int
    total: int
    data_row: int  # -1 in a stream


def plan_draws(length: int | None, plan: BatchPlan, first_step: int = 0) -> Iterator[list[Draw]]:
    """
    Iterate over the draws of this process, part after part; every epoch of the data, or of a bucket, has all of its
    rows in a new order.
    """
    everything = None if length is None else range(length)
    orders: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}
    for step in plan.each_step(first_step):
        bucket = step.shape if plan.buckets else ()
        rows = everything if (found := plan.rows_of(step.shape)) is None else found
        share = step.total // (plan.world_size * plan.parts)
        for part in range(plan.parts):
            start, draws = (part * plan.world_size + plan.rank) * share, []
            for row in range(start, start + share):
                data_row = -1
                if rows is not None:
                    epoch, place = divmod(step.before_in_bucket + row, len(rows))
                    if orders.get(bucket, (-1,))[0] != epoch:
                        order = np.random.default_rng((plan.seed, epoch, *bucket)).permutation(len(rows))
                        orders[bucket] = epoch, order
                    data_row = int(rows[int(orders[bucket][1][place])])
                draws.append(Draw(step.before + row, row, step.shape, step.number, part, step.total, data_row))
            yield draws


def step_generator(seed: int | str, step: int) -> torch.Generator:
    """Make a source of noise on the CPU for one step, a function of the two."""
    # torch's generator takes 32 bits of its seed.
    return torch.Generator().manual_seed(random.Random(f"{seed}:{step}").getrandbits(32))


class _Crops(Dataset):
    def __init__(self, images: Images, plan: BatchPlan, scale: tuple[float, float]):
        self.images, self.plan, self.scale = images, plan, scale

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        length, bucket = len(self.images), self.plan.rows_of(draw.shape)
        following: Iterator[int] = ((draw.data_row + offset) % length for offset in range(length))
        if bucket is not None:
            place = np.searchsorted(bucket, draw.data_row)
            own = (int(bucket[(place + offset) % len(bucket)]) for offset in range(len(bucket)))
            following = chain(own, following)
        return self.sample((self.images[row] for row in following), draw)

    def sample(self, rows: Iterator[Row], draw: Draw) -> dict[str, Any]:
        """Crop the first of `rows` that can be decoded."""
        skipped: list[str] = []
        for row in islice(rows, _TRIES):
            rng = random.Random(f"{self.plan.seed}:{draw.place}")
            try:
                crop = random_crop(image_of(row), draw.shape, rng, self.scale)
                return {"crop": np.asarray(crop), "label": row["label"], "draw": draw, "skipped": skipped}
            except ImageError as error:
                skipped.append(str(error))
        raise ImageError(f"{self.images.source}: {len(skipped)} images in a row cannot be decoded; {skipped[0]}")


class _StreamedCrops(IterableDataset):
    """Each process reads all of the stream and decodes its share."""

    def __init__(self, crops: _Crops, first_step: int):
        self.crops, self.first_step = crops, first_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        plan, start = self.crops.plan, 0
        stream = self.crops.images.shuffled(plan.seed)
        held: deque[Row] = deque()  # the rows of the stream from `start` that were read

        def rows_from(place: int) -> Iterator[Row]:
            for index in count(place - start):
                while len(held) <= index:
                    held.append(next(stream))
                yield held[index]

        for draws in plan_draws(None, plan, self.first_step):
            while start < draws[0].place - draws[0].row:
                held.popleft() if held else next(stream)
                start += 1
            yield _collate([self.crops.sample(rows_from(draw.place), draw) for draw in draws])


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    draw = samples[0]["draw"]
    return {
        "pixel_values": torch.from_numpy(np.stack([sample["crop"] for sample in samples])).permute(0, 3, 1, 2),
        "step": draw.step,
        "part": draw.part,
        "count": draw.total,
        "rows": torch.tensor([sample["draw"].row for sample in samples]),
        "labels": torch.tensor([-1 if sample["label"] is None else sample["label"] for sample in samples]),
        "skipped": [reason for sample in samples for reason in sample["skipped"]],
    }
