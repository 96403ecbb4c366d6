"""Tests of `tokenizer`: the two properties that make it HieraTok, its linear start, folded statistics and training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DETOK, LINEAR_PATH, changed_tokens, images, noise, random_core, tiny

from hieratok_hf import AutoencoderHieraTok, HieraTokCore, HieraTokModel, PyramidLayout
from hieratok_hf.models.losses import image_pyramid
from hieratok_hf.ops.pyramid import flatten_pyramid

SIZES = [(32, 32), (48, 20), (20, 48), (28, 20), (4, 12), (4, 4)]
VARIANTS = [
    pytest.param({}, id="own"),
    pytest.param({"downsampling": "mean"}, id="mean"),
    pytest.param(DETOK, id="detok"),
    pytest.param({"linear_path": 0, "output_conv": False}, id="no-linear-path"),
    pytest.param({"linear_path": 1}, id="linear-path-1"),
    pytest.param({"scale_factors": (1,)}, id="single-scale"),
    pytest.param({"scale_factors": (5, 3, 1)}, id="odd-factors"),
    pytest.param({"scale_factors": (5, 3, 1), "downsampling": "mean"}, id="odd-factors-mean"),
]
both_kinds = pytest.mark.parametrize("downsampling", ["learned", "mean"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overrides", VARIANTS)
def test_images_come_back_in_their_own_size(size, overrides):
    core = random_core(**overrides)
    posterior = core.encode(images(2, 3, *size))
    latents = posterior.mode()
    assert latents.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert posterior.sample(torch.Generator().manual_seed(0)).shape == latents.shape
    decoded = core.decode(latents)
    assert decoded.shape == (2, 3, *size) and decoded.isfinite().all()


@pytest.mark.parametrize("grid", [(7, 5), (4, 6), (1, 3), (8, 8)])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_decoding_some_scales_equals_that_part_of_decoding_all(grid, overrides):
    core = random_core(**overrides)
    latents = noise(2, 4, *grid)
    every_scale = core.decode_scales(latents)
    assert len(every_scale) == len(core.config.scale_factors)
    for k in range(1, len(every_scale) + 1):
        factor = core.config.scale_factors[k - 1]
        image = core.decode(latents, num_scales=k)
        assert image.shape == (2, 3, 4 * -(-grid[0] // factor), 4 * -(-grid[1] // factor))
        torch.testing.assert_close(image, every_scale[k - 1], atol=1e-5, rtol=0)
        for ours, theirs in zip(core.decode_scales(latents, num_scales=k), every_scale):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(core.decode(latents), every_scale[-1], atol=1e-5, rtol=0)


@both_kinds
def test_both_wrappers_decode_some_scales_as_the_core_does(downsampling):
    core = random_core(downsampling=downsampling)
    model, vae = HieraTokModel.from_core(core), AutoencoderHieraTok.from_core(core)
    latents = noise(2, 4, 7, 5)
    for k in (1, 2, 3, 4, None):
        expected = core.decode(latents, k)
        assert torch.equal(model.decode(latents, num_scales=k).reconstruction, expected)
        assert torch.equal(vae.decode(latents, num_scales=k).sample, expected)


@both_kinds
def test_a_coarse_image_depends_on_averages_alone_unless_it_is_learned(downsampling):
    core = random_core(downsampling=downsampling)
    latents = noise(1, 4, 8, 8)
    swapped = latents.clone()
    swapped[:, :, 0, 0], swapped[:, :, 1, 1] = latents[:, :, 1, 1], latents[:, :, 0, 0]  # the same 2x2 mean
    for k in (1, 2, 3):
        same = torch.allclose(core.decode(swapped, k), core.decode(latents, k), atol=1e-5, rtol=0)
        assert same is (downsampling == "mean")
    assert not torch.allclose(core.decode(swapped), core.decode(latents), atol=1e-2)


@both_kinds
def test_coarse_images_are_those_of_their_tokens_whatever_finer_ones_hold(downsampling):
    core, latents = random_core(downsampling=downsampling), noise(2, 4, 7, 5)
    expected = core.decode_scales(latents)
    with changed_tokens(core.decoder, lambda tokens: torch.cat([tokens[:, :5], 3 * noise(2, 47, 32)], dim=1)):
        changed = core.decode_scales(latents)
    assert [torch.equal(a, b) for a, b in zip(changed, expected)] == [True, True, False, False]


@both_kinds
def test_decode_feeds_the_latent_to_the_decoder(downsampling):
    core = random_core(downsampling=downsampling)
    latents = noise(2, 4, 7, 5)
    layout = PyramidLayout.from_grid(7, 5, core.config.scale_factors)
    for image, other in zip(core.decode_scales(latents), core.decoder(latents, layout, all_scales=True)):
        assert torch.equal(image, other)


@both_kinds
def test_single_scale_twin_has_the_same_parameters_but_for_the_scales_it_lacks(downsampling):
    twin, multi = (
        {
            name: x.shape
            for name, x in random_core(scale_factors=factors, downsampling=downsampling).state_dict().items()
        }
        for factors in ((1,), (8, 4, 2, 1))
    )
    finest = ("decoder.linear_path.0.", "decoder.linear_path.3.")
    twin = {name.replace(*finest): shape for name, shape in twin.items()}
    lacked = {name for name in multi if twin.get(name) != multi[name]}
    of_scales = ("decoder.scale_embedding", "decoder.linear_path.", "decoder.coarse_embed.")
    assert twin.keys() <= multi.keys() and all(name.startswith(of_scales) for name in lacked)
    assert len(lacked) == 1 + 2 * 3 * (2 if downsampling == "learned" else 1)
    assert twin["decoder.scale_embedding"] == (1, 32) and multi["decoder.scale_embedding"] == (4, 32)


def test_single_scale_twin_is_a_plain_autoencoder():
    core = random_core(scale_factors=(1,))
    latents = noise(2, 4, 7, 5)
    assert torch.equal(core.decode(latents, num_scales=1), core.decode(latents))
    assert len(core.decode_scales(latents)) == 1


def random_basis(channels=4, size=48):
    basis = torch.linalg.qr(noise(size, channels, seed=3).double())[0].T
    return basis, noise(size, seed=4).double() * 0.1, noise(channels, seed=5).double().abs() + 0.5


def patches_of(image):
    """`(B, h, w, 3 * p * p)` in the order (colour, row, column)."""
    return image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)


@pytest.mark.parametrize("linear_path", [1, LINEAR_PATH])
@pytest.mark.parametrize("size", [(32, 32), (28, 20), (4, 12)])
def test_linear_path_starts_as_exactly_the_principal_components(linear_path, size):
    core = HieraTokCore(tiny(linear_path=linear_path)).init_weights().double()
    components, mean, scale = random_basis()
    core.set_linear_path(components, mean, scale)
    image = images(2, 3, *size).double()
    patches = patches_of(image)
    expected_latents = ((patches - mean) @ components.T / scale).permute(0, 3, 1, 2)
    latents = core.encode(image).mode()
    torch.testing.assert_close(latents, expected_latents, atol=1e-10, rtol=0)

    projected = mean + (patches - mean) @ components.T @ components
    torch.testing.assert_close(patches_of(core.decode(latents)), projected, atol=1e-10, rtol=0)
    assert not torch.allclose(projected, patches, atol=0.1)


@pytest.mark.parametrize("grid", [(8, 16), (7, 5), (1, 3)])
@pytest.mark.parametrize("factors", [(8, 4, 2, 1), (6, 3, 1)])
@both_kinds
def test_linear_path_starts_every_scale_from_averages(downsampling, factors, grid):
    core = HieraTokCore(tiny(downsampling=downsampling, scale_factors=factors)).init_weights().double()
    components, mean, scale = random_basis()
    core.set_linear_path(components, mean, scale)
    latents = noise(2, 4, *grid).double()
    made = core.decode_scales(latents)
    if downsampling == "mean":  # the image of the average latent
        layout = PyramidLayout.from_grid(*grid, factors)
        tokens = flatten_pyramid(latents, layout)
        for image, rows in zip(made, layout.slices):
            expected = mean + (tokens[:, rows] * scale) @ components
            torch.testing.assert_close(patches_of(image).flatten(1, 2), expected, atol=1e-10, rtol=0)
        return
    for image, factor, expected in zip(made, factors, image_pyramid(made[-1], core.config), strict=True):
        assert image.shape == expected.shape
        # Beyond the latent what is repeated is an average of pixels, not the last of them.
        rows, columns = (4 * side // factor for side in grid)
        torch.testing.assert_close(image[..., :rows, :columns], expected[..., :rows, :columns], atol=1e-10, rtol=0)


def test_a_full_basis_reconstructs_the_image_itself():
    core = HieraTokCore(tiny(latent_channels=48)).init_weights().double()
    core.set_linear_path(*random_basis(channels=48))
    image = images(2, 3, 28, 20).double()
    torch.testing.assert_close(core.decode(core.encode(image).mode()), image, atol=1e-10, rtol=0)


def test_linear_path_forgets_what_was_there_before():
    fresh, trained = HieraTokCore(tiny()).init_weights().double(), random_core().double()
    trained.decoder.output_conv = None
    fresh.decoder.output_conv = None
    image = images(1, 3, 28, 20).double()
    for core in (fresh, trained):
        core.set_linear_path(*random_basis())
    means = [core.encode(image).mode() for core in (fresh, trained)]
    torch.testing.assert_close(means[1], means[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(trained.decode(means[0]), fresh.decode(means[0]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("size", [(32, 32), (28, 20), (4, 12)])
def test_folded_statistics_normalise_the_latent_and_keep_the_images(overrides, size):
    core = random_core(**overrides)
    mean, std = 0.5 * noise(4, seed=7), noise(4, seed=8).abs() + 0.3
    image = images(2, 3, *size)
    before = core.encode(image)
    every_scale = core.decode_scales(before.mode())
    core.fold_latent_statistics(mean, std)
    after = core.encode(image)
    expected = (before.mode() - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(after.mode(), expected, atol=1e-4, rtol=1e-4)
    shift = 2 * std.log()[:, None, None]
    torch.testing.assert_close(after.logvar, before.logvar - shift, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(core.decode_scales(after.mode()), every_scale):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(core.decode(after.mode()), every_scale[-1], atol=1e-4, rtol=0)
    assert not torch.allclose(core.decode(before.mode()), every_scale[-1], atol=1e-2)


def test_latents_of_the_training_images_are_normalised_after_folding():
    core = random_core()
    batch = images(8, 3, 32, 32)
    latents = core.encode(batch).mode()
    core.fold_latent_statistics(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    latents = core.encode(batch).mode()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


@both_kinds
def test_folding_is_undone_by_folding_the_inverse(downsampling):
    core = random_core(downsampling=downsampling)
    before = copy.deepcopy(core.state_dict())
    mean, std = 0.5 * noise(4, seed=7), noise(4, seed=8).abs() + 0.3
    core.fold_latent_statistics(mean, std)
    assert any(not torch.allclose(value, before[name], atol=1e-3) for name, value in core.state_dict().items())
    core.fold_latent_statistics(-mean / std, 1 / std)
    for name, value in core.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_batch_gives_what_its_images_give_alone(overrides):
    core = random_core(**overrides)
    batch = images(3, 3, 28, 20)
    latents = core.encode(batch).mode()
    torch.testing.assert_close(latents, torch.cat([core.encode(x[None]).mode() for x in batch]), atol=1e-5, rtol=1e-5)
    decoded = torch.cat([core.decode(x[None]) for x in latents])
    torch.testing.assert_close(core.decode(latents), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_gradients_reach_every_parameter_and_are_finite(overrides):
    core = random_core(**overrides).train()
    posterior = core.encode(images(2, 3, 28, 20))
    latents = posterior.sample(torch.Generator().manual_seed(0))
    loss = sum((image * noise(*image.shape, seed=i)).sum() for i, image in enumerate(core.decode_scales(latents)))
    loss.backward()
    for name, parameter in core.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@both_kinds
def test_gradients_reach_the_latent_from_every_scale(downsampling):
    core = random_core(downsampling=downsampling)
    latents = noise(1, 4, 7, 5).requires_grad_()
    for k in (1, 2, 3, 4):
        (gradient,) = torch.autograd.grad(core.decode(latents, k).square().sum(), latents)
        assert gradient.isfinite().all() and (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("overrides", VARIANTS)
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


def test_encode_and_decode_are_deterministic():
    core = random_core()
    image = images(2, 3, 28, 20)
    latents = core.encode(image).mode()
    assert torch.equal(core.encode(image).mode(), latents)
    assert torch.equal(core.decode(latents), core.decode(latents))


def test_posterior_takes_the_mean_first_and_the_log_variance_second():
    core = random_core()
    image = images(1, 3, 28, 20)
    moments, _ = core.encode_moments(image)
    posterior = core.encode(image)
    assert torch.equal(posterior.mode(), moments[:, :4])
    assert torch.equal(posterior.logvar, moments[:, 4:].clamp(-30, 20))


OTHER_SCALES = [(8, 4, 2, 1), (1,), (4, 1), (16, 3, 1)]


@pytest.mark.parametrize("factors", OTHER_SCALES)
@pytest.mark.parametrize("overrides", VARIANTS)
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
                assert all(torch.equal(*pair) for pair in zip(ours[i].parameters(), theirs[row].parameters()))
    of_scales = ("decoder.scale_embedding", "decoder.linear_path.", "decoder.coarse_embed.")
    rest = [name for name in before if not name.startswith(of_scales)]
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in rest)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(torch.equal(x, before[name]) for name, x in core.state_dict().items())


@both_kinds
@pytest.mark.parametrize("kept", [(8, 4, 2, 1), (8, 4, 1), (8, 1), (8, 3, 1)])
def test_a_copy_decodes_alike_what_has_lost_no_coarser_scale(kept, downsampling):
    core = random_core(downsampling=downsampling)
    other, latents = core.with_scale_factors(kept, downsampling), noise(2, 4, 8, 8)
    for k, (ours, own) in enumerate(zip(kept, (8, 4, 2, 1)), start=1):
        if ours != own:
            break
        torch.testing.assert_close(other.decode(latents, k), core.decode(latents, k), atol=1e-5, rtol=0)
    assert other.decode(latents).shape == core.decode(latents).shape
    assert kept != (8, 4, 2, 1) or torch.equal(other.decode(latents), core.decode(latents))


@both_kinds
def test_a_new_scale_starts_as_the_finest_with_average_cells(downsampling):
    single = random_core(scale_factors=(1,), output_conv=False)
    multi, latents = single.with_scale_factors((4, 3, 1), downsampling), noise(1, 4, 12, 24)
    assert all(torch.equal(row, single.decoder.scale_embedding[0]) for row in multi.decoder.scale_embedding)
    assert multi.config.downsampling == downsampling
    averages = flatten_pyramid(latents, PyramidLayout.from_grid(12, 24, (4, 1)))[:, :18].transpose(1, 2)
    averages = averages.unflatten(2, (3, 6))
    if downsampling == "mean":
        expected = single.decoder.linear_image(averages, 0)
    else:
        expected = F.avg_pool2d(single.decoder.linear_image(latents, 0), 4)
    cells = latents if downsampling == "learned" else averages
    torch.testing.assert_close(multi.decoder.linear_image(cells, 0), expected, atol=1e-5, rtol=0)
    seen = []
    with changed_tokens(multi.decoder, lambda tokens: seen.append(tokens) or tokens):
        multi.decode(latents, 1)
    expected = single.decoder.embed(averages.flatten(2).transpose(1, 2)) + single.decoder.scale_embedding
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overrides", [{}, {"linear_path": 0}, DETOK, {"scale_factors": (6, 3, 1)}])
def test_averages_become_learned_with_the_same_images(overrides):
    core = random_core(downsampling="mean", **overrides)
    factors = tuple(core.config.scale_factors)
    learned = core.with_scale_factors(factors)
    assert (core.config.downsampling, learned.config.downsampling) == ("mean", "learned")
    for grid in ((24, 24), (24, 48)):  # which all factors divide
        latents = noise(2, 4, *grid)
        torch.testing.assert_close(learned.decode(latents), core.decode(latents), atol=1e-5, rtol=0)
        if not core.config.linear_path:
            for ours, theirs in zip(learned.decode_scales(latents), core.decode_scales(latents), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_copy_keeps_precision_mode_and_attention():
    core = random_core().to(torch.bfloat16)
    core.config._attn_implementation = "eager"
    other = core.with_scale_factors((4, 1))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16} and not other.training
    assert other.config._attn_implementation == "eager"
    assert core.train().with_scale_factors((1,)).training
    other = core.with_scale_factors((4, 1))
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("factors", [(), (2,), (1, 2), (4, 4, 1), (4, 2), (2.0, 1), (1, 0), 8])
def test_a_copy_with_scales_that_make_no_pyramid_is_refused(factors):
    core = random_core()
    with pytest.raises(ValueError, match="`scale_factors` must be integers that decrease strictly and end in 1"):
        core.with_scale_factors(factors)
    assert core.config.scale_factors == (8, 4, 2, 1)


@pytest.mark.parametrize("kind", ["mean", "means", None])
def test_a_copy_that_would_average_what_was_learned_is_refused(kind):
    with pytest.raises(ValueError, match="`downsampling` must be one of"):
        random_core().with_scale_factors((8, 4, 2, 1), kind)


def test_without_scale_causality_no_scale_is_decoded_alone():
    core = random_core(scale_factors=(4, 2, 1), scale_causal=False)
    latents = noise(1, 4, 4, 4)
    assert torch.equal(core.decode(latents, num_scales=3), core.decode(latents))
    with pytest.raises(
        ValueError, match=r"Without `scale_causal` no scale can be decoded alone, got `num_scales=2`\."
    ):
        core.decode(latents, num_scales=2)


def test_a_copy_of_a_model_with_adapters_is_refused():
    peft = pytest.importorskip("peft")
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has adapters"):
        vae.core.with_scale_factors((4, 1))
