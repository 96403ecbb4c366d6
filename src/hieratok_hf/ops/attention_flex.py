"""Compute scale-causal attention by PyTorch's `flex_attention` (arXiv 2412.05496); block masks of layouts are kept."""

import functools
import itertools
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .pyramid import PyramidLayout
from .torch_compat import is_exporting, is_watched

__all__ = ["flex_scale_causal_attention"]

# Shape letters: B batch, A heads, N tokens of all scales, d channels of a head.

BLOCK_SIZE = 128
BLOCK_FIELDS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def _sees(ends: tuple[int, ...]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        visible = torch.full_like(query_row, ends[0])
        for start, end in itertools.pairwise(ends):
            visible = visible + (query_row >= start) * (end - start)
        return key_row < visible

    return sees


@functools.lru_cache(maxsize=8)
def _kept_block_mask(ends: tuple[int, ...], device: torch.device) -> BlockMask:
    # A mask first made in inference mode must also serve where gradients are needed.
    with torch.inference_mode(False):
        return create_block_mask(_sees(ends), None, None, ends[-1], ends[-1], device, BLOCK_SIZE)


# A block mask cannot be a constant of a compiled graph, but its tensors can.
@torch.compiler.assume_constant_result
def _block_tensors(ends: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    # What is exported, faked or wrapped is no tensor to keep.
    is_passing = is_exporting() or (is_watched() and not torch.compiler.is_compiling())
    make = _kept_block_mask.__wrapped__ if is_passing else _kept_block_mask
    block_mask = make(ends, device)
    return tuple(getattr(block_mask, field) for field in BLOCK_FIELDS)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def flex_scale_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PyramidLayout, scale: float
) -> Tensor:
    """
    Compute scale-causal attention of `query`, `key` and `value`, each of shape `(B, A, N, d)`, by `flex_attention`.

    Inside `torch.compile` it becomes part of the graph. Outside it is compiled by itself on an accelerator; on a CPU
    PyTorch computes it unfused there.
    """
    # A block mask is of one layout, and so is a graph that holds it, also where shapes are symbols.
    ends = tuple(operator.index(end) for end in layout.ends)
    # `view` says their sizes, which a graph of symbolic shapes would take for symbols.
    sizes = (1, 1, *[-(-ends[-1] // BLOCK_SIZE)] * 2)
    tensors = [x.view(sizes[: x.ndim]) for x in _block_tensors(ends, query.device)]
    block_mask = BlockMask(
        seq_lengths=(ends[-1], ends[-1]),
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=_sees(ends),
        **dict(zip(BLOCK_FIELDS, tensors)),
    )
    attend: Callable[..., Tensor] = flex_attention
    if query.device.type == "cpu":
        # Where no gradient is computed, it still refuses inputs that could have one.
        query, key, value = query.detach(), key.detach(), value.detach()
    elif not torch.compiler.is_compiling():
        attend = _compiled_flex_attention()
    return attend(query, key, value, block_mask=block_mask, scale=scale)
