"""Ask torch what differs from version to version, and name where this package registers its operators."""

import zlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["NAMESPACE", "has_tangents", "is_exporting", "is_watched", "mode_of"]


# Torch 2.11 traces `torch.compiler.is_exporting` itself as true wherever it compiles.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Tell whether `torch.export` is tracing, for sizes and machines that are unknown yet; not so `torch.compile`."""
    return torch.compiler.is_exporting()


def has_tangents() -> bool:
    """Tell whether forward-mode derivatives may be carried along, by `torch.func.jvp` or dual tensors."""
    return forward_ad._current_level >= 0  # private, see CONTRIBUTING.md


def is_watched() -> bool:
    """Tell whether tensors may lack values or be wrapped: under a tracer, a fake mode, `torch.func` and the like."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or has_tangents()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def mode_of(tensor: Tensor) -> AbstractContextManager:
    """Make a context where new tensors are fake if `tensor`, of any shape, is, even after its `FakeTensorMode`."""
    mode = None if torch.compiler.is_compiling() else getattr(tensor, "fake_mode", None)
    return nullcontext() if mode is None else mode


NAMESPACE: str = (
    "hieratok_hf" if __name__.startswith("hieratok_hf.") else f"hieratok_hf_{zlib.crc32(__name__.encode()):08x}"
)
"""
Namespace of the package's operators, `"hieratok_hf"`. Code that came with weights from the Hub has one of its own,
since it may be of another version, and registering an operator anew replaces it for everybody.
"""
