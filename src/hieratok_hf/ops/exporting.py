"""Whether a model is being exported, asked so that a compiled graph gets the right answer too."""

import torch

__all__ = ["is_exporting"]


# Torch 2.11 traces `torch.compiler.is_exporting` itself as true wherever it compiles.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` is tracing, for sizes and machines that are not known yet; not so in `torch.compile`."""
    return torch.compiler.is_exporting()
