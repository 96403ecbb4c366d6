"""The adversarial part of the training loss: the PatchGAN (arXiv 1611.07004) as VQGAN uses it (arXiv 2012.09841)."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PatchDiscriminator", "adaptive_weight", "discriminator_hinge_loss", "generator_hinge_loss"]

# Shape letters: B batch, H W pixels, h w grid of scores.


class PatchDiscriminator(nn.Module):
    """
    Score how real each patch of an image looks, by convolutions of 4x4: `num_layers` of stride 2, then two of
    stride 1. A score sees 16, 34, 70 or 142 pixels each way with 1 to 4 layers, and the rest of its image only
    through the statistics of the norms.

    Group norms stand where the papers have batch norms: a score must depend neither on the other images of the batch
    nor on how many processes share it.

    Args:
        channels (`int`, defaults to 64): Channels after the first convolution, a multiple of 4; later ones have
            up to eight times as many.
        num_layers (`int`, defaults to 3): Convolutions of stride 2.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.min_size = 3 * 2**num_layers
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (width, next_width) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < num_layers else 1
            # Four channels or more a group: a channel alone would lose its mean.
            groups = math.gcd(32, next_width // 4)
            layers += [
                nn.Conv2d(width, next_width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(groups, next_width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """
        Score `images` `(B, 3, H, W)` in [-1, 1] by patches: `(B, 1, h, w)`, float32, high for real, with
        `h = H // 2**num_layers - 2`; `ValueError` for sides of fewer than `min_size` pixels.
        """
        if min(images.shape[2:]) < self.min_size:
            size = f"{images.shape[2]}x{images.shape[3]}"
            raise ValueError(f"`images` must be at least {self.min_size} pixels high and wide, got {size}.")
        return self.layers(images).float()


def discriminator_hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """
    Compute the discriminator's loss, float32 of shape `()`. Scores of real images, `real` of any shape, rise to 1,
    those of reconstructions without their graph, `fake` of any shape, fall to -1.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_hinge_loss(fake: Tensor) -> Tensor:
    """
    Compute the adversarial loss of the tokenizer, float32 of shape `()`: minus the mean of `fake` of any shape, the
    scores of its reconstructions with their graph.
    """
    return -fake.float().mean()


def adaptive_weight(reconstruction_square: Tensor, adversarial_square: Tensor) -> Tensor:
    """
    Compute the weight that makes the adversarial loss pull as hard as the reconstruction loss (VQGAN's eq. 7), at
    most 1e4.

    VQGAN compares the gradients at the last layer's weight. Those at the reconstructed images need no wrapper (DDP,
    FSDP, compile) to be opened, and several processes can add up their sums of squares first.

    Args:
        reconstruction_square, adversarial_square (`torch.Tensor` of shape `()`): Sums of the squares of each loss's
            gradient with respect to the reconstructed images. The ratio of their roots is the weight, float32.
    """
    with torch.no_grad():
        adversarial_norm = adversarial_square.float().sqrt() + 1e-4
        return (reconstruction_square.float().sqrt() / adversarial_norm).clamp(0, 1e4)
