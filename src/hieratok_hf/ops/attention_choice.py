"""Which computation of scale-causal attention was fastest where it was measured."""

import torch
from torch import Tensor

from .exporting import is_exporting

__all__ = ["FASTEST", "fastest_backend"]

# Shape letters: B batch, A heads, N tokens of all scales, d channels of a head.

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
`{(device, dtype, channels of a head, gradients needed): {tokens of all scales: backend}}`, written by
`benchmarks/bench_attention.py --record` from `benchmarks/results/attention_*.json`.
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
    The backend that was fastest at the nearest measured number of tokens, or `"sdpa"` where nothing was measured.

    It is also `"sdpa"` in `torch.export`.

    Args:
        query (`torch.Tensor` of shape `(B, A, N, d)`): For its device, dtype, number of tokens and channels of a head.
        needs_gradient (`bool`): Whether a backward pass will follow.
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
