"""Compute scale-causal attention in one Triton launch: flash attention (arXiv 2307.08691) over prefixes of keys."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .torch_compat import NAMESPACE

__all__ = ["channels_last", "prefix_attention", "tl", "triton", "why_not_triton"]

# A trap: before code from the Hub runs, diffusers and transformers look for its imports. transformers takes those in a
# `try` for optional. diffusers reads lines, and misses an `import x` only where something stands behind it, so the
# comment behind `import triton` must stay. Without it, diffusers warns on every machine that has no Triton.
try:
    import triton  # this comment must stay
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed.") from error
if not hasattr(triton, "knobs"):
    raise ImportError(f"Triton 3.4 or later is needed, {triton.__version__} is installed.")


# Shape letters: B batch, N tokens of all scales, A heads, d channels of a head, D a power of two that holds them.
# A tile is M queries by K keys.
#
# Tiles of rows are counted scale by scale, so that none straddles two: all of a tile's queries see one prefix, and all
# of its keys are seen by one suffix. So scores need a mask only at the ragged end of a prefix, and nothing beyond the
# prefix is ever read.

# With `TRITON_INTERPRET=1` Triton interprets the kernels, on any device.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Three products of the tensor cores' short floats make a float32 one; AMD's compiler has only the plain way.
PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")


@triton.jit
def _locate(program, ends, BLOCK: tl.constexpr, FINEST_FIRST: tl.constexpr):
    """Find the tile of a program: batch and head, first row, and start and end of the scale that the rows are of."""
    num_tiles = 0
    scale_start = 0
    for i in tl.static_range(len(ends)):
        num_tiles += tl.cdiv(ends[i] // 2 - scale_start, BLOCK)
        scale_start = ends[i] // 2
    # The longest tiles start first, so that short ones fill the end of the launch.
    tile = num_tiles - 1 - program % num_tiles if FINEST_FIRST else program % num_tiles

    first_row, start, end = 0, 0, 0
    tiles_before = 0
    scale_start = 0
    for i in tl.static_range(len(ends)):
        scale_end = ends[i] // 2
        reached = tile >= tiles_before
        first_row = tl.where(reached, scale_start + (tile - tiles_before) * BLOCK, first_row)
        start = tl.where(reached, scale_start, start)
        end = tl.where(reached, scale_end, end)
        tiles_before += tl.cdiv(scale_end - scale_start, BLOCK)
        scale_start = scale_end
    return program // num_tiles, first_row, start, end


@triton.jit
def _pointers(tensor, strides, batch_head, heads, rows, channels):
    """Compute the addresses of `rows` of one head, `(len(rows), len(channels))`."""
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    return tensor + batch * strides[0] + head * strides[2] + rows[:, None] * strides[1] + channels[None, :]


@triton.jit
def _load(pointers, rows, end, channels, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Load rows before `end`, zero beyond it and beyond the head's channels."""
    if RAGGED:
        return tl.load(pointers, mask=(rows[:, None] < end) & (channels[None, :] < HEAD_DIM), other=0.0)
    elif channels.shape[0] > HEAD_DIM:
        return tl.load(pointers, mask=channels[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _dot(left, right, start=None):
    """Compute `left @ right + start` in float32, also of float32 inputs."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as raw bits and would multiply those.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, start, input_precision=PRECISION)


@triton.jit
def _forward_step(
    accumulator, maximum, total, query, keys, values, key_row, row, end, channels, scale,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Update the online softmax by one more tile of keys; scores and their maximum are in units of log 2."""
    key_rows = row + key_row
    key = _load(keys, key_rows, end, channels, HEAD_DIM, RAGGED)  # (K, d)
    scores = _dot(query, tl.trans(key))  # (M, K)
    if RAGGED:
        scores = tl.where(key_rows[None, :] < end, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    value = _load(values, key_rows, end, channels, HEAD_DIM, RAGGED)  # (K, d)
    accumulator = _dot(weights.to(value.dtype), value, accumulator * decay[:, None])
    return accumulator, new_maximum, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["num_tokens", "heads", "length_class"])
def attention_kernel(
    query, key, value, output, log_sum,
    query_strides, key_strides, value_strides, output_strides,
    ends, num_tokens, heads, scale, length_class,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute attention `(B, N, A, d)`, and the base-2 logarithm of each softmax's sum, `(B, A, N)` in float32."""
    batch_head, first_row, _, end = _locate(tl.program_id(0), ends, M, FINEST_FIRST=True)
    rows, key_row, channels = first_row + tl.arange(0, M), tl.arange(0, K), tl.arange(0, D)
    queries = _pointers(query, query_strides, batch_head, heads, rows, channels)
    tile = _load(queries, rows, end, channels, HEAD_DIM, True)  # (M, d)
    keys = _pointers(key, key_strides, batch_head, heads, key_row, channels)
    values = _pointers(value, value_strides, batch_head, heads, key_row, channels)

    accumulator = tl.zeros((M, D), tl.float32)
    maximum = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    whole = end - end % K
    for row in range(0, whole, K):
        accumulator, maximum, total = _forward_step(
            accumulator, maximum, total, tile, keys, values, key_row, row, end, channels, scale, HEAD_DIM, False
        )
        keys += K * key_strides[1]
        values += K * value_strides[1]
    if whole < end:
        accumulator, maximum, total = _forward_step(
            accumulator, maximum, total, tile, keys, values, key_row, whole, end, channels, scale, HEAD_DIM, True
        )

    written = rows < end
    outputs = _pointers(output, output_strides, batch_head, heads, rows, channels)
    result = (accumulator / total[:, None]).to(output.dtype.element_ty)
    tl.store(outputs, result, mask=written[:, None] & (channels[None, :] < HEAD_DIM))
    tl.store(log_sum + batch_head.to(tl.int64) * num_tokens + rows, maximum + tl.log2(total), mask=written)


@triton.jit
def _query_gradient_step(
    gradient, query, upstream, log_sum, delta, keys, values, key_row, row, end, channels, scale,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    key_rows = row + key_row
    key = _load(keys, key_rows, end, channels, HEAD_DIM, RAGGED)  # (K, d)
    value = _load(values, key_rows, end, channels, HEAD_DIM, RAGGED)  # (K, d)
    scores = _dot(query, tl.trans(key))  # (M, K)
    if RAGGED:
        scores = tl.where(key_rows[None, :] < end, scores, float("-inf"))
    weights = tl.exp2(scores * scale - log_sum[:, None])
    of_weights = _dot(upstream, tl.trans(value))  # (M, K)
    of_scores = weights * (of_weights - delta[:, None])
    return _dot(of_scores.to(key.dtype), key, gradient)


@triton.jit(do_not_specialize=["num_tokens", "heads", "length_class"])
def query_gradient_kernel(
    query, key, value, output, upstream, log_sum, delta, query_gradient,
    query_strides, key_strides, value_strides, output_strides, upstream_strides, gradient_strides,
    ends, num_tokens, heads, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the queries, and on the way `delta`, the inner product of outputs and gradients."""
    batch_head, first_row, _, end = _locate(tl.program_id(0), ends, M, FINEST_FIRST=True)
    rows, key_row, channels = first_row + tl.arange(0, M), tl.arange(0, K), tl.arange(0, D)
    written = rows < end
    queries = _pointers(query, query_strides, batch_head, heads, rows, channels)
    outputs = _pointers(output, output_strides, batch_head, heads, rows, channels)
    upstreams = _pointers(upstream, upstream_strides, batch_head, heads, rows, channels)
    tile = _load(queries, rows, end, channels, HEAD_DIM, True)  # (M, d)
    of_output = _load(upstreams, rows, end, channels, HEAD_DIM, True)  # (M, d)
    attended = _load(outputs, rows, end, channels, HEAD_DIM, True)  # (M, d)
    product = tl.sum(attended.to(tl.float32) * of_output.to(tl.float32), 1)
    place = batch_head.to(tl.int64) * num_tokens + rows
    tl.store(delta + place, product, mask=written)
    sums = tl.load(log_sum + place, mask=written, other=0.0)
    keys = _pointers(key, key_strides, batch_head, heads, key_row, channels)
    values = _pointers(value, value_strides, batch_head, heads, key_row, channels)

    gradient = tl.zeros((M, D), tl.float32)
    whole = end - end % K
    for row in range(0, whole, K):
        gradient = _query_gradient_step(
            gradient, tile, of_output, sums, product, keys, values, key_row, row, end, channels, scale,
            HEAD_DIM, False,
        )  # fmt: skip
        keys += K * key_strides[1]
        values += K * value_strides[1]
    if whole < end:
        gradient = _query_gradient_step(
            gradient, tile, of_output, sums, product, keys, values, key_row, whole, end, channels, scale,
            HEAD_DIM, True,
        )  # fmt: skip

    gradients = _pointers(query_gradient, gradient_strides, batch_head, heads, rows, channels)
    result = (gradient * softmax_scale).to(query_gradient.dtype.element_ty)
    tl.store(gradients, result, mask=written[:, None] & (channels[None, :] < HEAD_DIM))


@triton.jit
def _key_gradient_step(
    of_key, of_value, key, value, queries, upstreams, log_sums, deltas, query_row, row, end, channels, scale,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    rows = row + query_row
    query = _load(queries, rows, end, channels, HEAD_DIM, RAGGED)  # (M, d)
    upstream = _load(upstreams, rows, end, channels, HEAD_DIM, RAGGED)  # (M, d)
    if RAGGED:
        # A row that does not exist has no weight anywhere.
        log_sum = tl.load(log_sums, mask=rows < end, other=float("inf"))
        delta = tl.load(deltas, mask=rows < end, other=0.0)
    else:
        log_sum = tl.load(log_sums)
        delta = tl.load(deltas)
    scores = _dot(key, tl.trans(query))  # (K, M)
    weights = tl.exp2(scores * scale - log_sum[None, :])
    of_value = _dot(weights.to(upstream.dtype), upstream, of_value)
    of_weights = _dot(value, tl.trans(upstream))  # (K, M)
    of_scores = weights * (of_weights - delta[None, :])
    return _dot(of_scores.to(query.dtype), query, of_key), of_value


@triton.jit(do_not_specialize=["num_tokens", "heads", "length_class"])
def key_gradient_kernel(
    query, key, value, upstream, log_sum, delta, key_gradient, value_gradient,
    query_strides, key_strides, value_strides, upstream_strides, gradient_strides,
    ends, num_tokens, heads, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values, which the queries of their own and of every finer scale see."""
    batch_head, first_row, start, end = _locate(tl.program_id(0), ends, K, FINEST_FIRST=False)
    rows, channels = first_row + tl.arange(0, K), tl.arange(0, D)
    keys = _pointers(key, key_strides, batch_head, heads, rows, channels)
    values = _pointers(value, value_strides, batch_head, heads, rows, channels)
    key_tile = _load(keys, rows, end, channels, HEAD_DIM, True)  # (K, d)
    value_tile = _load(values, rows, end, channels, HEAD_DIM, True)  # (K, d)
    query_row = tl.arange(0, M)
    queries = _pointers(query, query_strides, batch_head, heads, start + query_row, channels)
    upstreams = _pointers(upstream, upstream_strides, batch_head, heads, start + query_row, channels)
    place = batch_head.to(tl.int64) * num_tokens + start + query_row
    log_sums, deltas = log_sum + place, delta + place

    of_key = tl.zeros((K, D), tl.float32)
    of_value = tl.zeros((K, D), tl.float32)
    whole = num_tokens - (num_tokens - start) % M
    for row in range(start, whole, M):
        of_key, of_value = _key_gradient_step(
            of_key, of_value, key_tile, value_tile, queries, upstreams, log_sums, deltas, query_row, row, num_tokens,
            channels, scale, HEAD_DIM, False,
        )  # fmt: skip
        queries += M * query_strides[1]
        upstreams += M * upstream_strides[1]
        log_sums += M
        deltas += M
    if whole < num_tokens:
        of_key, of_value = _key_gradient_step(
            of_key, of_value, key_tile, value_tile, queries, upstreams, log_sums, deltas, query_row, whole, num_tokens,
            channels, scale, HEAD_DIM, True,
        )  # fmt: skip

    written = (rows < end)[:, None] & (channels[None, :] < HEAD_DIM)
    key_gradients = _pointers(key_gradient, gradient_strides, batch_head, heads, rows, channels)
    value_gradients = _pointers(value_gradient, gradient_strides, batch_head, heads, rows, channels)
    tl.store(key_gradients, (of_key * softmax_scale).to(key_gradient.dtype.element_ty), mask=written)
    tl.store(value_gradients, of_value.to(value_gradient.dtype.element_ty), mask=written)


LARGEST_HEAD = 128
LOG2_E = 1 / math.log(2)

# Tiles `(M, K, warps, stages)` to choose from. The last fits every chip of compute capability 8 and higher.
ATTENTION_TILES = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)]
QUERY_GRADIENT_TILES = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2)]
KEY_GRADIENT_TILES = [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (32, 32, 4, 2)]


def _tuned(kernel: Any, tiles: list[tuple[int, int, int, int]]) -> Any:
    """Give a kernel the fastest of its tiles `(M, K, warps, stages)`, timed once a head size, dtype and length."""
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
    """Give the reason that the kernel cannot serve for a `query` of shape `(B, A, N, d)`, or `None` where it can."""
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
    """Count the programs, one for each tile of `block` rows of one scale, batch and head."""
    lengths = [end - start for start, end in zip((0, *ends), ends)]
    return lambda meta: (query.shape[0] * query.shape[2] * sum(triton.cdiv(n, meta[block]) for n in lengths),)


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, num_tokens), dtype=torch.float32)


