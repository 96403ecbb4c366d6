"""Tests of `attention_reference`: the mask against its definition in words, and the weights it leads to."""

import pytest
import torch
from helpers import noise

from hieratok_hf import PyramidLayout
from hieratok_hf.ops.attention import reference_attention, scale_causal_mask

LAYOUTS = [
    pytest.param(PyramidLayout.from_grid(*grid, factors), id=f"{grid[0]}x{grid[1]}-{factors}".replace(" ", ""))
    for grid, factors in [((7, 5), (8, 4, 2, 1)), ((4, 6), (4, 2, 1)), ((1, 3), (2, 1)), ((3, 3), (1,))]
]


def scale_of_each_token(layout):
    return [scale for scale, (height, width) in enumerate(layout.grids) for _ in range(height * width)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_sees_its_own_scale_and_every_coarser_one(layout):
    scales = scale_of_each_token(layout)
    expected = [[key_scale <= query_scale for key_scale in scales] for query_scale in scales]
    assert scale_causal_mask(layout).tolist() == expected


def test_the_mask_of_one_scale_is_full():
    assert scale_causal_mask(PyramidLayout.from_grid(3, 4, (1,))).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_the_weighted_mean_of_visible_values(layout):
    query, key, value = (noise(1, 2, layout.num_tokens, 4, seed=seed) for seed in range(3))
    attended, weights = reference_attention(query, key, value, layout, scale=0.7)
    scales = scale_of_each_token(layout)
    for head in range(2):
        for i, scale in enumerate(scales):
            visible = [j for j, other in enumerate(scales) if other <= scale]
            exponentials = torch.stack([(0.7 * query[0, head, i] @ key[0, head, j]).exp() for j in visible])
            expected = (exponentials[:, None] * value[0, head, visible]).sum(0) / exponentials.sum()
            torch.testing.assert_close(attended[0, head, i], expected, atol=1e-5, rtol=1e-5)
            assert weights[0, head, i].count_nonzero() == len(visible)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_sum_to_one_and_vanish_where_masked(layout, dtype):
    query, key, value = (noise(2, 2, layout.num_tokens, 8, seed=seed).to(dtype) for seed in range(3))
    attended, weights = reference_attention(query, key, value, layout, scale=8**-0.5)
    assert weights.dtype == torch.float32 and attended.dtype == dtype
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, layout.num_tokens))
    assert (weights.masked_select(~scale_causal_mask(layout)) == 0).all()
    assert (weights.masked_select(scale_causal_mask(layout)) > 0).all()
