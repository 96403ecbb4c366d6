"""Other ways to use a pyramid of averages, tried by `compare_scales.py`; none of them is part of the package."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok_hf import HieraTokConfig, HieraTokCore
from hieratok_hf.models.core import HieraTokDecoder, HieraTokEncoder
from hieratok_hf.models.layers import HieraTokBlock, HieraTokSwiGLU, rotary_tables
from hieratok_hf.ops.pyramid import PyramidLayout, flatten_pyramid

# Shape letters: B batch, H W pixels, h w grid, C latent channels, D hidden size, N tokens of all scales.


class AveragesCore(HieraTokCore):
    """Hold the coarse scales that the variants were tried with."""

    def __init__(self, config: HieraTokConfig):
        if config.downsampling != "mean":
            raise ValueError(f"`downsampling` must be 'mean' for a variant, got {config.downsampling!r}.")
        super().__init__(config)


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


class ScaleLayers(AveragesCore):
    """Norms and feed-forward layers of their own for each scale of the decoder."""

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        shape = config.decoder_hidden_size, config.decoder_num_heads
        self.decoder.blocks = nn.ModuleList(ScaleBlock(config, *shape) for _ in range(config.decoder_num_layers))


class ContextEmbed(nn.Linear):
    """Embeds each average beside that of the next coarser scale, upsampled; zeros for the coarsest."""

    layout: PyramidLayout

    def forward(self, averages: Tensor) -> Tensor:
        slices, grids = self.layout.slices, self.layout.grids
        maps = [averages[:, rows].transpose(1, 2).unflatten(2, cells) for rows, cells in zip(slices, grids)]
        coarser = [torch.zeros_like(maps[0])]
        coarser += [F.interpolate(x, y.shape[2:], mode="bilinear") for x, y in pairwise(maps)]
        context = torch.cat([x.flatten(2) for x in coarser], dim=2).transpose(1, 2)  # (B, N, C)
        return super().forward(torch.cat([averages, context], dim=2))


class ContextDecoder(HieraTokDecoder):
    """A decoder whose embedding knows where each scale lies."""

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        self.embed = ContextEmbed(2 * config.latent_channels, config.decoder_hidden_size)

    def forward(self, latents: Tensor, layout: PyramidLayout, all_scales: bool = False) -> list[Tensor]:
        self.embed.layout = layout
        return super().forward(latents, layout, all_scales)


class CoarseContext(AveragesCore):
    """Every token of the decoder is also fed the next coarser scale's latent, upsampled."""

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        self.decoder = ContextDecoder(config)

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


class EncoderToo(AveragesCore):
    """The pyramid in the last block of the encoder as well."""

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        self.encoder = PyramidEncoder(config)


VARIANTS = {"scale_layers": ScaleLayers, "coarse_context": CoarseContext, "encoder_too": EncoderToo}
