"""Compute QK-norm and rotary positions in one Triton kernel, which reads and writes once, not once a step."""

from typing import Any

import torch
from torch import Tensor

from .attention_triton import channels_last, tl, triton
from .torch_compat import NAMESPACE

__all__ = ["norm_rotary"]

# Shape letters: B batch, N tokens, A heads, d channels of a head, D a power of two that holds them, R rows of a tile.

ROWS = 32


@triton.jit
def _row_pointers(tensor, strides, rows, num_rows, num_tokens, heads, channels):
    """Compute the addresses of the heads `rows`, counted through batch, tokens and heads, `(R, D)`."""
    rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    batch, token, head = rows // (num_tokens * heads), rows // heads % num_tokens, rows % heads
    return tensor + (batch * strides[0] + token * strides[1] + head * strides[2])[:, None] + channels[None, :]


@triton.jit
def _swap(values, R: tl.constexpr, D: tl.constexpr):
    """Exchange the two channels of each pair, within registers."""
    first, second = tl.split(tl.reshape(values, (R, D // 2, 2)))
    return tl.reshape(tl.join(second, first), (R, D))


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "heads"])
def rotary_kernel(
    states, weight, cos, signed_sin, rotated, strides, rotated_strides, num_rows, num_tokens, heads, eps,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows, channels = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, D)
    inside = channels < HEAD_DIM
    mask = (rows < num_rows)[:, None] & inside[None, :]
    pointers = _row_pointers(states, strides, rows, num_rows, num_tokens, heads, channels)
    values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # (R, d)
    if NORM:
        scale = tl.rsqrt(tl.sum(values * values, 1) / HEAD_DIM + eps)
        values *= scale[:, None] * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    places = (rows // heads % num_tokens)[:, None] * HEAD_DIM + channels[None, :]
    result = values * tl.load(cos + places, mask=mask, other=0.0)
    result += _swap(values, R, D) * tl.load(signed_sin + places, mask=mask, other=0.0)
    pointers = _row_pointers(rotated, rotated_strides, rows, num_rows, num_tokens, heads, channels)
    tl.store(pointers, result.to(rotated.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "heads"])
def rotary_gradient_kernel(
    upstream, states, weight, cos, signed_sin, gradient, weight_gradients,
    upstream_strides, strides, gradient_strides, num_rows, num_tokens, heads, eps,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the states, and each program's share of that of the weight."""
    rows, channels = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, D)
    inside = channels < HEAD_DIM
    mask = (rows < num_rows)[:, None] & inside[None, :]
    pointers = _row_pointers(upstream, upstream_strides, rows, num_rows, num_tokens, heads, channels)
    of_rotated = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # (R, d)
    places = (rows // heads % num_tokens)[:, None] * HEAD_DIM + channels[None, :]
    result = of_rotated * tl.load(cos + places, mask=mask, other=0.0)
    # A channel went to its partner by the partner's sine.
    result += _swap(of_rotated * tl.load(signed_sin + places, mask=mask, other=0.0), R, D)
    if NORM:
        pointers = _row_pointers(states, strides, rows, num_rows, num_tokens, heads, channels)
        values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # (R, d)
        scale = tl.rsqrt(tl.sum(values * values, 1) / HEAD_DIM + eps)[:, None]
        values *= scale
        shares = weight_gradients + tl.program_id(0) * HEAD_DIM + channels
        tl.store(shares, tl.sum(result * values, 0), mask=inside)
        result *= tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
        result = scale * (result - values * (tl.sum(result * values, 1) / HEAD_DIM)[:, None])
    pointers = _row_pointers(gradient, gradient_strides, rows, num_rows, num_tokens, heads, channels)
    tl.store(pointers, result.to(gradient.dtype.element_ty), mask=mask)


def _rotary_arguments(states: Tensor, weight: Tensor | None, eps: float) -> dict[str, Any]:
    batch, num_tokens, heads, head_dim = states.shape
    return {
        "num_rows": batch * num_tokens * heads,
        "num_tokens": num_tokens,
        "heads": heads,
        "eps": eps,
        "HEAD_DIM": head_dim,
        "NORM": weight is not None,
        "D": triton.next_power_of_2(head_dim),
        "R": ROWS,
    }


def _rotary_programs(states: Tensor) -> int:
    return triton.cdiv(states.shape[:-1].numel(), ROWS)


@torch.library.custom_op(f"{NAMESPACE}::norm_rotary", mutates_args=())
def norm_rotary(states: Tensor, weight: Tensor | None, cos: Tensor, signed_sin: Tensor, eps: float) -> Tensor:
    """
    Norm each head by its root mean square and turn it by its token's angles, in float32 with one rounding at the end.

    It takes `states` of shape `(B, N, A, d)`, `d` even, the norm's `weight` of shape `(d,)`, without which there is no
    norm, and the tables of `rotary_tables`, `cos` and `signed_sin`, each of shape `(N, 1, d)`, which get no gradient.
    """
    states, cos, signed_sin = channels_last(states), cos.contiguous(), signed_sin.contiguous()
    rotated = states.new_empty(states.shape)
    if states.numel():
        with torch.cuda.device_of(states):
            rotary_kernel[(_rotary_programs(states),)](
                states, weight, cos, signed_sin, rotated, states.stride()[:3], rotated.stride()[:3],
                **_rotary_arguments(states, weight, eps),
            )  # fmt: skip
    return rotated


@torch.library.custom_op(f"{NAMESPACE}::norm_rotary_backward", mutates_args=())
def norm_rotary_backward(
    upstream: Tensor, states: Tensor, weight: Tensor | None, cos: Tensor, signed_sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `states`, `(B, N, A, d)`, and of `weight`, `(d,)` in float32 (zero without one)."""
    upstream, states = channels_last(upstream), channels_last(states)
    cos, signed_sin = cos.contiguous(), signed_sin.contiguous()
    gradient = states.new_empty(states.shape)
    # A row a program, summed afterwards in one order, so that runs agree to the bit.
    shape = (_rotary_programs(states) if weight is not None else 0, states.shape[-1])
    weight_gradients = states.new_empty(shape, dtype=torch.float32)
    if states.numel():
        with torch.cuda.device_of(states):
            rotary_gradient_kernel[(_rotary_programs(states),)](
                upstream, states, weight, cos, signed_sin, gradient, weight_gradients,
                upstream.stride()[:3], states.stride()[:3], gradient.stride()[:3],
                **_rotary_arguments(states, weight, eps),
            )  # fmt: skip
    return gradient, weight_gradients.sum(0)


@norm_rotary.register_fake
def _(states: Tensor, weight: Tensor | None, cos: Tensor, signed_sin: Tensor, eps: float) -> Tensor:
    return states.new_empty(states.shape)


@norm_rotary_backward.register_fake
def _(upstream, states, weight, cos, signed_sin, eps) -> tuple[Tensor, Tensor]:
    return states.new_empty(states.shape), states.new_empty(states.shape[-1], dtype=torch.float32)


def _rotary_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _rotary_backward(ctx, upstream: Tensor):
    weight = ctx.saved_tensors[1]
    gradient, weight_gradient = norm_rotary_backward(upstream, *ctx.saved_tensors, ctx.eps)
    return gradient, None if weight is None else weight_gradient.to(weight.dtype), None, None, None


norm_rotary.register_autograd(_rotary_backward, setup_context=_rotary_setup_context)
