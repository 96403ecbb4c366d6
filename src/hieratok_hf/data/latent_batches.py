"""Batches of latents for training a generator, read from a cache or encoded on the way."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..models.autoencoder_adapter import Codec
from .image_dataset import Images
from .latent_cache import LatentCache
from .training_batches import BatchPlan, plan_draws, step_generator, to_pixel_values, training_loader

__all__ = ["iterate_cached", "iterate_encoded"]

# Shape letters: B images of this process in one part of a step, H W pixels, C latent channels, h w the latent's grid.


def iterate_cached(
    cache: LatentCache, plan: BatchPlan, first_step: int = 0, *, with_features: bool = False
) -> Iterator[dict[str, Any]]:
    """
    Read the batches of one process from a cache, mirrored half the time if it has flips, and drawn anew from moments.

    Args:
        cache (`LatentCache`): The data.
        plan (`BatchPlan`): Decides what each step sees; of a cache with buckets, one with `cache.buckets`.
        first_step (`int`, defaults to 0): The step to begin with.
        with_features (`bool`, defaults to `False`): Whether to read the cached feature maps too.

    Returns:
        Iterator of dictionaries: `latents` `(B, C, h, w)` float32; `labels` `(B,)` int64; `features`, those maps as
        `LatentCache.features` gives them, or none; `step`, `part`, `count` and `rows` as `training_loader` gives them;
        `skipped`, always empty.
    """
    for draws in plan_draws(len(cache), plan, first_step):
        step, count, rows = draws[0].step, draws[0].total, torch.tensor([draw.row for draw in draws])
        flipped = [cache.flips and random.Random(f"{plan.seed}:{draw.place}").random() < 0.5 for draw in draws]
        is_drawn = cache.settings["kind"] == "moments"
        shape = cache.latent_shapes.get(draws[0].shape, cache.latent_shape)
        noise = _posterior_noise(plan.seed, step, count, shape)[rows] if is_drawn else None
        images = [draw.data_row for draw in draws]
        latents, labels = cache.batch(images, flipped, noise)
        features = cache.features(images, flipped) if with_features else []
        facts = {"step": step, "part": draws[0].part, "count": count, "rows": rows, "skipped": []}
        yield {**facts, "latents": latents, "labels": labels, "features": features}


def iterate_encoded(
    codec: Codec,
    latent_shape: tuple[int, ...],
    images: Images,
    num_classes: int,
    plan: BatchPlan,
    first_step: int = 0,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """
    Encode random crops of images as they come, in the batches that `iterate_cached` gives of a cache.

    Args:
        codec (`Codec`): The tokenizer.
        latent_shape (`tuple[int, ...]`): The shape `(C, h, w)` of a latent of a square of the plan's first size.
        images (`Images`): The data, with labels from 0 to `num_classes - 1`.
        plan, first_step, options: What `training_loader` takes.

    Returns:
        Iterator of dictionaries like those of `iterate_cached`, without features; `skipped` holds the reasons of
        images left out.

    Raises:
        ImageError: A hundred rows in a row cannot be decoded.
        ValueError: An image has no label or one that is no class.
    """
    channels, side, _ = latent_shape
    for batch in training_loader(images, plan, first_step=first_step, **options):
        labels = batch.pop("labels")
        if wrong := [label for label in labels.tolist() if not 0 <= label < num_classes]:
            got = "none" if wrong[0] < 0 else wrong[0]
            raise ValueError(f"{images.source}: labels must be from 0 to {num_classes - 1}, one is {got}.")
        grid = [pixels * side // plan.crop_sizes[0] for pixels in batch["pixel_values"].shape[2:]]
        noise = _posterior_noise(plan.seed, batch["step"], batch["count"], (channels, *grid))[batch["rows"]]
        with torch.no_grad():
            latents = codec.normalise(codec.encode(to_pixel_values(batch), noise)).float()
        yield {**batch, "latents": latents, "labels": labels, "features": []}


def _posterior_noise(seed: int, step: int, count: int, latent_shape: tuple[int, ...]) -> Tensor:
    """Draw noise for all images of a step, other noise than that of the generator's training."""
    return torch.randn(count, *latent_shape, generator=step_generator(f"{seed}:posterior", step))
