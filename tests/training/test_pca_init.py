"""Tests of `pca_init`: principal components as numpy finds them, a fit that helps, and statistics to fold."""

import numpy as np
import pytest
import torch
from helpers import images, noise, random_core, tiny
from torch.nn import functional as F

from hieratok_hf import HieraTokCore
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.models.losses import image_pyramid
from hieratok_hf.training.pca_init import fit_linear_path, latent_statistics, start_from_principal_components


def smooth(*shape, seed=0):
    """Images in [-1, 1] whose neighbouring pixels are alike, as those of photographs."""
    coarse = F.interpolate(noise(*shape[:2], shape[2] // 4, shape[3] // 4, seed=seed), shape[2:], mode="bilinear")
    return (0.4 * coarse + 0.05 * noise(*shape, seed=seed + 1)).clamp(-1, 1)


def patches_of(batch, size=4):
    """Patches `(n, 3 * p * p)` in float64, cut with numpy, row by row."""
    pixels = batch.double().numpy()
    count, channels, height, width = pixels.shape
    cut = pixels.reshape(count, channels, height // size, size, width // size, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)


def fresh(**overrides):
    torch.manual_seed(0)
    return HieraTokCore(tiny(**overrides)).init_weights()


def error_of(core, batch):
    with torch.no_grad():
        return (core.decode(core.encode(batch).mode()) - batch).square().mean().item()


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
@pytest.mark.parametrize("channels", [1, 20])
def test_the_start_is_numpys_principal_component_analysis(channels, downsampling):
    core = fresh(latent_channels=channels, downsampling=downsampling)
    batches = [smooth(6, 3, 16, 24, seed=0), smooth(4, 3, 32, 16, seed=5)]
    start_from_principal_components(core, iter(batches))
    patches = np.concatenate([patches_of(batch) for batch in batches])
    mean = patches.mean(0)
    _, deviations, directions = np.linalg.svd(patches - mean, full_matrices=False)
    basis = directions[:channels]
    with torch.no_grad():
        for batch in batches:
            latents = core.encode(batch).mode()
            expected = (patches_of(batch) - mean) @ basis.T @ basis + mean
            np.testing.assert_allclose(patches_of(core.decode(latents)), expected, atol=2e-5)
    values = torch.cat([core.encode(batch).mode().transpose(0, 1).flatten(1) for batch in batches], 1)
    assert values.mean(1).abs().max() < 1e-4
    torch.testing.assert_close(torch.cov(values).view(channels, channels), torch.eye(channels), atol=1e-3, rtol=0)
    assert deviations[channels - 1] > 1.01 * deviations[channels]  # or another basis would serve as well


def test_fewer_directions_than_channels_still_give_the_images():
    core, flat = fresh(latent_channels=8), noise(3, 3, 1, 1).clamp(-1, 1).expand(3, 3, 8, 8).contiguous()
    start_from_principal_components(core, [flat])
    assert error_of(core, flat) < 1e-6
    assert all(p.isfinite().all() for p in core.parameters())
    with pytest.raises(ValueError, match="no linear path"):
        start_from_principal_components(fresh(linear_path=0), [flat])


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_the_start_replaces_what_was_there(downsampling):
    batch = smooth(8, 3, 16, 16)
    made = []
    for seed in (0, 1):
        core = random_core(seed, downsampling=downsampling)
        core.decoder.output_conv = None
        start_from_principal_components(core, [batch])
        made.append(core.decode_scales(core.encode(batch).mode()))
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_coarse_images_start_as_averages_of_the_finest():
    core, batch = fresh(), smooth(8, 3, 32, 32)
    start_from_principal_components(core, [batch])
    made = core.decode_scales(core.encode(batch).mode())
    for ours, theirs in zip(made, image_pyramid(made[-1], core.config), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_the_fit_lowers_the_error_and_leaves_the_blocks(downsampling):
    core, batch = fresh(downsampling=downsampling).train(), smooth(8, 3, 16, 16)
    start_from_principal_components(core, [batch])
    blocks = core.encoder.blocks, core.decoder.blocks
    before = {name: x.clone() for name, x in core.state_dict().items()}
    started = error_of(core, batch)
    fit_linear_path(core, (smooth(8, 3, 16, 16, seed=i) for i in range(100)), 60, learning_rate=3e-3)
    assert error_of(core, batch) < 0.9 * started
    assert core.training and (core.encoder.blocks, core.decoder.blocks) == blocks
    assert [len(x) for x in blocks] == [2, 2]
    assert all(p.grad is None and p.requires_grad for p in core.parameters())
    changed = {name for name, x in core.state_dict().items() if not torch.equal(x, before[name])}
    fitted = {name for name in before if "linear_path" in name} | {"encoder.head.bias", "decoder.head.bias"}
    assert changed == fitted


def test_the_fit_takes_as_many_batches_as_steps_and_is_the_same_each_time():
    fitted = []
    for _ in range(2):
        core, taken = fresh(), []
        batches = (taken.append(i) or smooth(2, 3, 8, 8, seed=i) for i in range(9))
        start_from_principal_components(core, [smooth(8, 3, 16, 16)])
        fit_linear_path(core, batches, 3)
        assert taken == [0, 1, 2]
        fitted.append(core.state_dict())
    assert all(torch.equal(x, fitted[1][name]) for name, x in fitted[0].items())


@pytest.mark.parametrize(("offset", "tolerance"), [(0, 1e-6), (1000, 1e-3)], ids=["small", "large"])
def test_latent_statistics_are_those_of_all_values_together_also_beside_a_large_mean(offset, tolerance):
    core = random_core()
    with torch.no_grad():
        core.encoder.head.bias[:4] += offset
        batches = [images(3, 3, 16, 16), images(1, 3, 28, 20, seed=1), images(5, 3, 4, 4, seed=2)]
        values = torch.cat([core.encode(x).mode().transpose(0, 1).flatten(1) for x in batches], 1).double()
    mean, std = latent_statistics(Codec(core), iter(batches))
    assert mean.dtype == std.dtype == torch.float32 and not mean.requires_grad
    torch.testing.assert_close(mean, values.mean(1).float(), atol=0 if offset else 1e-6, rtol=1e-6)
    torch.testing.assert_close(std, values.std(1).float(), atol=0, rtol=tolerance)


@pytest.mark.parametrize("batches", [[], [images(1, 3, 4, 4)]])
def test_statistics_of_too_little_are_refused(batches):
    with pytest.raises(ValueError, match=rf"`batches` must hold at least two latent positions, got {len(batches)}"):
        latent_statistics(Codec(random_core()), batches)
