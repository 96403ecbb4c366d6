"""Tests of `pyramid`: where scales lie, and what the tokens of a scale are made of."""

import pytest
import torch
from helpers import images, noise, random_core
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hieratok_hf import HieraTokConfig, PyramidLayout
from hieratok_hf.models.losses import image_pyramid
from hieratok_hf.ops.pyramid import convolve_pyramid, flatten_pyramid, keep_by_size

FACTORS = (8, 4, 2, 1)
SEVERAL_FACTORS = [FACTORS, (1,), (3, 1), (7, 3, 1)]
GRIDS = [(7, 5), (1, 1), (16, 16), (1, 3), (8, 17)]


def blocks(grid, factors):
    """Number of its scale, rows and columns of every token's block of cells, as a plain loop."""
    for scale, factor in enumerate(factors):
        for top in range(0, grid[0], factor):
            for left in range(0, grid[1], factor):
                yield scale, list(range(top, top + factor)), list(range(left, left + factor))


def test_16x16_has_340_tokens_that_see_80_2_percent_of_the_score_matrix():
    layout = PyramidLayout.from_grid(16, 16, FACTORS)
    assert layout.grids == ((2, 2), (4, 4), (8, 8), (16, 16))
    assert layout.num_tokens == 340 and layout.ends == (4, 20, 84, 340)
    assert round(100 * float(layout.visible_ends().sum()) / layout.num_tokens**2, 1) == 80.2


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factors", SEVERAL_FACTORS)
def test_scales_cover_the_sequence_once_in_order_and_each_sees_its_own_end(grid, factors):
    layout = PyramidLayout.from_grid(*grid, factors)
    assert layout.num_scales == len(factors) and layout.grids[-1] == grid
    walked = [
        (scale, factors[scale], rows[0] // factors[scale], columns[0] // factors[scale])
        for scale, rows, columns in blocks(grid, factors)
    ]
    assert torch.stack(layout.cells(), dim=1).tolist() == [list(place) for place in walked]
    positions = list(range(layout.num_tokens))
    assert [i for rows in layout.slices for i in positions[rows]] == positions
    assert tuple(rows.stop - rows.start for rows in layout.slices) == layout.lengths
    assert [rows.stop for rows in layout.slices] == list(layout.ends)
    visible = layout.visible_ends()
    assert visible.dtype == torch.int64
    assert visible.tolist() == [layout.ends[scale] for scale, *_ in walked]
    for num_scales in range(1, layout.num_scales + 1):
        short = layout.truncate(num_scales)
        assert short.grids == layout.grids[:num_scales] and short.scale_factors == tuple(factors[:num_scales])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factors", SEVERAL_FACTORS)
def test_tokens_are_means_over_the_covered_cells(grid, factors):
    latents, layout = noise(2, 3, *grid), PyramidLayout.from_grid(*grid, factors)
    tokens = flatten_pyramid(latents, layout)
    covered = [latents[:, :, rows[0] : rows[-1] + 1, x[0] : x[-1] + 1] for _, rows, x in blocks(grid, factors)]
    expected = torch.stack([x.mean((2, 3)) for x in covered], dim=1)
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-6)
    short = layout.truncate(1)
    assert torch.equal(flatten_pyramid(latents, short), tokens[:, : short.num_tokens])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factors", SEVERAL_FACTORS)
