"""Tests of `evaluation`: shares of data, figures against their definitions, independence of batches, refusals."""

import math
import time

import numpy as np
import pytest
import torch
from helpers import images, noise, random_core, tiny_vision_model
from latent_data import tiny_kl
from PIL import Image
from torch.nn import functional as F

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="SSIM and Fréchet distances are its own")

import datasets

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.image_sets import FrechetDistance
from hieratok_hf.evaluation.metrics import psnr, ssim
from hieratok_hf.evaluation.perceptual import PerceptualDistance
from hieratok_hf.evaluation.reconstruction import (
    EvaluationBatches,
    ReconstructionMetrics,
    evaluate,
    evaluate_perturbed,
    perturb,
    throughput,
)
from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.models.quantizing import LatentQuantizer


@pytest.fixture(scope="module")
def features():
    return VisionFeatures(tiny_vision_model(), [0.5] * 3, [0.5] * 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven images of two classes, the fourth of them broken."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "images" / "ab"[i > 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32 + i, 40, 3), dtype=np.uint8)).save(path)
        if i == 3:
            path.write_bytes(path.read_bytes()[:200])
    return tmp_path / "images"


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_hold_every_image_but_broken_ones(folder, streaming):
    batches = EvaluationBatches(load_images(str(folder), streaming=streaming), 32, 3)
    for _ in range(2):
        found = list(batches)
        assert [batch["rows"] for batch in found] == [[0, 1, 2], [4, 5], [6]]
        assert [label for batch in found for label in batch["labels"]] == [0, 0, 0, 1, 1, 1]
    (name,) = batches.skipped
    assert name.endswith("a/3.png") and "cannot be decoded" in batches.skipped[name]
    first = found[0]["pixel_values"]
    assert first.shape == (3, 3, 32, 32) and first.dtype == torch.float32
    levels = np.asarray(Image.open(folder / "a" / "0.png"))[:, 4:36]
    assert torch.equal((first[0] * 127.5 + 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(levels.copy()))
    few = EvaluationBatches(batches.images, 32, 3, limit=5)
    assert [batch["rows"] for batch in few] == [[0, 1, 2], [4]]
    if not streaming:
        assert (len(batches), len(few)) == (3, 2)


@pytest.mark.parametrize("name", ["size", "batch_size", "limit", "threads"])
def test_batches_refuse_numbers_that_are_not_positive(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        EvaluationBatches([], **{"size": 8, name: 0})


def test_figures_are_means_over_images_however_they_are_divided(features):
    targets, rebuilt = images(5, 3, 32, 32), images(5, 3, 32, 32, seed=1)
    perceptual = PerceptualDistance(features)
    with torch.no_grad():
        levels = [((x + 1) * 127.5).round() / 127.5 - 1 for x in (rebuilt, targets)]
        expected = {"psnr": psnr(rebuilt, targets), "ssim": ssim(rebuilt, targets), "perceptual": perceptual(*levels)}
    frechet = FrechetDistance(features, size=32)
    metrics = ReconstructionMetrics(perceptual=perceptual, frechet=frechet)
    found = []
    for parts in ([5], [2, 3], [1, 1, 1, 1, 1]):
        metrics.reset()
        for pair in zip(rebuilt.split(parts), targets.split(parts)):
            metrics.update(*pair)
        found.append(metrics.compute())
        assert list(found[-1]) == ["psnr", "ssim", "perceptual", "FD-MobileNetV2", "images"]
        assert found[-1]["images"] == 5
        for name, values in expected.items():
            assert found[-1][name] == pytest.approx(values.double().mean().item(), rel=1e-5)
        assert found[-1]["FD-MobileNetV2"] == pytest.approx(found[0]["FD-MobileNetV2"], rel=1e-4)
    assert found[0]["FD-MobileNetV2"] > 0
    assert set(ReconstructionMetrics(ssim=False).networks) == set()


def test_images_that_equal_their_targets_are_left_out_of_the_psnr_and_counted():
    targets, rebuilt = images(3, 3, 16, 16), images(3, 3, 16, 16, seed=1)
    rebuilt[1] = targets[1]
    metrics = ReconstructionMetrics(ssim=False)
    metrics.update(rebuilt, targets)
    expected = psnr(rebuilt, targets)[[0, 2]].double().mean().item()
    assert metrics.compute() == {"psnr": pytest.approx(expected), "images": 3, "exact": 1}


def test_lpips_is_any_module_of_a_pair_of_images():
    class Lpips(torch.nn.Module):
        def forward(self, first, second):
            return (first - second).abs().mean((1, 2, 3), keepdim=True)  # the shape that the package lpips gives

    metrics = ReconstructionMetrics(ssim=False, lpips=Lpips())
    for value in (0.0, 0.5):
        metrics.update(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), value))
    assert metrics.compute()["lpips"] == pytest.approx(0.25, abs=1 / 255)


def test_too_few_images_are_refused(features):
    metrics = ReconstructionMetrics(ssim=False, frechet=FrechetDistance(features, size=32))
    with pytest.raises(ValueError, match="no images to measure"):
        metrics.compute()
    metrics.update(*[torch.zeros(1, 3, 8, 8)] * 2)
    with pytest.raises(ValueError, match="two images or more, got 1"):
        metrics.compute()


def batches_of(pixel_values, *parts):
    return [{"pixel_values": part} for part in pixel_values.split(parts)]


@torch.no_grad()
def test_evaluation_measures_the_mode_every_scale_and_every_channel():
    core, pixel_values = random_core(), images(5, 3, 32, 32)
    metrics = ReconstructionMetrics()
    figures = evaluate(Codec(core), batches_of(pixel_values, 2, 3), metrics)
    assert evaluate(Codec(core), batches_of(pixel_values, 2, 3), metrics) == figures  # it starts afresh
    latents = core.encode(pixel_values).mode()
    scales = [scale.clamp(-1, 1) for scale in core.decode_scales(latents)]
    assert figures["psnr"] == pytest.approx(psnr(scales[-1], pixel_values).mean().item(), rel=1e-4)
    assert figures["ssim"] == pytest.approx(ssim(scales[-1], pixel_values).mean().item(), rel=1e-3)
    assert figures["images"] == 5 and len(figures["scales_psnr"]) == len(scales) == 4
    assert figures["scales_psnr"][-1] == pytest.approx(figures["psnr"])
    for value, scale, factor in zip(figures["scales_psnr"], scales, core.config.scale_factors):
        target = F.interpolate(pixel_values, scale_factor=1 / factor, mode="area")
        assert value == pytest.approx(psnr(scale, target).mean().item(), rel=1e-4)
    flat = latents.double().transpose(0, 1).flatten(1)
    assert figures["latent_mean"] == pytest.approx(flat.mean(1).tolist(), abs=1e-6)
    assert figures["latent_std"] == pytest.approx(flat.std(1).tolist(), rel=1e-5)


@torch.no_grad()
def test_values_that_overshoot_are_clamped_and_nan_is_refused():
    core, metrics = random_core(output_conv=False, linear_path=0), ReconstructionMetrics(ssim=False)
    batches = batches_of(torch.ones(1, 3, 16, 16), 1)
    core.decoder.head.bias.fill_(100.0)  # beyond what an image may hold, and white once clamped
    figures = evaluate(Codec(core), batches, metrics)
    assert figures["psnr"] == math.inf and figures["exact"] == 1 and figures["scales_psnr"] == [math.inf] * 4
    core.decoder.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="`images` must be finite"):
        evaluate(Codec(core), batches, metrics)


