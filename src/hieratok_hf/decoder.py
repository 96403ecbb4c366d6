"""The decoder: tokens of a pyramid to one picture a scale, by blocks with scale-causal attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_hieratok import HieraTokConfig
from .layers import HieraTokDecoderBlock, HieraTokPositions, rotary_tables
from .linear import HieraTokLinear
from .pyramid import PyramidLayout, flatten_pyramid

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
        patch_channels = config.patch_size**2 * config.in_channels
        self.config = config
        self.head_dim = hidden_size // config.decoder_num_heads
        self.embed = HieraTokLinear(config.latent_channels, hidden_size)
        self.scale_embedding = nn.Parameter(torch.zeros(len(config.scale_factors), hidden_size))
        self.positions = HieraTokPositions(config, hidden_size) if config.learned_positions else None
        self.norm_before = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_before_blocks else nn.Identity()
        self.blocks = nn.ModuleList(
            HieraTokDecoderBlock(config, hidden_size, config.decoder_num_heads)
            for _ in range(config.decoder_num_layers)
        )
        self.norm_after = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_after_blocks else nn.Identity()
        self.head = HieraTokLinear(hidden_size, patch_channels)
        # One a scale, because a pooled latent is not the latent of the smaller picture.
        self.linear_path = nn.ModuleList(
            nn.Conv2d(
                config.latent_channels,
                patch_channels,
                config.linear_path,
                padding=config.linear_path // 2,
                padding_mode="replicate",
            )
            for _ in (config.scale_factors if config.linear_path else ())
        )
        self.output_conv = (
            nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1) if config.output_conv else None
        )

    @torch.no_grad()
    def init_weights(self, initializer_range: float) -> None:
        """Random scale embeddings of that standard deviation; the output convolution starts as the identity."""
        init.normal_(self.scale_embedding, std=initializer_range)
        if self.output_conv is not None:
            init.dirac_(self.output_conv.weight)
            init.zeros_(self.output_conv.bias)

    def forward(
        self, tokens: Tensor, layout: PyramidLayout, grid: tuple[int, int], all_scales: bool = False
    ) -> list[Tensor]:
        """
        Args:
            tokens (`torch.Tensor` of shape `(B, N, C)`): The latent at the scales of `layout`, coarse first.
            layout (`PyramidLayout`): The first scales of the model's pyramid, or all of them.
            grid (`tuple[int, int]`): Height and width of the finest grid, also where `layout` stops before it.
            all_scales (`bool`, defaults to `False`): Make the picture of every scale, not only of the last.

        Returns:
            A list of pictures `(B, 3, n_h * p, n_w * p)`, coarse to fine; the last is that of the layout's last scale.
        """
        hidden_states = self.embed(tokens)  # (B, N, D)
        hidden_states = hidden_states + F.embedding(layout.cells(tokens.device).scale, self.scale_embedding)
        if self.positions is not None:
            hidden_states = hidden_states + flatten_pyramid(self.positions(*grid), layout)
        rotary = rotary_tables(self.config, layout, grid, self.head_dim, tokens.device)

        visible = layout if self.config.scale_causal else PyramidLayout(((1, layout.num_tokens),), (1,))
        hidden_states = self.norm_before(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, rotary, visible)

        pictures = []
        for i in range(0 if all_scales else layout.num_scales - 1, layout.num_scales):
            rows, (height, width) = layout.slices[i], layout.grids[i]
            patches = self.head(self.norm_after(hidden_states[:, rows]))  # (B, n, p * p * 3)
            if self.config.linear_path:
                latents = tokens[:, rows].transpose(1, 2).unflatten(2, (height, width))  # (B, C, n_h, n_w)
                patches = patches + self.linear_path[i](latents).flatten(2).transpose(1, 2)
            pictures.append(self.unpatchify(patches, height, width))
        return pictures if self.output_conv is None else [self.output_conv(picture) for picture in pictures]

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """
        Args:
            patches (`torch.Tensor` of shape `(B, n, p * p * 3)`): In the order (row, column, colour).
            height, width (`int`): The grid of their scale, `n_h` and `n_w`.

        Returns:
            `torch.Tensor` of shape `(B, 3, n_h * p, n_w * p)`.
        """
        size = self.config.patch_size
        patches = patches.unflatten(2, (size, size, -1)).unflatten(1, (height, width))  # (B, n_h, n_w, p, p, 3)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 3, n_h * p, n_w * p)
