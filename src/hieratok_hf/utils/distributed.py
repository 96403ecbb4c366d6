"""Processes that share a task."""

from typing import Any

import torch.distributed as dist

__all__ = ["gather", "process_place"]


def gather(value: Any) -> list[Any]:
    """Collect the values of all processes, in their order."""
    if (world := process_place()[1]) == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def process_place() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
