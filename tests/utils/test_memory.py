"""Tests of giving memory back to the system."""

import ctypes

import psutil
import pytest
import torch

from hieratok_hf.utils.memory import limit_arenas, release_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_that_was_freed_goes_back_to_the_system():
    limit_arenas(2)
    resident = psutil.Process().memory_info
    kept = [torch.ones(16_000) for _ in range(4000)]  # each too small for a mapping of its own
    ends = kept[::100]
    full = resident().rss
    del kept
    release_memory()
    assert full - resident().rss > 4000 * 64_000 // 2 and len(ends) == 40
