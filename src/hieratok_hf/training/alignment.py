"""The alignment of a latent with a vision model's features: the VF loss of VA-VAE (arXiv 2501.01423)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.vision_features import VisionFeatures

__all__ = ["LatentAlignment"]

# Shape letters: B batch, H W pixels, C latent channels, h w the latent's grid, D feature channels, N places (h * w).


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
        last = self.features(pixel_values)[1][-1]
        if last.ndim == 4:
            return last
        name, size = self.features.name, getattr(self.features.model.config, "patch_size", None)
        if size is None:
            raise ValueError(f"`features` must give maps, or have a `patch_size`; {name} has tokens and none.")
        sizes = (size, size) if isinstance(size, int) else size
        height, width = (side // cell for side, cell in zip(pixel_values.shape[2:], sizes))
        if not 0 < height * width <= last.shape[2]:
            raise ValueError(
                f"`features` must give a token a patch, got {last.shape[2]} of {name} for {height}x{width} patches."
            )
        return last[:, :, -height * width :].unflatten(2, (height, width))
