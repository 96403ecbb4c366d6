"""Measure perceptual distances, over the feature maps of any vision model (after LPIPS, arXiv 1801.03924)."""

from itertools import groupby

import torch
from torch import Tensor, nn

from .vision_features import VisionFeatures

__all__ = ["PerceptualDistance", "load_lpips"]

# Shape letters: B batch, H W pixels, C channels of a feature map.

_TOKEN_LAYERS = 4


class PerceptualDistance(nn.Module):
    """
    Measure LPIPS without learned weights: the squared difference of the feature vectors at each place, scaled to unit
    length, averaged over the places, then over the layers. It lies in [0, 4] and compares only for one vision model.

    The last map of each resolution of a convolutional network counts, and of a ViT four layers evenly spaced in depth.

    Args:
        features (`VisionFeatures`): The frozen vision model.
    """

    def __init__(self, features: VisionFeatures):
        super().__init__()
        self.features = features

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """
        Measure the distance `(B,)` of each pair in float32.

        Args:
            images, targets (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; gradients flow to `images`
                alone.
        """
        maps = _chosen(self.features(images)[1])
        with torch.no_grad():
            target_maps = _chosen(self.features(targets)[1])
        differences = [(_unit(x) - _unit(y)).square().sum(1) for x, y in zip(maps, target_maps)]
        return torch.stack([difference.flatten(1).mean(1) for difference in differences]).mean(0)


def _chosen(maps: list[Tensor]) -> list[Tensor]:
    """Choose the last map of each resolution, or where there is but one, some evenly spaced."""
    last = [list(group)[-1] for _, group in groupby(maps, key=lambda x: x.shape[2:])]
    if len(last) > 1 or len(maps) <= _TOKEN_LAYERS:
        return last
    return [maps[round((i + 1) * (len(maps) - 1) / _TOKEN_LAYERS)] for i in range(_TOKEN_LAYERS)]


def _unit(x: Tensor) -> Tensor:
    """Scale vectors along dimension 1 to unit length; one that is zero stays zero and gets a finite gradient."""
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-8)


def load_lpips(network: str = "vgg") -> nn.Module:
    """
    Load the published LPIPS (Zhang et al., 2018) of the `lpips` package, frozen: images in [-1, 1] to `(B, 1, 1, 1)`.

    Args:
        network (`str`, defaults to `"vgg"`): Name of its vision network: `"vgg"`, `"alex"` or `"squeeze"`.

    Raises:
        ImportError: `lpips`, or the torchvision that it needs, is not installed.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError("LPIPS needs the lpips package and torchvision: pip install lpips torchvision") from error
    return lpips.LPIPS(net=network, verbose=False).eval().requires_grad_(False)
