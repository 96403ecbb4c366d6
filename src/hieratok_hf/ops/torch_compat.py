"""Ask torch what differs from version to version, and name where this package registers its operators."""

import zlib

import torch

__all__ = ["NAMESPACE", "is_exporting"]


# Torch 2.11 traces `torch.compiler.is_exporting` itself as true wherever it compiles.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Tell whether `torch.export` is tracing, for sizes and machines that are unknown yet; not so `torch.compile`."""
    return torch.compiler.is_exporting()


NAMESPACE: str = (
    "hieratok_hf" if __name__.startswith("hieratok_hf.") else f"hieratok_hf_{zlib.crc32(__name__.encode()):08x}"
)
"""
Namespace of the package's operators, `"hieratok_hf"`. Code that came with weights from the Hub has one of its own,
since it may be of another version, and registering an operator anew replaces it for everybody.
"""
