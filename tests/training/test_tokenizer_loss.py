"""Tests of `tokenizer_loss`: each part counts with its weight, in float32, from its step on."""

import math

import pytest
import torch
from helpers import images, noise, random_core, tiny
from torch import nn
from transformers import ViTConfig, ViTModel

from hieratok_hf.evaluation.perceptual import PerceptualDistance
from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.models.losses import border_loss, image_pyramid
from hieratok_hf.training.alignment import LatentAlignment
from hieratok_hf.training.discriminator import PatchDiscriminator
from hieratok_hf.training.teacher import LatentTeacher
from hieratok_hf.training.tokenizer_loss import LossWeights, TokenizerTraining, TrainingLoss, step_noise


@pytest.fixture(scope="module")
def vision():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.5)
    return VisionFeatures(ViTModel(config), [0.5] * 3, [0.5] * 3)


@pytest.fixture(scope="module")
def discriminator():
    torch.manual_seed(0)
    return PatchDiscriminator(channels=8, num_layers=1)


class Lpips(nn.Module):
    """A distance in the shape of the `lpips` package's, which is not installed everywhere."""

    def forward(self, images, targets):
        assert images.dtype == targets.dtype == torch.float32
        return (images - targets).abs().amax((1, 2, 3), keepdim=True)


class Never(nn.Module):
    def forward(self, *args):
        raise AssertionError("a part of weight 0 was computed")


