"""The start of a model with a linear path: principal components of patches, then a short fit of that path alone."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.autoencoder_adapter import Codec
from ..models.core import HieraTokCore, posterior_of
from ..models.losses import tokenizer_losses
from ..utils.channel_statistics import add_sums, channel_statistics, channel_sums

__all__ = ["fit_linear_path", "latent_statistics", "start_from_principal_components"]

# Shape letters: B batch, H W pixels, C latent channels, p patch size.


@torch.no_grad()
def start_from_principal_components(core: HieraTokCore, batches: Iterable[Tensor]) -> None:
    """Start the linear path at the principal components of the patches of images `(B, 3, H, W)` in [-1, 1]."""
    size, channels = core.config.patch_size, core.config.latent_channels
    unfolded = [F.unfold(batch, size, stride=size).transpose(1, 2).flatten(0, 1) for batch in batches]
    patches = torch.cat(unfolded).double()  # (n, 3 * p * p)
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((patches - mean).T))
    order = torch.arange(len(variances) - 1, len(variances) - 1 - channels, -1)
    # Patches may span fewer directions than there are channels.
    scale = variances[order].clamp_min(1e-8).sqrt()
    core.set_linear_path(directions.T[order].float(), mean.float(), scale.float())


def fit_linear_path(core: HieraTokCore, batches: Iterable[Tensor], steps: int, learning_rate: float = 1e-3) -> None:
    """
    Train the linear path alone for `steps` of the batches `(B, 3, H, W)` in [-1, 1]: without the blocks a step is
    cheap, and they start from what it reaches.
    """
    blocks = core.encoder.blocks, core.decoder.blocks
    core.encoder.blocks, core.decoder.blocks = nn.ModuleList(), nn.ModuleList()
    parameters = [p for name, p in core.named_parameters() if "linear_path" in name or name.endswith("head.bias")]
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    generator = torch.Generator().manual_seed(0)
    for _, pixel_values in zip(range(steps), batches):
        moments, _ = core.encode_moments(pixel_values)
        images = core.decode_scales(posterior_of(moments).sample(generator))
        losses = tokenizer_losses(images, pixel_values, moments, core.config)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        schedule.step()
    core.encoder.blocks, core.decoder.blocks = blocks
    core.zero_grad()


@torch.no_grad()
def latent_statistics(codec: Codec, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """
    Measure the mean and standard deviation `(C,)`, float32, of each channel of the latents, a posterior's mode, over
    images `(B, 3, H, W)` in [-1, 1]; `ValueError` for fewer than two latent positions.
    """
    sums: dict[str, Tensor] = {}
    for batch in batches:
        add_sums(sums, channel_sums(codec.encode(batch)))
    if (count := int(sums.get("count", 0))) < 2:
        raise ValueError(f"`batches` must hold at least two latent positions, got {count}.")
    mean, std = channel_statistics(sums)
    return mean.float(), std.float()
