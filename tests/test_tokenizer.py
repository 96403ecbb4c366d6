"""Tests of `tokenizer`: the two properties that make it HieraTok, its linear start, folded statistics and training."""

import copy

import pytest
import torch
from helpers import DETOK, LINEAR_PATH, noise, pictures, random_core, tiny

from hieratok_hf import AutoencoderHieraTok, HieraTokCore, HieraTokModel, PyramidLayout
from hieratok_hf.pyramid import flatten_pyramid

SIZES = [(32, 32), (48, 20), (20, 48), (28, 20), (4, 12), (4, 4)]
VARIANTS = [
    pytest.param({}, id="own"),
    pytest.param(DETOK, id="detok"),
    pytest.param({"linear_path": 0, "output_conv": False}, id="no-linear-path"),
    pytest.param({"linear_path": 1}, id="linear-path-1"),
    pytest.param({"scale_factors": (1,)}, id="single-scale"),
    pytest.param({"scale_factors": (5, 3, 1)}, id="odd-factors"),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overrides", VARIANTS)
def test_pictures_come_back_in_their_own_size(size, overrides):
    core = random_core(**overrides)
    posterior = core.encode(pictures(2, 3, *size))
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
        picture = core.decode(latents, num_scales=k)
        assert picture.shape == (2, 3, 4 * -(-grid[0] // factor), 4 * -(-grid[1] // factor))
        torch.testing.assert_close(picture, every_scale[k - 1], atol=1e-5, rtol=0)
        for ours, theirs in zip(core.decode_scales(latents, num_scales=k), every_scale):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(core.decode(latents), every_scale[-1], atol=1e-5, rtol=0)


def test_both_wrappers_decode_some_scales_as_the_core_does():
    core = random_core()
    model, vae = HieraTokModel.from_core(core), AutoencoderHieraTok.from_core(core)
    latents = noise(2, 4, 7, 5)
    for k in (1, 2, 3, 4, None):
        expected = core.decode(latents, k)
        assert torch.equal(model.decode(latents, num_scales=k).reconstruction, expected)
        assert torch.equal(vae.decode(latents, num_scales=k).sample, expected)


def test_a_coarse_picture_depends_on_the_pooled_latent_alone():
    core = random_core()
    latents = noise(1, 4, 8, 8)
    swapped = latents.clone()
    swapped[:, :, 0, 0], swapped[:, :, 1, 1] = latents[:, :, 1, 1], latents[:, :, 0, 0]  # the same 2x2 mean
    for k in (1, 2, 3):
        torch.testing.assert_close(core.decode(swapped, k), core.decode(latents, k), atol=1e-5, rtol=0)
    assert not torch.allclose(core.decode(swapped), core.decode(latents), atol=1e-2)


def test_decode_feeds_the_pooled_latent_to_the_decoder():
    core = random_core()
    latents = noise(2, 4, 7, 5)
    layout = PyramidLayout.from_grid(7, 5, core.config.scale_factors)
    expected = core.decoder(flatten_pyramid(latents, layout), layout, (7, 5), all_scales=True)
    for picture, other in zip(core.decode_scales(latents), expected):
        assert torch.equal(picture, other)


def test_single_scale_twin_has_the_same_parameters_but_for_the_scales_it_lacks():
    twin, multi = (random_core(scale_factors=factors).state_dict() for factors in ((1,), (8, 4, 2, 1)))
    differing = {
        name for name in twin.keys() | multi.keys() if getattr(twin.get(name), "shape", None) != multi[name].shape
    }
    assert all(name.startswith(("decoder.scale_embedding", "decoder.linear_path.")) for name in differing)
    assert twin["decoder.scale_embedding"].shape == (1, 32) and multi["decoder.scale_embedding"].shape == (4, 32)


def test_single_scale_twin_is_a_plain_autoencoder():
    core = random_core(scale_factors=(1,))
    latents = noise(2, 4, 7, 5)
    assert torch.equal(core.decode(latents, num_scales=1), core.decode(latents))
    assert len(core.decode_scales(latents)) == 1


def random_basis(channels=4, size=48):
    basis = torch.linalg.qr(noise(size, channels, seed=3).double())[0].T
    return basis, noise(size, seed=4).double() * 0.1, noise(channels, seed=5).double().abs() + 0.5


def patches_of(picture):
    """`(B, h, w, 3 * p * p)` in the order (colour, row, column)."""
    return picture.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)


@pytest.mark.parametrize("linear_path", [1, LINEAR_PATH])
@pytest.mark.parametrize("size", [(32, 32), (28, 20), (4, 12)])
def test_linear_path_starts_as_exactly_the_principal_components(linear_path, size):
    core = HieraTokCore(tiny(linear_path=linear_path)).init_weights().double()
    components, mean, scale = random_basis()
    core.set_linear_path(components, mean, scale)
    picture = pictures(2, 3, *size).double()
    patches = patches_of(picture)
    expected_latents = ((patches - mean) @ components.T / scale).permute(0, 3, 1, 2)
    latents = core.encode(picture).mode()
    torch.testing.assert_close(latents, expected_latents, atol=1e-10, rtol=0)

    projected = mean + (patches - mean) @ components.T @ components
    torch.testing.assert_close(patches_of(core.decode(latents)), projected, atol=1e-10, rtol=0)
    assert not torch.allclose(projected, patches, atol=0.1)


def test_linear_path_starts_every_scale_from_the_pooled_latent():
    core = HieraTokCore(tiny()).init_weights().double()
    components, mean, scale = random_basis()
    core.set_linear_path(components, mean, scale)
    latents = noise(2, 4, 7, 5).double()
    layout = PyramidLayout.from_grid(7, 5, core.config.scale_factors)
    tokens = flatten_pyramid(latents, layout)
    for picture, rows in zip(core.decode_scales(latents), layout.slices):
        expected = mean + (tokens[:, rows] * scale) @ components
        torch.testing.assert_close(patches_of(picture).flatten(1, 2), expected, atol=1e-10, rtol=0)


def test_a_full_basis_reconstructs_the_picture_itself():
    core = HieraTokCore(tiny(latent_channels=48)).init_weights().double()
    core.set_linear_path(*random_basis(channels=48))
    picture = pictures(2, 3, 28, 20).double()
    torch.testing.assert_close(core.decode(core.encode(picture).mode()), picture, atol=1e-10, rtol=0)


def test_linear_path_forgets_what_was_there_before():
    fresh, trained = HieraTokCore(tiny()).init_weights().double(), random_core().double()
    trained.decoder.output_conv = None
    fresh.decoder.output_conv = None
    picture = pictures(1, 3, 28, 20).double()
    for core in (fresh, trained):
        core.set_linear_path(*random_basis())
    means = [core.encode(picture).mode() for core in (fresh, trained)]
    torch.testing.assert_close(means[1], means[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(trained.decode(means[0]), fresh.decode(means[0]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("size", [(32, 32), (28, 20), (4, 12)])
def test_folded_statistics_normalise_the_latent_and_keep_the_pictures(overrides, size):
    core = random_core(**overrides)
    mean, std = 0.5 * noise(4, seed=7), noise(4, seed=8).abs() + 0.3
    picture = pictures(2, 3, *size)
    before = core.encode(picture)
    every_scale = core.decode_scales(before.mode())
    core.fold_latent_statistics(mean, std)
    after = core.encode(picture)
    expected = (before.mode() - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(after.mode(), expected, atol=1e-4, rtol=1e-4)
    shift = 2 * std.log()[:, None, None]
    torch.testing.assert_close(after.logvar, before.logvar - shift, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(core.decode_scales(after.mode()), every_scale):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(core.decode(after.mode()), every_scale[-1], atol=1e-4, rtol=0)
    assert not torch.allclose(core.decode(before.mode()), every_scale[-1], atol=1e-2)


def test_latents_of_the_training_pictures_are_normalised_after_folding():
    core = random_core()
    batch = pictures(8, 3, 32, 32)
    latents = core.encode(batch).mode()
    core.fold_latent_statistics(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    latents = core.encode(batch).mode()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_folding_is_undone_by_folding_the_inverse():
    core = random_core()
    before = copy.deepcopy(core.state_dict())
    mean, std = 0.5 * noise(4, seed=7), noise(4, seed=8).abs() + 0.3
    core.fold_latent_statistics(mean, std)
    assert any(not torch.allclose(value, before[name], atol=1e-3) for name, value in core.state_dict().items())
    core.fold_latent_statistics(-mean / std, 1 / std)
    for name, value in core.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_batch_gives_what_its_pictures_give_alone(overrides):
    core = random_core(**overrides)
    batch = pictures(3, 3, 28, 20)
    latents = core.encode(batch).mode()
    torch.testing.assert_close(latents, torch.cat([core.encode(x[None]).mode() for x in batch]), atol=1e-5, rtol=1e-5)
    decoded = torch.cat([core.decode(x[None]) for x in latents])
    torch.testing.assert_close(core.decode(latents), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_gradients_reach_every_parameter_and_are_finite(overrides):
    core = random_core(**overrides).train()
    posterior = core.encode(pictures(2, 3, 28, 20))
    latents = posterior.sample(torch.Generator().manual_seed(0))
    loss = sum(
        (picture * noise(*picture.shape, seed=i)).sum() for i, picture in enumerate(core.decode_scales(latents))
    )
    loss.backward()
    for name, parameter in core.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_gradients_reach_the_latent_from_every_scale():
    core = random_core()
    latents = noise(1, 4, 7, 5).requires_grad_()
    for k in (1, 2, 3, 4):
        (gradient,) = torch.autograd.grad(core.decode(latents, k).square().sum(), latents)
        assert gradient.isfinite().all() and (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("overrides", VARIANTS)
def test_bfloat16_is_finite_and_close_to_float32(overrides):
    core = random_core(**overrides)
    picture = pictures(2, 3, 28, 20)
    expected_latents = core.encode(picture).mode()
    expected = core.decode_scales(expected_latents)
    core = core.bfloat16()
    latents = core.encode(picture.bfloat16()).mode()
    decoded = core.decode_scales(expected_latents.bfloat16())
    for ours, theirs in zip([latents, *decoded], [expected_latents, *expected]):
        assert ours.dtype == torch.bfloat16 and ours.isfinite().all()
        error = (ours.float() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error < 0.05


def test_encode_and_decode_are_deterministic():
    core = random_core()
    picture = pictures(2, 3, 28, 20)
    latents = core.encode(picture).mode()
    assert torch.equal(core.encode(picture).mode(), latents)
    assert torch.equal(core.decode(latents), core.decode(latents))


def test_posterior_takes_the_mean_first_and_the_log_variance_second():
    core = random_core()
    picture = pictures(1, 3, 28, 20)
    moments, _ = core.encode_moments(picture)
    posterior = core.encode(picture)
    assert torch.equal(posterior.mode(), moments[:, :4])
    assert torch.equal(posterior.logvar, moments[:, 4:].clamp(-30, 20))


OTHER_SCALES = [(8, 4, 2, 1), (1,), (4, 1), (16, 3, 1)]


@pytest.mark.parametrize("factors", OTHER_SCALES)
@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_copy_with_other_scales_keeps_the_weights_of_those_it_shares(overrides, factors):
    core = random_core(**overrides)
    own = tuple(core.config.scale_factors)
    before = copy.deepcopy(core.state_dict())
    other = core.with_scale_factors(factors)
    assert other.config.scale_factors == factors and core.config.scale_factors == own
    assert other.config.model_fields == {**core.config.model_fields, "scale_factors": factors}
    for i, factor in enumerate(factors):
        row = own.index(factor) if factor in own else len(own) - 1
        assert torch.equal(other.decoder.scale_embedding[i], core.decoder.scale_embedding[row])
        if core.config.linear_path:
            for ours, theirs in zip(
                other.decoder.linear_path[i].parameters(), core.decoder.linear_path[row].parameters()
            ):
                assert torch.equal(ours, theirs)
    rest = [name for name in before if not name.startswith(("decoder.scale_embedding", "decoder.linear_path."))]
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in rest)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(torch.equal(x, before[name]) for name, x in core.state_dict().items())


def test_a_copy_with_the_same_scales_is_the_same_model():
    core = random_core()
    other = core.with_scale_factors((8, 4, 2, 1))
    batch = pictures(2, 3, 28, 20)
    assert torch.equal(other.encode(batch).mode(), core.encode(batch).mode())
    for ours, theirs in zip(
        other.decode_scales(core.encode(batch).mode()), core.decode_scales(core.encode(batch).mode())
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kept", [(8, 4, 1), (8, 1), (8, 3, 1)])
def test_a_copy_with_fewer_coarse_scales_decodes_those_it_keeps_alike(kept):
    core = random_core()
    other, latents = core.with_scale_factors(kept), noise(2, 4, 8, 8)
    # A scale that has lost no coarser one sees what it saw before.
    for k, (ours, own) in enumerate(zip(kept, (8, 4, 2, 1)), start=1):
        if ours != own:
            break
        torch.testing.assert_close(other.decode(latents, k), core.decode(latents, k), atol=1e-5, rtol=0)
    assert other.decode(latents).shape == core.decode(latents).shape


def test_a_new_scale_starts_as_the_finest():
    single = random_core(scale_factors=(1,))
    multi, latents = single.with_scale_factors((4, 2, 1)), noise(1, 4, 8, 8)
    assert all(torch.equal(row, single.decoder.scale_embedding[0]) for row in multi.decoder.scale_embedding)
    layout = PyramidLayout.from_grid(8, 8, (4, 2, 1))
    coarsest = flatten_pyramid(latents, layout)[:, layout.slices[0]].transpose(1, 2).unflatten(2, (2, 2))
    assert multi.decode(latents, 1).shape == (1, 3, 8, 8)
    # Laid out as the finest, it is the old model's picture of a small latent.
    own_layout = PyramidLayout.from_grid(2, 2, (1,))
    tokens = flatten_pyramid(coarsest, own_layout)
    ours = multi.decoder(tokens, own_layout, (2, 2))[0]
    theirs = single.decoder(tokens, own_layout, (2, 2))[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_copy_keeps_precision_mode_and_attention():
    core = random_core().to(torch.bfloat16)
    core.config._attn_implementation = "eager"
    other = core.with_scale_factors((4, 1))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16} and not other.training
    assert other.config._attn_implementation == "eager"
    assert core.train().with_scale_factors((1,)).training
    other = core.with_scale_factors((4, 1))
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("factors", [(), (2,), (1, 2), (4, 4, 1), (4, 2), (2.0, 1), (1, 0)])
def test_a_copy_with_scales_that_make_no_pyramid_is_refused(factors):
    core = random_core()
    with pytest.raises(ValueError, match="`scale_factors` must be integers that decrease strictly and end in 1"):
        core.with_scale_factors(factors)
    assert core.config.scale_factors == (8, 4, 2, 1)


def test_without_scale_causality_no_scale_is_decoded_alone():
    core = random_core(scale_factors=(4, 2, 1), scale_causal=False)
    latents = noise(1, 4, 4, 4)
    assert torch.equal(core.decode(latents, num_scales=3), core.decode(latents))
    with pytest.raises(
        ValueError, match=r"Without `scale_causal` no scale can be decoded alone, got `num_scales=2`\."
    ):
        core.decode(latents, num_scales=2)
