"""Tests of `autoencoder_adapter`: every autoencoder gives what its own calls give, and refusals."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from helpers import images, random_core
from huggingface_hub import constants
from latent_data import tiny_dc

from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.models.autoencoder_adapter import Codec, load_codec
from hieratok_hf.models.quantizing import LatentQuantizer
from hieratok_hf.utils.choices import QUANTIZER_FILE

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, **BLOCKS}


def kl():
    return AutoencoderKL(**SMALL, latent_channels=4, sample_size=32)


OTHERS = {
    "kl": (kl, lambda output: output.latent_dist.mode(), 4),
    "vq": (lambda: VQModel(**SMALL, latent_channels=3, num_vq_embeddings=16), lambda output: output.latents, 3),
    "dc": (tiny_dc, lambda output: output.latent, 4),
}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_autoencoders_of_diffusers_give_what_their_own_calls_give(kind, tmp_path):
    make, latents_of, channels = OTHERS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    codec = load_codec(tmp_path)
    assert type(codec.model) is type(model) and not codec.model.training and codec.core is None
    assert codec.latent_shape(32) == (channels, 16, 16)
    pixel_values = images(2, 3, 32, 32)
    latents = codec.encode(pixel_values)
    assert torch.equal(latents, latents_of(model.encode(pixel_values)))
    (only,) = codec.decode_scales(latents)
    assert torch.equal(only, model.decode(latents).sample) and torch.equal(codec.decode(latents), only)


@torch.no_grad()
def test_every_form_of_hieratok_is_the_same_codec(tmp_path):
    core = random_core()
    AutoencoderHieraTok.from_core(core).save_pretrained(tmp_path / "diffusers")
    HieraTokModel.from_core(core).save_pretrained(tmp_path / "transformers")
    pixel_values = images(2, 3, 32, 32)
    expected = core.decode_scales(core.encode(pixel_values).mode())
    folders = [load_codec(tmp_path / name) for name in ("diffusers", "transformers")]
    for codec in (Codec(core), Codec(HieraTokModel.from_core(core)), *folders):
        assert codec.core is not None and codec.latent_shape(32) == (4, 8, 8)
        latents = codec.encode(pixel_values)
        torch.testing.assert_close(codec.decode_scales(latents), expected, rtol=0, atol=0)
        torch.testing.assert_close(codec.decode(latents), expected[-1])
    codec = Codec(core.bfloat16())
    latents = codec.encode(pixel_values)
    assert latents.dtype == codec.decode(latents).dtype == torch.bfloat16


def test_shipped_names_and_the_vae_of_a_pipeline_load(tmp_path):
    assert load_codec("hieratok-tiny").model.config.latent_channels == 16
    kl().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert isinstance(load_codec(tmp_path).model, AutoencoderKL)


@pytest.mark.parametrize("place", ["", "vae"])
@torch.no_grad()
def test_levels_beside_the_weights_are_taken(place, tmp_path):
    model = kl().eval()
    model.save_pretrained(tmp_path / place)
    assert load_codec(tmp_path).quantizer is None
    levels = LatentQuantizer.fit([model.encode(images(2, 3, 64, 64)).latent_dist.mode()])
    levels.write(tmp_path / place / QUANTIZER_FILE)
    assert torch.equal(load_codec(tmp_path).quantizer.levels[8], levels.levels[8])
    LatentQuantizer({bits: values[:3] for bits, values in levels.levels.items()}).write(
        tmp_path / place / QUANTIZER_FILE
    )
    with pytest.raises(ValueError, match=f"{QUANTIZER_FILE}' must have levels of 4 channels, got 3"):
        load_codec(tmp_path)


def test_what_is_no_autoencoder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    with pytest.raises(OSError, match=r"missing' is no folder"):
        load_codec(tmp_path / "missing")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"must hold an autoencoder.*'UNet2DModel'"):
        load_codec(tmp_path / "unet")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"must hold an autoencoder.*names None"):
        load_codec(tmp_path / "vit")
    kl().save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):  # which need no unpickling
        load_codec(tmp_path / "pickle")


def test_sizes_that_do_not_suit_are_named():
    with pytest.raises(ValueError, match=r"cannot take images of 30 x 30 pixels: .*multiples of the patch size 4"):
        Codec(random_core()).latent_shape(30)
    with pytest.raises(ValueError, match=r"makes images of shape \(3, 32, 32\) of those of \(3, 33, 33\)"):
        Codec(kl().eval()).latent_shape(33)
