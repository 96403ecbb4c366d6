"""Lay out the pyramid of token grids in the decoder's sequence, and make the tokens of each scale of the latent."""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.numbers import whole_number
from .torch_compat import is_watched

__all__ = [
    "PyramidCells",
    "PyramidLayout",
    "check_scale_factors",
    "continue_border",
    "convolve_pyramid",
    "flatten_pyramid",
    "keep_by_size",
]

# Larger tables are made in no time beside what else there is to do, and would hold memory by size.
_KEPT_TOKENS = 2**11

# Shape letters: B batch, H W pixels, p patch size, C latent channels, h w finest grid, N tokens of all scales.


# Without it hieratok-tiny decodes 1.09 times as long at 64x64, and as long at 256x256 (one thread, by turns with
# each function's `__wrapped__` in its place): python -m timeit -s "import torch, hieratok_hf as h;
# core = h.AutoencoderHieraTok.from_pretrained(h.pretrained('hieratok-tiny')).requires_grad_(False).core;
# z = torch.zeros(1, core.config.latent_channels, 8, 8)" "core.decode(z)"
def keep_by_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Keep the last few results of a function of a layout, other hashable arguments and, as the last, a device.

    Nothing is kept inside a graph, which may be traced with tensors without data, and whose memory ends with it.
    """

    @functools.lru_cache(maxsize=8)
    def made(*arguments: Any) -> Any:
        # A table made while no gradient is wanted is used again where one is.
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments)

    @functools.wraps(function)
    def kept(layout: "PyramidLayout", *arguments: Any) -> Any:
        if is_watched() or layout.num_tokens > _KEPT_TOKENS:
            return function(layout, *arguments)
        captured = torch.device(arguments[-1]).type == "cuda" and torch.cuda.is_current_stream_capturing()
        return function(layout, *arguments) if captured else made(layout, *arguments)

    return kept


class PyramidCells(NamedTuple):
    """
    Hold the cell of every token of a pyramid.

    Attributes:
        scale (`torch.Tensor` of shape `(N,)`, int64): Number of each token's scale, 0 the coarsest.
        factor (`torch.Tensor` of shape `(N,)`, int64): Cells of the finest grid that each token covers on a side.
        row, column (`torch.Tensor` of shape `(N,)`, int64): Each token's place in its scale's grid.
    """

    scale: Tensor
    factor: Tensor
    row: Tensor
    column: Tensor

    def spans(self, grid: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Compute first and end of the rows, then of the columns, that each token covers of `grid`: four `(N,)`."""
        rows, columns = self.row * self.factor, self.column * self.factor
        return (rows, (rows + self.factor).clamp(max=grid[0])), (columns, (columns + self.factor).clamp(max=grid[1]))


