"""The training loss of a tokenizer: squared errors of every scale and the KL divergence, each a mean per element."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_hieratok import HieraTokConfig
from .pyramid import picture_pyramid
from .tokenizer import posterior_of

__all__ = ["tokenizer_losses"]


def tokenizer_losses(
    pictures: list[Tensor], pixel_values: Tensor, moments: Tensor, config: HieraTokConfig
) -> dict[str, Tensor]:
    """
    The parts of the loss and their weighted sum, in float32.

    Means per element, unlike sums, keep their balance when pictures change in size.

    Args:
        pictures (`list[torch.Tensor]`): What `HieraTokCore.decode_scales` gives for all scales.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): The pictures that were encoded, in [-1, 1].
        moments (`torch.Tensor` of shape `(B, 2C, h, w)`): Mean and log-variance of their latents.
        config (`HieraTokConfig`): Its `kl_weight` and `coarse_weight`.

    Returns:
        Scalars: `mse` of the finest scale; `kl` divergence a latent number; `coarse`, the mean squared error of the
        coarser scales, where there are any; `loss`, the weighted sum.
    """
    pairs = zip(pictures, picture_pyramid(pixel_values.float(), config))
    *coarse, finest = [F.mse_loss(picture.float(), target) for picture, target in pairs]
    posterior = posterior_of(moments.float())
    losses = {"mse": finest, "kl": posterior.kl().mean() / posterior.mean[0].numel()}
    losses["loss"] = losses["mse"] + config.kl_weight * losses["kl"]
    if coarse:
        losses["coarse"] = torch.stack(coarse).mean()
        losses["loss"] = losses["loss"] + config.coarse_weight * losses["coarse"]
    return losses
