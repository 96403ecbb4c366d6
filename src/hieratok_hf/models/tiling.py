"""Run a model on large images in overlapping tiles, weighted so that they sum to one image without a seam."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor

from ..utils.numbers import whole_number

__all__ = ["TilingMixin", "run_in_tiles"]

# Shape letters: B batch, C channels of the input, K channels of the result, H W sides of the input.

Span = tuple[int, int]


def tile_spans(length: int, size: int, stride: int, unit: int = 1) -> list[Span]:
    """Divide a side into overlapping tiles `(start, end)`, whose starts are multiples of `unit`."""
    if not 0 < stride <= size or unit > size:
        raise ValueError(f"Tiles of {size} that begin every {stride}, at multiples of {unit}, do not cover a side.")
    if length <= size:
        return [(0, length)]
    # All tiles but the last are as long as `size`, so that they meet one compiled graph and the context that the model
    # was trained with; with a unit of 1 the last is so too, and overlaps the one before by more.
    step = max(stride // unit, 1) * unit
    last = -(-(length - size) // unit) * unit
    return [(start, start + size) for start in range(0, last, step)] + [(last, length)]


def tile_weights(spans: Sequence[Span], device: torch.device | None = None) -> list[Tensor]:
    """Compute each tile's weights `(end - start,)`, which sum to 1 and pass evenly from tile to tile."""
    total = torch.zeros(spans[-1][1], dtype=torch.float32, device=device)
    weights = []
    for i, (start, end) in enumerate(spans):
        place = torch.arange(start, end, dtype=torch.float32, device=device) + 0.5
        weight = torch.ones_like(place)
        if i > 0:
            weight = torch.minimum(weight, (place - start) / max(spans[i - 1][1] - start, 1))
        if i < len(spans) - 1:
            weight = torch.minimum(weight, (end - place) / max(end - spans[i + 1][0], 1))
        weights.append(weight)
        total[start:end] += weight
    return [weight / total[start:end] for weight, (start, end) in zip(weights, spans)]


