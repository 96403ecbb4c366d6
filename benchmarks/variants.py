"""Other ways to use a pyramid, tried by `compare_scales.py`; none of them is part of the package."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok_hf import HieraTokConfig, HieraTokCore
from hieratok_hf.encoder import HieraTokEncoder
from hieratok_hf.layers import HieraTokBlock, HieraTokSwiGLU, rotary_tables
from hieratok_hf.pyramid import PyramidLayout, flatten_pyramid
from hieratok_hf.tokenizer import check_latents

# Shape letters: B batch, H W pixels, h w grid, C latent channels, D hidden size, N tokens of all scales.


class ScaleBlock(HieraTokBlock):
    """A block whose norms and feed-forward layer are each scale's own; attention is shared."""

    def __init__(self, config: HieraTokConfig, hidden_size: int, num_heads: int):
        super().__init__(config, hidden_size, num_heads)
        scales = range(len(config.scale_factors))
        self.norm1 = nn.ModuleList(nn.RMSNorm(hidden_size, config.norm_eps) for _ in scales)
        self.norm2 = nn.ModuleList(nn.RMSNorm(hidden_size, config.norm_eps) for _ in scales)
        self.mlp = nn.ModuleList(HieraTokSwiGLU(config, hidden_size) for _ in scales)

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], layout: PyramidLayout) -> Tensor:
        scales = [hidden_states[:, rows] for rows in layout.slices]
        normed = torch.cat([norm(x) for norm, x in zip(self.norm1, scales)], dim=1)
        hidden_states = hidden_states + self.attn(normed, rotary, layout)[0]
        scales = [hidden_states[:, rows] for rows in layout.slices]
        return torch.cat([x + mlp(norm(x)) for norm, mlp, x in zip(self.norm2, self.mlp, scales)], dim=1)


class ScaleLayers(HieraTokCore):
    """Norms and feed-forward layers of their own for each scale of the decoder."""

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        shape = config.decoder_hidden_size, config.decoder_num_heads
        self.decoder.blocks = nn.ModuleList(ScaleBlock(config, *shape) for _ in range(config.decoder_num_layers))


class FirstChannels(nn.Module):
    """A layer that sees the first channels of a map alone."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, : self.layer.in_channels])


class CoarseContext(HieraTokCore):
    """Every token of the decoder is also fed the next coarser scale's latent, upsampled."""

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        self.decoder.embed = nn.Linear(2 * config.latent_channels, config.decoder_hidden_size)
        self.decoder.linear_path = nn.ModuleList(FirstChannels(path) for path in self.decoder.linear_path)

    def _decode(self, latents: Tensor, num_scales: int | None, all_scales: bool) -> list[Tensor]:
        check_latents(latents, self.config)
        grid = (latents.shape[-2], latents.shape[-1])
        layout = PyramidLayout.from_grid(*grid, tuple(self.config.scale_factors))
        tokens = flatten_pyramid(latents, layout)
        maps = [
            tokens[:, rows].transpose(1, 2).unflatten(2, cells) for rows, cells in zip(layout.slices, layout.grids)
        ]
        coarser = [torch.zeros_like(maps[0])]
        coarser += [F.interpolate(x, y.shape[2:], mode="bilinear") for x, y in pairwise(maps)]
        context = torch.cat([x.flatten(2) for x in coarser], dim=2).transpose(1, 2)
        return self.decoder(torch.cat([tokens, context], dim=2), layout, grid, all_scales)

    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Left alone: the two inputs would have to be folded apart."""


class PyramidEncoder(HieraTokEncoder):
    """An encoder whose last block sees the pooled token map before the finest, scale-causally."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.patch_embed(pixel_values)
        grid = (embedded.shape[-2], embedded.shape[-1])
        plain = PyramidLayout.from_grid(*grid, (1,))
        pyramid = PyramidLayout.from_grid(*grid, tuple(self.config.scale_factors))
        hidden_states = self.norm_before(embedded.flatten(2).transpose(1, 2))
        rotary = rotary_tables(self.config, plain, grid, self.head_dim, embedded.device)
        for block in list(self.blocks)[:-1]:
            hidden_states = block(hidden_states, rotary, plain)
        rotary = rotary_tables(self.config, pyramid, grid, self.head_dim, embedded.device)
        for block in list(self.blocks)[-1:]:
            pooled = flatten_pyramid(hidden_states.transpose(1, 2).unflatten(2, grid), pyramid)
            hidden_states = block(pooled, rotary, pyramid)[:, pyramid.slices[-1]]
        hidden_states = self.norm_after(hidden_states)
        moments = self.head(hidden_states).transpose(1, 2).unflatten(2, grid)
        if self.linear_path is not None:
            mean, logvar = moments.chunk(2, dim=1)
            moments = torch.cat([mean + self.linear_path(pixel_values), logvar], dim=1)
        return moments, hidden_states


class EncoderToo(HieraTokCore):
    """The pyramid in the last block of the encoder as well."""

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        self.encoder = PyramidEncoder(config)


VARIANTS = {"scale_layers": ScaleLayers, "coarse_context": CoarseContext, "encoder_too": EncoderToo}
