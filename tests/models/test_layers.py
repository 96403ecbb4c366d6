"""Tests of `layers`: rotary tables against plain computations, attention, SwiGLU, positions and random weights."""

import copy
import itertools
import math

import pytest
import torch
from helpers import DETOK, noise, random_core, tiny
from torch.nn import functional as F

from hieratok_hf import AutoencoderHieraTok, HieraTokModel, PyramidLayout
from hieratok_hf.models.layers import HieraTokBlockEmbed, HieraTokSwiGLU, apply_rotary, rotary_tables

FACTORS = (8, 4, 2, 1)
GRIDS = [(7, 5), (1, 3), (1, 1), (16, 16)]
HEAD_DIM = 16


def plain_centres(grid, factors):
    """Mean row and mean column of the finest cells that each token covers, one cell at a time."""
    centres = []
    for factor in factors:
        for top, left in itertools.product(range(0, grid[0], factor), range(0, grid[1], factor)):
            rows, columns = range(grid[0])[top : top + factor], range(grid[1])[left : left + factor]
            centres.append([sum(cells) / len(cells) for cells in (rows, columns)])
    return centres


def tables(grid, factors=FACTORS, head_dim=HEAD_DIM, **overrides):
    layout = PyramidLayout.from_grid(*grid, factors)
    return rotary_tables(tiny(**overrides), layout, grid, head_dim, torch.device("cpu"))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factors", [FACTORS, (3, 1), (1,)])
@pytest.mark.parametrize("coordinates", ["cells", "fraction"])
def test_a_token_sits_at_the_mean_of_the_cells_it_covers(grid, factors, coordinates):
    cos, signed_sin = tables(grid, factors, rotary_coordinates=coordinates, rotary_scale=0.1)
    slowest_turn = torch.atan2(signed_sin, cos)[:, 0]  # angles below pi: an angle tells its position
    for axis in (0, 1):
        unit = 1 if coordinates == "cells" else max(grid[axis] - 1, 1)
        expected = torch.tensor([0.1 * centre[axis] / unit for centre in plain_centres(grid, factors)])
        second_channel_of_first_pair = axis * HEAD_DIM // 2 + 1
        torch.testing.assert_close(slowest_turn[:, second_channel_of_first_pair], expected, atol=1e-6, rtol=1e-5)


