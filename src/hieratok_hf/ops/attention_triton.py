"""Scale-causal attention as one Triton launch, forward and backward, registered as a PyTorch operator."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .attention_kernels import INTERPRETED, attention_kernel, key_gradient_kernel, query_gradient_kernel, triton
from .operators import NAMESPACE

__all__ = ["channels_last", "on_device", "prefix_attention", "why_not_triton"]

# Shape letters: B batch, N tokens of all scales, A heads, d channels of a head. A tile is M queries by K keys.

LARGEST_HEAD = 128
LOG2_E = 1 / math.log(2)

# Tiles `(M, K, warps, stages)` to choose from. The last fits every chip of compute capability 8 and higher.
ATTENTION_TILES = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)]
QUERY_GRADIENT_TILES = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2)]
KEY_GRADIENT_TILES = [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (32, 32, 4, 2)]


def _tuned(kernel: Any, tiles: list[tuple[int, int, int, int]]) -> Any:
    """The kernel with the fastest of its tiles `(M, K, warps, stages)`, timed once a head size, dtype and length."""
    configs = [triton.Config({"M": m, "K": k}, num_warps=warps, num_stages=stages) for m, k, warps, stages in tiles]
    if INTERPRETED.value:
        configs = [triton.Config({"M": 32, "K": 64})]  # nothing to time there

    def serving(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
        # Larger tiles of float32 do not fit the registers.
        small = [config for config in configs if config.kwargs["M"] * config.kwargs["K"] <= 32 * 64]
        return small if arguments["query"].dtype == torch.float32 else configs

    return triton.autotune(
        configs,
        key=["HEAD_DIM", "length_class"],
        prune_configs_by={"early_config_prune": serving},
        cache_results=True,
    )(kernel)


_attend = _tuned(attention_kernel, ATTENTION_TILES)
_query_gradient = _tuned(query_gradient_kernel, QUERY_GRADIENT_TILES)
_key_gradient = _tuned(key_gradient_kernel, KEY_GRADIENT_TILES)


def why_not_triton(query: Tensor, scale: float) -> str | None:
    """
    The reason that the kernel cannot serve such projections, or `None` where it can.

    Args:
        query (`torch.Tensor` of shape `(B, A, N, d)`): For its device, dtype and channels of a head.
        scale (`float`): Factor of the scores before the softmax.
    """
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernel takes float16, bfloat16 and float32, not {query.dtype}"
    if query.shape[-1] > LARGEST_HEAD:
        return f"the kernel takes heads of at most {LARGEST_HEAD} channels, not {query.shape[-1]}"
    if not scale > 0:
        return f"the kernel takes a positive `scale`, not {scale}"
    if INTERPRETED.value:
        return None
    if query.device.type != "cuda":
        return f"the kernel runs on a CUDA device, not on {query.device.type!r} (or anywhere with TRITON_INTERPRET=1)"
    capability = torch.cuda.get_device_capability(query.device)
    if torch.version.hip is None and capability < (8, 0):
        return f"the kernel needs CUDA compute capability 8.0 or higher, not {capability[0]}.{capability[1]}"
    return None


def _arguments(query: Tensor, ends: Sequence[int], scale: float) -> dict[str, Any]:
    """Give the arguments of every launch that describe the sequence."""
    num_tokens, heads, head_dim = query.shape[1:]
    return {
        # An odd number above 1 is never specialised, so one compilation serves all layouts of so many scales.
        "ends": tuple(2 * end + 1 for end in ends),
        "num_tokens": num_tokens,
        "heads": heads,
        "scale": scale * LOG2_E,
        "length_class": num_tokens.bit_length(),
        "HEAD_DIM": head_dim,
        "D": max(16, triton.next_power_of_2(head_dim)),
    }


def _programs(query: Tensor, ends: Sequence[int], block: str) -> Callable[[dict[str, Any]], tuple[int]]:
    """The number of programs, one for each tile of `block` rows of one scale, batch and head."""
    lengths = [end - start for start, end in zip((0, *ends), ends)]
    return lambda meta: (query.shape[0] * query.shape[2] * sum(triton.cdiv(n, meta[block]) for n in lengths),)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """
    A context in which the current device is that of a tensor.

    Args:
        tensor (`torch.Tensor` of any shape): On the device.
    """
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def channels_last(tensor: Tensor) -> Tensor:
    """
    A tensor with its last dimension dense, as the kernels read it; itself where it is so already.

    Args:
        tensor (`torch.Tensor` of any shape): With one dimension or more.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::prefix_attention", mutates_args=())
