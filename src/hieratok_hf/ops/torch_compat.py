"""What this package asks of torch that differs from version to version, and where its operators are registered."""

import zlib

import torch

__all__ = ["NAMESPACE", "is_exporting"]


# Torch 2.11 traces `torch.compiler.is_exporting` itself as true wherever it compiles.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` is tracing, for sizes and machines that are not known yet; not so in `torch.compile`."""
    return torch.compiler.is_exporting()


NAMESPACE: str = (
    "hieratok_hf" if __name__.startswith("hieratok_hf.") else f"hieratok_hf_{zlib.crc32(__name__.encode()):08x}"
)
"""
`"hieratok_hf"`; code that came with weights from the Hub has one of its own, since it may be of another version, and
registering an operator anew replaces it for everybody.
"""
