"""The pyramid of token grids: where each scale lies in the decoder's sequence, and the latent pooled to each scale."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_hieratok import HieraTokConfig, check_scale_factors

__all__ = ["PyramidCells", "PyramidLayout", "flatten_pyramid", "picture_pyramid"]

# Shape letters: B batch, H W pixels, p patch size, C latent channels, h w finest grid, N tokens of all scales.


class PyramidCells(NamedTuple):
    """
    The cell of every token of a pyramid.

    Attributes:
        scale (`torch.Tensor` of shape `(N,)`, int64): Number of its scale, 0 the coarsest.
        factor (`torch.Tensor` of shape `(N,)`, int64): Cells of the finest grid that it covers on a side.
        row, column (`torch.Tensor` of shape `(N,)`, int64): Its place in its scale's grid.
    """

    scale: Tensor
    factor: Tensor
    row: Tensor
    column: Tensor

    def spans(self, grid: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """First and end of the rows, then of the columns, that each token covers of a finest grid: four `(N,)`."""
        rows, columns = self.row * self.factor, self.column * self.factor
        return (rows, (rows + self.factor).clamp(max=grid[0])), (columns, (columns + self.factor).clamp(max=grid[1]))


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

    def cells(self, device: torch.device | None = None) -> PyramidCells:
        """
        The cell of every token.

        Counted over the whole sequence, because the compiler makes a graph of its own for a tensor with a side of 1,
        which the grid of a coarse scale often has.
        """
        index = torch.arange(self.num_tokens, device=device)
        scale = torch.zeros_like(index)
        factor, first, width = scale + self.scale_factors[0], scale, scale + self.grids[0][1]
        for i in range(1, self.num_scales):
            reached = index >= self.ends[i - 1]
            scale = scale + reached
            factor = factor + reached * (self.scale_factors[i] - self.scale_factors[i - 1])
            first = first + reached * self.lengths[i - 1]
            width = width + reached * (self.grids[i][1] - self.grids[i - 1][1])
        row = (index - first) // width
        return PyramidCells(scale, factor, row, index - first - row * width)

    def visible_ends(self, device: torch.device | None = None) -> Tensor:
        """`(N,)` int64: a query at row `i` sees the keys `[0, visible_ends[i])`. The one predicate of the mask."""
        index = torch.arange(self.num_tokens, device=device)
        ends = torch.zeros_like(index) + self.ends[0]
        for previous, end in pairwise(self.ends):
            ends = ends + (index >= previous) * (end - previous)
        return ends


def flatten_pyramid(latents: Tensor, layout: PyramidLayout) -> Tensor:
    """
    Average-pool a latent to every scale of a layout.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): The finest map.
        layout (`PyramidLayout`): The scales to make, over a finest grid of `h x w`.

    Returns:
        `torch.Tensor` of shape `(B, N, C)`: The tokens of all scales, coarse first, each scale row by row.
    """
    if layout.scale_factors == (1,):
        return latents.flatten(2).transpose(1, 2)
    grid = (latents.shape[-2], latents.shape[-1])
    cells = layout.cells(latents.device)
    maps, index, start = [], torch.zeros_like(cells.row), 0
    for scale, (factor, (rows, columns)) in enumerate(zip(layout.scale_factors, layout.grids)):
        if factor == 1:
            pooled = latents
        else:
            # One row and column of cells too many: the compiler makes a graph of its own for a grid with a side of 1.
            rows, columns = rows + 1, columns + 1
            padding = (0, columns * factor - grid[1], 0, rows * factor - grid[0])
            pooled = F.avg_pool2d(F.pad(latents, padding), factor)  # (B, C, n_h + 1, n_w + 1)
        maps.append(pooled.flatten(2))
        index = index + (cells.scale == scale) * (start + cells.row * columns + cells.column)
        start += rows * columns
    tokens = torch.cat(maps, dim=2)[:, :, index].transpose(1, 2)  # (B, N, C)
    # The averages at the borders hold zeros of the padding.
    (top, bottom), (left, right) = cells.spans(grid)
    covered = (bottom - top) * (right - left)
    share = cells.factor.square() / covered.to(torch.promote_types(latents.dtype, torch.float32))
    return (tokens * share[:, None]).to(latents.dtype)


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
