"""Compute scale-causal attention: a token sees its own scale and every coarser one (HieraTok, arXiv 2509.23736)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .pyramid import PyramidLayout
from .torch_compat import has_tangents, is_exporting

__all__ = [
    "ATTENTION_BACKENDS",
    "FASTEST",
    "REGISTERED_BACKENDS",
    "fastest_backend",
    "reference_attention",
    "scale_causal_attention",
    "scale_causal_mask",
    "why_not",
]

# Shape letters: B batch, A heads, N tokens of all scales, d channels of a head.


def scale_causal_mask(layout: PyramidLayout, device: torch.device | None = None) -> Tensor:
    """Make the dense mask `(N, N)`, bool, which is true where the query of a row sees the key of a column."""
    return torch.arange(layout.num_tokens, device=device)[None, :] < layout.visible_ends(device)[:, None]


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PyramidLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """
    Compute scale-causal attention from its dense mask, as the definition that the backends are tested against.

    It takes `query`, `key` and `value`, each of shape `(B, A, N, d)`, and the `scale` of the scores. It returns the
    attended values `(B, A, N, d)` in the dtype of `query`, and the weights `(B, A, N, N)` in float32.
    """
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)  # (B, A, N, N)
    scores = scores.masked_fill(~scale_causal_mask(layout, query.device), float("-inf"))
    weights = scores.softmax(dim=-1)
    return (weights @ value.float()).to(query.dtype), weights


FASTEST: dict[tuple[str, str, int, bool], dict[int, str]] = {
    ("cpu AVX512", "float32", 64, False): {85: "sdpa", 340: "sdpa", 1360: "sdpa", 5440: "sdpa"},
    ("cpu AVX512", "float32", 64, True): {85: "sdpa_mask", 340: "sdpa", 1360: "sdpa", 5440: "sdpa"},
    ("cpu AVX512", "float32", 32, False): {85: "sdpa", 340: "sdpa", 1360: "sdpa", 5440: "sdpa"},
    ("cpu AVX512", "float32", 32, True): {85: "sdpa_mask", 340: "sdpa", 1360: "sdpa", 5440: "sdpa"},
    ("cpu AVX512", "bfloat16", 64, False): {85: "sdpa", 340: "sdpa", 1360: "sdpa", 5440: "sdpa"},
    ("cpu AVX512", "bfloat16", 64, True): {85: "sdpa_mask", 340: "sdpa", 1360: "sdpa", 5440: "sdpa"},
    ("cuda 9.0", "bfloat16", 64, False): {85: "triton", 340: "triton", 1360: "triton", 5440: "triton"},
    ("cuda 9.0", "bfloat16", 64, True): {85: "triton", 340: "triton", 1360: "triton", 5440: "triton"},
    ("cuda 9.0", "bfloat16", 32, False): {85: "triton", 340: "triton", 1360: "triton", 5440: "triton"},
    ("cuda 9.0", "bfloat16", 32, True): {85: "triton", 340: "triton", 1360: "triton", 5440: "triton"},
    ("cuda 9.0", "bfloat16", 128, False): {85: "triton", 340: "triton", 1360: "triton", 5440: "sdpa"},
    ("cuda 9.0", "bfloat16", 128, True): {85: "triton", 340: "triton", 1360: "triton", 5440: "triton"},
}
"""
Fastest backend by measurement, `{(device, dtype, channels of a head, gradients needed): {tokens of all scales:
backend}}`. `benchmarks/bench_attention.py --record` writes it from `benchmarks/results/attention_*.json`.
"""


@torch.compiler.assume_constant_result  # what it asks cannot be traced, and never changes
def device_kind(device: torch.device) -> str:
    """Name the kind of a device: a GPU by its compute capability, a CPU by its vector instructions."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda {major}.{minor}"
    return device.type


