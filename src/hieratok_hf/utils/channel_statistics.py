"""Measure the mean and the standard deviation of channels, batch by batch."""

import torch
from torch import Tensor

__all__ = ["add_sums", "channel_statistics", "channel_sums"]

# Shape letters: B batch, C channels, h w a grid.


def channel_sums(maps: Tensor) -> dict[str, Tensor]:
    """Sum up the values and the squares of each channel of `maps` `(B, C, h, w)` in float64, and count them."""
    values = maps.float().cpu().double().transpose(0, 1).flatten(1)  # (C, B * h * w)
    return {"sum": values.sum(1), "squares": values.square().sum(1), "count": torch.tensor(values.shape[1])}


def channel_statistics(sums: dict[str, Tensor], correction: int = 1) -> tuple[Tensor, Tensor]:
    """Give the mean and the standard deviation `(C,)`, as `torch.std`, of all values that `channel_sums` saw."""
    mean, count = sums["sum"] / sums["count"], sums["count"]
    variance = (sums["squares"] / count - mean.square()) * count / (count - correction).clamp(min=1)
    return mean, variance.clamp(min=0).sqrt()


def add_sums(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add `more` to `sums` by name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
