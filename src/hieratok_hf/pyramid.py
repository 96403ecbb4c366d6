"""The pyramid of token grids: where each scale lies in the decoder's sequence, and the latent pooled to each scale."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_hieratok import HieraTokConfig, check_scale_factors

__all__ = ["PyramidLayout", "flatten_pyramid", "picture_pyramid"]

# Shape letters: B batch, H W pixels, p patch size, C latent channels, h w finest grid, N tokens of all scales.


@dataclass(frozen=True)
class PyramidLayout:
    """
    Grids of a pyramid of tokens, laid out coarse to fine in one sequence.

    A grid that a factor does not divide is rounded up: its last row or column covers fewer cells.

    Attributes:
        grids (`tuple[tuple[int, int], ...]`): Height and width of each scale's grid, in tokens.
        scale_factors (`tuple[int, ...]`): Cells of the finest grid that one cell of each scale covers on a side.
    """

    grids: tuple[tuple[int, int], ...]
    scale_factors: tuple[int, ...]

    @classmethod
    def from_grid(cls, height: int, width: int, scale_factors: tuple[int, ...]) -> "PyramidLayout":
        """
        The layout over a finest grid of `height` x `width` tokens.

        Raises:
            ValueError: A side is smaller than 1, or the factors do not decrease strictly to 1.
        """
        if height < 1 or width < 1:
            raise ValueError(f"`height` and `width` must be at least 1 token, got {height} and {width}.")
        check_scale_factors(scale_factors)
        grids = tuple((-(-height // factor), -(-width // factor)) for factor in scale_factors)
        return cls(grids, tuple(scale_factors))

    @property
    def num_scales(self) -> int:
        return len(self.grids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(height * width for height, width in self.grids)

    @property
    def ends(self) -> tuple[int, ...]:
        """End of each scale in the sequence, which is also the number of keys that its queries see."""
        ends, end = [], 0
        for length in self.lengths:
            end += length
            ends.append(end)
        return tuple(ends)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Place of each scale in the sequence."""
        return tuple(slice(end - length, end) for end, length in zip(self.ends, self.lengths))

    @property
    def num_tokens(self) -> int:
        """Tokens of all scales, `N`."""
        return sum(self.lengths)

    def truncate(self, num_scales: int) -> "PyramidLayout":
        """
        The layout of the coarsest `num_scales` scales. Positions keep the unit of the original finest grid.

        Raises:
            ValueError: `num_scales` is not in `1 ... self.num_scales`.
        """
        if isinstance(num_scales, bool) or not isinstance(num_scales, int) or not 1 <= num_scales <= self.num_scales:
            raise ValueError(f"`num_scales` must be an integer from 1 to {self.num_scales}, got {num_scales!r}.")
        return PyramidLayout(self.grids[:num_scales], self.scale_factors[:num_scales])

    def visible_ends(self, device: torch.device | None = None) -> Tensor:
        """`(N,)` int64: a query at row `i` sees the keys `[0, visible_ends[i])`. The one predicate of the mask."""
        ends = [torch.full((length,), end, device=device) for end, length in zip(self.ends, self.lengths)]
        return torch.cat(ends)


def flatten_pyramid(latents: Tensor, layout: PyramidLayout) -> Tensor:
    """
    Average-pool a latent to every scale of a layout.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): The finest map.
        layout (`PyramidLayout`): The scales to make, over a finest grid of `h x w`.

    Returns:
        `torch.Tensor` of shape `(B, N, C)`: The tokens of all scales, coarse first, each scale row by row.
    """
    maps = [
        F.avg_pool2d(latents, factor, ceil_mode=True, count_include_pad=False) if factor > 1 else latents
        for factor in layout.scale_factors
    ]  # each (B, C, n_h, n_w)
    return torch.cat([pooled.flatten(2) for pooled in maps], dim=2).transpose(1, 2)  # (B, N, C)


def picture_pyramid(pixel_values: Tensor, config: HieraTokConfig) -> list[Tensor]:
    """
    What each scale's picture should be: the picture at `1 / factor` of its size, by averages.

    Where a coarse cell reaches beyond the picture, its edge is repeated, so that all scales show a thing in one place.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Pictures; sides are multiples of the patch size.
        config (`HieraTokConfig`): The patch size and the scales.

    Returns:
        A list of `(B, 3, n_h * p, n_w * p)`, coarse to fine; the last is `pixel_values`.
    """
    height, width = pixel_values.shape[-2:]
    pictures = []
    for factor in config.scale_factors[:-1]:
        cell = factor * config.patch_size
        padded = F.pad(pixel_values, (0, -width % cell, 0, -height % cell), mode="replicate")
        pictures.append(F.avg_pool2d(padded, factor))
    return [*pictures, pixel_values]