class SlowCodec(Codec):
    """Takes at least 10 ms to encode and 30 ms to decode."""

    def encode(self, pixel_values):
        time.sleep(0.01)
        return super().encode(pixel_values)

    def decode(self, latents):
        time.sleep(0.03)
        return super().decode(latents)


def test_speed_is_images_over_the_time_that_they_take():
    rates = throughput(SlowCodec(random_core()), images(2, 3, 16, 16), seconds=0.05)
    assert 1 < rates["encode"] <= 2 / 0.01
    assert 1 < rates["decode"] <= 2 / 0.03


def test_wrong_latents_have_noise_in_units_of_their_channel_and_replaced_levels():
    std = torch.tensor([0.5, 4.0])
    latents = noise(6, 2, 16, 16) * std[:, None, None]
    quantizer = LatentQuantizer.fit([latents])
    for amount in (0.1, 0.3):
        made = perturb(latents, range(6), amount, std, quantizer)
        assert list(made) == ["noise", "replaced_levels"]
        added = (made["noise"] - latents).std((0, 2, 3))
        torch.testing.assert_close(added, amount * std, rtol=0.05, atol=0)
        exact = quantizer.dequantize(quantizer.quantize(latents, 8), 8)
        assert (made["replaced_levels"] != exact).double().mean().item() == pytest.approx(amount, rel=0.15)
        last = perturb(latents[3:5], [3, 4], amount, std, quantizer)  # whatever batch they are in
        assert all(torch.equal(made[name][3:5], last[name]) for name in made)
    assert list(perturb(latents, range(6), 0.1, std)) == ["noise"]
    assert torch.equal(perturb(latents, range(6), 0.0, std)["noise"], latents)


@torch.no_grad()
def test_images_of_wrong_latents_are_means_over_images_however_they_are_divided():
    vae, pixel_values = AutoencoderHieraTok.from_core(random_core()).eval(), images(5, 3, 32, 32)
    std, amounts = torch.tensor([0.2, 0.4, 0.6, 0.8]), [0.1, 0.5]
    rows = [{"pixel_values": x, "rows": list(r)} for x, r in zip(pixel_values.split([2, 3]), (range(2), range(2, 5)))]
    plain = evaluate_perturbed(Codec(vae), rows, amounts, std)
    assert list(plain) == ["psnr_with_noise"]  # without levels
    vae.fit_quantizer([pixel_values])
    found = evaluate_perturbed(Codec(vae), rows, amounts, std)
    assert found["psnr_with_noise"] == plain["psnr_with_noise"]
    latents = vae.encode(pixel_values).latent_dist.mode()
    for amount in amounts:
        for name, wrong in perturb(latents, range(5), amount, std, vae.quantizer).items():
            expected = psnr(vae.decode(wrong).sample.clamp(-1, 1), pixel_values).mean().item()
            assert found[f"psnr_with_{name}"][str(amount)] == pytest.approx(expected, rel=1e-4)
    assert all(values["0.5"] < values["0.1"] for values in found.values())
    other = tiny_kl()
    latents = other.encode(pixel_values).latent_dist.mode()
    levels = LatentQuantizer.fit([latents])
    found = evaluate_perturbed(Codec(other, levels), rows, [0.5], std)
    wrong = perturb(latents, range(5), 0.5, std, levels)["replaced_levels"]
    expected = psnr(other.decode(wrong).sample.clamp(-1, 1), pixel_values).mean().item()
    assert found["psnr_with_replaced_levels"]["0.5"] == pytest.approx(expected, rel=1e-4)