def run_in_tiles(
    function: Callable[[Tensor], Tensor],
    tensor: Tensor,
    tile: tuple[int, int],
    stride: tuple[int, int],
    ratio: tuple[int, int],
    unit: int = 1,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """
    Run a function of maps tile by tile, and add the weighted results to `(B, K, H * ratio, W * ratio)`.

    Args:
        function (`Callable`): A function from `(B, C, height, width)` to `(B, K, height * ratio, width * ratio)`. It
            takes sides that are no multiples of `unit` for the next multiple.
        tensor (`torch.Tensor` of shape `(B, C, H, W)`): The whole map.
        tile, stride (`tuple[int, int]`): Height and width of a tile, and the steps between tiles, in the map's cells.
        ratio (`tuple[int, int]`): Sides of the result over those of the map, as numerator and denominator.
        unit (`int`, defaults to 1): Number of cells of which every tile's beginning is a multiple, so that it lies at
            a whole cell of the result.
        group (`torch.distributed.ProcessGroup`, *optional*): Processes that share the tiles. Each calls this with the
            same map and gets the whole result, to the bit that of one process, without gradients.

    Raises:
        ValueError: Tiles of these sizes and steps do not cover the map.
    """
    sides: list[list[tuple[Span, Span, Tensor]]] = []
    for length, size, step in zip(tensor.shape[-2:], tile, stride):
        spans = tile_spans(length, size, step, unit)
        whole = [(start, -(-end // unit) * unit) for start, end in spans]
        made = [(start * ratio[0] // ratio[1], end * ratio[0] // ratio[1]) for start, end in whole]
        sides.append(list(zip(spans, made, tile_weights(made, tensor.device))))
    tiles = list(itertools.product(*sides))

    def run_tile(number: int) -> Tensor:
        ((top, bottom), *_), ((left, right), *_) = tiles[number]
        return function(tensor[:, :, top:bottom, left:right])

    parts: Iterator[Tensor]
    if group is None:
        parts = map(run_tile, range(len(tiles)))
    else:
        shapes = [(row[1] - row[0], column[1] - column[0]) for (_, row, _), (_, column, _) in tiles]
        parts = _share_tiles(run_tile, shapes, tensor.device, group)
    height, width = (made[-1][1][1] for made in sides)
    result = None
    for part, (row, column) in zip(parts, tiles):
        (_, (first_row, end_row), row_weight), (_, (first_column, end_column), column_weight) = row, column
        if result is None:
            result = part.new_zeros(*part.shape[:2], height, width)
        # Weights of half precision would not sum to 1.
        result[:, :, first_row:end_row, first_column:end_column] += part * row_weight[:, None] * column_weight
    assert result is not None
    return result


def _share_tiles(
    run_tile: Callable[[int], Tensor],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    group: "dist.ProcessGroup",
) -> Iterator[Tensor]:
    """Run the tiles of these heights and widths in turn by the processes of a group, and give each of them all."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    with torch.no_grad():
        mine = {number: run_tile(number).contiguous() for number in range(rank, len(shapes), world)}
    # A process that has no tile learns what they are of.
    told = [(mine[0].shape[:2], mine[0].dtype) if rank == 0 else None]
    dist.broadcast_object_list(told, group=group, group_src=0)
    assert told[0] is not None
    batch_and_channels, dtype = told[0]
    for number, shape in enumerate(shapes):
        source = number % world
        if source == rank:
            part = mine.pop(number)
        else:
            part = torch.empty(*batch_and_channels, *shape, dtype=dtype, device=device)
        dist.broadcast(part, group=group, group_src=source)
        yield part


class TilingMixin(AutoencoderMixin):
    """Switch the tiling of an autoencoder on and off, by the names that diffusers' own use."""

    def init_tiling(self, patch_size: int, side: int) -> None:
        """Leave tiling off; once switched on, it has square tiles of `side` pixels, every three quarters of a side."""
        self.use_tiling = self.use_parallel_tiling = False
        self._tile_group: dist.ProcessGroup | None = None
        self._tile_unit = patch_size
        self.tile_sample_min_height = self.tile_sample_min_width = side
        self.tile_sample_stride_height = self.tile_sample_stride_width = _default_stride(side, patch_size)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """
        Encode and decode images larger than a tile in overlapping tiles, one at a time.

        Memory then grows with the image alone, and time with its pixels instead of their square.
        Attention sees no further than a tile, so the result is close to that of the whole image, not equal to it: it
        is better where the weights were trained to images of a tile's size, as those that ship with the package.

        Args:
            tile_sample_min_height, tile_sample_min_width (`int`, *optional*): Sides of a tile in pixels, multiples of
                the patch size; unless given, those of the last call, at first 256 or two of the coarsest cells.
            tile_sample_stride_height, tile_sample_stride_width (`int`, *optional*): Steps from tile to tile in
                pixels, multiples of the patch size; what they lack of a tile overlaps. Unless given, those of the
                last call, or three quarters of a side that was given.

        Raises:
            ValueError: A value is no positive multiple of the patch size, or a stride is longer than its tile.
        """
        values: dict[str, int] = {}
        for side, size, stride in (
            ("height", tile_sample_min_height, tile_sample_stride_height),
            ("width", tile_sample_min_width, tile_sample_stride_width),
        ):
            size_name, stride_name = f"tile_sample_min_{side}", f"tile_sample_stride_{side}"
            if size is None:
                size, stride = getattr(self, size_name), getattr(self, stride_name) if stride is None else stride
            size = self._take_multiple(size_name, size)
            stride = _default_stride(size, self._tile_unit) if stride is None else stride
            stride = self._take_multiple(stride_name, stride)
            if stride > size:
                raise ValueError(f"`{stride_name}` must be at most the tile's {size} pixels, got {stride}.")
            values |= {size_name: size, stride_name: stride}
        for name, value in values.items():
            setattr(self, name, value)
        super().enable_tiling()

    def enable_parallel_tiling(self, group: "dist.ProcessGroup | None" = None) -> None:
        """
        Encode and decode images larger than a tile in tiles that several processes share.

        Each process calls `encode` and `decode` with the same batch, and gets the whole result, to the bit that of
        `enable_tiling` in one process, without gradients. Sides of tiles are those of the last `enable_tiling`;
        `disable_tiling` ends it.

        Args:
            group (`torch.distributed.ProcessGroup`, *optional*): The processes that share the tiles; all unless given.

        Raises:
            ValueError: `torch.distributed` is not initialised, or this process is none of the group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("Parallel tiling needs processes; call `torch.distributed.init_process_group` before it.")
        if dist.get_rank(group) < 0:
            raise ValueError("`group` must hold this process, which is none of its own.")
        self.enable_tiling()
        self.use_parallel_tiling, self._tile_group = True, group

    def disable_tiling(self) -> None:
        """Encode and decode images whole again, each process its own."""
        super().disable_tiling()
        self.use_parallel_tiling, self._tile_group = False, None

    def tiles(self, pixels: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return height and width of a tile, and of the step between tiles, in cells of `pixels` a side."""
        size = (self.tile_sample_min_height // pixels, self.tile_sample_min_width // pixels)
        return size, (self.tile_sample_stride_height // pixels, self.tile_sample_stride_width // pixels)

    def needs_tiles(self, batch: Any, pixels: int) -> bool:
        """Tell whether tiling is on and `batch` holds maps, in cells of `pixels` a side, larger than a tile."""
        (height, width), _ = self.tiles(pixels)
        is_map = isinstance(batch, Tensor) and not batch.is_nested and batch.ndim == 4
        return self.use_tiling and is_map and (batch.shape[2] > height or batch.shape[3] > width)

    def _run_in_tiles(
        self, function: Callable[[Tensor], Tensor], tensor: Tensor, pixels: int, ratio: tuple[int, int], unit: int
    ) -> Tensor:
        """Run a function of maps in tiles as they are set, in cells of `pixels` a side, as `run_in_tiles` does."""
        group = (self._tile_group or dist.group.WORLD) if self.use_parallel_tiling else None
        return run_in_tiles(function, tensor, *self.tiles(pixels), ratio, unit, group)

    def _take_multiple(self, name: str, value: Any) -> int:
        number = whole_number(name, value, self._tile_unit)
        if number % self._tile_unit:
            raise ValueError(f"`{name}` must be a multiple of the patch size {self._tile_unit}, got {number}.")
        return number


def _default_stride(side: int, patch_size: int) -> int:
    return max(side * 3 // 4 // patch_size, 1) * patch_size