def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """
    Attention in which the rows between two neighbours of `(0, *ends)` see all keys before the second.

    Deterministic, forward and backward: no sum depends on the order in which programs run.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, N, A, d)`): One dtype, float16, bfloat16 or float32.
        ends (`Sequence[int]`): End of each scale in the sequence, increasing; the last is `N`.
        scale (`float`): Positive factor of the scores before the softmax.

    Returns:
        The attended values `(B, N, A, d)`, and, for the backward pass, the base-2 logarithm of the sum under each
        softmax `(B, A, N)` in float32.
    """
    query, key, value = channels_last(query), channels_last(key), channels_last(value)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_sum = torch.empty(_rows(query), dtype=torch.float32, device=query.device)
    if query.numel():
        with on_device(query):
            _attend[_programs(query, ends, "M")](
                query, key, value, output, log_sum,
                query.stride()[:3], key.stride()[:3], value.stride()[:3], output.stride()[:3],
                **_arguments(query, ends, scale),
            )  # fmt: skip
    return output, log_sum


@torch.library.custom_op(f"{NAMESPACE}::prefix_attention_backward", mutates_args=())
def prefix_attention_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    ends: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `query`, `key` and `value`, each `(B, N, A, d)`; weights are computed again from `log_sum`."""
    query, key, value = channels_last(query), channels_last(key), channels_last(value)
    upstream = channels_last(upstream)
    gradients = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
    if query.numel():
        delta = torch.empty_like(log_sum)
        strides = [x.stride()[:3] for x in (query, key, value, output, upstream, gradients[0])]
        arguments = {"softmax_scale": scale, **_arguments(query, ends, scale)}
        with on_device(query):
            _query_gradient[_programs(query, ends, "M")](
                query, key, value, output, upstream, log_sum, delta, gradients[0], *strides, **arguments
            )
            del strides[3]
            _key_gradient[_programs(query, ends, "K")](
                query, key, value, upstream, log_sum, delta, *gradients[1:], *strides, **arguments
            )
    return gradients[0], gradients[1], gradients[2]


def _rows(query: Tensor) -> tuple[int, int, int]:
    return query.shape[0], query.shape[2], query.shape[1]


@prefix_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(_rows(query), dtype=torch.float32)


@prefix_attention_backward.register_fake
def _(upstream, query, key, value, output, log_sum, ends, scale) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, ctx.ends, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream: Tensor, _: Tensor):
    return *prefix_attention_backward(upstream, *ctx.saved_tensors, ctx.ends, ctx.scale), None, None


prefix_attention.register_autograd(_backward, setup_context=_setup_context)


def _visible_scores(shape: Sequence[int], ends: Sequence[int]) -> int:
    return shape[0] * shape[2] * sum((end - start) * end for start, end in zip((0, *ends), ends))


@register_flop_formula(getattr(torch.ops, NAMESPACE).prefix_attention)
def _(query, key, value, ends, scale, *args, out_shape=None, **kwargs) -> int:
    # Two products of matrices: the scores and the values.
    return 2 * 2 * query[3] * _visible_scores(query, ends)


@register_flop_formula(getattr(torch.ops, NAMESPACE).prefix_attention_backward)
def _(upstream, query, key, value, output, log_sum, ends, scale, *args, out_shape=None, **kwargs) -> int:
    # The scores again, and the gradients of weights, queries, keys and values, as PyTorch counts its own attention.
    return 2 * 5 * query[3] * _visible_scores(query, ends)
