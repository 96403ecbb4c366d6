"""Translate the names that transformers and diffusers have for ways to compute attention into backends."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.attention import ATTENTION_BACKENDS, REGISTERED_BACKENDS, AttentionFunction

__all__ = [
    "ATTENTION_IMPLEMENTATIONS",
    "DIFFUSERS_BACKENDS",
    "backend_of",
    "preferring",
    "register_attention_backend",
]

_ORDER_LOCK = threading.Lock()
_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)

ATTENTION_IMPLEMENTATIONS = {"eager": "reference", "sdpa": "auto", "flex_attention": "flex"} | {
    f"hieratok_{backend}": backend for backend in ATTENTION_BACKENDS
}
"""
Backend of each name that transformers' `attn_implementation` may have, those that were registered among them; the
library's default is `"sdpa"`.
"""

DIFFUSERS_BACKENDS: dict[str, tuple[str, SDPBackend | None]] = {
    "native": ("sdpa", None),
    "flex": ("flex", None),
    "_native_cudnn": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "_native_efficient": ("sdpa", SDPBackend.EFFICIENT_ATTENTION),
    "_native_flash": ("sdpa", SDPBackend.FLASH_ATTENTION),
    "_native_math": ("sdpa", SDPBackend.MATH),
}
"""
Backend of each name that diffusers' `set_attention_backend` and `attention_backend` may have, and the kernel that
PyTorch's attention takes where it can. Some kernels cannot serve under a mask, which compiled graphs have.
"""


def register_attention_backend(name: str, function: AttentionFunction) -> None:
    """
    Add a scale-causal attention of one's own to those that are known by name, for as long as the process lives.

    The name is then a `backend` of `scale_causal_attention` and of `HieraTokAttnProcessor`, and an
    `attn_implementation` of `HieraTokModel`. `"auto"` never chooses it.

    Args:
        name (`str`): A name that no attention of this package, transformers or diffusers has. Of two functions of one
            name the later counts.
        function (`Callable[[Tensor, Tensor, Tensor, PyramidLayout], Tensor]`): A function of the query, key and value,
            each of shape `(B, A, N, d)`, and the layout. It returns the attended values `(B, A, N, d)` in their
            dtype, and multiplies scores by `d ** -0.5`; for another `scale` it is given a query that makes up for it.

    Raises:
        ValueError: The name is taken or no identifier, or the function cannot be called.

    Example:

    ```python
    >>> import torch
    >>> from hieratok_hf import PyramidLayout, register_attention_backend, scale_causal_attention
    >>> register_attention_backend("no_attention", lambda query, key, value, layout: value)
    >>> tokens, layout = torch.rand(1, 2, 5, 8), PyramidLayout.from_grid(2, 2, (2, 1))
    >>> torch.equal(scale_causal_attention(tokens, tokens, tokens, layout, backend="no_attention"), tokens)
    True

    ```
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`name` must be an identifier, got {name!r}.")
    taken = {*ATTENTION_BACKENDS, *ATTENTION_IMPLEMENTATIONS, *DIFFUSERS_BACKENDS, *ALL_ATTENTION_FUNCTIONS}
    if name in taken - REGISTERED_BACKENDS.keys():
        raise ValueError(f"`name` must be a new one, got {name!r}, which is taken.")
    if not callable(function):
        raise ValueError(f"`function` must be callable, got {function!r}.")
    REGISTERED_BACKENDS[name] = function
    ATTENTION_IMPLEMENTATIONS[name] = name


def backend_of(
    own: str | None, set_by_diffusers: str | None, implementation: str | None
) -> tuple[str, SDPBackend | None]:
    """
    Choose the backend of `scale_causal_attention`, and the kernel of PyTorch's attention to prefer, or `None`.

    The first choice that was made counts, in the order: the model's `set_attention_backend`, the processor's `own`,
    diffusers' context manager `attention_backend`, transformers' `attn_implementation` (`"sdpa"` unless given).

    Raises:
        ValueError: `set_by_diffusers` is not one of `DIFFUSERS_BACKENDS`.
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
    # Nobody has chosen by a module that is not loaded, and loading it takes long.
    if (dispatch := sys.modules.get("diffusers.models.attention_dispatch")) is not None:
        active: Any = dispatch._AttentionBackendRegistry.get_active_backend()[0]  # private, see CONTRIBUTING.md
        # It holds for every model in the process, so it may be one that only another can use.
        if active != dispatch.AttentionBackendName.NATIVE and active in DIFFUSERS_BACKENDS:
            return DIFFUSERS_BACKENDS[active]
    return ATTENTION_IMPLEMENTATIONS[implementation or "sdpa"], None


def preferring(kernel: SDPBackend | None) -> AbstractContextManager:
    """Make a context in which PyTorch's attention takes `kernel` before all others; `None` leaves its own order."""
    if kernel is None:
        return nullcontext()
    order = sdpa_kernel([kernel, *_KERNELS], set_priority=True)
    return order if torch.compiler.is_compiling() else _one_thread_in(order)


@contextmanager
def _one_thread_in(order: AbstractContextManager) -> Iterator[None]:
    # The order is the whole process's: threads that took turns within would put back each other's.
    with _ORDER_LOCK, order:
        yield
