"""The names that transformers and diffusers have for ways to compute attention, and what they mean here."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.attention import ATTENTION_BACKENDS

__all__ = ["ATTENTION_IMPLEMENTATIONS", "DIFFUSERS_BACKENDS", "preferring", "backend_of"]

_KERNELS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)

ATTENTION_IMPLEMENTATIONS = {"eager": "reference", "sdpa": "auto", "flex_attention": "flex"} | {
    f"hieratok_{backend}": backend for backend in ATTENTION_BACKENDS
}
"""What transformers' `attn_implementation` means here, as a backend. The library's default is `"sdpa"`."""

DIFFUSERS_BACKENDS: dict[str, tuple[str, SDPBackend | None]] = {
    "native": ("sdpa", None),
    "flex": ("flex", None),
    "_native_cudnn": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "_native_efficient": ("sdpa", SDPBackend.EFFICIENT_ATTENTION),
    "_native_flash": ("sdpa", SDPBackend.FLASH_ATTENTION),
    "_native_math": ("sdpa", SDPBackend.MATH),
}
"""
What the names of diffusers' `set_attention_backend` and `attention_backend` mean here: a backend, and the kernel that
PyTorch's attention takes where it can; under a mask, which compiled graphs have, some cannot.
"""


def backend_of(
    own: str | None, set_by_diffusers: str | None, implementation: str | None
) -> tuple[str, SDPBackend | None]:
    """
    The backend of `scale_causal_attention` to use, and the kernel of PyTorch's attention that it should prefer.

    Args:
        own (`str`, *optional*): The processor's own choice.
        set_by_diffusers (`str`, *optional*): That of the model's `set_attention_backend`, which comes first.
        implementation (`str`, *optional*): transformers' `attn_implementation`, which comes last, after diffusers'
            context manager `attention_backend`.

    Raises:
        ValueError: `set_by_diffusers` has no meaning here.
    """
    if set_by_diffusers is not None:
        if set_by_diffusers not in DIFFUSERS_BACKENDS:
            raise ValueError(
                f"HieraTok attends by its own function; the attention backend {str(set_by_diffusers)!r} is not "
                f"supported. Use one of {list(DIFFUSERS_BACKENDS)}, or "
                "`set_attn_processor(HieraTokAttnProcessor(backend=...))`."
            )
        return DIFFUSERS_BACKENDS[set_by_diffusers]
    if own is not None:
        return own, None
    active: Any = _AttentionBackendRegistry.get_active_backend()[0]
    # It holds for every model in the process, so it may be one that only another can use.
    if active != AttentionBackendName.NATIVE and active in DIFFUSERS_BACKENDS:
        return DIFFUSERS_BACKENDS[active]
    return ATTENTION_IMPLEMENTATIONS[implementation or "sdpa"], None


def preferring(kernel: SDPBackend | None) -> AbstractContextManager:
    """A context in which PyTorch's attention takes a kernel before all others; `None` leaves its own order."""
    return nullcontext() if kernel is None else sdpa_kernel([kernel, *_KERNELS], set_priority=True)