def forward(core, pixel_values, alignment=None, latent_noise=0.0, mix=0.3, latent_jitter=0.0, **options):
    model = TokenizerTraining(core, alignment, latent_noise, latent_jitter, **options)
    batch, _, height, width = pixel_values.shape
    normal = noise(2, batch, core.config.latent_channels, height // 4, width // 4)
    return model(pixel_values, normal, torch.full((batch, 1, 1, 1), mix)), normal


def losses_of(core, weights, step=0, made=None, **modules):
    made = forward(core, images(2, 3, 16, 16))[0] if made is None else made
    return TrainingLoss(weights, **modules)(core.config, made, step)


@pytest.mark.parametrize(
    ("latent_noise", "latent_jitter", "mix"),
    [(0.0, 0.0, 0.3), (2.0, 0.0, 1.0), (0.0, 0.5, 0.3), (2.0, 0.5, 0.3), (2.0, 0.5, 0.0)],
)
def test_the_forward_pass_is_the_tokenizers_with_the_noise_it_is_given(vision, latent_noise, latent_jitter, mix):
    core, pixel_values, alignment = random_core(), images(2, 3, 16, 12), LatentAlignment(4, vision)
    (made, moments, aligned, _, targets), normal = forward(
        core, pixel_values, alignment, latent_noise, mix, latent_jitter
    )
    posterior = core.encode(pixel_values)
    assert torch.equal(moments, core.encode_moments(pixel_values)[0])
    assert targets is pixel_values
    latents = posterior.mean + (0.5 * posterior.logvar).exp() * normal[0]
    torch.testing.assert_close(aligned, alignment(latents, pixel_values))  # it sees them without noise
    if latent_noise:
        latents = (1 - mix) * latents + mix * latent_noise * normal[1]
    latents = latents + latent_jitter * mix**4 * normal[1]
    for ours, theirs in zip(made, core.decode_scales(latents), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("teacher_images", [False, True])
def test_with_a_teacher_the_decoder_learns_the_images_or_what_the_teacher_makes_of_the_noisy_latents(teacher_images):
    core, theirs, pixel_values = random_core(), random_core(seed=1), images(2, 3, 16, 12)
    teacher = LatentTeacher(Codec(theirs), 4)
    teacher.measure([pixel_values])
    options = {"teacher": teacher, "teacher_images": teacher_images}
    (made, moments, _, distance, targets), normal = forward(core, pixel_values, None, 0.5, 0.6, 0.3, **options)
    own, mean, std = theirs.encode(pixel_values).mode(), teacher.mean[:, None, None], teacher.std[:, None, None]
    noisy = 0.4 * (own - mean) / std + (0.6 * 0.5 + 0.3 * 0.6**4) * normal[1]
    expected = theirs.decode(noisy * std + mean) if teacher_images else pixel_values
    torch.testing.assert_close(targets, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[-1], core.decode(noisy), atol=1e-5, rtol=1e-5)
    assert moments is None and distance > 0 and not targets.requires_grad
    losses = TrainingLoss(LossWeights("mse"))(core.config, (made, moments, None, distance, targets), 0)
    torch.testing.assert_close(losses["mse"], (made[-1] - expected).square().mean())


@pytest.mark.parametrize("pixel", ["l1", "mse", "charbonnier"])
def test_every_part_counts_with_its_weight(vision, discriminator, pixel):
    core = random_core(kl_weight=0.3, coarse_weight=0.7)
    alignment, perceptual = LatentAlignment(4, vision), PerceptualDistance(vision)
    pixel_values = images(2, 3, 16, 16)
    made, moments, aligned, *_ = whole = forward(core, pixel_values, alignment)[0]
    weights = LossWeights(pixel, border=0.8, perceptual=0.2, lpips=1.5, alignment=0.4, adversarial=0.6)
    modules = {"perceptual": perceptual, "lpips": Lpips(), "discriminator": discriminator}
    losses = losses_of(core, weights, made=whole, **modules)

    def difference(a, b):
        if pixel == "charbonnier":
            return ((a - b).square() + 1e-6).sqrt().mean() - 1e-3
        return ((a - b).abs() if pixel == "l1" else (a - b).square()).mean()

    targets = image_pyramid(pixel_values, core.config)
    mean, logvar = moments.chunk(2, dim=1)
    expected = {
        pixel: difference(made[-1], pixel_values),
        "border": border_loss(made[-1], 4),
        "coarse": sum(f * difference(a, b) for f, a, b in zip((8, 4, 2), made, targets)) / 3,
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        "perceptual": perceptual(made[-1], pixel_values).mean(),
        "lpips": (made[-1] - pixel_values).abs().amax((1, 2, 3)).mean(),
        "alignment": aligned,
        "adversarial": -discriminator(made[-1]).mean(),
    }

    def weighted(**factors):
        return sum(factor * expected[name] for name, factor in factors.items())

    reconstruction = weighted(**{pixel: 1}, border=0.8, perceptual=0.2, lpips=1.5)
    parts = (reconstruction, expected["adversarial"])
    norms = [torch.autograd.grad(part, made[-1], retain_graph=True)[0].norm() for part in parts]
    expected["adaptive_weight"] = factor = norms[0] / (norms[1] + 1e-4)
    expected["loss"] = reconstruction + weighted(kl=0.3, coarse=0.7, alignment=0.4, adversarial=0.6 * factor)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert all(value.abs() > 1e-3 for value in losses.values())


def test_parts_of_weight_zero_are_not_computed():
    core = random_core(kl_weight=0.3, coarse_weight=0.0)
    modules = {name: Never() for name in ("perceptual", "lpips", "discriminator")}
    losses = losses_of(core, LossWeights(), **modules)
    assert losses.keys() == {"l1", "kl", "coarse", "loss"}
    torch.testing.assert_close(losses["loss"], losses["l1"] + 0.3 * losses["kl"])
    single = losses_of(random_core(scale_factors=(1,)), LossWeights("mse"), **modules)
    assert single.keys() == {"mse", "kl", "loss"}


def test_losses_of_ones_own_count_with_their_weights():
    core, pixel_values = random_core(kl_weight=0.0, coarse_weight=0.0), images(2, 3, 16, 16)
    made = forward(core, pixel_values)[0]

    def dark(reconstruction, targets):
        assert reconstruction.dtype == targets.dtype == torch.float32
        return (reconstruction + targets).square().mean((1, 2, 3))

    losses = losses_of(core, LossWeights(), made=made, own={"dark": (dark, 0.5), "never": (Never(), 0)})
    expected = (made[0][-1] + pixel_values).square().mean()
    torch.testing.assert_close((losses["dark"], losses["loss"]), (expected, losses["l1"] + 0.5 * expected))
    assert losses["dark"] > 1e-3 and "never" not in losses


@pytest.mark.parametrize(("name", "weight"), [("kl", 1), ("loss", 1), ("dark", math.nan), ("dark", -1)])
def test_a_loss_of_ones_own_with_a_wrong_name_or_weight_is_refused(name, weight):
    with pytest.raises(ValueError, match=f"`own` .*'{name}' of weight {weight}"):
        TrainingLoss(LossWeights(), own={name: (Lpips(), weight)})


def test_coarser_scales_count_from_their_step_on_and_get_a_gradient_before():
    core = random_core(coarse_weight=0.5, kl_weight=0.0)
    for step, counts in ((0, 0), (4, 0), (5, 1), (6, 1)):
        core.zero_grad()
        losses = losses_of(core, LossWeights(coarse_start=5), step)
        torch.testing.assert_close(losses["loss"], losses["l1"] + counts * 0.5 * losses["coarse"])
        losses["loss"].backward()
        gradient = core.decoder.linear_path[0].weight.grad
        assert gradient is not None and (gradient.abs().max() > 0) == bool(counts)


def test_the_discriminator_counts_from_its_step_on_by_the_gradients_of_all_processes(discriminator):
    core, calls, others = random_core(), [], iter([3.0, 5.0])

    def total(square):
        calls.append(square)
        return square + next(others)  # what another process would add

    weights = LossWeights(adversarial=0.5, adversarial_start=3)
    assert "adversarial" not in losses_of(core, weights, 2, discriminator=Never())
    losses = losses_of(core, weights, 3, discriminator=discriminator, total=total)
    assert len(calls) == 2 and all(square.shape == () and square > 0 for square in calls)
    expected = (calls[0] + 3).sqrt() / ((calls[1] + 5).sqrt() + 1e-4)
    torch.testing.assert_close(losses["adaptive_weight"], expected)
    objective = TrainingLoss(weights, discriminator=discriminator)
    assert [objective.is_adversarial(step) for step in (0, 2, 3, 4)] == [False, False, True, True]
    assert not TrainingLoss(LossWeights(adversarial_start=0)).is_adversarial(5)


def every_part(core, vision, discriminator):
    alignment = LatentAlignment(4, vision)
    # Margins would switch some of the alignment off, and with it its gradient.
    alignment.cosine_margin = alignment.distance_margin = 0.0
    weights = LossWeights("charbonnier", border=0.1, perceptual=0.1, lpips=0.1, alignment=0.1, adversarial=0.1)
    modules = {"perceptual": PerceptualDistance(vision), "lpips": Lpips(), "discriminator": discriminator}
    model = TokenizerTraining(core, alignment, latent_noise=1.0, latent_jitter=0.1)
    inputs = images(2, 3, 16, 16), noise(2, 2, 4, 4, 4), torch.full((2, 1, 1, 1), 0.5)
    return model, TrainingLoss(weights, **modules), inputs


@pytest.mark.parametrize(
    "overrides", [{}, {"downsampling": "mean"}, {"scale_factors": (1,)}, {"linear_path": 0, "scale_causal": False}]
)
def test_gradients_reach_every_trained_parameter(vision, discriminator, overrides):
    core = random_core(**overrides).train()
    model, objective, inputs = every_part(core, vision, discriminator)
    objective(core.config, model(*inputs), 0)["loss"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert "alignment.projection.weight" in trained and not [name for name in trained if "features" in name]
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in [*vision.parameters(), *discriminator.parameters()])
    assert all(p.requires_grad for p in discriminator.parameters())


def test_losses_are_float32_under_autocast(vision, discriminator):
    core = random_core().train()
    model, objective, inputs = every_part(core, vision, discriminator)
    expected = objective(core.config, model(*inputs), 0)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(*inputs)
        assert made[0][-1].dtype == torch.bfloat16
        losses = objective(core.config, made, 0)
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in core.parameters())
    for name, value in losses.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.02), name


