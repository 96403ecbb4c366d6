"""
The alignment with a vision model's features: of a latent, the VF loss of VA-VAE (arXiv 2501.01423), and of the tokens
in a DiT, REPA (arXiv 2410.06940).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.vision_features import VisionFeatures

__all__ = ["BlockAlignment", "LatentAlignment"]

# Shape letters: B batch, H W pixels, C latent channels, h w the latent's or the tokens' grid, D feature channels,
# N places (h * w), E channels of a token.


class LatentAlignment(nn.Module):
    """
    Measure how far the latent's directions are from a frozen vision model's, place by place and between places.

    A linear map without bias takes the latent to the features' channels, and two losses are added up: the mean of
    `relu(1 - cosine_margin - cos(z_i, f_i))` over the places, and that of
    `relu(|cos(z_i, z_j) - cos(f_i, f_j)| - distance_margin)` over all pairs of places of an image. `z` is the mapped
    latent in both, as in the implementations at large; the paper prints the latent itself in the second. The pairs
    take memory with the square of `N`.

    Only the map has weights (`projection.weight`). The vision model is no submodule: put it on the device of the
    images before.

    Args:
        latent_channels (`int`): Channels of the latent.
        features (`VisionFeatures`): The frozen vision model; it sees one blank image here, for its channels.
        cosine_margin, distance_margin (`float`, default to 0.5 and 0.25): Differences that cost nothing, in [0, 2).

    Raises:
        ValueError: The model's last tokens are no grid of patches.
    """

    features: VisionFeatures

    def __init__(
        self,
        latent_channels: int,
        features: VisionFeatures,
        *,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
    ):
        super().__init__()
        # Not a part of this module: it would be saved with every state, and sharded, though it never changes.
        self.__dict__["features"] = features
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin
        # Asked rather than read: many configurations do not name the channels of the last layer.
        blank = features.mean.new_zeros(1, 3, features.image_size, features.image_size)
        self.projection = nn.Conv2d(latent_channels, self.target_map(blank).shape[1], 1, bias=False).to(blank.device)

    def forward(self, latents: Tensor, pixel_values: Tensor) -> Tensor:
        """
        Add up both losses, float32 of shape `()`; gradients flow to the latents and to the map.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): The latents to align.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): The same images in [-1, 1], at any size that the
                vision model takes.
        """
        # Autocasting would round the cosines by up to a hundredth of the margins.
        with torch.autocast(latents.device.type, enabled=False):
            targets = self.target_map(pixel_values)
            if targets.shape[2:] != latents.shape[2:]:
                targets = F.interpolate(targets, latents.shape[2:], mode="bilinear", antialias=True)
            # The bound keeps the gradient of a vector of zeros finite.
            z, f = (F.normalize(x.flatten(2), dim=1, eps=1e-4) for x in (self.projection(latents.float()), targets))
            cosine_loss = F.relu(1 - self.cosine_margin - (z * f).sum(1)).mean()
            differences = (z.mT @ z - f.mT @ f).abs()  # (B, N, N)
            return cosine_loss + F.relu(differences - self.distance_margin).mean()

    @torch.no_grad()
    def target_map(self, pixel_values: Tensor) -> Tensor:
        """
        Compute the last feature map `(B, D, h', w')` of `pixel_values` `(B, 3, H, W)` in [-1, 1], float32, at the
        vision model's own grid; of a ViT the patches' tokens, which come after all others. `ValueError` for tokens
        without a patch size, or fewer than patches.
        """
        return self.features.feature_maps(pixel_values, [-1])[0]


class BlockAlignment(nn.Module):
    """
    Measure how far a transformer's tokens are from a vision model's feature maps, as they are after a projection of
    three layers: of each map the mean of `1 - cos(y_i, f_i)` over the places, and the sum of these over the maps.

    Args:
        width (`int`): Channels `E` of a token.
        statistics (sequence of pairs of `torch.Tensor` of shape `(D,)`): Mean and standard deviation of each channel
            of each map, which are taken out of it; they are not saved.
        hidden_width (`int`, defaults to 512): Channels inside the projection.
    """

    def __init__(self, width: int, statistics: Sequence[tuple[Tensor, Tensor]], *, hidden_width: int = 512):
        super().__init__()
        means, spreads = zip(*statistics)
        self.channels = [len(mean) for mean in means]
        self.register_buffer("mean", torch.cat(means)[:, None, None], persistent=False)
        # A channel that is always zero would be divided by zero.
        self.register_buffer("std", torch.cat(spreads)[:, None, None].clamp(min=1e-6), persistent=False)
        self.projector = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, sum(self.channels)),
        )

    def forward(self, tokens: Tensor, features: Sequence[Tensor]) -> Tensor:
        """
        Compute the loss, float32 of shape `()`; gradients flow to the tokens and to the projection.

        Args:
            tokens (`torch.Tensor` of shape `(B, h, w, E)`): The tokens in their places.
            features (sequence of `torch.Tensor` of shape `(B, D, h', w')`): The maps, each at a grid of its own; they
                are resampled to that of the tokens.
        """
        projected = self.projector(tokens).float().permute(0, 3, 1, 2)  # (B, sum of D, h, w)
        grid = projected.shape[2:]
        maps = [
            x if x.shape[2:] == grid else F.interpolate(x, grid, mode="bilinear", antialias=True) for x in features
        ]
        targets = (torch.cat(maps, 1) - self.mean) / self.std
        pairs = zip(projected.split(self.channels, 1), targets.split(self.channels, 1))
        return torch.stack([1 - F.cosine_similarity(y, f, dim=1).mean() for y, f in pairs]).sum()
