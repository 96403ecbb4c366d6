"""Small images and autoencoders that the tests of cached latents share."""

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from helpers import leave_something, random_core, tiny_vision_model
from PIL import Image
from safetensors.torch import load_file

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.evaluation.vision_features import VisionFeatures

BROKEN = 5  # the row whose image cannot be decoded


def make_images(folder, count=14, broken=BROKEN):
    """Noise of 32 x 40 pixels in two classes, one of the images cut short."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("hat", "jacket")[2 * i // count] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
        if i == broken:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def make_mixed_images(folder, broken=BROKEN):
    """Noise of three aspects in two classes, 9 squares, 6 wide and 4 tall in mixed order, one of them cut short."""
    rng = np.random.default_rng(1)
    kinds = rng.permutation([(40, 40)] * 9 + [(32, 56)] * 6 + [(60, 30)] * 4)
    for i, (height, width) in enumerate(kinds):
        path = folder / ("hat", "jacket")[2 * i // len(kinds)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        if i == broken:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def tiny_kl(**options):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks, **options).eval()


def tiny_without_posterior():
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    torch.manual_seed(0)
    return AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()


def save_autoencoders(folder):
    """Save one of ours as `hieratok`, and two of diffusers: `kl`, and `tiny`, which has no posterior."""
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder / "hieratok")
    tiny_kl().save_pretrained(folder / "kl")
    tiny_without_posterior().save_pretrained(folder / "tiny")


def tiny_dc():
    side = {"block_types": ("ResBlock",) * 2, "block_out_channels": (8, 16), "qkv_multiscales": ((),) * 2}
    sides = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "attention_head_dim": 4}
    steps = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    torch.manual_seed(0)
    return AutoencoderDC(**sides, **layers, **steps, latent_channels=4).eval()


def tiny_vision_features(seed=0, mean=0.5):
    """A vision model whose maps are no zeros in float16."""
    model = tiny_vision_model(seed)
    torch.manual_seed(seed)
    leave_something(model)
    return VisionFeatures(model, [mean] * 3, [0.3] * 3)


def shards_in(folder):
    """The tensors of every shard, by the name of its file."""
    return {path.name: load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))}
