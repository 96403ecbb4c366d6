"""Statistics of channels: those of all batches at once, however they are divided."""

import pytest
import torch
from helpers import noise

from hieratok_hf.utils.channel_statistics import add_sums, channel_statistics, channel_sums


@pytest.mark.parametrize("correction", [0, 1])
def test_batches_of_any_sizes_give_what_torch_gives_of_all(correction):
    maps, sums = 3 + 2 * noise(5, 4, 6, 7), {}
    for part in maps.split([1, 3, 1]):
        add_sums(sums, channel_sums(part))
    values = maps.double().transpose(0, 1).flatten(1)
    expected = values.mean(1), values.std(1, correction=correction)
    torch.testing.assert_close(channel_statistics(sums, correction), expected)


def test_a_single_value_has_no_spread():
    mean, std = channel_statistics(channel_sums(torch.full((1, 2, 1, 1), 0.5)))
    assert mean.tolist() == [0.5, 0.5] and std.tolist() == [0, 0]
