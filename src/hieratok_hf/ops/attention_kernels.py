"""The kernels of `attention_triton`: flash attention (arXiv 2307.08691) in which a row sees a prefix of the keys."""

import torch

# A library that checks the imports of remote code takes those in a `try` for optional.
try:
    import triton  # diffusers warns of each missing import behind which nothing stands
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed.") from error
if not hasattr(triton, "knobs"):
    raise ImportError(f"Triton 3.4 or later is needed, {triton.__version__} is installed.")

__all__ = ["INTERPRETED", "attention_kernel", "key_gradient_kernel", "query_gradient_kernel", "tl", "triton"]

# Shape letters: B batch, N tokens of all scales, A heads, d channels of a head, D a power of two that holds them.
# A tile is M queries by K keys.
#
# Tiles of rows are counted scale by scale, so that none straddles two: all of a tile's queries see one prefix, and all
# of its keys are seen by one suffix. So scores need a mask only at the ragged end of a prefix, and nothing beyond the
# prefix is ever read.

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton interprets the kernels, on any device, as with `TRITON_INTERPRET=1`; the `bool` is its `value`."""

# Three products of the tensor cores' short floats make a float32 one; AMD's compiler has only the plain way.
PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")


@triton.jit
def _locate(program, ends, BLOCK: tl.constexpr, FINEST_FIRST: tl.constexpr):
    """The tile of a program: batch and head, first row, and start and end of the scale that the rows are of."""
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
    """Addresses of `rows` of one head, `(len(rows), len(channels))`."""
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    return tensor + batch * strides[0] + head * strides[2] + rows[:, None] * strides[1] + channels[None, :]


@triton.jit
def _load(pointers, rows, end, channels, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Rows before `end`, zero beyond it and beyond the head's channels."""
    if RAGGED:
        return tl.load(pointers, mask=(rows[:, None] < end) & (channels[None, :] < HEAD_DIM), other=0.0)
    elif channels.shape[0] > HEAD_DIM:
        return tl.load(pointers, mask=channels[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _dot(left, right, start=None):
    """`left @ right + start` in float32, also of float32 inputs."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as raw bits and would multiply those.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, start, input_precision=PRECISION)


@triton.jit
def _forward_step(
    accumulator, maximum, total, query, keys, values, key_row, row, end, channels, scale,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The online softmax after one more tile of keys; scores and their maximum are in units of log 2."""
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
    """Attention `(B, N, A, d)`, and the base-2 logarithm of the sum under each softmax, `(B, A, N)` in float32."""
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
    """The gradient of the queries, and on the way `delta`, the inner product of each output and its gradient."""
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
    """The gradients of keys and values: a key is seen by the queries of its own scale and of every finer one."""
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