def _empty_gradients(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def channels_last(tensor: Tensor) -> Tensor:
    """Make the last dimension of `tensor` of any shape dense, as the kernels read it; copy only where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::prefix_attention", mutates_args=())
def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """
    Attend so that the rows between two neighbours of `(0, *ends)` see all keys before the second.

    It takes `query`, `key` and `value`, each of shape `(B, N, A, d)`, and the positive `scale` of the scores. It gives
    the attended values `(B, N, A, d)`, and, for the backward pass, the base-2 logarithm of the sum under each softmax,
    `(B, A, N)` in float32. It is deterministic both ways: no sum depends on the order in which programs run.
    """
    query, key, value = channels_last(query), channels_last(key), channels_last(value)
    output, log_sum = _empty_results(query)
    if query.numel():
        # Triton launches on the current device, which need not be the tensor's.
        with torch.cuda.device_of(query):
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
    """Compute the gradients of `query`, `key` and `value`, each `(B, N, A, d)`, with weights made from `log_sum`."""
    query, key, value = channels_last(query), channels_last(key), channels_last(value)
    upstream = channels_last(upstream)
    gradients = _empty_gradients(query)
    if query.numel():
        delta = torch.empty_like(log_sum)
        strides = [x.stride()[:3] for x in (query, key, value, output, upstream, gradients[0])]
        arguments = {"softmax_scale": scale, **_arguments(query, ends, scale)}
        with torch.cuda.device_of(query):
            _query_gradient[_programs(query, ends, "M")](
                query, key, value, output, upstream, log_sum, delta, gradients[0], *strides, **arguments
            )
            del strides[3]
            _key_gradient[_programs(query, ends, "K")](
                query, key, value, upstream, log_sum, delta, *gradients[1:], *strides, **arguments
            )
    return gradients


@prefix_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    return _empty_results(query)


@prefix_attention_backward.register_fake
def _(upstream, query, key, value, output, log_sum, ends, scale) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(query)


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