def test_frequencies_fall_geometrically_from_scale_to_scale_over_base():
    cos, signed_sin = tables((2, 1), (1,), rotary_scale=0.5, rotary_base=16.0)
    angles = torch.atan2(signed_sin, cos)[1, 0, : HEAD_DIM // 2]
    expected = [sign * 0.5 * 16 ** (-t / 3) for t in range(4) for sign in (-1, 1)]
    torch.testing.assert_close(angles, torch.tensor(expected))
    assert torch.equal(cos[1, 0, HEAD_DIM // 2 :], torch.ones(HEAD_DIM // 2))


def test_proper_pairing_makes_dot_products_depend_on_the_offset_alone():
    grid = (5, 6)
    rotary = tables(grid, (2, 1))
    centres = plain_centres(grid, (2, 1))
    query, key = (noise(1, 1, 1, HEAD_DIM, seed=seed).expand(1, len(centres), 1, HEAD_DIM) for seed in (0, 1))
    query, key = apply_rotary(query, rotary)[0, :, 0], apply_rotary(key, rotary)[0, :, 0]
    products = query @ key.T
    by_offset = {}
    for a, b in itertools.product(range(len(centres)), repeat=2):
        offset = (centres[a][0] - centres[b][0], centres[a][1] - centres[b][1])
        by_offset.setdefault(offset, []).append(products[a, b])
    assert max(len(values) for values in by_offset.values()) > 10
    for values in by_offset.values():
        torch.testing.assert_close(torch.stack(values), values[0].expand(len(values)), atol=2e-5, rtol=0)
    assert torch.stack([values[0] for values in by_offset.values()]).std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_positions_are_applied_in_float32(dtype):
    rotary = tables((16, 16))
    vectors = noise(1, 340, 1, HEAD_DIM).to(dtype)
    assert rotary[0].dtype == rotary[1].dtype == torch.float32
    expected = apply_rotary(vectors.float(), rotary).to(dtype)
    torch.testing.assert_close(apply_rotary(vectors, rotary), expected, atol=0, rtol=0)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_block_is_pre_norm_with_a_plain_attention_and_two_residual_branches(qk_norm):
    overrides = {"qk_norm": qk_norm, "norm_eps": 0.5}
    block = random_core(**overrides).decoder.blocks[0]
    attn, layout, rotary = block.attn, PyramidLayout.from_grid(7, 5, FACTORS), tables((7, 5), **overrides)
    hidden_states = noise(2, layout.num_tokens, 32)

    def normed(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight

    x = normed(hidden_states, block.norm1)
    query, key, value = (layer(x).view(2, -1, 2, 16) for layer in (attn.to_q, attn.to_k, attn.to_v))
    if qk_norm:
        query, key = normed(query, attn.norm_q), normed(key, attn.norm_k)
    query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
    scores = torch.einsum("bqad,bkad->baqk", query, key) / 4
    for i, end in enumerate(layout.visible_ends().tolist()):
        scores[:, :, i, end:] = -torch.inf
    attended = torch.einsum("baqk,bkad->bqad", scores.softmax(-1), value).flatten(2)
    middle = hidden_states + F.linear(attended, attn.to_out[0].weight, attn.to_out[0].bias)
    expected = middle + block.mlp(normed(middle, block.norm2))
    torch.testing.assert_close(block(hidden_states, rotary, layout), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ratio", "hidden_size", "width"), [(4.0, 32, 85), (4.0, 768, 2048), (1.5, 20, 20)])
def test_swiglu_has_the_stated_width_and_formula(ratio, hidden_size, width):
    layer = HieraTokSwiGLU(tiny(mlp_ratio=ratio), hidden_size)
    assert layer.linear_in.weight.shape == (2 * width, hidden_size)
    assert layer.linear_out.weight.shape == (hidden_size, width)
    hidden_states = noise(2, 3, hidden_size)
    projected = hidden_states @ layer.linear_in.weight.T + layer.linear_in.bias
    gate, value = projected[..., :width], projected[..., width:]
    expected = (gate * torch.sigmoid(gate) * value) @ layer.linear_out.weight.T + layer.linear_out.bias
    torch.testing.assert_close(layer(hidden_states), expected, atol=1e-5, rtol=1e-5)


def test_both_wrappers_start_from_the_same_distribution():
    config = tiny(**{**DETOK, "qk_norm": True, "linear_path": 3, "initializer_range": 0.05})
    cores = []
    for make in (HieraTokModel, lambda config: AutoencoderHieraTok(**config.model_fields)):
        torch.manual_seed(0)
        cores.append(make(copy.deepcopy(config)).core)
    ours, theirs = (core.state_dict() for core in cores)
    assert list(ours) == list(theirs)
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.shape == other.shape
        if mine.unique().numel() <= 2:  # zeros, ones and the identity
            assert torch.equal(mine, other), name
            assert "output_conv" in name or (mine == (0 if name.endswith("bias") else 1)).all()
            continue
        # A block of f x f cells makes one token, which varies as one of a single cell.
        std = 0.05 / (mine.shape[-1] if "coarse_embed" in name else 1)
        for weight in (mine, other):
            tolerance = 6 * std / math.sqrt(weight.numel())
            assert abs(weight.mean()) < tolerance, name
            assert abs(weight.std() - std) < tolerance, name
    image = noise(1, 3, 6, 7)
    assert torch.equal(cores[0].decoder.output_conv(image), image)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_blocks_are_embedded_as_by_a_strided_convolution(factor, dtype, tolerance):
    # The channels and sides with which oneDNN is wrong in bfloat16 on processors with AMX.
    layer, maps = HieraTokBlockEmbed(16, 32, factor, stride=factor), noise(2, 16, 3 * factor, 2 * factor)
    with torch.no_grad():
        expected = F.conv2d(maps, layer.weight, layer.bias, stride=factor)
        made = layer.to(dtype)(maps.to(dtype)).float()
    assert made.shape == (2, 32, 3, 2)
    assert (made - expected).norm() < tolerance * expected.norm()
