"""Tests of `core`: every scale, causality of the whole stack bit for bit, the linear path, folding and copies."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DETOK, LINEAR_PATH, changed_tokens, images, noise, random_core
from torch._dynamo.testing import CompileCounterWithBackend
from torch.backends import mkldnn
from torch.fx.experimental.proxy_tensor import make_fx

from hieratok_hf import AutoencoderHieraTok, PyramidLayout
from hieratok_hf.models.core import _warn_of_slow_bfloat16
from hieratok_hf.models.layers import rotary_tables
from hieratok_hf.models.losses import image_pyramid
from hieratok_hf.ops.pyramid import flatten_pyramid

FACTORS = (8, 4, 2, 1)
VARIANTS = [
    pytest.param({}, id="own"),
    pytest.param({"downsampling": "mean"}, id="mean"),
    pytest.param(DETOK, id="detok"),
    pytest.param({"linear_path": 0, "output_conv": False, "qk_norm": False}, id="bare"),
    pytest.param({"linear_path": 1}, id="linear-path-1"),
    pytest.param({"scale_factors": (1,)}, id="single-scale"),
    pytest.param({"scale_factors": (5, 3, 1)}, id="odd-factors"),
    pytest.param({"scale_factors": (5, 3, 1), "downsampling": "mean"}, id="odd-factors-mean"),
]
every_variant = pytest.mark.parametrize("overrides", VARIANTS)
both_kinds = pytest.mark.parametrize("downsampling", ["learned", "mean"])


def layout_of(core, grid=(7, 5)):
    return PyramidLayout.from_grid(*grid, tuple(core.config.scale_factors))


def tokens_of(core, latents, num_scales=None):
    """What the decoder makes of a latent before its first norm."""
    seen = []
    with changed_tokens(core.decoder, lambda tokens: seen.append(tokens) or tokens):
        core.decode(latents, num_scales)
    return seen[0]


def means(latents, factor):
    """`(B, C, n_h, n_w)`, each mean of the cells that the block has."""
    return F.avg_pool2d(latents, factor, ceil_mode=True)


@pytest.mark.parametrize("grid", [(8, 8), (12, 5), (7, 5), (1, 3), (1, 1)])
@every_variant
def test_every_scale_of_any_grid_is_the_same_alone_and_among_others(grid, overrides):
    core = random_core(**overrides)
    latents = core.encode(images(2, 3, 4 * grid[0], 4 * grid[1])).mode()
    assert latents.shape == (2, 4, *grid)
    every_scale = core.decode_scales(latents)
    sizes = [(4 * -(-grid[0] // factor), 4 * -(-grid[1] // factor)) for factor in core.config.scale_factors]
    assert [tuple(image.shape) for image in every_scale] == [(2, 3, *size) for size in sizes]
    assert all(image.isfinite().all() for image in every_scale)
    for k in range(1, len(every_scale) + 1):
        torch.testing.assert_close(core.decode_scales(latents, num_scales=k), every_scale[:k], atol=1e-5, rtol=0)
        torch.testing.assert_close(core.decode(latents, num_scales=k), every_scale[k - 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(core.decode(latents), every_scale[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(7, 5), (1, 3)])
@every_variant
def test_finer_tokens_leave_coarser_images_bit_identical(grid, overrides):
    core, latents = random_core(**overrides), noise(2, 4, *grid)
    layout, before = layout_of(core, grid), core.decode_scales(latents)
    for scale in range(1, layout.num_scales):
        value = 3 * noise(2, layout.num_tokens - layout.slices[scale].start, 32, seed=5)
        for end in (value, torch.full_like(value, float("nan"))):
            with changed_tokens(core.decoder, lambda x, end=end: torch.cat([x[:, : -end.shape[1]], end], dim=1)):
                after = core.decode_scales(latents)
            torch.testing.assert_close(after[:scale], before[:scale], atol=0, rtol=0)
            for image, other in zip(before[scale:], after[scale:]):
                assert not torch.allclose(image, other, atol=1e-2)


@every_variant
@pytest.mark.parametrize("scale_causal", [True, False])
def test_an_image_reads_every_token_that_it_may(overrides, scale_causal):
    core, leaves = random_core(scale_causal=scale_causal, **overrides), []
    layout = layout_of(core)

    def as_leaf(tokens):
        leaves.append(tokens.detach().requires_grad_())
        return leaves[0]

    with changed_tokens(core.decoder, as_leaf):
        made = core.decode_scales(noise(1, 4, 7, 5))
    for image, end in zip(made, layout.ends, strict=True):
        (gradient,) = torch.autograd.grad(image.sum(), leaves[0], retain_graph=True)
        read, end = gradient[0].abs().sum(-1) > 0, end if scale_causal else layout.num_tokens
        assert read[:end].all() and not read[end:].any()


@both_kinds
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_scale_causality_attention_is_plain(attention, downsampling, monkeypatch):
    plain, latents = random_core(scale_causal=False, downsampling=downsampling), noise(2, 4, 7, 5)
    plain.config._attn_implementation = attention
    made = plain.decode_scales(latents)
    assert torch.equal(plain.decode(latents, num_scales=4), made[-1])
    with pytest.raises(ValueError, match="num_scales=2"):
        plain.decode(latents, num_scales=2)
    causal = random_core(downsampling=downsampling)
    causal.load_state_dict(plain.state_dict())
    # The definition with a mask that hides nothing, in place of the prefix.
    causal.config._attn_implementation = "eager"
    monkeypatch.setattr(PyramidLayout, "visible_ends", lambda self, device=None: torch.full((self.num_tokens,), 10**6))
    torch.testing.assert_close(made, causal.decode_scales(latents), atol=1e-5, rtol=0)


@both_kinds
@pytest.mark.parametrize("learned_positions", [0, 5])
def test_tokens_are_embeddings_of_blocks_or_averages_beside_those_of_scale_and_place(downsampling, learned_positions):
    core, latents = random_core(downsampling=downsampling, learned_positions=learned_positions), noise(2, 4, 7, 5)
    decoder, layout, tokens = core.decoder, layout_of(core), tokens_of(core, latents)
    positions = flatten_pyramid(decoder.positions(7, 5), layout) if learned_positions else torch.zeros(1, 52, 32)
    for i, (factor, rows) in enumerate(zip(FACTORS, layout.slices)):
        if downsampling == "mean" or factor == 1:
            made = decoder.embed(means(latents, factor).flatten(2).transpose(1, 2))
        else:
            padded = F.pad(latents, (0, -5 % factor, 0, -7 % factor), mode="replicate")
            weight, bias = decoder.coarse_embed[i].parameters()
            made = F.conv2d(padded, weight, bias, factor).flatten(2).transpose(1, 2)
        expected = made + decoder.scale_embedding[i] + positions[:, rows]
        torch.testing.assert_close(tokens[:, rows], expected, atol=1e-5, rtol=1e-5)


@both_kinds
def test_an_image_is_the_convolved_sum_of_the_patches_of_its_tokens_and_its_linear_image(downsampling):
    core, latents = random_core(downsampling=downsampling), noise(2, 4, 7, 5)
    outputs = core.decode_scales(latents)
    convolution, core.decoder.output_conv = core.decoder.output_conv, None
    sums = core.decode_scales(latents)
    with torch.no_grad():
        core.decoder.head.weight.zero_()
        core.decoder.head.bias.zero_()
    for i, (image, factor) in enumerate(zip(core.decode_scales(latents), FACTORS)):
        cells = latents if downsampling == "learned" else means(latents, factor)
        torch.testing.assert_close(image, core.decoder.linear_image(cells, i), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs[i], convolution(sums[i]), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(sums[i], image, atol=1e-2) and not torch.allclose(sums[i], outputs[i], atol=1e-2)


PATHS = [(4, (8, 4, 2, 1)), (4, (16, 6, 3, 1)), (8, (12, 4, 1))]


@both_kinds
@pytest.mark.parametrize("linear_path", [1, 3])
@pytest.mark.parametrize("grid", [(7, 5), (1, 3), (16, 12)])
@pytest.mark.parametrize(("patch_size", "factors"), PATHS)
def test_a_linear_path_is_a_convolution_whose_learned_images_are_averaged(
    linear_path, grid, patch_size, factors, downsampling
):
    sizes = {"patch_size": patch_size, "scale_factors": factors}
    decoder = random_core(linear_path=linear_path, downsampling=downsampling, **sizes).decoder
    latents = noise(2, 4, *grid)
    for i, factor in enumerate(factors):
        cells, size = latents if downsampling == "learned" else means(latents, factor), decoder.cell_size(factor)
        padded = F.pad(cells, (linear_path // 2,) * 4, mode="replicate")
        patches = F.conv2d(padded, *decoder.linear_path[i].parameters())
        assert patches.shape[1] == 3 * size**2
        expected = decoder.unpatchify(patches.flatten(2).transpose(1, 2), *cells.shape[2:])
        if downsampling == "learned":  # the edge is repeated
            expected = F.pad(expected, (0, -grid[1] % factor * size, 0, -grid[0] % factor * size), mode="replicate")
            expected = F.adaptive_avg_pool2d(expected, [-(-side // factor) * patch_size for side in grid])
        torch.testing.assert_close(decoder.linear_image(cells, i), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def nothing_kept(monkeypatch):
    """A function that decodes with tables of its own."""

    def decode(core, latents):
        with monkeypatch.context() as patch:
            patch.setattr("hieratok_hf.ops.pyramid._KEPT_TOKENS", 0)
            return core.decode(latents)

    return decode


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing_then_or_later(nothing_kept, dtype, downsampling):
    # A long grid has places that bfloat16 does not, and is no other test's.
    core, latents = random_core(downsampling=downsampling), noise(1, 4, 301, 2 if dtype == torch.float64 else 3)
    with torch.no_grad():
        expected = nothing_kept(core, latents)
        torch.set_default_dtype(dtype)
        try:
            found = core.decode(latents)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, expected)
        assert torch.equal(core.decode(latents), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@both_kinds
@pytest.mark.parametrize("width", range(1, 6))
def test_what_is_kept_under_a_transform_serves_outside_of_it(nothing_kept, width, downsampling):
    core, latents = random_core(downsampling=downsampling).requires_grad_(False), noise(1, 4, 23, width)
    expected = nothing_kept(core, latents)

    def decode(x):
        return core.decode(x)

    transforms = (
        lambda: torch.func.grad(lambda x: decode(x).sum())(latents),
        lambda: torch.func.functionalize(decode)(latents),
        lambda: torch.func.jvp(decode, (latents,), (latents,)),
        lambda: make_fx(decode)(latents),
        lambda: torch.jit.trace(decode, latents),
    )
    transforms[width - 1]()
    assert torch.equal(core.decode(latents), expected)
    layout = layout_of(core, (23, width))
    rotary = rotary_tables(core.config, layout, (23, width), 16, latents.device)
    assert all(table.data_ptr() and not table.requires_grad for table in (*rotary, *layout.cells(latents.device)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
@both_kinds
def test_forward_mode_derivatives_are_those_of_reverse_mode(implementation, training, downsampling, monkeypatch):
    monkeypatch.setattr("hieratok_hf.ops.onednn_linear.PREFERS_ONEDNN", mkldnn.is_available())
    core = random_core(downsampling=downsampling).requires_grad_(training)
    core.config._attn_implementation = implementation
    for function, x in ((core.decode, noise(1, 4, 7, 5)), (lambda x: core.encode(x).mean, images(1, 3, 20, 12))):
        tangent, upstream = noise(*x.shape, seed=1), noise(*function(x).shape, seed=2)
        with torch.no_grad():
            forward = (torch.func.jvp(function, (x,), (tangent,))[1] * upstream).sum()
        backward = (torch.func.vjp(function, x)[1](upstream)[0] * tangent).sum()
        torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-3)


def test_a_compiled_linear_path_gives_the_gradients_of_a_plain_one():
    decoder, latents = random_core().decoder, noise(2, 4, 7, 5)
    results = []
    for compute in (decoder.linear_image, torch.compile(decoder.linear_image, dynamic=False)):
        leaves = [latents.clone().requires_grad_(), *decoder.linear_path[0].parameters()]
        results.append(torch.autograd.grad(compute(leaves[0], 0).square().sum(), leaves))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


def test_one_graph_makes_all_scales_of_every_size():
    core, counted = random_core(scale_factors=(4, 2, 1), decoder_num_layers=1), CompileCounterWithBackend("eager")
    compiled = torch.compile(core.decode_scales, backend=counted, fullgraph=True, dynamic=True)
    for grid in ((9, 10), (10, 12), (7, 13), (16, 9)):
        latents = noise(1, 4, *grid)
        torch.testing.assert_close(compiled(latents), core.decode_scales(latents), rtol=0, atol=1e-5)
    assert counted.frame_count == 1


@pytest.mark.parametrize("linear_path", [1, 3])
def test_linear_path_of_the_encoder_adds_a_convolution_to_the_mean_only(linear_path):
    core, image = random_core(linear_path=linear_path), images(2, 3, 28, 20)
    encoder = core.encoder
    moments, features = encoder(image)
    plain = encoder.head(features).transpose(1, 2).unflatten(2, (7, 5))
    padded = F.pad(image, (4 * (linear_path // 2),) * 4, mode="replicate")
    patches = F.unfold(padded, 4 * linear_path, stride=4)
    added = (encoder.linear_path.weight.flatten(1) @ patches).unflatten(2, (7, 5))
    torch.testing.assert_close(moments[:, :4], plain[:, :4] + added, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments[:, 4:], plain[:, 4:], atol=1e-6, rtol=1e-6)
    assert torch.equal(core.encode(image).parameters, moments)


def random_basis(channels=4, size=48):
    basis = torch.linalg.qr(noise(size, channels, seed=3).double())[0].T
    return basis, noise(size, seed=4).double() * 0.1, noise(channels, seed=5).double().abs() + 0.5


def patches_of(image):
    """`(B, h, w, 3 * p * p)` in the order (colour, row, column)."""
    return image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)


@pytest.mark.parametrize("linear_path", [1, LINEAR_PATH])
@pytest.mark.parametrize("channels", [4, 48])
def test_linear_path_starts_as_exactly_the_principal_components_whatever_was_there(linear_path, channels):
    core = random_core(linear_path=linear_path, latent_channels=channels, output_conv=False).double()
    components, mean, scale = random_basis(channels)
    core.set_linear_path(components, mean, scale)
    image = images(2, 3, 28, 20).double()
    patches = patches_of(image)
    expected_latents = ((patches - mean) @ components.T / scale).permute(0, 3, 1, 2)
    latents = core.encode(image).mode()
    torch.testing.assert_close(latents, expected_latents, atol=1e-10, rtol=0)

    projected = mean + (patches - mean) @ components.T @ components
    torch.testing.assert_close(patches_of(core.decode(latents)), projected, atol=1e-10, rtol=0)
    assert torch.allclose(projected, patches) is (channels == 48)  # a full basis gives the image itself


@pytest.mark.parametrize("grid", [(48, 96), (7, 5), (1, 3)])
@pytest.mark.parametrize(("patch_size", "factors"), PATHS)
def test_linear_path_starts_every_scale_as_an_average_of_the_finest(patch_size, factors, grid):
    core = random_core(output_conv=False, patch_size=patch_size, scale_factors=factors).double()
    core.set_linear_path(*random_basis(size=3 * patch_size**2))
    made = core.decode_scales(noise(2, 4, *grid).double())
    for image, expected, factor in zip(made, image_pyramid(made[-1], core.config), factors, strict=True):
        assert image.shape == expected.shape
        # Beyond the latent what is repeated is an average of pixels, not the last of them.
        rows, columns = (side * patch_size // factor for side in grid)
        torch.testing.assert_close(image[..., :rows, :columns], expected[..., :rows, :columns], atol=1e-10, rtol=0)


@every_variant
def test_folded_statistics_normalise_the_latent_and_keep_the_images(overrides):
    core = random_core(**overrides)
    mean, std = 0.5 * noise(4, seed=7), noise(4, seed=8).abs() + 0.3
    image = images(2, 3, 28, 20)
    before = core.encode(image)
    every_scale = core.decode_scales(before.mode())
    core.fold_latent_statistics(mean, std)
    after = core.encode(image)
    expected = (before.mode() - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(after.mode(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(core.decode_scales(after.mode()), every_scale, atol=1e-4, rtol=0)
    assert not torch.allclose(core.decode(before.mode()), every_scale[-1], atol=1e-2)


@every_variant
def test_gradients_reach_every_parameter_and_the_latent_from_every_scale(overrides):
    core = random_core(**overrides).train()
    latents = core.encode(images(2, 3, 28, 20)).sample(torch.Generator().manual_seed(0))
    losses = [(image * noise(*image.shape, seed=i)).sum() for i, image in enumerate(core.decode_scales(latents))]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, latents, retain_graph=True)
        assert gradient.isfinite().all() and (gradient.abs().sum(1) > 0).all()
    sum(losses).backward()
    for name, parameter in core.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("lacks", [True, False])
def test_bfloat16_is_warned_of_once_where_the_processor_lacks_it(lacks, monkeypatch, caplog):
    monkeypatch.setattr("hieratok_hf.models.core.lacks_bfloat16", lambda: lacks)
    _warn_of_slow_bfloat16.cache_clear()
    core = random_core()
    with torch.no_grad():
        core.encode(images(1, 3, 32, 32))
        assert not caplog.records
        core.bfloat16()
        for _ in range(2):
            core.decode(core.encode(images(1, 3, 32, 32).bfloat16()).mode())
    assert ["bfloat16" in record.message for record in caplog.records] == [True] * lacks
    _warn_of_slow_bfloat16.cache_clear()


@every_variant
def test_bfloat16_is_finite_and_close_to_float32(overrides):
    core = random_core(**overrides)
    image = images(2, 3, 28, 20)
    expected_latents = core.encode(image).mode()
    expected = core.decode_scales(expected_latents)
    core = core.bfloat16()
    latents = core.encode(image.bfloat16()).mode()
    decoded = core.decode_scales(expected_latents.bfloat16())
    for ours, theirs in zip([latents, *decoded], [expected_latents, *expected]):
        assert ours.dtype == torch.bfloat16 and ours.isfinite().all()
        error = (ours.float() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error < 0.05


def without_scales(weights):
    of_scales = ("decoder.scale_embedding", "decoder.linear_path.", "decoder.coarse_embed.")
    return {name: x for name, x in weights.items() if not name.startswith(of_scales)}


@pytest.mark.parametrize("factors", [(8, 4, 2, 1), (1,), (16, 3, 1)])
@every_variant
def test_a_copy_with_other_scales_keeps_the_weights_of_those_it_shares(overrides, factors):
    core = random_core(**overrides)
    own, kind = tuple(core.config.scale_factors), core.config.downsampling
    before = copy.deepcopy(core.state_dict())
    other = core.with_scale_factors(factors, kind)
    assert other.config.scale_factors == factors and core.config.scale_factors == own
    assert other.config.model_fields == {**core.config.model_fields, "scale_factors": factors}
    for i, factor in enumerate(factors):
        row = own.index(factor) if factor in own else -1
        assert torch.equal(other.decoder.scale_embedding[i], core.decoder.scale_embedding[row])
        for modules in ("linear_path", "coarse_embed"):
            ours, theirs = getattr(other.decoder, modules), getattr(core.decoder, modules)
            if factor in own and i < len(ours) and len(theirs):
                torch.testing.assert_close(ours[i].state_dict(), theirs[row].state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(without_scales(other.state_dict()), without_scales(before), atol=0, rtol=0)
    other.load_state_dict({name: torch.zeros_like(x) for name, x in other.state_dict().items()})
    torch.testing.assert_close(core.state_dict(), before, atol=0, rtol=0)


@both_kinds
def test_a_new_scale_starts_as_the_finest_with_average_cells(downsampling):
    single = random_core(scale_factors=(1,), output_conv=False)
    multi, latents = single.with_scale_factors((4, 3, 1), downsampling), noise(1, 4, 12, 24)
    assert all(torch.equal(row, single.decoder.scale_embedding[0]) for row in multi.decoder.scale_embedding)
    assert multi.config.downsampling == downsampling
    averages = means(latents, 4)
    cells = latents if downsampling == "learned" else averages
    expected = single.decoder.linear_image(cells, 0)
    expected = F.avg_pool2d(expected, 4) if downsampling == "learned" else expected
    torch.testing.assert_close(multi.decoder.linear_image(cells, 0), expected, atol=1e-5, rtol=0)
    expected = single.decoder.embed(averages.flatten(2).transpose(1, 2)) + single.decoder.scale_embedding
    torch.testing.assert_close(tokens_of(multi, latents, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overrides", [{}, {"linear_path": 0}, DETOK, {"scale_factors": (6, 3, 1)}])
def test_averages_become_learned_with_the_same_images(overrides):
    core = random_core(downsampling="mean", **overrides)
    learned = core.with_scale_factors(tuple(core.config.scale_factors))
    assert (core.config.downsampling, learned.config.downsampling) == ("mean", "learned")
    latents = noise(2, 4, 24, 48)  # which all factors divide
    torch.testing.assert_close(learned.decode(latents), core.decode(latents), atol=1e-5, rtol=0)
    if not core.config.linear_path:
        torch.testing.assert_close(learned.decode_scales(latents), core.decode_scales(latents), atol=1e-5, rtol=0)


def test_a_copy_keeps_precision_mode_and_attention():
    core = random_core().to(torch.bfloat16)
    core.config._attn_implementation = "eager"
    other = core.with_scale_factors((4, 1))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16} and not other.training
    assert other.config._attn_implementation == "eager" and all(p.requires_grad for p in other.parameters())
    assert core.train().with_scale_factors((1,)).training


def test_a_copy_that_cannot_be_made_is_refused():
    peft, core = pytest.importorskip("peft"), random_core()
    for factors in ((), (2,), (1, 2), (4, 4, 1), (2.0, 1), 8):
        with pytest.raises(ValueError, match="scale_factors"):
            core.with_scale_factors(factors)
    vae = AutoencoderHieraTok.from_core(core)
    vae.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="adapters"):
        core.with_scale_factors((4, 1))