def test_convolved_tokens_are_those_of_a_loop_over_blocks_with_a_continued_border(grid, factors):
    torch.manual_seed(0)
    latents, layout = noise(2, 3, *grid), PyramidLayout.from_grid(*grid, factors)
    convolutions = [nn.Conv2d(3, 5, factor, stride=factor) for factor in factors]
    tokens = []
    for scale, rows, columns in blocks(grid, factors):
        rows, columns = ([min(place, side - 1) for place in places] for places, side in zip((rows, columns), grid))
        block = latents[:, :, rows][..., columns]
        tokens.append(torch.einsum("bcij,ocij->bo", block, convolutions[scale].weight) + convolutions[scale].bias)
    expected = torch.stack(tokens, dim=1)
    torch.testing.assert_close(convolve_pyramid(latents, layout, convolutions), expected, atol=1e-5, rtol=1e-5)
    short = layout.truncate(1)
    made = convolve_pyramid(latents, short, convolutions[:1])
    torch.testing.assert_close(made, expected[:, : short.num_tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finest_tokens_are_the_latent_bit_for_bit(dtype):
    latents = noise(2, 3, 7, 5).to(dtype)
    layout = PyramidLayout.from_grid(7, 5, FACTORS)
    finest = flatten_pyramid(latents, layout)[:, layout.slices[-1]]
    assert torch.equal(finest, latents.flatten(2).transpose(1, 2))


def test_gradient_of_a_coarse_average_is_spread_evenly_over_its_cells():
    latents = noise(1, 1, 3, 3).requires_grad_()
    layout = PyramidLayout.from_grid(3, 3, (2, 1))
    flatten_pyramid(latents, layout)[0, 1, 0].backward()
    expected = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    assert torch.equal(latents.grad[0, 0], expected)
    latents.grad = None
    convolution = nn.Conv2d(1, 1, 2, stride=2)
    convolve_pyramid(latents, layout.truncate(1), [convolution])[0, 1, 0].backward()
    # What the continued border repeats counts as often.
    expected[:2, 2] = convolution.weight[0, 0].sum(1)
    torch.testing.assert_close(latents.grad[0, 0], expected)


def test_image_pyramid_averages_and_repeats_the_edge():
    config = HieraTokConfig(patch_size=2, scale_factors=(4, 2, 1))
    image = torch.arange(3 * 10 * 6, dtype=torch.float32).view(1, 3, 10, 6)  # 5x3 tokens
    coarse, middle, fine = image_pyramid(image, config)
    assert fine is image
    assert coarse.shape == (1, 3, 4, 2) and middle.shape == (1, 3, 6, 4)
    for pooled, factor in ((coarse, 4), (middle, 2)):
        for row in range(pooled.shape[2]):
            for column in range(pooled.shape[3]):
                rows = [min(factor * row + i, 9) for i in range(factor)]
                columns = [min(factor * column + i, 5) for i in range(factor)]
                torch.testing.assert_close(pooled[..., row, column], image[:, :, rows][..., columns].mean((2, 3)))


def test_what_is_kept_is_that_of_its_own_size():
    made = []

    @keep_by_size
    def double(layout, number, device):
        made.append(layout.num_tokens)
        return torch.full((layout.num_tokens,), 2 * number, device=device)

    small, large = (PyramidLayout.from_grid(side, side, (2, 1)) for side in (4, 8))
    for layout, number in ((small, 1), (large, 1), (small, 1), (small, 2), (large, 1)):
        assert torch.equal(double(layout, number, torch.device("cpu")), torch.full((layout.num_tokens,), 2 * number))
    assert made == [small.num_tokens, large.num_tokens, small.num_tokens]
    huge = PyramidLayout.from_grid(200, 200, (1,))
    assert double(huge, 1, torch.device("cpu")) is not double(huge, 1, torch.device("cpu"))


def test_what_is_kept_has_data_and_serves_training_after_inference():
    layout = PyramidLayout.from_grid(11, 13, (4, 1))
    with FakeTensorMode() as mode:
        assert layout.cells().row.fake_mode is mode
    with torch.inference_mode():
        first = layout.cells(torch.device("cpu")).row
    assert type(first) is torch.Tensor and not first.is_inference()
    with FakeTensorMode() as mode:
        assert layout.cells(torch.device("cpu")).row.fake_mode is mode
    assert layout.cells(torch.device("cpu")).row is first


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_a_model_trains_after_inference_at_the_same_size(downsampling):
    core, sample = random_core(downsampling=downsampling), images(1, 3, 44, 52)
    with torch.inference_mode():
        core.decode(core.encode(sample).mode())
    core.decode(core.encode(sample).mode()).square().mean().backward()
    assert core.encoder.patch_embed.weight.grad.isfinite().all()
