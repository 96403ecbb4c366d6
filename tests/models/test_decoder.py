"""Tests of `decoder`: patch order, tokens, causality of the whole stack bit for bit, and images of every scale."""

from functools import partial

import pytest
import torch
from helpers import DETOK, changed_tokens, noise, random_core
from torch.nn import functional as F

from hieratok_hf import HieraTokConfig, PyramidLayout
from hieratok_hf.models.losses import image_pyramid
from hieratok_hf.ops.pyramid import flatten_pyramid

FACTORS = (8, 4, 2, 1)
GRIDS = [(7, 5), (4, 6), (1, 3)]
VARIANTS = [
    pytest.param({}, id="own"),
    pytest.param({"downsampling": "mean"}, id="mean"),
    pytest.param(DETOK, id="detok"),
    pytest.param({"linear_path": 0, "output_conv": False, "qk_norm": False}, id="bare"),
]
both_kinds = pytest.mark.parametrize("downsampling", ["learned", "mean"])


def decoder_and_latents(grid, factors=FACTORS, batch=2, **overrides):
    decoder = random_core(scale_factors=factors, **overrides).decoder
    return decoder, noise(batch, 4, *grid), PyramidLayout.from_grid(*grid, factors)


def tokens_of(decoder, latents, layout):
    """What the decoder makes of a latent before its first norm."""
    seen = []
    with changed_tokens(decoder, lambda tokens: seen.append(tokens) or tokens):
        decoder(latents, layout)
    return seen[0]


def with_end(value, tokens):
    return torch.cat([tokens[:, : -value.shape[1]], value], dim=1)


