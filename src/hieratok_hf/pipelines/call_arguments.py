"""Take what a pipeline's call is given, and what its callback returns, or say what is wrong with it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..utils.images import centre_crop, convert_to_rgb, from_uint8
from ..utils.numbers import real_number

__all__ = ["describe", "evaluating", "take_falling", "take_generators", "take_images", "take_interval", "take_latents"]


def take_interval(guidance_interval: Any) -> tuple[float, float]:
    """Convert two rising shares of noise, or raise `ValueError`."""
    given = guidance_interval if _is_list(guidance_interval) else ()
    shares = [real_number("guidance_interval", share, 0, 1) for share in given]
    if len(shares) != 2 or shares[0] > shares[1]:
        raise ValueError(f"`guidance_interval` must be two rising shares from 0 to 1, got {guidance_interval!r}.")
    return shares[0], shares[1]


def take_falling(name: str, values: Any, most: float) -> list[float] | None:
    """Convert the times or the noise of steps, which must fall, or raise `ValueError` with the argument's name."""
    if values is None:
        return None
    if not _is_list(values) or not len(values):
        raise ValueError(f"`{name}` must be a list of numbers, got {values!r}.")
    numbers = [real_number(name, value, 0, most) for value in values]
    if any(following >= number for number, following in pairwise(numbers)):
        raise ValueError(f"`{name}` must fall from step to step, got {values!r}.")
    return numbers


def take_generators(generator: Any, batch_size: int) -> Any:
    """Give a scheduler one generator, or a list of one for each image; `ValueError` for anything else."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, int):
        made = f"torch.Generator().manual_seed({int(generator)})"
        raise ValueError(f"`generator` must be a torch.Generator, such as `{made}`, got {generator!r}.")
    generators = list(generator) if _is_list(generator) else []
    if len(generators) != batch_size or not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError(
            f"`generator` must be a torch.Generator, or one for each of {batch_size} images, "
            f"got {f'{len(generators)} of them' if generators else repr(generator)}."
        )
    return generators


def take_latents(returned: Any, latents: Tensor) -> Tensor:
    """
    Take the latents that a callback returns, and those of the step where it returns none.

    Args:
        returned (`dict` or `None`): What the callback returned.
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents of the step.

    Raises:
        ValueError: `returned` is no dictionary, or its latents are of another shape.
    """
    if returned is None:
        return latents
    changed = returned.get("latents", latents) if isinstance(returned, Mapping) else None
    if not isinstance(changed, Tensor) or changed.shape != latents.shape:
        raise ValueError(
            "`callback_on_step_end` must return a dictionary, whose 'latents', if any, are of shape "
            f"{tuple(latents.shape)}, got {getattr(changed, 'shape', returned)!r}."
        )
    return changed.to(latents)


def take_images(image: Any, count: int, shape: tuple[int, int]) -> Tensor:
    """
    Convert images of any kind to `(1, 3, H, W)` or `(count, 3, H, W)` in float32 and [-1, 1].

    Args:
        image (`PIL.Image.Image`, `numpy.ndarray`, `torch.Tensor` or a list of them): One image, or `count`. Of a
            `PIL.Image.Image` the middle is cut and resized to `shape`. An array `(H, W, 3)` or `(B, H, W, 3)` and a
            tensor `(3, H, W)` or `(B, 3, H, W)` have that size, and are in [0, 1] or 8-bit levels in uint8.
        count (`int`): Number of images where they are more than one.
        shape (`tuple[int, int]`): Height and width in pixels.

    Raises:
        ValueError: `image` is none of these.
    """
    parts = []
    for given in image if isinstance(image, list | tuple) else [image]:
        pixels = given
        if isinstance(given, Image.Image):
            pixels = np.asarray(centre_crop(convert_to_rgb(given), shape))
        is_array = isinstance(pixels, np.ndarray) and pixels.ndim in (3, 4)
        if is_array and (pixels.dtype == np.uint8 or pixels.dtype.kind == "f"):
            pixels = pixels.astype(np.uint8 if pixels.dtype == np.uint8 else np.float32)
            pixels = torch.from_numpy(np.moveaxis(pixels, -1, -3))
        is_usable = isinstance(pixels, Tensor) and pixels.layout == torch.strided and not pixels.is_meta
        is_usable = is_usable and (pixels.dtype == torch.uint8 or pixels.is_floating_point())
        if not is_usable or pixels.ndim not in (3, 4) or pixels.shape[-3:] != (3, *shape):
            height, width = shape
            forms = f"an image of PIL, an array ({height}, {width}, 3) or a tensor (3, {height}, {width})"
            kinds = "in uint8 or of floating point in [0, 1]"
            raise ValueError(f"`image` must be {forms}, or several, {kinds}, got {describe(given)}.")
        if pixels.dtype == torch.uint8:
            pixels = from_uint8(pixels)
        elif bool(((pixels >= 0) & (pixels <= 1)).all()):
            pixels = 2 * pixels.float() - 1
        else:
            values = f"values from {float(pixels.min()):g} to {float(pixels.max()):g}"
            raise ValueError(f"`image` must be of uint8 or lie in [0, 1], got {describe(given)} with {values}.")
        parts.append(pixels.cpu() if pixels.ndim == 4 else pixels.cpu()[None])
    if (number := sum(map(len, parts))) not in (1, count):
        raise ValueError(f"`image` must be one image or one for each of {count} labels, got {number}.")
    return torch.cat(parts)


def describe(value: Any) -> str:
    """Describe a value for a message: arrays and tensors by shape and dtype, others by their type."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype} on {value.device}"
    return f"{value.shape} of {value.dtype}" if isinstance(value, np.ndarray) else str(type(value))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, as in the midst of its training, when a DiT drops labels; restore its mode."""
    modes = {module: module.training for module in model.modules()} if model.training else {}
    try:
        if modes:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_list(value: Any) -> bool:
    """Tell sequences, and arrays and tensors of one dimension, from numbers and texts."""
    return (
        isinstance(value, Sequence | np.ndarray | Tensor)
        and not isinstance(value, str | bytes)
        and len(getattr(value, "shape", (0,))) == 1
    )
