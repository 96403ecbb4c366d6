"""The encoder: pixel values to the moments of the latent, by a pre-norm ViT with full attention."""

import torch
from torch import Tensor, nn

from ..ops.onednn_linear import HieraTokLinear
from ..ops.pyramid import PyramidLayout
from .configuration_hieratok import HieraTokConfig
from .layers import HieraTokEncoderBlock, HieraTokPositions, rotary_tables

__all__ = ["HieraTokEncoder"]

# Shape letters: B batch, H W pixels, p patch size, h w grid (H / p, W / p), D hidden size, C latent channels.


class HieraTokEncoder(nn.Module):
    """
    Patches, blocks, and a linear head to `2C` moments (mean first, then log-variance).

    Args:
        config (`HieraTokConfig`): Sizes and options.
    """

    def __init__(self, config: HieraTokConfig):
        super().__init__()
        hidden_size, patch_size = config.encoder_hidden_size, config.patch_size
        self.config = config
        self.head_dim = hidden_size // config.encoder_num_heads
        self.patch_embed = nn.Conv2d(config.in_channels, hidden_size, patch_size, stride=patch_size)
        self.positions = HieraTokPositions(config, hidden_size) if config.learned_positions else None
        self.norm_before = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_before_blocks else nn.Identity()
        self.blocks = nn.ModuleList(
            HieraTokEncoderBlock(config, hidden_size, config.encoder_num_heads)
            for _ in range(config.encoder_num_layers)
        )
        self.norm_after = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_after_blocks else nn.Identity()
        self.head = HieraTokLinear(hidden_size, 2 * config.latent_channels)
        self.linear_path = (
            nn.Conv2d(
                config.in_channels,
                config.latent_channels,
                config.linear_path * patch_size,
                stride=patch_size,
                padding=config.linear_path // 2 * patch_size,
                padding_mode="replicate",
                bias=False,
            )
            if config.linear_path
            else None
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1], sides multiples of the
                patch size; `HieraTokCore` checks them, this module does not.

        Returns:
            The moments `(B, 2C, h, w)` and the features `(B, h * w, D)` that they are read from.
        """
        embedded = self.patch_embed(pixel_values)  # (B, D, h, w)
        grid = (embedded.shape[-2], embedded.shape[-1])
        if self.positions is not None:
            embedded = embedded + self.positions(*grid)
        layout = PyramidLayout.from_grid(*grid, (1,))
        rotary = rotary_tables(self.config, layout, grid, self.head_dim, embedded.device)

        hidden_states = self.norm_before(embedded.flatten(2).transpose(1, 2))  # (B, h * w, D)
        for block in self.blocks:
            hidden_states = block(hidden_states, rotary, layout)
        hidden_states = self.norm_after(hidden_states)

        moments = self.head(hidden_states).transpose(1, 2).unflatten(2, grid)  # (B, 2C, h, w)
        if self.linear_path is not None:
            mean, logvar = moments.chunk(2, dim=1)
            moments = torch.cat([mean + self.linear_path(pixel_values), logvar], dim=1)
        return moments, hidden_states
