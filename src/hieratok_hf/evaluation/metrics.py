"""Measure how close images are, on 8 bits as files: PSNR, SSIM (Wang et al., 2004); and seams."""

from typing import Any

import torch
from torch import Tensor

from ..models.core import PIXEL_LIMIT
from ..models.losses import steps_at_borders
from ..utils.extras import missing_extra
from ..utils.images import to_uint8
from ..utils.numbers import whole_number

__all__ = ["SSIM_WINDOW", "border_steps", "psnr", "ssim", "to_levels"]

# Shape letters: B batch, H W pixels.

SSIM_WINDOW = 11
"""Side of the window of `ssim`; smaller images have none."""


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """
    Compute the peak signal-to-noise ratio of each image, over all its pixels and colours.

    Args:
        images, targets (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; values beyond are clamped, and
            both are rounded to 8 bits.

    Returns:
        `torch.Tensor` of shape `(B,)`: Decibels in float32, `inf` for images that are equal.

    Raises:
        ValueError: Rank, channels, size, dtype or values are not those above; the message names the argument.
    """
    levels, target_levels = _paired_levels(images, targets)
    return 10 * torch.log10(255**2 / (levels - target_levels).square().mean(dim=(1, 2, 3)))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """
    Compute the structural similarity of each image by torchmetrics: a Gaussian window of 11x11 with a standard
    deviation of 1.5 on each colour, averaged over the whole image with edges reflected.

    Args:
        images, targets (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1] with sides of at least
            `SSIM_WINDOW` pixels; clamped and rounded as by `psnr`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Float32, 1 for images that are equal.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: As `psnr`, or a side is smaller than the window.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise missing_extra("`ssim`", "torchmetrics") from error
    levels, target_levels = _paired_levels(images, targets)
    if min(size := tuple(levels.shape[2:])) < SSIM_WINDOW:
        raise ValueError(f"`images` must be at least {SSIM_WINDOW} pixels high and wide, got {size}.")
    # torchmetrics holds more than ten times what it is given, so it gets one image at a time.
    values: list[Any] = [
        structural_similarity_index_measure(*pair, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=255.0)
        for pair in zip(levels.split(1), target_levels.split(1))
    ]
    return torch.stack(values)


def border_steps(images: Tensor, patch_size: int) -> Tensor:
    """
    Measure how much neighbouring pixels differ across the borders of patches and inside of them; the ratio is about 1
    for photographs, and more where a decoder leaves seams.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1] of at least two patches on a side; clamped
            and rounded as by `psnr`.
        patch_size (`int`): Pixels from border to border, at least 2.

    Returns:
        `torch.Tensor` of shape `(B, 2)`: The mean absolute difference, in levels of 8 bits, across borders and inside.

    Raises:
        ValueError: As `psnr`, or there is no border or nothing between borders.
    """
    levels = to_levels("images", images)
    return steps_at_borders(levels, whole_number("patch_size", patch_size, 2, min(levels.shape[2:]) - 1))


def _paired_levels(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both images to levels; they must have one shape."""
    levels, target_levels = to_levels("images", images), to_levels("targets", targets)
    if (one := tuple(images.shape)) != (other := tuple(targets.shape)):
        raise ValueError(f"`images` and `targets` must have the same shape, got {one} and {other}.")
    return levels, target_levels


def to_levels(name: str, images: Tensor) -> Tensor:
    """
    Round images to whole numbers in 0 ... 255, after a check.

    Args:
        name (`str`): Name of the argument in messages.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1], as those of `psnr`.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: Levels in float32, without a gradient.

    Raises:
        ValueError: Rank, channels, size, dtype or values are not those above.
    """
    if not isinstance(images, Tensor) or images.layout != torch.strided:
        raise ValueError(f"`{name}` must be a dense torch.Tensor, got {getattr(images, 'layout', type(images))}.")
    if not images.is_floating_point():
        raise ValueError(f"`{name}` must be of floating point and lie in [-1, 1], got {images.dtype}.")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"`{name}` must have shape (B, 3, H, W) and not be empty, got {tuple(images.shape)}.")
    if not (largest := images.detach().abs().max().item()) <= PIXEL_LIMIT:  # phrased so that NaN fails
        raise ValueError(f"`{name}` must be finite and lie in [-1, 1], got a value of magnitude {largest:g}.")
    return to_uint8(images.detach()).float()
