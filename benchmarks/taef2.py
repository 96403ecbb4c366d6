"""
The forward of TAEF2, a small autoencoder distilled onto the latents of FLUX.2: 32 channels at 1/8 (Ollin Boer Bohan,
github.com/madebyollin/taesd, MIT licence), which diffusers does not have.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["TAEF2", "load_taef2"]

# Shape letters: B batch, H W pixels, h w the latent's grid (H / 8, W / 8).

WIDTH, CHANNELS = 64, 32


class Pooling(nn.Sequential):
    """Normalise over the whole image, so that a block knows of its statistics."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
            nn.GroupNorm(4, 4 * WIDTH),
            nn.ReLU(),
            nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
        )


class Block(nn.Module):
    """Three convolutions beside the identity."""

    def __init__(self, pooled: bool = False):
        super().__init__()
        layers = [conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH)]
        self.conv = nn.Sequential(*layers)
        self.pool = Pooling() if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(B, 64, H, W)` to the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Bound(nn.Module):
    """Bound latents softly to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(B, 32, h, w)` to the same shape."""
        return 3 * torch.tanh(x / 3)


def conv(inputs: int, outputs: int, **options: bool | int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


class TAEF2(nn.Module):
    """Encode and decode as the autoencoders of diffusers do, with images in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        down = [conv(3, WIDTH), Block()]
        up: list[nn.Module] = [Bound(), conv(CHANNELS, WIDTH), nn.ReLU()]
        for stage in range(3):
            down += [conv(WIDTH, WIDTH, stride=2, bias=False), *(Block(stage == 2) for _ in range(3))]
            up += [*(Block(stage == 0) for _ in range(3)), nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
        self.encoder = nn.Sequential(*down, conv(WIDTH, CHANNELS))
        self.decoder = nn.Sequential(*up, Block(), conv(WIDTH, 3))
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, sample_size=512)

    def encode(self, x: Tensor) -> SimpleNamespace:
        """Encode `x` `(B, 3, H, W)` in [-1, 1] to `latents` `(B, 32, h, w)`."""
        return SimpleNamespace(latents=self.encoder((x + 1) / 2))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """Decode `z` `(B, 32, h, w)` to `sample` `(B, 3, H, W)` in [-1, 1]."""
        return SimpleNamespace(sample=self.decoder(z).clamp(0, 1) * 2 - 1)


def load_taef2(path: Path | str) -> TAEF2:
    """Load the published weights, of which each key is a number of a module in the sequence."""
    model = TAEF2()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