def means(latents, factor):
    """`(B, C, n_h, n_w)` by a plain loop over blocks; each mean is of the cells that the block has."""
    rows = [
        [block.mean((2, 3)) for block in strip.split(factor, dim=3)] for strip in latents.split(factor, dim=2)
    ]  # fmt: skip
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (4, 6), (1, 3), (1, 1), (9, 2)])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_images_of_every_scale_of_any_grid(grid, overrides):
    decoder, latents, layout = decoder_and_latents(grid, **overrides)
    shapes = [tuple(image.shape) for image in decoder(latents, layout, all_scales=True)]
    assert shapes == [(2, 3, 4 * -(-grid[0] // factor), 4 * -(-grid[1] // factor)) for factor in FACTORS]


def test_unpatchify_inverts_a_plain_extraction_of_patches():
    decoder = random_core().decoder
    image = noise(2, 3, 12, 20)
    patches = torch.zeros(2, 15, 48)
    for i in range(3):
        for j in range(5):
            for row in range(4):
                for column in range(4):
                    for colour in range(3):
                        pixel = image[:, colour, 4 * i + row, 4 * j + column]
                        patches[:, 5 * i + j, 12 * row + 3 * column + colour] = pixel
    assert torch.equal(decoder.unpatchify(patches, 3, 5), image)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_unpatchify_is_a_pixel_shuffle_of_squares_of_any_side_with_colours_first(size):
    decoder = random_core().decoder
    patches = noise(2, 6, 3 * size**2)
    colours_first = patches.unflatten(2, (size**2, 3)).transpose(2, 3).flatten(2)
    expected = F.pixel_shuffle(colours_first.transpose(1, 2).unflatten(2, (2, 3)), size)
    assert torch.equal(decoder.unpatchify(patches, 2, 3), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_finer_tokens_leave_coarser_images_bit_identical(grid, overrides, attention):
    decoder, latents, layout = decoder_and_latents(grid, **overrides)
    decoder.config._attn_implementation = attention
    before = decoder(latents, layout, all_scales=True)
    for scale in range(1, layout.num_scales):
        values = [3 * noise(2, layout.num_tokens - layout.slices[scale].start, 32, seed=5)]
        if attention == "sdpa":  # a dense mask multiplies what it hides by 0
            values.append(torch.full_like(values[0], float("nan")))
        for value in values:
            with changed_tokens(decoder, partial(with_end, value)):
                after = decoder(latents, layout, all_scales=True)
            for image, same in zip(before[:scale], after[:scale]):
                assert torch.equal(image, same)
            for image, other in zip(before[scale:], after[scale:]):
                assert not torch.allclose(image, other, atol=1e-2)


def tokens_read(decoder, latents, layout):
    """For each image, which tokens its gradient reaches, `(N,)`."""
    leaves = []

    def as_leaf(tokens):
        leaves.append(tokens.detach().requires_grad_())
        return leaves[0]

    with changed_tokens(decoder, as_leaf):
        made = decoder(latents, layout, all_scales=True)
    gradients = [torch.autograd.grad(image.sum(), leaves[0], retain_graph=True)[0] for image in made]
    return [gradient[0].abs().sum(-1) > 0 for gradient in gradients]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("scale_causal", [True, False])
def test_an_image_reads_every_token_that_it_may(grid, overrides, scale_causal):
    decoder, latents, layout = decoder_and_latents(grid, batch=1, scale_causal=scale_causal, **overrides)
    for read, end in zip(tokens_read(decoder, latents, layout), layout.ends, strict=True):
        end = end if scale_causal else layout.num_tokens
        assert read[:end].all() and not read[end:].any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_scales", [1, 2, 3, 4])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_fewer_scales_give_the_same_images(grid, num_scales, overrides):
    decoder, latents, layout = decoder_and_latents(grid, **overrides)
    full = decoder(latents, layout, all_scales=True)
    short = layout.truncate(num_scales)
    made = decoder(latents, short, all_scales=True)
    assert len(made) == num_scales
    for image, expected in zip(made, full):
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    (alone,) = decoder(latents, short)
    torch.testing.assert_close(alone, made[-1], atol=1e-6, rtol=0)


@both_kinds
@pytest.mark.parametrize("learned_positions", [0, 5])
def test_tokens_are_embeddings_of_blocks_or_averages_beside_those_of_scale_and_place(downsampling, learned_positions):
    overrides = {"downsampling": downsampling, "learned_positions": learned_positions}
    decoder, latents, layout = decoder_and_latents((7, 5), **overrides)
    tokens = tokens_of(decoder, latents, layout)
    positions = flatten_pyramid(decoder.positions(7, 5), layout) if learned_positions else torch.zeros(1, 52, 32)
    for i, (factor, rows, cells) in enumerate(zip(FACTORS, layout.slices, layout.grids)):
        if downsampling == "mean" or factor == 1:
            made = decoder.embed(means(latents, factor).flatten(2).transpose(1, 2))
        else:
            padded = F.pad(latents, (0, -5 % factor, 0, -7 % factor), mode="replicate")
            convolution = decoder.coarse_embed[i]
            assert convolution.weight.shape == (32, 4, factor, factor)
            made = F.conv2d(padded, convolution.weight, convolution.bias, factor).flatten(2).transpose(1, 2)
        assert made.shape[1] == cells[0] * cells[1]
        expected = made + decoder.scale_embedding[i] + positions[:, rows]
        torch.testing.assert_close(tokens[:, rows], expected, atol=1e-5, rtol=1e-5)


def test_random_embeddings_of_blocks_vary_as_that_of_cells():
    torch.manual_seed(0)
    overrides = {"latent_channels": 16, "decoder_hidden_size": 128}
    decoder = random_core(std=0, scale_factors=(8, 3, 1), initializer_range=0.05, **overrides).decoder
    for embed, factor in zip(decoder.coarse_embed, (8, 3)):
        assert embed.weight.std().item() == pytest.approx(0.05 / factor, rel=0.05) and not embed.bias.any()
    layout = PyramidLayout.from_grid(24, 24, (8, 3, 1))
    tokens = decoder.embed_blocks(noise(4, 16, 24, 24), layout)
    spread = [tokens[:, rows].std().item() for rows in layout.slices]
    assert spread == pytest.approx([0.05 * 16**0.5 * 1] * 3, rel=0.1)


@pytest.mark.parametrize("linear_path", [1, 3])
def test_the_linear_path_of_averages_is_a_convolution_of_them(linear_path):
    overrides = {"linear_path": linear_path, "downsampling": "mean"}
    decoder, latents, layout = decoder_and_latents((7, 5), **overrides)
    for i, (factor, cells) in enumerate(zip(FACTORS, layout.grids)):
        average = means(latents, factor)
        padded = F.pad(average, (linear_path // 2,) * 4, mode="replicate")
        weight, bias = decoder.linear_path[i].parameters()
        patches = F.conv2d(padded, weight, bias).flatten(2).transpose(1, 2)
        expected = decoder.unpatchify(patches, *cells)
        torch.testing.assert_close(decoder.linear_image(average, i), expected, atol=1e-5, rtol=1e-5)


PATHS = [(4, (8, 4, 2, 1)), (4, (16, 6, 3, 1)), (8, (16, 6, 3, 1)), (8, (12, 4, 1))]


@pytest.mark.parametrize("linear_path", [1, 3])
@pytest.mark.parametrize("grid", [(7, 5), (1, 3), (16, 12)])
@pytest.mark.parametrize(("patch_size", "factors"), PATHS)
def test_a_learned_linear_path_averages_an_image_with_its_edge_repeated(linear_path, grid, patch_size, factors):
    overrides = {"linear_path": linear_path, "patch_size": patch_size}
    decoder, latents, layout = decoder_and_latents(grid, factors, **overrides)
    for i, (factor, cells) in enumerate(zip(factors, layout.grids)):
        size = decoder.cell_size(factor)
        padded = F.pad(latents, (linear_path // 2,) * 4, mode="replicate")
        weight, bias = decoder.linear_path[i].parameters()
        assert weight.shape[0] == 3 * size**2
        image = decoder.unpatchify(F.conv2d(padded, weight, bias).flatten(2).transpose(1, 2), *grid)
        image = F.pad(image, (0, -grid[1] % factor * size, 0, -grid[0] % factor * size), mode="replicate")
        expected = F.adaptive_avg_pool2d(image, (cells[0] * patch_size, cells[1] * patch_size))
        torch.testing.assert_close(decoder.linear_image(latents, i), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("patch_size", "factors"), PATHS)
def test_a_linear_path_that_starts_from_the_finest_makes_the_average_of_its_image(patch_size, factors):
    core = random_core(scale_factors=factors, patch_size=patch_size)
    decoder, whole = core.decoder, noise(2, 4, 48, 96)
    for i in range(len(factors) - 1):
        decoder.init_coarse_path(i)
    for latents in (whole, whole[..., :31, :17], whole[..., :1, :3]):
        finest = decoder.linear_image(latents, len(factors) - 1)
        for i, (factor, expected) in enumerate(zip(factors[:-1], image_pyramid(finest, core.config))):
            made = decoder.linear_image(latents, i)
            assert made.shape == expected.shape
            # At a border beyond which a block reaches, what is repeated is an average of pixels, not the last of them.
            rows, columns = (side * patch_size // factor for side in latents.shape[2:])
            torch.testing.assert_close(
                made[..., :rows, :columns], expected[..., :rows, :columns], atol=1e-5, rtol=1e-5
            )


@both_kinds
def test_a_scale_that_starts_from_the_finest_has_tokens_of_average_cells(downsampling):
    decoder, latents, layout = decoder_and_latents((8, 16), downsampling=downsampling, learned_positions=0)
    for i in range(3):
        decoder.init_coarse_scale(i)
    expected = decoder.embed(flatten_pyramid(latents, layout)) + decoder.scale_embedding[-1]
    torch.testing.assert_close(tokens_of(decoder, latents, layout), expected, atol=1e-5, rtol=1e-5)


@both_kinds
def test_an_image_is_the_patches_of_its_tokens_and_its_linear_image(downsampling):
    decoder, latents, layout = decoder_and_latents((7, 5), downsampling=downsampling, output_conv=False)
    whole = decoder(latents, layout, all_scales=True)
    with torch.no_grad():
        decoder.head.weight.zero_()
        decoder.head.bias.zero_()
    for i, (image, factor) in enumerate(zip(decoder(latents, layout, all_scales=True), FACTORS)):
        cells = latents if downsampling == "learned" else means(latents, factor)
        torch.testing.assert_close(image, decoder.linear_image(cells, i), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(whole[i], image, atol=1e-2)


@both_kinds
def test_output_convolution_runs_on_each_image(downsampling):
    decoder, latents, layout = decoder_and_latents((7, 5), downsampling=downsampling)
    outputs = decoder(latents, layout, all_scales=True)
    convolution, decoder.output_conv = decoder.output_conv, None
    for output, image in zip(outputs, decoder(latents, layout, all_scales=True), strict=True):
        torch.testing.assert_close(output, convolution(image), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(output, image, atol=1e-2)


@both_kinds
def test_a_batch_gives_what_its_members_give_alone(downsampling):
    decoder, latents, layout = decoder_and_latents((7, 5), batch=3, downsampling=downsampling)
    together = decoder(latents, layout, all_scales=True)
    alone = [decoder(one[None], layout, all_scales=True) for one in latents]
    for k, images in enumerate(together):
        torch.testing.assert_close(images, torch.cat([x[k] for x in alone]), atol=1e-5, rtol=1e-5)


@both_kinds
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_scale_causality_attention_is_plain(attention, downsampling, monkeypatch):
    decoder, latents, layout = decoder_and_latents((7, 5), scale_causal=False, downsampling=downsampling)
    decoder.config._attn_implementation = attention
    made = decoder(latents, layout, all_scales=True)
    causal, *_ = decoder_and_latents((7, 5), downsampling=downsampling)
    causal.load_state_dict(decoder.state_dict())
    # The definition with a mask that hides nothing, in place of the prefix.
    causal.config._attn_implementation = "eager"
    monkeypatch.setattr(PyramidLayout, "visible_ends", lambda self, device=None: torch.full((self.num_tokens,), 10**6))
    for ours, theirs in zip(made, causal(latents, layout, all_scales=True), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_defaults_and_a_single_scale_that_knows_no_difference():
    assert HieraTokConfig().scale_causal is True and HieraTokConfig().downsampling == "learned"
    for factors, same in (((1,), True), (FACTORS, False)):
        made = []
        for overrides in ({}, {"scale_causal": True, "downsampling": "learned"}, {"scale_causal": False}):
            decoder, latents, layout = decoder_and_latents((7, 5), factors, **overrides)
            made.append(decoder(latents, layout, all_scales=True))
        default, causal, plain = made
        assert all(torch.equal(a, b) for a, b in zip(default, causal, strict=True))
        assert torch.allclose(default[0], plain[0], atol=1e-6) is same
    decoder, latents, layout = decoder_and_latents((7, 5), (1,), downsampling="mean")
    learned, *_ = decoder_and_latents((7, 5), (1,))
    assert torch.equal(decoder(latents, layout)[0], learned(latents, layout)[0])


@both_kinds
def test_the_kind_of_attention_changes_no_weight(downsampling):
    plain = random_core(scale_causal=False, downsampling=downsampling).state_dict()
    causal = random_core(downsampling=downsampling).state_dict()
    assert plain.keys() == causal.keys() and all(torch.equal(plain[name], causal[name]) for name in causal)


def test_a_compiled_linear_path_gives_the_gradients_of_a_plain_one():
    decoder, latents, _ = decoder_and_latents((7, 5))
    results = []
    for compute in (decoder.linear_image, torch.compile(decoder.linear_image, dynamic=False)):
        leaves = [latents.clone().requires_grad_(), *decoder.linear_path[0].parameters()]
        results.append(torch.autograd.grad(compute(leaves[0], 0).square().sum(), leaves))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-3)