def fastest_backend(query: Tensor, needs_gradient: bool) -> str:
    """
    Choose the backend that was fastest for a `query` of shape `(B, A, N, d)` at the nearest measured number of tokens.

    It is `"sdpa"` where nothing was measured, and in `torch.export`.
    """
    if is_exporting():
        return "sdpa"  # an exported graph serves every size, so no one size may choose for it
    dtype = str(query.dtype).removeprefix("torch.")
    measured = FASTEST.get((device_kind(query.device), dtype, query.shape[3], needs_gradient), {})
    num_tokens = query.shape[2]
    for length, backend in measured.items():
        # Measured lengths are a factor of 4 apart; each speaks for those within a factor of 2. A length is compared
        # only where it matters, because a compiled graph holds for the lengths that compare alike.
        if backend != "sdpa" and length <= 2 * num_tokens <= 4 * length:
            return backend
    return "sdpa"


ATTENTION_BACKENDS = ("auto", "reference", "sdpa", "sdpa_mask", "flex", "triton")
"""The values that `scale_causal_attention` takes as its `backend`, besides those of `REGISTERED_BACKENDS`."""

AttentionFunction = Callable[[Tensor, Tensor, Tensor, PyramidLayout], Tensor]

REGISTERED_BACKENDS: dict[str, AttentionFunction] = {}
"""Functions by the names that `register_attention_backend` gave them."""