@dataclass(frozen=True)
class PyramidLayout:
    """
    Lay out the grids of a pyramid of tokens in one sequence, coarse to fine.

    A grid that a factor does not divide is rounded up: its last row or column covers fewer cells.

    Attributes:
        grids (`tuple[tuple[int, int], ...]`): Height and width of each scale's grid, in tokens.
        scale_factors (`tuple[int, ...]`): Cells of the finest grid that one cell of each scale covers on a side.

    Example:

    ```python
    >>> from hieratok_hf import PyramidLayout
    >>> layout = PyramidLayout.from_grid(8, 10, (4, 2, 1))
    >>> layout.grids, layout.ends
    (((2, 3), (4, 5), (8, 10)), (6, 26, 106))

    ```
    """

    grids: tuple[tuple[int, int], ...]
    scale_factors: tuple[int, ...]

    @classmethod
    def from_grid(cls, height: int, width: int, scale_factors: tuple[int, ...]) -> "PyramidLayout":
        """Make the layout over `height` x `width` tokens; `ValueError` unless the factors decrease strictly to 1."""
        if height < 1 or width < 1:
            raise ValueError(f"`height` and `width` must be at least 1 token, got {height} and {width}.")
        scale_factors = check_scale_factors(scale_factors)
        # Rounded up without negative numbers, because division in ONNX rounds towards zero.
        grids = tuple(((height + factor - 1) // factor, (width + factor - 1) // factor) for factor in scale_factors)
        return cls(grids, scale_factors)

    # No `cached_property`: `torch.compile` cannot trace the lock that Python 3.11 has in it.
    @property
    def num_scales(self) -> int:
        """Count the scales."""
        return len(self.grids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Count the tokens of each scale."""
        return tuple(height * width for height, width in self.grids)

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the end of each scale in the sequence, which is the number of keys that its queries see."""
        return tuple(accumulate(self.lengths))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Return the place of each scale in the sequence."""
        return tuple(slice(end - length, end) for end, length in zip(self.ends, self.lengths))

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all scales, `N`."""
        return sum(self.lengths)

    def truncate(self, num_scales: int) -> "PyramidLayout":
        """Make the layout of the coarsest `num_scales`; `ValueError` unless that is in `1 ... self.num_scales`."""
        num_scales = whole_number("num_scales", num_scales, 1, self.num_scales)
        return PyramidLayout(self.grids[:num_scales], self.scale_factors[:num_scales])

    def cells(self, device: torch.device | None = None) -> PyramidCells:
        """Compute the cell of every token."""
        return _cells(self, torch.get_default_device() if device is None else device)

    def visible_ends(self, device: torch.device | None = None) -> Tensor:
        """Compute the one predicate of the mask, `(N,)` int64: a query `i` sees the keys `[0, visible_ends[i])`."""
        index = torch.arange(self.num_tokens, device=device)
        ends = torch.zeros_like(index) + self.ends[0]
        for previous, end in pairwise(self.ends):
            ends = ends + (index >= previous).long() * (end - previous)
        return ends


@keep_by_size
def _cells(layout: PyramidLayout, device: torch.device) -> PyramidCells:
    # Counted over the whole sequence, because the compiler makes a graph of its own for a tensor with a side of 1,
    # which the grid of a coarse scale often has.
    index = torch.arange(layout.num_tokens, device=device)
    scale = torch.zeros_like(index)
    factor, first, width = scale + layout.scale_factors[0], scale, scale + layout.grids[0][1]
    for i in range(1, layout.num_scales):
        # Exporters to ONNX cannot multiply truth values by a size that is not known yet.
        reached = (index >= layout.ends[i - 1]).long()
        scale = scale + reached
        factor = factor + reached * (layout.scale_factors[i] - layout.scale_factors[i - 1])
        first = first + reached * layout.lengths[i - 1]
        width = width + reached * (layout.grids[i][1] - layout.grids[i - 1][1])
    row = (index - first) // width
    return PyramidCells(scale, factor, row, index - first - row * width)


def flatten_pyramid(latents: Tensor, layout: PyramidLayout) -> Tensor:
    """
    Average-pool a latent to every scale of a layout.

    The token `(i, j)` of the scale of factor `f` is the average of the `n <= f * f` cells of its block that are there:

    ```
    t_f[i, j] = 1 / n * sum over a, b < f of  z[:, f i + a, f j + b]
    ```

    The finest map is `latents` of shape `(B, C, h, w)`, and `layout` is one over `h x w`. The tokens of all scales,
    `(B, N, C)`, come coarse first, each scale row by row.
    """
    if layout.scale_factors == (1,):
        return latents.flatten(2).transpose(1, 2)
    grid = (latents.shape[-2], latents.shape[-1])
    maps = []
    for factor, (rows, columns) in zip(layout.scale_factors, _pooled_grids(layout)):
        padding = (0, columns * factor - grid[1], 0, rows * factor - grid[0])
        pooled = F.avg_pool2d(F.pad(latents, padding), factor) if factor > 1 else latents
        maps.append(pooled.flatten(2))
    index, share = _places_in_pooled(layout, grid, latents.device)
    tokens = torch.cat(maps, dim=2)[:, :, index].transpose(1, 2)  # (B, N, C)
    return (tokens * share.to(torch.promote_types(latents.dtype, torch.float32))).to(latents.dtype)


def convolve_pyramid(
    latents: Tensor, layout: PyramidLayout, convolutions: Iterable[Callable[[Tensor], Tensor]]
) -> Tensor:
    """
    Map the block of cells that each token covers to that token, by a convolution a scale.

    The token `(i, j)` of the scale of factor `f` is made of the whole block, with the convolution's weight `W_f` and
    bias `b_f`. Where a block reaches beyond the latent, the border is continued:

    ```
    t_f[i, j] = b_f + sum over a, b < f, c < C of  W_f[:, c, a, b] * z[c, min(f i + a, h - 1), min(f j + b, w - 1)]
    ```

    The finest map is `latents` of shape `(B, C, h, w)`, and `layout` is one over `h x w`. There is one convolution a
    scale, coarse to fine, of kernel and stride `f`. The tokens `(B, N, D)` lie as those of `flatten_pyramid`.
    """
    grid = (latents.shape[-2], latents.shape[-1])
    maps = []
    for factor, (rows, columns), convolution in zip(layout.scale_factors, _pooled_grids(layout), convolutions):
        blocks = continue_border(latents, 0, columns * factor - grid[1], 0, rows * factor - grid[0])
        maps.append(convolution(blocks).flatten(2))
    index, _ = _places_in_pooled(layout, grid, latents.device)
    return torch.cat(maps, dim=2)[:, :, index].transpose(1, 2)  # (B, N, D)


def continue_border(maps: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Repeat the border of `maps` `(B, C, H, W)` at each side, to `(B, C, top + H + bottom, left + W + right)`."""
    # In compiled graphs the gradient of `F.pad` has other strides than they expect of it.
    if not torch.compiler.is_compiling():
        return F.pad(maps, (left, right, top, bottom), mode="replicate")
    columns = [maps[..., :1].expand(-1, -1, -1, left), maps, maps[..., -1:].expand(-1, -1, -1, right)]
    maps = torch.cat(columns, dim=3)
    rows = [maps[..., :1, :].expand(-1, -1, top, -1), maps, maps[..., -1:, :].expand(-1, -1, bottom, -1)]
    return torch.cat(rows, dim=2)


def _pooled_grids(layout: PyramidLayout) -> list[tuple[int, int]]:
    """Make the grids of the pooled maps a row and a column larger: a side of 1 would get a graph of its own."""
    extra = [int(factor > 1) for factor in layout.scale_factors]
    return [(rows + more, columns + more) for more, (rows, columns) in zip(extra, layout.grids)]


@keep_by_size
def _places_in_pooled(layout: PyramidLayout, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Find where each token lies in the pooled maps in a row, `(N,)`, and what its average lacks, `(N, 1)`."""
    cells = layout.cells(device)
    index, start = torch.zeros_like(cells.row), 0
    for scale, (rows, columns) in enumerate(_pooled_grids(layout)):
        index = index + (cells.scale == scale) * (start + cells.row * columns + cells.column)
        start = start + rows * columns
    # The averages at the borders hold zeros of the padding.
    (top, bottom), (left, right) = cells.spans(grid)
    covered = (bottom - top) * (right - left)
    return index, (cells.factor.square().float() / covered)[:, None]


def check_scale_factors(scale_factors: Iterable[int]) -> tuple[int, ...]:
    """Return `scale_factors` as an `int` each; `ValueError` unless they are integers that decrease strictly to 1."""
    try:
        factors = tuple(operator.index(factor) for factor in scale_factors)
    except TypeError:
        factors = ()
    if not factors or factors[-1] != 1 or not all(coarse > fine for coarse, fine in pairwise(factors)):
        raise ValueError(f"`scale_factors` must be integers that decrease strictly and end in 1, got {scale_factors}.")
    return factors
