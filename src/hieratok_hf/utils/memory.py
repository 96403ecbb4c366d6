"""Give memory back to the system."""

import ctypes

__all__ = ["limit_arenas", "release_memory"]

_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h


def release_memory() -> None:
    """Give back to the system what the allocator keeps of memory that was freed; of glibc's, for others nothing."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def limit_arenas(count: int) -> None:
    """Let all threads that are started from now on share so many pools of memory; of glibc's, for others nothing."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_ARENA_MAX, count)
