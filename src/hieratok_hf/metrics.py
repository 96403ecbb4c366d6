"""How close pictures are to others, measured on 8 bits as on files: PSNR, and SSIM (Wang et al., 2004)."""

from typing import Any

import torch
from torch import Tensor

from .tokenizer import PIXEL_LIMIT

__all__ = ["SSIM_WINDOW", "psnr", "ssim"]

# Shape letters: B batch, H W pixels.

SSIM_WINDOW = 11
"""Side of the window of `ssim`; smaller pictures have none."""


def psnr(pictures: Tensor, targets: Tensor) -> Tensor:
    """
    Peak signal-to-noise ratio of each picture, over all its pixels and colours.

    Args:
        pictures, targets (`torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1]; values beyond are clamped, and
            both are rounded to 8 bits.

    Returns:
        `torch.Tensor` of shape `(B,)`: Decibels in float32, `inf` for pictures that are equal.

    Raises:
        ValueError: Rank, channels, size, dtype or values are not those above; the message names the argument.
    """
    levels, target_levels = _levels(pictures, targets)
    return 10 * torch.log10(255**2 / (levels - target_levels).square().mean(dim=(1, 2, 3)))


def ssim(pictures: Tensor, targets: Tensor) -> Tensor:
    """
    Structural similarity of each picture by torchmetrics: Gaussian window of 11x11 with a standard deviation of 1.5,
    on each colour, averaged over the whole picture with edges reflected.

    Args:
        pictures, targets (`torch.Tensor` of shape `(B, 3, H, W)`): As those of `psnr`; sides of at least
            `SSIM_WINDOW` pixels.

    Returns:
        `torch.Tensor` of shape `(B,)`: Float32, 1 for pictures that are equal.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: As `psnr`, or a side is smaller than the window.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError('`ssim` needs torchmetrics: pip install "hieratok_hf[eval]"') from error
    levels, target_levels = _levels(pictures, targets)
    if min(levels.shape[2:]) < SSIM_WINDOW:
        size = f"{levels.shape[2]}x{levels.shape[3]}"
        raise ValueError(f"`pictures` must be at least {SSIM_WINDOW} pixels high and wide, got {size}.")
    # torchmetrics holds more than ten times what it is given, so it gets one picture at a time.
    values: list[Any] = [
        structural_similarity_index_measure(*pair, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=255.0)
        for pair in zip(levels.split(1), target_levels.split(1))
    ]
    return torch.stack(values)


def _levels(pictures: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as whole numbers in 0 ... 255 in float32, checked."""
    for name, tensor in (("pictures", pictures), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape:
            raise ValueError(f"`{name}` must have shape (B, 3, H, W) and not be empty, got {tuple(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be floating point in [-1, 1], got {tensor.dtype}.")
        if not (largest := tensor.detach().abs().max().item()) <= PIXEL_LIMIT:  # phrased so that NaN fails
            raise ValueError(f"`{name}` must be finite and lie in [-1, 1], got a value of magnitude {largest:g}.")
    if pictures.shape != targets.shape:
        shapes = f"{tuple(pictures.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"`pictures` and `targets` must have the same shape, got {shapes}.")
    levels, target_levels = (255 * (x.detach().float() * 0.5 + 0.5).clamp(0, 1) for x in (pictures, targets))
    return levels.round(), target_levels.round()
