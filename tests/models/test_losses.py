"""The training loss: parts by hand, kinds of pixel differences, borders, and balance over sizes."""

import pytest
import torch
from helpers import images, noise, random_core

from hieratok_hf.models.core import posterior_of
from hieratok_hf.models.losses import border_loss, image_pyramid, pixel_loss, tokenizer_losses
from hieratok_hf.utils.choices import PIXEL_LOSSES


def losses_of(core, pixel_values, kind="mse"):
    moments, _ = core.encode_moments(pixel_values)
    decoded = core.decode_scales(core.encode(pixel_values).mode())
    return tokenizer_losses(decoded, pixel_values, moments, core.config, kind), moments, decoded


@pytest.mark.parametrize("kind", PIXEL_LOSSES)
@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_parts_are_what_they_say(downsampling, kind):
    core = random_core(kl_weight=0.5, coarse_weight=0.25, downsampling=downsampling)
    pixel_values = images(2, 3, 28, 20)
    losses, moments, decoded = losses_of(core, pixel_values, kind)
    assert set(losses) == {kind, "kl", "coarse", "loss"}
    pairs = zip(decoded, image_pyramid(pixel_values, core.config), strict=True)
    *coarse, finest = [pixel_loss(a, b, kind) for a, b in pairs]
    torch.testing.assert_close(losses[kind], finest)
    torch.testing.assert_close(losses["coarse"], (8 * coarse[0] + 4 * coarse[1] + 2 * coarse[2]) / 3)
    torch.testing.assert_close(losses["kl"], posterior_of(moments).kl().mean() / moments[0].numel() * 2)
    torch.testing.assert_close(losses["loss"], finest + 0.5 * losses["kl"] + 0.25 * losses["coarse"])


def test_the_divergence_is_that_of_diffusers_also_where_it_bounds_the_variance():
    core = random_core(scale_factors=(1,))
    pixel_values, moments = images(1, 3, 16, 16), 40 * noise(1, 2 * core.config.latent_channels, 2, 2)
    losses = tokenizer_losses([pixel_values], pixel_values, moments, core.config)
    torch.testing.assert_close(losses["kl"], posterior_of(moments).kl().mean() / moments[0].numel() * 2)


def test_a_single_scale_has_no_coarse_part_and_low_precision_a_float32_loss():
    core = random_core(scale_factors=(1,)).to(torch.bfloat16)
    losses, *_ = losses_of(core, images(1, 3, 16, 16).to(torch.bfloat16))
    assert set(losses) == {"mse", "kl", "loss"}
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


def test_kinds_of_pixel_differences_by_hand():
    a, b = images(2, 3, 5, 7), images(2, 3, 5, 7, seed=1)
    difference = (a - b).double()
    expected = {
        "mse": difference.square().mean(),
        "l1": difference.abs().mean(),
        "charbonnier": (difference.square() + 1e-6).sqrt().mean() - 1e-3,
    }
    assert set(expected) == set(PIXEL_LOSSES)
    for kind, value in expected.items():
        assert pixel_loss(a, b, kind).item() == pytest.approx(value.item(), rel=1e-6)
        assert pixel_loss(a, a, kind).abs() < 1e-9
        same = a.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pixel_loss(same, a, kind), same)
        assert (gradient == 0).all()
        assert pixel_loss(a.bfloat16(), b, kind).dtype == torch.float32
    assert pixel_loss(a, b) == pixel_loss(a, b, "mse")
    with pytest.raises(ValueError, match="kind"):
        pixel_loss(a, b, "l3")


def test_the_border_loss_is_that_of_a_plain_loop_over_steps():
    made = images(3, 3, 10, 12)
    excess = []
    for image in made:
        means = []
        for axis, length in ((1, 10), (2, 12)):
            steps = [(image.select(axis, i) - image.select(axis, i - 1)).abs().mean() for i in range(1, length)]
            across = [step for i, step in enumerate(steps, start=1) if i % 4 == 0]
            inside = [step for i, step in enumerate(steps, start=1) if i % 4]
            means.append(sum(across) / len(across) - sum(inside) / len(inside))
        excess.append(max(0, sum(means) / 2))
    torch.testing.assert_close(border_loss(made, 4), torch.stack([torch.as_tensor(x) for x in excess]).mean())


def test_the_border_loss_sees_seams_alone():
    offsets = noise(2, 3, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert border_loss(offsets, 4) > 0.5
    assert border_loss(offsets, 8) == border_loss(offsets, 1) == 0  # no border, and nothing but borders
    assert border_loss(images(2, 3, 8, 8) - 3 * offsets.roll((2, 2), (2, 3)), 4) == 0  # steps inside alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_the_border_loss_are_finite(dtype):
    offsets = noise(1, 3, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for made, moves in ((torch.zeros(1, 3, 8, 8), False), (offsets, True)):
        made = made.to(dtype).requires_grad_()
        loss = border_loss(made, 4)
        (gradient,) = torch.autograd.grad(loss, made)
        assert loss.dtype == torch.float32 and gradient.isfinite().all()
        assert (gradient.abs().max() > 0) == moves
