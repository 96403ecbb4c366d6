"""Give memory back to the system."""

import ctypes

__all__ = ["release_memory"]


def release_memory() -> None:
    """Give back to the system what the allocator keeps of memory that was freed; of glibc's, for others nothing."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
