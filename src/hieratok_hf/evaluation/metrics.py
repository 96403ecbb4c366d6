"""Measure how close images are, on 8 bits as files: PSNR, SSIM (Wang et al., 2004), Fréchet distances; and seams."""

from typing import Any

import torch
from torch import Tensor, nn

from ..models.core import PIXEL_LIMIT
from ..models.losses import steps_at_borders
from ..utils.extras import missing_extra
from ..utils.images import from_uint8, to_uint8
from ..utils.numbers import whole_number
from .vision_features import VisionFeatures

__all__ = ["SSIM_WINDOW", "FrechetDistance", "border_steps", "psnr", "ssim"]

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
    levels = _levels("images", images)
    return steps_at_borders(levels, whole_number("patch_size", patch_size, 2, min(levels.shape[2:]) - 1))


class FrechetDistance:
    """
    Measure the distance between the features of all images and of their targets, each set taken as one Gaussian
    (Heusel et al., 2017), by torchmetrics in float64 and over all processes of torch.distributed.

    Args:
        features (`VisionFeatures`, *optional*): The model whose pooled features count; unless given the Inception
            network of the published figures, which torchmetrics loads through torch-fidelity.
        size (`int`, *optional*): Side in pixels that images are resized to, `features.image_size` unless given. The
            Inception network always takes 299.
        same_targets (`bool`, defaults to `False`): Whether every round, from one `reset` to the next, has the same
            targets, so that their features are computed in the first alone.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where to compute; it must know float64.

    Attributes:
        name (`str`): `"rFID"`, or for other features `"FD-"` and their name: such figures are no FID.
        size (`int`): Side in pixels that images are resized to.
        num_features (`int`): Features of an image; as many images or fewer have a covariance without full rank.

    Raises:
        ImportError: torchmetrics, or for the Inception network torch-fidelity, is not installed.
        ValueError: `size` is not positive, nothing that the model takes, or was given for the Inception network.
    """

    def __init__(
        self,
        features: VisionFeatures | None = None,
        *,
        size: int | None = None,
        same_targets: bool = False,
        device: torch.device | str = "cpu",
    ):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise missing_extra("A Fréchet distance", "torchmetrics") from error
        if size is not None and features is None:
            raise ValueError(f"`size` must be left out for the Inception network, got {size}.")
        size = size if size is None else whole_number("size", size, 1)
        self.name = "rFID" if features is None else f"FD-{features.name}"
        self.size = 299 if features is None else size or features.image_size
        self.same_targets = same_targets
        network: Any = 2048 if features is None else _PooledFeatures(features.to(device), self.size)
        self.num_features: int = 2048 if features is None else network.num_features
        self._metric = FrechetInceptionDistance(network, reset_real_features=not same_targets).to(device)
        # torchmetrics takes it from the features, which a process without images never sees.
        self._metric.orig_dtype = torch.float64
        self._knows_targets = False

    def update(self, images: Tensor | None, targets: Tensor | None) -> None:
        """
        Add images to both sets, or to one alone: the other is then `None`.

        Args:
            images, targets (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Images in [-1, 1], clamped and
                rounded as by `psnr`; their numbers and sizes may differ.

        Raises:
            ValueError: As `psnr`.
        """
        given = {"images": images, "targets": targets}
        levels = {name: _levels(name, tensor) for name, tensor in given.items() if tensor is not None}
        for name, values in levels.items():
            if name == "images" or not self._knows_targets:
                self._metric.update(values.byte().to(self._metric.device), real=name == "targets")

    def compute(self) -> float:
        """
        Compute the distance over the images of all processes, each of which must call this.

        Raises:
            RuntimeError: There are fewer than two images or targets.
            ValueError: With `same_targets`, another round had more or fewer targets than this one.
        """
        rounds = int(self._metric.fake_features_num_samples), int(self._metric.real_features_num_samples)
        if self.same_targets and rounds[0] != rounds[1]:
            raise ValueError(f"`same_targets` needs the same targets in every round, got {rounds[0]} and {rounds[1]}.")
        distance = float(self._metric.compute())
        return 0.0 if distance < 0 else distance  # rounding takes that of equal sets below zero

    def reset(self) -> None:
        """Begin a new round."""
        self._knows_targets = self.same_targets and int(self._metric.real_features_num_samples) > 0
        self._metric.reset()


class _PooledFeatures(nn.Module):
    """Turn levels `(B, 3, H, W)` in uint8 into features `(B, num_features)`, as torchmetrics asks for them."""

    def __init__(self, features: VisionFeatures, size: int):
        super().__init__()
        self.features, self.size = features, size
        blank = torch.zeros(1, 3, size, size, device=features.mean.device)  # type: ignore[arg-type]
        try:
            with torch.no_grad():
                self.num_features = features(blank)[0].shape[1]
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{features.name} takes no images of {size} x {size} pixels: {reason}") from error

    @torch.no_grad()
    def forward(self, levels: Tensor) -> Tensor:
        return self.features(from_uint8(levels), self.size)[0].double()


def _paired_levels(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both images to levels; they must have one shape."""
    levels, target_levels = _levels("images", images), _levels("targets", targets)
    if (one := tuple(images.shape)) != (other := tuple(targets.shape)):
        raise ValueError(f"`images` and `targets` must have the same shape, got {one} and {other}.")
    return levels, target_levels


def _levels(name: str, tensor: Tensor) -> Tensor:
    """Convert images to whole numbers in 0 ... 255 in float32, after a check."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"`{name}` must be a dense torch.Tensor, got {getattr(tensor, 'layout', type(tensor))}.")
    if not tensor.is_floating_point():
        raise ValueError(f"`{name}` must be of floating point and lie in [-1, 1], got {tensor.dtype}.")
    if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape:
        raise ValueError(f"`{name}` must have shape (B, 3, H, W) and not be empty, got {tuple(tensor.shape)}.")
    if not (largest := tensor.detach().abs().max().item()) <= PIXEL_LIMIT:  # phrased so that NaN fails
        raise ValueError(f"`{name}` must be finite and lie in [-1, 1], got a value of magnitude {largest:g}.")
    return to_uint8(tensor.detach()).float()
