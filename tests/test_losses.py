"""The training loss: parts by hand, weights, and balance over sizes."""

import torch
from helpers import pictures, random_core

from hieratok_hf.losses import tokenizer_losses
from hieratok_hf.pyramid import picture_pyramid


def losses_of(core, pixel_values):
    moments, _ = core.encode_moments(pixel_values)
    latents = core.encode(pixel_values).mode()
    return tokenizer_losses(core.decode_scales(latents), pixel_values, moments, core.config), moments, latents


def test_parts_are_what_they_say():
    core, pixel_values = random_core(kl_weight=0.5, coarse_weight=0.25), pictures(2, 3, 28, 20)
    losses, moments, latents = losses_of(core, pixel_values)
    decoded = core.decode_scales(latents)
    squares = [
        (a - b).square().mean() for a, b in zip(decoded, picture_pyramid(pixel_values, core.config), strict=True)
    ]
    mean, logvar = moments.chunk(2, dim=1)
    torch.testing.assert_close(losses["mse"], squares[-1])
    torch.testing.assert_close(losses["coarse"], sum(squares[:-1]) / 3)
    torch.testing.assert_close(losses["kl"], 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean())
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.5 * losses["kl"] + 0.25 * losses["coarse"])


def test_a_single_scale_has_no_coarse_part():
    losses, *_ = losses_of(random_core(scale_factors=(1,)), pictures(1, 3, 8, 8))
    assert set(losses) == {"mse", "kl", "loss"}


def test_parts_do_not_grow_with_the_picture():
    core, small = random_core(), pictures(1, 3, 32, 32)
    large = small.repeat(1, 1, 4, 4)
    for name in ("mse", "kl"):
        ratio = losses_of(core, large)[0][name] / losses_of(core, small)[0][name]
        assert 0.5 < ratio < 2, name


def test_low_precision_gives_a_float32_loss():
    core = random_core().to(torch.bfloat16)
    losses, *_ = losses_of(core, pictures(1, 3, 16, 16).to(torch.bfloat16))
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
