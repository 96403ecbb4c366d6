"""Tests of `decoder`: patch order, causality of the whole stack bit for bit, and pictures of every scale."""

import pytest
import torch
from helpers import DETOK, noise, random_core
from torch.nn import functional as F

from hieratok_hf import HieraTokConfig, PyramidLayout
from hieratok_hf.pyramid import flatten_pyramid

FACTORS = (8, 4, 2, 1)
GRIDS = [(7, 5), (4, 6), (1, 3)]
VARIANTS = [
    pytest.param({}, id="own"),
    pytest.param(DETOK, id="detok"),
    pytest.param({"linear_path": 0, "output_conv": False, "qk_norm": False}, id="bare"),
]


def decoder_and_tokens(grid, factors=FACTORS, batch=2, **overrides):
    decoder = random_core(scale_factors=factors, **overrides).decoder
    layout = PyramidLayout.from_grid(*grid, factors)
    return decoder, noise(batch, layout.num_tokens, 4), layout


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (4, 6), (1, 3), (1, 1), (9, 2)])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_pictures_of_every_scale_of_any_grid(grid, overrides):
    decoder, tokens, layout = decoder_and_tokens(grid, **overrides)
    shapes = [tuple(picture.shape) for picture in decoder(tokens, layout, grid, all_scales=True)]
    assert shapes == [(2, 3, 4 * -(-grid[0] // factor), 4 * -(-grid[1] // factor)) for factor in FACTORS]


def test_unpatchify_inverts_a_plain_extraction_of_patches():
    decoder = random_core().decoder
    picture = noise(2, 3, 12, 20)
    patches = torch.zeros(2, 15, 48)
    for i in range(3):
        for j in range(5):
            for row in range(4):
                for column in range(4):
                    for colour in range(3):
                        pixel = picture[:, colour, 4 * i + row, 4 * j + column]
                        patches[:, 5 * i + j, 12 * row + 3 * column + colour] = pixel
    assert torch.equal(decoder.unpatchify(patches, 3, 5), picture)


@pytest.mark.parametrize("patch_size", [1, 4, 8])
def test_unpatchify_is_a_pixel_shuffle_of_patches_with_colours_first(patch_size):
    decoder = random_core(patch_size=patch_size).decoder
    patches = noise(2, 6, 3 * patch_size**2)
    colours_first = patches.unflatten(2, (patch_size**2, 3)).transpose(2, 3).flatten(2)
    expected = F.pixel_shuffle(colours_first.transpose(1, 2).unflatten(2, (2, 3)), patch_size)
    assert torch.equal(decoder.unpatchify(patches, 2, 3), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_finer_tokens_leave_coarser_pictures_bit_identical(grid, overrides, attention):
    decoder, tokens, layout = decoder_and_tokens(grid, **overrides)
    decoder.config._attn_implementation = attention
    before = decoder(tokens, layout, grid, all_scales=True)
    for scale in range(1, layout.num_scales):
        changed = tokens.clone()
        changed[:, layout.slices[scale].start :] = 3 * noise(*changed[:, layout.slices[scale].start :].shape, seed=5)
        after = decoder(changed, layout, grid, all_scales=True)
        for picture, same in zip(before[:scale], after[:scale]):
            assert torch.equal(picture, same)
        for picture, other in zip(before[scale:], after[scale:]):
            assert not torch.allclose(picture, other, atol=1e-2)


@pytest.mark.parametrize("grid", GRIDS)
def test_coarse_pictures_never_read_finer_tokens_even_when_they_are_nan(grid):
    decoder, tokens, layout = decoder_and_tokens(grid)
    before = decoder(tokens, layout, grid, all_scales=True)
    for scale in range(1, layout.num_scales):
        poisoned = tokens.clone()
        poisoned[:, layout.slices[scale].start :] = float("nan")
        after = decoder(poisoned, layout, grid, all_scales=True)
        assert all(torch.equal(picture, same) for picture, same in zip(before[:scale], after[:scale]))
        assert after[scale].isnan().any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_finer_picture_depends_on_every_coarser_token(grid, overrides):
    decoder, tokens, layout = decoder_and_tokens(grid, batch=1, **overrides)
    tokens.requires_grad_()
    for picture, end in zip(decoder(tokens, layout, grid, all_scales=True), layout.ends):
        (gradient,) = torch.autograd.grad(picture.sum(), tokens, retain_graph=True)
        read = gradient[0].abs().sum(-1) > 0
        assert read[:end].all() and not read[end:].any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_scales", [1, 2, 3, 4])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_truncated_sequence_gives_the_same_pictures(grid, num_scales, overrides):
    decoder, tokens, layout = decoder_and_tokens(grid, **overrides)
    full = decoder(tokens, layout, grid, all_scales=True)
    short = layout.truncate(num_scales)
    pictures = decoder(tokens[:, : short.num_tokens], short, grid, all_scales=True)
    assert len(pictures) == num_scales
    for picture, expected in zip(pictures, full):
        torch.testing.assert_close(picture, expected, atol=1e-5, rtol=0)


def test_the_last_picture_alone_is_the_last_of_all():
    decoder, tokens, layout = decoder_and_tokens((7, 5))
    alone = decoder(tokens, layout, (7, 5))
    assert len(alone) == 1
    torch.testing.assert_close(alone[0], decoder(tokens, layout, (7, 5), all_scales=True)[-1], atol=1e-6, rtol=0)


def test_each_scale_has_its_own_embedding():
    decoder, tokens, layout = decoder_and_tokens((7, 5))
    seen = []
    decoder.norm_before.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    decoder(tokens, layout, (7, 5))
    for i, rows in enumerate(layout.slices):
        expected = decoder.embed(tokens[:, rows]) + decoder.scale_embedding[i]
        torch.testing.assert_close(seen[0][:, rows], expected, atol=1e-6, rtol=1e-6)


def test_learned_positions_are_pooled_as_the_latent_is():
    decoder, tokens, layout = decoder_and_tokens((7, 5), **DETOK)
    seen = []
    decoder.norm_before.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    decoder(tokens, layout, (7, 5))
    scales = torch.cat([decoder.scale_embedding[i].expand(n, -1) for i, n in enumerate(layout.lengths)])
    expected = decoder.embed(tokens) + scales + flatten_pyramid(decoder.positions(7, 5), layout)
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("linear_path", [1, 3])
def test_linear_path_of_a_scale_is_a_convolution_of_its_own_tokens(linear_path):
    decoder, tokens, layout = decoder_and_tokens((7, 5), linear_path=linear_path, output_conv=False)
    with torch.no_grad():
        decoder.head.weight.zero_()
        decoder.head.bias.zero_()
    for i, (picture, rows, (height, width)) in enumerate(
        zip(decoder(tokens, layout, (7, 5), all_scales=True), layout.slices, layout.grids)
    ):
        latents = tokens[:, rows].transpose(1, 2).unflatten(2, (height, width))
        padded = F.pad(latents, (linear_path // 2,) * 4, mode="replicate")
        weight, bias = decoder.linear_path[i].weight, decoder.linear_path[i].bias
        patches = F.conv2d(padded, weight, bias).flatten(2).transpose(1, 2)
        torch.testing.assert_close(picture, decoder.unpatchify(patches, height, width), atol=1e-5, rtol=1e-5)


def test_output_convolution_runs_on_each_picture():
    decoder, tokens, layout = decoder_and_tokens((7, 5))
    outputs = decoder(tokens, layout, (7, 5), all_scales=True)
    convolution, decoder.output_conv = decoder.output_conv, None
    inputs = decoder(tokens, layout, (7, 5), all_scales=True)
    for output, picture in zip(outputs, inputs):
        torch.testing.assert_close(output, convolution(picture), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(output, picture, atol=1e-2)


def test_a_batch_gives_what_its_members_give_alone():
    decoder, tokens, layout = decoder_and_tokens((7, 5), batch=3)
    together = decoder(tokens, layout, (7, 5), all_scales=True)
    alone = [decoder(one[None], layout, (7, 5), all_scales=True) for one in tokens]
    for k, pictures in enumerate(together):
        torch.testing.assert_close(pictures, torch.cat([x[k] for x in alone]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("overrides", VARIANTS)
def test_without_scale_causality_every_picture_depends_on_every_token(grid, overrides):
    decoder, tokens, layout = decoder_and_tokens(grid, batch=1, scale_causal=False, **overrides)
    tokens.requires_grad_()
    for picture in decoder(tokens, layout, grid, all_scales=True):
        (gradient,) = torch.autograd.grad(picture.sum(), tokens, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_scale_causality_attention_is_plain(attention, monkeypatch):
    decoder, tokens, layout = decoder_and_tokens((7, 5), scale_causal=False)
    decoder.config._attn_implementation = attention
    made = decoder(tokens, layout, (7, 5), all_scales=True)
    causal, *_ = decoder_and_tokens((7, 5))
    causal.load_state_dict(decoder.state_dict())
    # The definition with a mask that hides nothing, in place of the prefix.
    causal.config._attn_implementation = "eager"
    monkeypatch.setattr(PyramidLayout, "visible_ends", lambda self, device=None: torch.full((self.num_tokens,), 10**6))
    for ours, theirs in zip(made, causal(tokens, layout, (7, 5), all_scales=True), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_scale_causality_is_the_default_and_a_single_scale_knows_no_difference():
    assert HieraTokConfig().scale_causal is True
    for factors, same in (((1,), True), (FACTORS, False)):
        pictures = []
        for overrides in ({}, {"scale_causal": True}, {"scale_causal": False}):
            torch.manual_seed(0)
            decoder, tokens, layout = decoder_and_tokens((7, 5), factors, **overrides)
            pictures.append(decoder(tokens, layout, (7, 5), all_scales=True))
        default, causal, plain = pictures
        assert all(torch.equal(a, b) for a, b in zip(default, causal, strict=True))
        assert torch.allclose(default[0], plain[0], atol=1e-6) is same


def test_the_kind_of_attention_changes_no_weight():
    torch.manual_seed(0)
    plain = random_core(scale_causal=False).state_dict()
    torch.manual_seed(0)
    causal = random_core().state_dict()
    assert plain.keys() == causal.keys() and all(torch.equal(plain[name], causal[name]) for name in causal)
