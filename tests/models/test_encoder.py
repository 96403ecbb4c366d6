"""Tests of `encoder`: places of the moments, full attention, the linear path and any size."""

import pytest
import torch
from helpers import DETOK, images, random_core
from torch.nn import functional as F

SIZES = [(32, 32), (48, 20), (20, 48), (28, 20), (4, 4), (4, 12)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overrides", [{}, DETOK], ids=["own", "detok"])
def test_moments_and_features_of_any_grid(size, overrides):
    encoder = random_core(**overrides).encoder
    height, width = size[0] // 4, size[1] // 4
    moments, features = encoder(images(2, 3, *size))
    assert moments.shape == (2, 8, height, width) and features.shape == (2, height * width, 32)
    assert moments.isfinite().all() and features.isfinite().all()


@pytest.mark.parametrize("size", [(28, 20), (4, 12)])
def test_moments_are_read_from_the_features_row_by_row(size):
    encoder = random_core(linear_path=0).encoder
    moments, features = encoder(images(2, 3, *size))
    width = size[1] // 4
    for i in range(moments.shape[2]):
        for j in range(width):
            expected = encoder.head(features[:, i * width + j])
            torch.testing.assert_close(moments[:, :, i, j], expected, atol=1e-6, rtol=1e-5)


def test_each_patch_is_embedded_by_itself():
    encoder = random_core().encoder
    image = images(1, 3, 12, 8)
    embedded = encoder.patch_embed(image)
    for i in range(3):
        for j in range(2):
            patch = image[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            expected = (patch * encoder.patch_embed.weight).sum((1, 2, 3)) + encoder.patch_embed.bias
            torch.testing.assert_close(embedded[0, :, i, j], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("linear_path", [1, 3])
@pytest.mark.parametrize("size", [(28, 20), (4, 12)])
def test_linear_path_adds_a_convolution_to_the_mean_only(linear_path, size):
    encoder = random_core(linear_path=linear_path).encoder
    image = images(2, 3, *size)
    moments, features = encoder(image)
    plain = encoder.head(features).transpose(1, 2).unflatten(2, (size[0] // 4, size[1] // 4))
    border = 4 * (linear_path // 2)
    padded = F.pad(image, (border,) * 4, mode="replicate")
    patches = F.unfold(padded, 4 * linear_path, stride=4)
    added = (encoder.linear_path.weight.flatten(1) @ patches).unflatten(2, (size[0] // 4, size[1] // 4))
    torch.testing.assert_close(moments[:, :4], plain[:, :4] + added, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments[:, 4:], plain[:, 4:], atol=1e-6, rtol=1e-6)
    assert added.abs().mean() > 0.01


@pytest.mark.parametrize("overrides", [{}, DETOK], ids=["own", "detok"])
def test_every_patch_sees_every_patch(overrides):
    encoder = random_core(**{**overrides, "linear_path": 0}).encoder
    image = images(1, 3, 12, 20).requires_grad_()
    moments, _ = encoder(image)
    for i in range(3):
        for j in range(5):
            (gradient,) = torch.autograd.grad(moments[0, :, i, j].sum(), image, retain_graph=True)
            by_patch = gradient[0].unflatten(2, (5, 4)).unflatten(1, (3, 4)).abs().sum((0, 2, 4))
            assert (by_patch > 0).all()


@pytest.mark.parametrize("overrides", [{}, DETOK], ids=["own", "detok"])
def test_moving_a_patch_changes_more_than_its_place(overrides):
    encoder = random_core(**{**overrides, "linear_path": 0}).encoder
    image = images(1, 3, 4, 16)
    swapped = image.clone()
    swapped[..., :4], swapped[..., 8:12] = image[..., 8:12], image[..., :4]
    before, after = encoder(image)[0], encoder(swapped)[0]
    assert not torch.allclose(after[..., [2, 1, 0, 3]], before, atol=1e-3)


def test_without_positions_moving_a_patch_would_only_move_its_moments():
    encoder = random_core(linear_path=0, rotary_scale=1e-12).encoder
    image = images(1, 3, 4, 16)
    swapped = image.clone()
    swapped[..., :4], swapped[..., 8:12] = image[..., 8:12], image[..., :4]
    before, after = encoder(image)[0], encoder(swapped)[0]
    torch.testing.assert_close(after[..., [2, 1, 0, 3]], before, atol=1e-5, rtol=1e-5)


def test_learned_positions_join_before_the_first_norm():
    encoder = random_core(**DETOK).encoder
    seen = []
    encoder.norm_before.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    image = images(1, 3, 20, 20)
    encoder(image)
    expected = (encoder.patch_embed(image) + encoder.positions.grid).flatten(2).transpose(1, 2)
    assert torch.equal(seen[0], expected)


def test_norms_around_the_blocks_follow_the_configuration():
    for before, after in [(True, True), (True, False), (False, True), (False, False)]:
        core = random_core(norm_before_blocks=before, norm_after_blocks=after)
        for side in (core.encoder, core.decoder):
            assert isinstance(side.norm_before, torch.nn.RMSNorm) == before
            assert isinstance(side.norm_after, torch.nn.RMSNorm) == after


def test_a_batch_gives_what_its_images_give_alone():
    encoder = random_core().encoder
    batch = images(3, 3, 28, 20)
    together = encoder(batch)
    alone = [encoder(image[None]) for image in batch]
    for k in (0, 1):
        torch.testing.assert_close(together[k], torch.cat([x[k] for x in alone]), atol=1e-5, rtol=1e-5)
