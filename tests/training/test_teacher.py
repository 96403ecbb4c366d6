"""Tests of `teacher`: latents of another autoencoder, in its units and normalised, and linear maps to them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import images, noise, random_core, tiny
from torch import nn
from torch.nn import functional as F

from hieratok_hf import AutoencoderHieraTok, HieraTokCore
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.training import teacher as teacher_module
from hieratok_hf.training.teacher import (
    LatentTeacher,
    TaughtCodec,
    agreement,
    start_from_teacher,
    teacher_fields,
    translate_latents,
)


class Mixed(nn.Module):
    """An autoencoder whose latents are those of a core, mixed to more channels, with statistics of their own."""

    def __init__(self, core, channels=6):
        super().__init__()
        self.core_ = core
        self.mixing = nn.Parameter(3 * noise(channels, core.config.latent_channels, seed=7), requires_grad=False)
        self.config = SimpleNamespace(scaling_factor=0.3, shift_factor=0.7, latents_mean=None, latents_std=[2.0])

    def encode(self, pixel_values):
        latents = torch.einsum("nc,bc...->bn...", self.mixing, self.core_.encode(pixel_values).mode()) + 1
        return SimpleNamespace(latents=latents)

    def decode(self, latents):
        own = torch.einsum("cn,bn...->bc...", torch.linalg.pinv(self.mixing), latents - 1)
        return SimpleNamespace(sample=self.core_.decode(own))


class Linear(nn.Module):
    """An autoencoder that is a convolution of patches, and its inverse where it has as many channels as numbers."""

    def __init__(self, channels=48, size=4):
        super().__init__()
        basis = torch.linalg.qr(noise(channels, channels, seed=3)).Q
        self.weight = nn.Parameter(basis.view(channels, 3, size, size), requires_grad=False)

    def encode(self, pixel_values):
        return SimpleNamespace(latents=2 * F.conv2d(pixel_values, self.weight, stride=self.weight.shape[2]))

    def decode(self, latents):
        return SimpleNamespace(sample=F.conv_transpose2d(latents / 2, self.weight, stride=self.weight.shape[2]))


def batches():
    return [images(4, 3, 16, 24), images(4, 3, 32, 16, seed=1)]


def taught_by(model, channels):
    teacher = LatentTeacher(Codec(model), channels)
    teacher.measure(batches())
    return teacher


def test_the_fields_are_those_of_the_teachers_latents():
    assert teacher_fields(Codec(random_core()), 32) == {"patch_size": 4, "latent_channels": 4}
    assert teacher_fields(Codec(Linear(3 * 8 * 8, 8)), 32) == {"patch_size": 8, "latent_channels": 192}
    with pytest.raises(ValueError, match="power of two"):
        teacher_fields(Codec(Linear(27, 3)), 12)
    with pytest.raises(ValueError, match="cannot take images of 30 x 30"):
        teacher_fields(Codec(random_core()), 30)


def test_latents_are_normalised_by_statistics_that_are_saved():
    teacher = taught_by(Mixed(random_core()), 6)
    values = torch.cat([teacher(x).transpose(0, 1).flatten(1) for x in batches()], 1)
    torch.testing.assert_close(values.mean(1), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(1), torch.ones(6), atol=1e-4, rtol=0)
    assert set(teacher.state_dict()) == {"mean", "std"} and not list(teacher.parameters())


def test_it_is_handed_over_in_the_teachers_own_units_and_taken_in_again():
    teacher, core = taught_by(Mixed(random_core()), 6), random_core(latent_channels=6)
    x, kept = images(2, 3, 16, 16, seed=5), {name: value.clone() for name, value in core.state_dict().items()}
    with torch.no_grad():
        normalised = core.encode(x).mode()
        decoded = core.decode(teacher(x))
        teacher.hand_over(core)
        mean, std = teacher.mean[:, None, None], teacher.std[:, None, None]
        torch.testing.assert_close(core.encode(x).mode(), normalised * std + mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(core.decode(teacher.codec.encode(x)), decoded, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(core.encode(x).sample(), core.encode(x).mode())
    assert (core.config.scaling_factor, core.config.shift_factor) == (0.3, 0.7)
    vae = AutoencoderHieraTok.from_core(core)
    assert vae.config.scaling_factor == 0.3 and vae.config.latents_std == [2.0] and vae.config.latents_mean is None
    teacher.take_in(core)
    silent = ("encoder.head.weight", "encoder.head.bias")
    for name, value in core.state_dict().items():
        expected = kept[name][:6] if name in silent else kept[name]
        torch.testing.assert_close(value[:6] if name in silent else value, expected, atol=1e-4, rtol=1e-4)


def test_agreement_is_the_explained_variance_of_all_batches_together():
    own, teacher = random_core(), taught_by(random_core(seed=1), 4)
    pairs = [(teacher(x).double(), own.encode(x).mode().double().detach()) for x in batches()]
    theirs, ours = (np.concatenate([p[i].transpose(0, 1).flatten(1) for p in pairs], 1) for i in (0, 1))
    expected = 1 - ((theirs - ours) ** 2).sum(1) / ((theirs - theirs.mean(1, keepdims=True)) ** 2).sum(1)
    assert agreement(own, teacher, batches()) == pytest.approx(expected.mean(), abs=1e-5)
    same = random_core(seed=1)
    teacher.take_in(same)
    assert agreement(same, teacher, batches()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_a_linear_teacher_is_met_by_the_linear_path(downsampling):
    torch.manual_seed(0)
    core = HieraTokCore(tiny(latent_channels=48, downsampling=downsampling)).init_weights()
    teacher = LatentTeacher(Codec(Linear()), 48)
    seen = [images(8, 3, 32, 32, seed=seed) for seed in range(60)]
    started = start_from_teacher(core, teacher, lambda: seen, pretrained=False)
    assert started is core and agreement(core, teacher, batches()) > 0.99
    with torch.no_grad():
        for x in batches():
            decoded = TaughtCodec(core, teacher).decode(teacher(x))
            assert (decoded - x).square().mean() < 0.01 * x.square().mean()


def test_of_large_patches_the_decoders_path_alone_is_fitted(monkeypatch):
    monkeypatch.setattr(teacher_module, "_MOST_SOURCES", 3 * 12**2 - 1)
    core = HieraTokCore(tiny(latent_channels=48)).init_weights()
    before = core.encoder.linear_path.weight.clone()
    linear, seen = LatentTeacher(Codec(Linear()), 48), [images(8, 3, 32, 32, seed=seed) for seed in range(60)]
    start_from_teacher(core, linear, lambda: seen, pretrained=False)
    assert torch.equal(core.encoder.linear_path.weight, before)
    decoded = core.decode(linear(seen[0]))
    assert (decoded - seen[0]).square().mean() < 0.01 * seen[0].square().mean()
    mixed = LatentTeacher(Codec(Mixed(core)), 6)
    mixed.measure(seen[:2])
    assert not translate_latents(core, mixed, seen[:2]).encoder.linear_path.weight.any()


def test_a_fingerprint_tells_weights_and_statistics_apart():
    model = Mixed(random_core())
    first, again = (LatentTeacher(Codec(Mixed(random_core())), 6).fingerprint for _ in range(2))
    model.config.scaling_factor = 0.4
    other = LatentTeacher(Codec(Mixed(random_core(seed=1))), 6).fingerprint
    assert first == again and len({first, other, LatentTeacher(Codec(model), 6).fingerprint}) == 3


@pytest.mark.parametrize("linear_path", [0, 3])
def test_a_tokenizer_is_translated_to_latents_that_are_linear_in_its_own(linear_path):
    core = random_core(std=0.05, linear_path=linear_path)
    before = {name: x.clone() for name, x in core.state_dict().items()}
    teacher = LatentTeacher(Codec(Mixed(core)), 6)
    seen = [images(8, 3, 32, 32, seed=seed) for seed in range(20)]
    teacher.measure(seen)
    translated = translate_latents(core, teacher, seen)
    assert all(torch.equal(x, before[name]) for name, x in core.state_dict().items())
    assert translated.config.latent_channels == 6 and agreement(translated, teacher, batches()) > 0.999
    with torch.no_grad():
        for x in batches():
            for ours, theirs in zip(translated.decode_scales(teacher(x)), core.decode_scales(core.encode(x).mode())):
                torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)


def test_a_tokenizer_of_the_teachers_latents_stays_as_it_is():
    core = random_core(std=0.05)
    again = start_from_teacher(core, LatentTeacher(Codec(random_core(std=0.05)), 4), batches, pretrained=True)
    assert again is core
    other = start_from_teacher(core, LatentTeacher(Codec(Mixed(random_core(std=0.05))), 6), batches, pretrained=True)
    assert other is not core and other.config.latent_channels == 6
