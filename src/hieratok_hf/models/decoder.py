"""The decoder: tokens of a pyramid to one picture a scale, by blocks with scale-causal attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..ops.onednn_linear import HieraTokLinear
from ..ops.pyramid import PyramidLayout, continue_border, convolve_pyramid, flatten_pyramid
from .configuration_hieratok import HieraTokConfig
from .layers import HieraTokDecoderBlock, HieraTokPositions, rotary_tables

__all__ = ["HieraTokDecoder"]

# Shape letters: B batch, C latent channels, N tokens of all scales, n tokens of one scale, D hidden size, p patch
# size, h w finest grid.


class HieraTokDecoder(nn.Module):
    """
    Embedding of the tokens, blocks, and one linear head that turns each token into a `p x p` patch.

    Args:
        config (`HieraTokConfig`): Sizes and options.
    """

    def __init__(self, config: HieraTokConfig):
        super().__init__()
        hidden_size = config.decoder_hidden_size
        self.config = config
        self.head_dim = hidden_size // config.decoder_num_heads
        self.embed = HieraTokLinear(config.latent_channels, hidden_size)
        learned_factors = config.scale_factors[:-1] if config.downsampling == "learned" else ()
        self.coarse_embed = nn.ModuleList(
            nn.Conv2d(config.latent_channels, hidden_size, factor, stride=factor) for factor in learned_factors
        )
        self.scale_embedding = nn.Parameter(torch.zeros(len(config.scale_factors), hidden_size))
        self.positions = HieraTokPositions(config, hidden_size) if config.learned_positions else None
        self.norm_before = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_before_blocks else nn.Identity()
        self.blocks = nn.ModuleList(
            HieraTokDecoderBlock(config, hidden_size, config.decoder_num_heads)
            for _ in range(config.decoder_num_layers)
        )
        self.norm_after = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_after_blocks else nn.Identity()
        self.head = HieraTokLinear(hidden_size, config.patch_size**2 * config.in_channels)
        self.linear_path = nn.ModuleList(
            nn.Conv2d(
                config.latent_channels,
                self.cell_size(factor) ** 2 * config.in_channels,
                config.linear_path,
            )
            for factor in (config.scale_factors if config.linear_path else ())
        )
        self.output_conv = (
            nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1) if config.output_conv else None
        )

    def cell_size(self, factor: int) -> int:
        """
        Side, in pixels, of what the linear path makes of one cell for the scale of `factor`.

        Where `factor` does not divide the patch, that is finer than the picture of the scale, which averages it.
        """
        size = self.config.patch_size
        return size if self.config.downsampling == "mean" else size // math.gcd(size, factor)

    @torch.no_grad()
    def init_weights(self, initializer_range: float) -> None:
        """
        Give random values to what has no module of its own: scale embeddings of that standard deviation.

        Embeddings of blocks get a smaller one, so that tokens of all scales vary alike. The output convolution starts
        as the identity.
        """
        init.normal_(self.scale_embedding, std=initializer_range)
        for factor, embed in zip(self.config.scale_factors, self.coarse_embed):
            init.normal_(embed.weight, std=initializer_range / factor)
        if self.output_conv is not None:
            init.dirac_(self.output_conv.weight)
            init.zeros_(self.output_conv.bias)

    @torch.no_grad()
    def init_coarse_scale(self, index: int) -> None:
        """
        Start a scale from the finest: its tokens as those of the average cell, its linear path as the average picture.

        Args:
            index (`int`): Number of the scale, 0 the coarsest.
        """
        factor = self.config.scale_factors[index]
        self.scale_embedding[index] = self.scale_embedding[-1]
        if self.config.downsampling == "learned":
            embed = self.coarse_embed[index]
            embed.weight.copy_((self.embed.weight / factor**2)[..., None, None])
            embed.bias.copy_(self.embed.bias)
        if self.config.linear_path:
            self.init_coarse_path(index)

    @torch.no_grad()
    def init_coarse_path(self, index: int) -> None:
        """Start the linear path of a scale, 0 the coarsest, as the average of what the finest one makes."""
        size = self.cell_size(self.config.scale_factors[index])
        pixels = (size, self.config.patch_size // size) * 2
        for own, finest in zip(self.linear_path[index].parameters(), self.linear_path[-1].parameters()):
            own.copy_(finest.unflatten(0, (*pixels, -1)).mean((1, 3)).flatten(0, 2))

    def forward(self, latents: Tensor, layout: PyramidLayout, all_scales: bool = False) -> list[Tensor]:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): The finest map.
            layout (`PyramidLayout`): The first scales of the model's pyramid, or all of them, over `h x w` cells.
            all_scales (`bool`, defaults to `False`): Make the picture of every scale, not only of the last.

        Returns:
            A list of pictures `(B, 3, n_h * p, n_w * p)`, coarse to fine; the last is that of the layout's last scale.
        """
        grid = (latents.shape[-2], latents.shape[-1])
        averages = flatten_pyramid(latents, layout) if self.config.downsampling == "mean" else None  # (B, N, C)
        hidden_states = self.embed_blocks(latents, layout) if averages is None else self.embed(averages)  # (B, N, D)
        hidden_states = hidden_states + F.embedding(layout.cells(latents.device).scale, self.scale_embedding)
        if self.positions is not None:
            hidden_states = hidden_states + flatten_pyramid(self.positions(*grid), layout)
        rotary = rotary_tables(self.config, layout, grid, self.head_dim, latents.device)

        visible = layout if self.config.scale_causal else PyramidLayout(((1, layout.num_tokens),), (1,))
        hidden_states = self.norm_before(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, rotary, visible)

        pictures = []
        for i in range(0 if all_scales else layout.num_scales - 1, layout.num_scales):
            rows, cells = layout.slices[i], layout.grids[i]
            patches = self.head(self.norm_after(hidden_states[:, rows]))  # (B, n, p * p * 3)
            picture = self.unpatchify(patches, *cells)
            if self.config.linear_path:
                source = latents if averages is None else averages[:, rows].transpose(1, 2).unflatten(2, cells)
                picture = picture + self.linear_picture(source, i)
            pictures.append(picture)
        return pictures if self.output_conv is None else [self.output_conv(picture) for picture in pictures]

    def embed_blocks(self, latents: Tensor, layout: PyramidLayout) -> Tensor:
        """Embed the blocks of `latents` `(B, C, h, w)` at the scales of `layout`, coarse first, `(B, N, D)`."""
        is_whole = layout.scale_factors[-1] == 1
        parts = []
        if num_coarse := layout.num_scales - is_whole:
            parts.append(convolve_pyramid(latents, layout.truncate(num_coarse), self.coarse_embed[:num_coarse]))
        if is_whole:
            parts.append(self.embed(latents.flatten(2).transpose(1, 2)))
        return torch.cat(parts, dim=1)

    def linear_picture(self, cells: Tensor, index: int) -> Tensor:
        """
        Args:
            cells (`torch.Tensor` of shape `(B, C, h, w)`): The latent; with averages, that of the scale itself,
                `(B, C, n_h, n_w)`.
            index (`int`): Number of the scale, 0 the coarsest.

        Returns:
            `torch.Tensor` of shape `(B, 3, n_h * p, n_w * p)`: What the linear path adds to the picture of the scale.
        """
        height, width = cells.shape[-2:]
        around = continue_border(cells, *[self.config.linear_path // 2] * 4)
        picture = self.unpatchify(self.linear_path[index](around).flatten(2).transpose(1, 2), height, width)
        if self.config.downsampling == "mean" or index == len(self.linear_path) - 1:
            return picture
        factor, patch_size = self.config.scale_factors[index], self.config.patch_size
        size = self.cell_size(factor)
        # Rounded up without negative numbers, for exporters as in `PyramidLayout.from_grid`.
        rows, columns = ((side + factor - 1) // factor for side in (height, width))
        # A block too many, because a compiled graph for padding of any size serves neither 0 nor 1.
        bottom, right = ((rows + 1) * factor - height) * size, ((columns + 1) * factor - width) * size
        averages = F.avg_pool2d(continue_border(picture, 0, right, 0, bottom), factor * size // patch_size)
        return averages[:, :, : rows * patch_size, : columns * patch_size]

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """
        Args:
            patches (`torch.Tensor` of shape `(B, n, s * s * 3)`): Squares of any side `s`, each in the order (row,
                column, colour).
            height, width (`int`): Their grid, of `n` squares.

        Returns:
            `torch.Tensor` of shape `(B, 3, height * s, width * s)`.
        """
        size = math.isqrt(patches.shape[2] // self.config.in_channels)
        patches = patches.unflatten(2, (size, size, -1)).unflatten(1, (height, width))  # (B, height, width, s, s, 3)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 3, height * s, width * s)
