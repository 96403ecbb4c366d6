"""Compute a tokenizer's losses that need no other model: pixel differences at every scale and the KL divergence."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.pyramid import continue_border
from ..utils.choices import PIXEL_LOSSES
from .configuration_hieratok import HieraTokConfig

__all__ = [
    "add_weighted",
    "border_loss",
    "image_pyramid",
    "pixel_loss",
    "steps_at_borders",
    "tokenizer_losses",
]

_CHARBONNIER_EPSILON = 1e-3


def pixel_loss(images: Tensor, targets: Tensor, kind: str = "mse") -> Tensor:
    """
    Compute the mean difference of images in float32, a scalar.

    Args:
        images, targets (`torch.Tensor` of any shape, the same): Images in [-1, 1].
        kind (`str`, defaults to `"mse"`): One of `PIXEL_LOSSES`; `"charbonnier"` (Charbonnier et al., 1994) is the
            absolute difference, but smooth within a thousandth of zero.

    Raises:
        ValueError: `kind` is not one of `PIXEL_LOSSES`.
    """
    images, targets = images.float(), targets.float()
    if kind == "mse":
        return F.mse_loss(images, targets)
    if kind == "l1":
        return F.l1_loss(images, targets)
    if kind == "charbonnier":
        return ((images - targets).square() + _CHARBONNIER_EPSILON**2).sqrt().mean() - _CHARBONNIER_EPSILON
    raise ValueError(f"`kind` must be one of {list(PIXEL_LOSSES)}, got {kind!r}.")


def border_loss(images: Tensor, patch_size: int) -> Tensor:
    """
    Measure by how much neighbouring pixels differ more across the borders of patches than inside of them, in float32.

    A decoder that smooths fine texture keeps more of it at borders, where it shows as a seam.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
        patch_size (`int`): Pixels from border to border.

    Returns:
        A scalar, the mean over images of what exceeds 0; 0 without borders, or with nothing but borders.
    """
    across, inside = steps_at_borders(images.float(), patch_size).unbind(1)
    return (across - inside).relu().mean()


def steps_at_borders(values: Tensor, patch_size: int) -> Tensor:
    """
    Measure the mean absolute difference of neighbours across the borders of patches, and inside of them, `(B, 2)`.

    A direction without borders, or with nothing but borders, does not count; 0 stands for both.

    Args:
        values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in any unit, float32.
        patch_size (`int`): Pixels from border to border.
    """
    steps = []
    for dim in (2, 3):
        if values.shape[dim] > patch_size > 1:
            difference = values.diff(dim=dim).abs().movedim(dim, 1).flatten(2).mean(2)  # (B, H - 1) or (B, W - 1)
            is_border = torch.arange(1, difference.shape[1] + 1, device=values.device) % patch_size == 0
            steps.append(torch.stack([difference[:, is_border].mean(1), difference[:, ~is_border].mean(1)], dim=1))
    return torch.stack(steps).mean(0) if steps else values.new_zeros(len(values), 2)


def tokenizer_losses(
    images: list[Tensor], pixel_values: Tensor, moments: Tensor | None, config: HieraTokConfig, kind: str = "mse"
) -> dict[str, Tensor]:
    """
    Compute the parts of the loss and their weighted sum, in float32.

    They are means per element, which unlike sums keep their balance when images change in size.

    Args:
        images (`list[torch.Tensor]`): The images of all scales, as `HieraTokCore.decode_scales` gives them.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): The images that were encoded, in [-1, 1].
        moments (`torch.Tensor` of shape `(B, 2C, h, w)` or `None`): Mean and log-variance of their latents, `None`
            where their distribution does not count.
        config (`HieraTokConfig`): Its `kl_weight` and `coarse_weight`.
        kind (`str`, defaults to `"mse"`): The difference of pixels, one of `PIXEL_LOSSES`.

    Returns:
        Scalars: the difference of the finest scale, by the name of its kind; `kl`, divergence a latent number, if
        there are moments; `coarse`, the mean over coarser scales, if any, of their difference times their factor; and
        `loss`, the weighted sum.

    Raises:
        ValueError: `kind` is not one of `PIXEL_LOSSES`.
    """
    pairs = zip(images, image_pyramid(pixel_values.float(), config))
    *coarse, finest = [pixel_loss(image, target, kind) for image, target in pairs]
    losses = {kind: finest}
    if moments is not None:
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)  # as diffusers' distribution does, which takes a second to import
        losses["kl"] = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    if coarse:
        # What averages lose falls about as the factor rises, and each scale is to count alike.
        losses["coarse"] = torch.stack([f * loss for f, loss in zip(config.scale_factors, coarse)]).mean()
    losses["loss"] = add_weighted(finest, losses, config)
    return losses


def add_weighted(reconstruction: Tensor, losses: dict[str, Tensor], config: HieraTokConfig, factor: int = 1) -> Tensor:
    """Add `kl` and `factor` times `coarse`, where they are, to `reconstruction` `()`."""
    loss = reconstruction + config.kl_weight * losses["kl"] if "kl" in losses else reconstruction
    return loss + config.coarse_weight * factor * losses["coarse"] if "coarse" in losses else loss


def image_pyramid(pixel_values: Tensor, config: HieraTokConfig) -> list[Tensor]:
    """
    Average images to the target of each scale, `(B, 3, n_h * p, n_w * p)`, coarse to fine.

    Where a coarse cell reaches beyond the image, its edge is repeated, so that all scales show a thing in one place.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images; sides are multiples of the patch size.
        config (`HieraTokConfig`): Its patch size and scales.
    """
    height, width = pixel_values.shape[-2:]
    images = []
    for factor in config.scale_factors[:-1]:
        cell = factor * config.patch_size
        padded = continue_border(pixel_values, 0, -width % cell, 0, -height % cell)
        images.append(F.avg_pool2d(padded, factor))
    return [*images, pixel_values]