@pytest.mark.parametrize(
    ("name", "value"),
    [("perceptual", 0.5), ("adversarial", 0.5), ("border", -0.1), ("lpips", math.nan), ("pixel", "l3")],
)
def test_weights_that_cannot_serve_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        TrainingLoss(LossWeights(**{name: value}))


def batch_of(rows, step=3, count=6, size=(8, 12)):
    return {"pixel_values": torch.zeros(len(rows), 3, *size), "step": step, "count": count, "rows": torch.tensor(rows)}


def test_noise_of_a_step_is_the_same_however_its_rows_are_divided():
    whole, mix = step_noise(batch_of(list(range(6))), tiny(), seed=5)
    assert whole.shape == (2, 6, 4, 2, 3) and mix.shape == (6, 1, 1, 1)
    for rows in ([0, 1, 2], [3, 4, 5], [5, 0], [2]):
        part, part_mix = step_noise(batch_of(rows), tiny(), seed=5)
        assert torch.equal(part, whole[:, rows]) and torch.equal(part_mix, mix[rows])
    torch.set_default_dtype(torch.float64)
    try:
        elsewhere = step_noise(batch_of(list(range(6))), tiny(), seed=5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(elsewhere[0], whole) and torch.equal(elsewhere[1], mix)
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole[:, 0], whole[:, 1])
    drawn = [step_noise(batch_of([0, 1], step), tiny(), seed) for step in (0, 1, 2**20) for seed in (0, 1, 2**33, -1)]
    for values in zip(*drawn):
        assert len({tuple(x.flatten().tolist()) for x in values}) == 12


def test_noise_is_standard_normal_and_the_mix_even_in_0_to_1():
    normal, mix = step_noise(batch_of(list(range(600)), count=600, size=(16, 16)), tiny(), seed=0)
    assert normal.dtype == mix.dtype == torch.float32
    for part in normal:
        assert abs(part.mean()) < 4 / math.sqrt(part.numel()) and part.std() == pytest.approx(1, abs=0.02)
    assert abs((normal[0] * normal[1]).mean()) < 0.02
    assert 0 <= mix.min() < 0.02 and 0.98 < mix.max() <= 1 and mix.mean() == pytest.approx(0.5, abs=0.05)
