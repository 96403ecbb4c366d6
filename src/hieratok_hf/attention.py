"""Scale-causal attention: a token sees its own scale and every coarser one (HieraTok, arXiv 2509.23736)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_reference import reference_attention
from .pyramid import PyramidLayout

__all__ = ["ATTENTION_BACKENDS", "scale_causal_attention"]

# Shape letters: B batch, A heads, N tokens of all scales, d channels of a head.

ATTENTION_BACKENDS = ("auto", "reference", "sdpa")


def scale_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PyramidLayout,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """
    Attention over a pyramid of tokens in which the queries of scale `i` see the keys of the scales `0 ... i`.

    With a layout of one scale it is full attention.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, A, N, d)`): Projected tokens, coarse scale first.
        layout (`PyramidLayout`): The scales of the sequence, `layout.num_tokens == N`.
        backend (`str`, defaults to `"auto"`): `"reference"` builds the dense mask and computes in float32; `"sdpa"`
            makes one unmasked `scaled_dot_product_attention` a scale; `"auto"` picks the fastest that serves.
        scale (`float`, *optional*): Factor of the scores before the softmax, `d ** -0.5` unless given.
        return_weights (`bool`, defaults to `False`): Also return the weights `(B, A, N, N)` in float32, which only
            `"reference"` (and thus `"auto"`) can.

    Returns:
        `torch.Tensor` of shape `(B, A, N, d)` in the dtype of `query`, and the weights if they were asked for.

    Raises:
        ValueError: An unknown backend, shapes that disagree with each other or the layout, or a backend that was
            named and cannot return weights.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"`backend` must be one of {list(ATTENTION_BACKENDS)}, got {backend!r}.")
    if query.ndim != 4 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "`query`, `key` and `value` must have one shape (batch, heads, tokens, head channels), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[2] != layout.num_tokens:
        raise ValueError(f"`layout` has {layout.num_tokens} tokens, but `query` has {query.shape[2]}.")
    if return_weights and backend == "sdpa":
        raise ValueError("`backend='sdpa'` cannot return weights; use `backend='reference'`.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    if backend == "reference" or return_weights:
        attended, weights = reference_attention(query, key, value, layout, scale)
        return (attended, weights) if return_weights else attended

    # What a scale sees is a prefix of the sequence, so no mask is needed, only shorter keys.
    attended_scales = []
    for rows in layout.slices:
        prefix = slice(0, rows.stop)
        attended_scales.append(
            F.scaled_dot_product_attention(query[:, :, rows], key[:, :, prefix], value[:, :, prefix], scale=scale)
        )
    return attended_scales[0] if len(attended_scales) == 1 else torch.cat(attended_scales, dim=2)
