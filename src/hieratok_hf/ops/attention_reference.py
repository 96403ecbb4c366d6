"""The definition of scale-causal attention, which every other backend is compared with: a dense mask in float32."""

import torch
from torch import Tensor

from .pyramid import PyramidLayout

__all__ = ["reference_attention", "scale_causal_mask"]

# Shape letters: B batch, A heads, N tokens of all scales, d channels of a head.


def scale_causal_mask(layout: PyramidLayout, device: torch.device | None = None) -> Tensor:
    """`(N, N)` bool: whether the query of a row may see the key of a column."""
    return torch.arange(layout.num_tokens, device=device)[None, :] < layout.visible_ends(device)[:, None]


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PyramidLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """
    Scale-causal attention from its dense mask.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, A, N, d)`): Projected tokens, coarse scale first.
        layout (`PyramidLayout`): The scales of the sequence.
        scale (`float`): Factor of the scores before the softmax.

    Returns:
        The attended values `(B, A, N, d)` in the dtype of `query`, and the weights `(B, A, N, N)` in float32.
    """
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)  # (B, A, N, N)
    scores = scores.masked_fill(~scale_causal_mask(layout, query.device), float("-inf"))
    weights = scores.softmax(dim=-1)
    return (weights @ value.float()).to(query.dtype), weights
