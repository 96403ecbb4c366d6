"""Name what users choose among, without an import, for the command line as for the parts that do the work."""

from typing import Any

__all__ = [
    "ARCHIVE_FITS",
    "ARCHIVE_FORMATS",
    "DEFAULT_VISION_MODEL",
    "DIT_SIZES",
    "DOWNSAMPLING",
    "LATENT_DTYPES",
    "LATENT_KINDS",
    "PIXEL_LOSSES",
    "QUANTIZER_FILE",
    "SHIPPED",
    "SIZES",
    "TOKEN_BITS",
    "TRAINING_FILE",
]

SHIPPED: tuple[str, ...] = ("hieratok-tiny", "hieratok-tiny-16x", "hieratok-dit-tiny")
"""Names of the trained weights in the package, which `hieratok_hf.pretrained` takes."""

_TINY: dict[str, Any] = {
    "latent_channels": 16,
    "qk_norm": True,
    "rotary_scale": 2.0,
    "rotary_base": 50.0,
    "output_conv": True,
    "linear_path": 3,
    "coarse_weight": 1.0,
    "sample_size": 128,
    # About the inverse root of the width: at the usual 0.02 the blocks add nothing in the first 800 steps.
    "initializer_range": 0.08,
}

SIZES: dict[str, dict[str, Any]] = {
    "hieratok-tiny": {
        **_TINY,
        "patch_size": 8,
        "encoder_hidden_size": 128,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "decoder_hidden_size": 128,
        "decoder_num_layers": 4,
        "decoder_num_heads": 4,
    },
    "hieratok-tiny-16x": {
        **_TINY,
        "coarse_weight": 0.3,
        "patch_size": 16,
        "encoder_hidden_size": 160,
        "encoder_num_layers": 3,
        "encoder_num_heads": 5,
        "decoder_hidden_size": 160,
        "decoder_num_layers": 6,
        "decoder_num_heads": 5,
    },
    "hieratok-s": {
        "encoder_hidden_size": 512,
        "encoder_num_layers": 8,
        "encoder_num_heads": 8,
        "decoder_hidden_size": 512,
        "decoder_num_layers": 8,
        "decoder_num_heads": 8,
    },
    "hieratok-b": {},
    "hieratok-l": {
        "latent_channels": 32,
        "decoder_hidden_size": 1024,
        "decoder_num_layers": 24,
        "decoder_num_heads": 16,
    },
}
"""
Named sizes, each with the arguments in which it differs from the defaults of `HieraTokConfig`. Latent shapes and
depths are this project's choice, because the paper publishes none.
"""

DIT_SIZES: dict[str, dict[str, int]] = {
    "dit-tiny": {"num_layers": 5, "num_attention_heads": 4, "attention_head_dim": 64},
    "dit-s": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "dit-b": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "dit-l": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "dit-xl": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
"""Depths and widths of arXiv 2212.09748 by name, and one for a CPU, `"dit-tiny"`."""

DOWNSAMPLING = ("learned", "mean")
"""How coarse tokens may be made of the latent: by learned maps of its blocks, or as averages of them."""

PIXEL_LOSSES = ("mse", "l1", "charbonnier")
"""Kinds of `hieratok_hf.models.losses.pixel_loss`."""

LATENT_KINDS = ("moments", "sample", "mode")
"""Kinds of latents that a cache may hold of each posterior."""

LATENT_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Dtypes that latents may be stored in, each with the name that safetensors has for it."""

ARCHIVE_FORMATS = {
    "safetensors": ("float16", "bfloat16", "float32"),
    "webdataset": ("float16", "float32"),
    "parquet": ("float16", "float32"),
}
"""Formats of an archive's shards, each with the dtypes of latents that it can hold."""

TOKEN_BITS = range(1, 9)
"""Bits that the integers of a quantised latent may have."""

QUANTIZER_FILE = "quantizer.safetensors"
"""Name of the levels beside a model's weights, which either library passes over."""

TRAINING_FILE = "training.json"
"""Name of what a training was, beside the model that it made."""

ARCHIVE_FITS = ("pad", "crop")
"""Ways to encode an image whose sides are no multiples of a latent's cell: continue its border, or cut it."""

DEFAULT_VISION_MODEL = "google/mobilenet_v2_1.0_224"
"""Hub id of the vision model that commands take unless another is named."""