def why_not(backend: str, query: Tensor, scale: float, needs_gradient: bool) -> str | None:
    """Give the reason that a backend cannot serve for a `query` of shape `(B, A, N, d)`, or `None` where it can."""
    if backend in ("flex", "triton") and has_tangents():
        return "its kernel has no forward-mode derivatives"
    if backend == "flex" and query.device.type == "cpu" and needs_gradient:
        return "`flex_attention` has no backward pass on a CPU"
    if backend == "triton":
        try:
            from .attention_triton import why_not_triton
        except ImportError as error:
            return str(error).rstrip(".")
        return why_not_triton(query, scale)
    return None


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
    Attend over a pyramid of tokens, where the queries of scale `s` see the keys of the scales `0 ... s`.

    With `end_s` the number of tokens up to the end of scale `s`, the query `m` of scale `s` gets

    ```
    y_m = sum over n < end_s of  softmax_n(scale * q_m . k_n) * v_n
    ```

    So a query sees a prefix of the sequence, and with a layout of one scale all of it: full attention.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, A, N, d)`): Projected tokens, coarse scale first.
        layout (`PyramidLayout`): The scales of the sequence, `layout.num_tokens == N`.
        backend (`str`, defaults to `"auto"`): The way to compute it; all agree within rounding.

            - `"reference"`: a dense mask, in float32.
            - `"sdpa"`: one unmasked `scaled_dot_product_attention` a scale. It runs everywhere.
            - `"sdpa_mask"`: one `scaled_dot_product_attention` with a dense mask.
            - `"flex"`: PyTorch's `flex_attention`; on a CPU forward only.
            - `"triton"`: one launch on a CUDA device, for heads of at most 128 channels.
            - `"auto"`: the one that was fastest where it was measured, `"sdpa"` elsewhere.
            - any name that was given to `register_attention_backend`.
        scale (`float`, *optional*): Factor of the scores before the softmax, `d ** -0.5` unless given.
        return_weights (`bool`, defaults to `False`): Whether to return the weights `(B, A, N, N)` in float32 as well,
            which only `"reference"` (and thus `"auto"`) can.

    Returns:
        `torch.Tensor` of shape `(B, A, N, d)` in the dtype of `query` (of autocast, where it is on), and the weights
        if they were asked for.

    Raises:
        ValueError: The backend is unknown, shapes or dtypes disagree, a backend that was named cannot serve, or one
            that was registered returns no tensor or one of another shape or dtype.

    Example:

    ```python
    >>> import torch
    >>> from hieratok_hf import PyramidLayout, scale_causal_attention
    >>> layout = PyramidLayout.from_grid(4, 4, (2, 1))  # 4 coarse tokens, then 16 fine ones
    >>> tokens = torch.randn(1, 2, layout.num_tokens, 8)
    >>> attended = scale_causal_attention(tokens, tokens, tokens, layout)
    >>> attended.shape
    torch.Size([1, 2, 20, 8])
    >>> tokens[:, :, 4:] = 0  # what the coarse ones do not see
    >>> torch.equal(attended[:, :, :4], scale_causal_attention(tokens, tokens, tokens, layout)[:, :, :4])
    True

    ```
    """
    if backend not in ATTENTION_BACKENDS and backend not in REGISTERED_BACKENDS:
        known = [*ATTENTION_BACKENDS, *REGISTERED_BACKENDS]
        raise ValueError(f"`backend` must be one of {known}, got {backend!r}.")
    if query.ndim != 4 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "`query`, `key` and `value` must have one shape (batch, heads, tokens, head channels), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[2] != layout.num_tokens:
        raise ValueError(f"`layout` has {layout.num_tokens} tokens, but `query` has {query.shape[2]}.")
    if return_weights and backend not in ("auto", "reference"):
        raise ValueError(f"`backend={backend!r}` cannot return weights; use `backend='reference'`.")
    usual_scale = query.shape[-1] ** -0.5
    scale = usual_scale if scale is None else scale

    if backend == "auto" and has_tangents():
        backend = "reference"  # the kernels have no forward-mode derivatives
    if backend == "reference" or return_weights:
        attended, weights = reference_attention(query, key, value, layout, scale)
        return (attended, weights) if return_weights else attended

    # `scaled_dot_product_attention` heeds autocast by itself, the other computations do not. "meta" has none, where
    # asking raises; `torch.amp.is_autocast_available` breaks a graph that torch 2.11 compiles.
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"`query`, `key` and `value` must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if backend == "auto":
        backend = "sdpa" if layout.num_scales == 1 else fastest_backend(query, needs_gradient)
        if why_not(backend, query, scale, needs_gradient) is not None:
            backend = "sdpa"
    elif (reason := why_not(backend, query, scale, needs_gradient)) is not None:
        raise ValueError(f"`backend={backend!r}` cannot serve here: {reason}.")

    if backend in REGISTERED_BACKENDS:
        scaled = query if scale == usual_scale else query * (scale / usual_scale)
        attended = REGISTERED_BACKENDS[backend](scaled, key, value, layout)
        is_tensor = isinstance(attended, Tensor)
        if not is_tensor or attended.shape != query.shape or attended.dtype != query.dtype:
            expected = f"a tensor of shape {tuple(query.shape)} and {query.dtype}"
            got = f"{tuple(attended.shape)} and {attended.dtype}" if is_tensor else type(attended).__name__
            raise ValueError(f"`backend={backend!r}` must return {expected}, got {got}.")
        return attended
    if backend == "sdpa_mask":
        mask = scale_causal_mask(layout, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if backend == "flex":
        from .attention_flex import flex_scale_causal_attention

        return flex_scale_causal_attention(query, key, value, layout, scale)
    if backend == "triton":
        from .attention_triton import prefix_attention

        rows_first = (x.transpose(1, 2) for x in (query, key, value))
        return prefix_attention(*rows_first, layout.ends, scale)[0].transpose(1, 2)

    # What a scale sees is a prefix of the sequence, so no mask is needed, only shorter keys.
    prefixes: list[tuple[slice, Tensor | None]] = [(rows, None) for rows in layout.slices]
    if torch.compiler.is_compiling() and layout.num_scales > 1:
        # The compiler makes a graph of its own for a scale of one token, so a mask tells the coarse ones apart.
        coarse = layout.truncate(max(layout.num_scales - 1, 2))
        prefixes[: coarse.num_scales] = [(slice(0, coarse.num_tokens), scale_causal_mask(coarse, query.device))]
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop], attn_mask=mask, scale=scale
        )
        for rows, mask in prefixes
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
