"""Where in `torch.library` the operators of this package are registered."""

import zlib

__all__ = ["NAMESPACE"]

NAMESPACE: str = (
    "hieratok_hf" if __name__.startswith("hieratok_hf.") else f"hieratok_hf_{zlib.crc32(__name__.encode()):08x}"
)
"""
`"hieratok_hf"`; code that came with weights from the Hub has one of its own, since it may be of another version, and
registering an operator anew replaces it for everybody.
"""
