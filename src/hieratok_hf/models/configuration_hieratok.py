"""Configure HieraTok: every size of the model, checked once, and the sizes that have names."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..ops.pyramid import check_scale_factors

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DOWNSAMPLING", "SIZES", "HieraTokConfig", "complete_saved"]

DOWNSAMPLING = ("learned", "mean")
"""How coarse tokens may be made of the latent: by learned maps of its blocks, or as averages of them."""

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

_POSITIVE = (
    "in_channels",
    "patch_size",
    "latent_channels",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_num_heads",
    "decoder_hidden_size",
    "decoder_num_layers",
    "decoder_num_heads",
    "mlp_ratio",
    "norm_eps",
    "rotary_base",
    "rotary_scale",
    "sample_size",
    "initializer_range",
    "scaling_factor",
)
_LARGEST_SIZE, _LARGEST_NUMBER, _MOST_WEIGHTS = 2**16, 1e38, 10**10
_CHOICES = {
    "downsampling": DOWNSAMPLING,
    "rotary_coordinates": ("cells", "fraction"),
    "rotary_pairing": ("proper", "detok"),
}


@strict
class HieraTokConfig(PreTrainedConfig):
    r"""
    Hold and check the sizes and options of a HieraTok tokenizer. The defaults are `hieratok-b`.

    Args:
        in_channels (`int`, defaults to 3): Colour channels of an image.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; a power of two. The latent is `patch_size`
            times smaller than the image on each side.
        latent_channels (`int`, defaults to 16): Channels of the latent.
        scale_factors (`tuple[int, ...]`, defaults to `(8, 4, 2, 1)`): Cells of the finest grid that one cell of each
            scale covers on a side, coarse to fine, ending in 1. `(1,)` is the single-scale twin.
        downsampling (`str`, defaults to `"learned"`): Kind of the coarse scales' tokens: `"learned"` convolutions of
            blocks of the latent's cells, or `"mean"`, the blocks' averages. A saved configuration without it is read
            as `"mean"` (see `complete_saved`).
        scale_causal (`bool`, defaults to `True`): A token of the decoder sees its own scale and every coarser one;
            `False` lets all tokens see all, for comparisons: no scale can then be decoded without the finer ones.
        encoder_hidden_size, encoder_num_layers, encoder_num_heads (`int`, default to 768, 12 and 12): Width, number of
            blocks and number of attention heads of the encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_heads (`int`, default to 768, 12 and 12): Width, number of
            blocks and number of attention heads of the decoder.
        mlp_ratio (`float`, defaults to 4.0): Factor of the width of a SwiGLU, which is
            `int(2 / 3 * mlp_ratio * hidden_size)`.
        norm_eps (`float`, defaults to 1e-6): Epsilon of every RMSNorm.
        qk_norm (`bool`, defaults to `False`): Whether an RMSNorm stands on the queries and keys of each head.
        norm_before_blocks, norm_after_blocks (`bool`, default to `False` and `True`): Whether an RMSNorm stands
            between the embedding and the first block, and between the last block and the head, on both sides.
        learned_positions (`int`, defaults to 0): Side of a learned grid of absolute positions, resampled to the grid
            of each image; 0 for none.
        rotary_coordinates (`str`, defaults to `"cells"`): Unit of a rotary position: `"cells"` of the finest grid, or
            `"fraction"` of the image's side.
        rotary_scale, rotary_base (`float`, default to 1.0 and 100.0): Largest angle of a unit of position, in radians,
            and its ratio to the smallest: channel pair `t`, evenly spaced over [0, 1], turns by
            `rotary_scale * rotary_base ** -t`.
        rotary_pairing (`str`, defaults to `"proper"`): How frequencies are given to channels: `"proper"` turns both
            channels of a pair alike, `"detok"` is the table of l-DeTok (arXiv 2507.15856), which its published weights
            need.
        output_conv (`bool`, defaults to `False`): Whether a 3x3 convolution follows on the image after the patches.
        linear_path (`int`, defaults to 0): Side, in patches, of convolutions from image to latent mean and from
            latent to image, one a scale, beside the transformers, so that training can start from a principal
            component analysis. An odd number, or 0 for none.
        kl_weight (`float`, defaults to 1e-4): Weight of the KL divergence, per latent number, in the training loss.
        coarse_weight (`float`, defaults to 0.02): Weight in the training loss of the mean squared errors of the
            coarser scales' images, each times its factor.
        sample_size (`int`, defaults to 256): Side of the training images in pixels. Images of other sizes work too.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights.
        scaling_factor, shift_factor (`float`, default to 1.0 and 0.0): Factor and offset by which diffusers pipelines
            normalise latents. Those of a trained checkpoint are normalised already.
        force_upcast (`bool`, defaults to `False`): Whether diffusers pipelines must run the model in float32.

    Raises:
        ValueError: A value is out of its range, a size is above 65536, or the model would have more than 1e10
            weights; the message names it.
        StrictDataclassError: A value is of another type; huggingface_hub's own error.

    Example:

    ```python
    >>> from hieratok_hf import HieraTokConfig
    >>> HieraTokConfig.from_size("hieratok-b").decoder_hidden_size
    768

    ```
    """

    model_type = "hieratok"
    attribute_map = {
        "num_channels": "in_channels",
        "image_size": "sample_size",
        "hidden_size": "encoder_hidden_size",
        "num_attention_heads": "encoder_num_heads",
    }

    in_channels: int = 3
    patch_size: int = 16
    latent_channels: int = 16
    scale_factors: list[int] | tuple[int, ...] = (8, 4, 2, 1)
    downsampling: str = "learned"
    scale_causal: bool = True
    encoder_hidden_size: int = 768
    encoder_num_layers: int = 12
    encoder_num_heads: int = 12
    decoder_hidden_size: int = 768
    decoder_num_layers: int = 12
    decoder_num_heads: int = 12
    mlp_ratio: float | int = 4.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    norm_before_blocks: bool = False
    norm_after_blocks: bool = True
    learned_positions: int = 0
    rotary_coordinates: str = "cells"
    rotary_scale: float | int = 1.0
    rotary_base: float | int = 100.0
    rotary_pairing: str = "proper"
    output_conv: bool = False
    linear_path: int = 0
    kl_weight: float | int = 1e-4
    coarse_weight: float | int = 0.02
    sample_size: int = 256
    initializer_range: float = 0.02
    scaling_factor: float | int = 1.0
    shift_factor: float | int = 0.0
    force_upcast: bool = False

    def __post_init__(self, **kwargs: Any):
        self.scale_factors = tuple(self.scale_factors)
        super().__post_init__(**kwargs)
        for name in (*_POSITIVE, "learned_positions", "linear_path", "kl_weight", "coarse_weight"):
            value, largest = getattr(self, name), self._largest(name)
            if not 0 <= value <= largest or (value == 0 and name in _POSITIVE):
                least = "greater than 0" if name in _POSITIVE else "not negative"
                raise ValueError(f"`{name}` must be {least} and at most {largest:g}, got {value!r}.")
        if not abs(self.shift_factor) <= _LARGEST_NUMBER:
            raise ValueError(f"`shift_factor` must be finite, got {self.shift_factor!r}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"`patch_size` must be a power of two, got {self.patch_size}.")
        if self.linear_path and self.linear_path % 2 == 0:
            raise ValueError(f"`linear_path` must be odd or 0, got {self.linear_path}.")
        check_scale_factors(self.scale_factors)
        if self.scale_factors[0] > _LARGEST_SIZE:
            raise ValueError(f"`scale_factors` must be at most {_LARGEST_SIZE}, got {self.scale_factors[0]}.")
        for side in ("encoder", "decoder"):
            hidden_size, num_heads = getattr(self, f"{side}_hidden_size"), getattr(self, f"{side}_num_heads")
            if hidden_size % (4 * num_heads):
                raise ValueError(
                    f"`{side}_hidden_size` must be a multiple of 4 * `{side}_num_heads` (two rotary axes of channel "
                    f"pairs a head), got {hidden_size} and {num_heads}."
                )
            if int(2 / 3 * self.mlp_ratio * hidden_size) < 1:
                raise ValueError(f"`mlp_ratio` must leave a width of at least 1, got {self.mlp_ratio!r}.")
        weights = self._count_weights()
        if sum(weights.values()) > _MOST_WEIGHTS:
            name = max(weights, key=weights.__getitem__)
            raise ValueError(
                f"`{name}` must leave a model of at most {_MOST_WEIGHTS:g} weights, got {getattr(self, name)!r}, of "
                f"which come {weights[name]:.3g}."
            )

    def _largest(self, name: str) -> float:
        return _LARGEST_SIZE if type(self).__annotations__[name] is int else _LARGEST_NUMBER

    def _count_weights(self) -> dict[str, int]:
        """Count about the weights of matrices and convolutions by the argument that they grow with."""
        patch, path = self.patch_size**2 * self.in_channels, self.linear_path**2 * self.latent_channels
        widths = self.encoder_hidden_size + self.decoder_hidden_size
        squares = self.decoder_hidden_size * self.latent_channels * sum(f**2 for f in self.scale_factors[:-1])
        counts = {
            "patch_size": widths * patch,
            "latent_channels": (widths + self.encoder_hidden_size) * self.latent_channels,
            "learned_positions": widths * self.learned_positions**2,
            "linear_path": patch * path * (1 + len(self.scale_factors)),
            "scale_factors": squares if self.downsampling == "learned" else 0,
            "mlp_ratio": 0,
        }
        for side in ("encoder", "decoder"):
            width, num_layers = getattr(self, f"{side}_hidden_size"), getattr(self, f"{side}_num_layers")
            counts[f"{side}_hidden_size"] = 4 * num_layers * width**2
            counts["mlp_ratio"] += 3 * num_layers * width * int(2 / 3 * self.mlp_ratio * width)
        return counts

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Self":
        """Read a configuration as `PreTrainedConfig.from_dict` does, also one saved without `downsampling`."""
        return super().from_dict(complete_saved(config_dict), **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, and `downsampling`, whose absence means `"mean"`."""
        return {**super().to_diff_dict(), "downsampling": self.downsampling}

    @property
    def num_hidden_layers(self) -> int:
        """Count the blocks of the encoder and the decoder together."""
        return self.encoder_num_layers + self.decoder_num_layers

    @property
    def model_fields(self) -> dict[str, Any]:
        """Return the values that describe the model by name, which are the arguments of `AutoencoderHieraTok`."""
        return {name: getattr(self, name) for name in type(self).__annotations__}

    @property
    def pipeline_facts(self) -> dict[str, Any]:
        """
        Return what diffusers pipelines read of a VAE's configuration, and this model has no use for.

        They take the length of `block_out_channels` for the downsampling, and want `latents_mean` and `latents_std` to
        be there.
        """
        block_out_channels = [self.encoder_hidden_size] * self.patch_size.bit_length()
        return {
            "block_out_channels": block_out_channels,
            "encoder_block_out_channels": block_out_channels,
            "latents_mean": None,
            "latents_std": None,
        }

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "Self":
        """
        Make the configuration of a named size, with single values replaced.

        Args:
            size (`str`): One of `SIZES`.
            overrides: Arguments of `HieraTokConfig` that replace those of the named size.

        Raises:
            ValueError: `size` is not one of `SIZES`, an override is no argument of the configuration, or
                `HieraTokConfig` refuses its value.
        """
        if not isinstance(size, str) or size not in SIZES:
            raise ValueError(f"`size` must be one of {list(SIZES)}, got {size!r}.")
        if unknown := sorted(set(overrides) - set(cls.__annotations__)):
            raise ValueError(f"HieraTokConfig has no argument {unknown[0]!r}; it has {list(cls.__annotations__)}.")
        return cls(**{**SIZES[size], **overrides})


def complete_saved(values: dict[str, Any]) -> dict[str, Any]:
    """
    Give a saved configuration its `downsampling`, which is `"mean"` where the file does not have it.

    Args:
        values (`dict[str, Any]`): The content of a `config.json`, or arguments that no library has saved.

    Returns:
        `values`, with the key if a library saved them without it.
    """
    saved = "transformers_version" in values or "_diffusers_version" in values
    return {"downsampling": "mean", **values} if saved else values
