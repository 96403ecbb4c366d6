"""Configure HieraTok: every size of the model, checked once, and the sizes that have names."""

import difflib
import logging
import os
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from ..ops.pyramid import check_scale_factors
from ..shipped import resolve_model
from ..utils.choices import DOWNSAMPLING, SIZES
from ..utils.files import read_json, write_whole
from ..utils.numbers import plain_numbers

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "OF_PIPELINES",
    "OF_BACKBONES",
    "HieraTokConfig",
    "complete_saved",
    "misspelt",
    "pipeline_hint",
    "refuse_misspelt",
]

OF_PIPELINES = {
    *("sample_size", "scaling_factor", "shift_factor", "force_upcast"),
    *("kl_weight", "coarse_weight", "initializer_range"),
}
"""Fields that a loaded model does not compute with: facts for pipelines and for training."""

OF_BACKBONES = ("out_features", "out_indices")
"""Arguments that choose the blocks whose feature maps a backbone returns."""

Config = TypeVar("Config", bound=PreTrainedConfig)

_logger = logging.getLogger(__name__)

_NOT_NEGATIVE = ("learned_positions", "linear_path", "kl_weight", "coarse_weight")
_LARGEST_SIZE = 2**16
_CHOICES = {
    "downsampling": DOWNSAMPLING,
    "rotary_coordinates": ("cells", "fraction"),
    "rotary_pairing": ("proper", "detok"),
}


# What the libraries give a configuration besides its fields, and hold in a `config.json`; the last two rows are of
# transformers 4, which gave them to every model.
_FOREIGN = {
    *("attn_implementation", "auto_map", "block_out_channels", "encoder_block_out_channels", "experts_implementation"),
    *("latents_mean", "latents_std", "model_type", "name_or_path", "num_labels", "output_attentions"),
    *("per_layer_config", "quantization_config", "tie_word_embeddings", "torch_dtype", "transformers_weights"),
    *("add_cross_attention", "cross_attention_hidden_size", "finetuning_task", "is_decoder", "pruned_heads"),
    *("task_specific_params", "tie_encoder_decoder", "torchscript", "use_bfloat16", "use_cache"),
}


def _with_plain_numbers(config: type[Config]) -> type[Config]:
    """Let the fields of a configuration be numbers and arrays of numpy too, which its check of types would refuse."""
    set_checked: Any = config.__setattr__

    def set_plain(self: Config, name: str, value: Any) -> None:
        is_field = config.attribute_map.get(name, name) in config.__annotations__
        set_checked(self, name, plain_numbers(value) if is_field else value)

    config.__setattr__ = set_plain  # type: ignore[assignment]
    return config


@_with_plain_numbers
@strict
class HieraTokConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Hold and check the sizes and options of a HieraTok tokenizer. The defaults are `hieratok-b`.

    Args:
        in_channels (`int`, defaults to 3): Colour channels of an image.
        patch_size (`int`, defaults to 16): Side in pixels of a patch, and of a cell of the latent; a power of two.
        latent_channels (`int`, defaults to 16): Channels of the latent.
        scale_factors (`tuple[int, ...]`, defaults to `(8, 4, 2, 1)`): Cells of the finest grid that one cell of each
            scale covers on a side, coarse to fine, ending in 1. `(1,)` is the single-scale twin.
        downsampling (`str`, defaults to `"learned"`): Kind of the coarse scales' tokens: `"learned"` convolutions of
            blocks of the latent's cells, or `"mean"`, the blocks' averages, as in a saved configuration without it.
        scale_causal (`bool`, defaults to `True`): A token of the decoder sees its own scale and every coarser one;
            `False` lets all tokens see all, for comparisons: no scale can then be decoded without the finer ones.
        encoder_hidden_size, encoder_num_layers, encoder_num_heads (`int`, default to 768, 12 and 12): Width, number of
            blocks and number of attention heads of the encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_heads (`int`, default to 768, 12 and 12): Width, number of
            blocks and number of attention heads of the decoder.
        mlp_ratio (`float`, defaults to 4.0): A SwiGLU has the width `int(2 / 3 * mlp_ratio * hidden_size)`.
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
            channels of a pair alike, `"detok"` is the table that the weights of l-DeTok (arXiv 2507.15856) need.
        output_conv (`bool`, defaults to `False`): Whether a 3x3 convolution follows on the image after the patches.
        linear_path (`int`, defaults to 0): Side in patches, odd, of convolutions from image to latent mean and from
            latent to each scale's image, so that training can start from a principal component analysis; 0 for none.
        kl_weight (`float`, defaults to 1e-4): Weight of the KL divergence, per latent number, in the training loss.
        coarse_weight (`float`, defaults to 0.02): Weight in the training loss of the mean squared errors of the
            coarser scales' images, each times its factor.
        sample_size (`int`, defaults to 256): Side of the training images in pixels. Images of other sizes work too.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights.
        scaling_factor, shift_factor (`float`, default to 1.0 and 0.0): Factor and offset by which diffusers pipelines
            normalise latents. Those of a trained checkpoint are normalised already.
        force_upcast (`bool`, defaults to `False`): Whether diffusers pipelines must run the model in float32.
        out_features, out_indices (`list[str]` or `list[int]`, *optional*): Names in `stage_names`, or their numbers,
            of the feature maps that a `HieraTokBackbone` returns; the last one unless given.

    Raises:
        ValueError: A value is out of its range, a size is above 65536, or there is no such argument; the message
            names it.
        StrictDataclassError: A value is of another type; huggingface_hub's own error.

    Example:

    ```python
    >>> from hieratok_hf import HieraTokConfig
    >>> HieraTokConfig.from_size("hieratok-b").decoder_hidden_size
    768

    ```
    """

    model_type = "hieratok"
    keys_to_ignore_at_inference = ["last_hidden_state", "pooler_output"]
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
    # Not fields, which describe the tokenizer in both libraries; `None` until a choice is made.
    _out_features = None
    _out_indices = None

    def __post_init__(self, **kwargs: Any):
        chosen = {name: kwargs.pop(name, None) for name in OF_BACKBONES}
        unknown = [name for name in kwargs if not _is_foreign(name)]
        refuse_misspelt(unknown, type(self).__annotations__, "HieraTokConfig")
        if unknown:
            name = unknown[0]
            raise ValueError(f"HieraTokConfig has no argument {name!r}; it has {list(type(self).__annotations__)}.")
        self.scale_factors = tuple(self.scale_factors)
        super().__post_init__(**kwargs)
        for name, value in self.model_fields.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not abs(value) <= sys.float_info.max:  # phrased so that NaN fails, and whole numbers beyond it
                raise ValueError(f"`{name}` must be finite, got {value!r}.")
            if name in _NOT_NEGATIVE and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value!r}.")
            if name not in (*_NOT_NEGATIVE, "shift_factor") and value <= 0:
                raise ValueError(f"`{name}` must be greater than 0, got {value!r}.")
            if isinstance(value, int) and value > _LARGEST_SIZE:
                raise ValueError(f"`{name}` must be at most {_LARGEST_SIZE}, got {value!r}.")
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
            if getattr(self, f"{side}_num_layers") > 4096:  # beyond, making them does not end soon
                raise ValueError(
                    f"`{side}_num_layers` must be at most 4096, got {getattr(self, f'{side}_num_layers')}."
                )
            if int(2 / 3 * self.mlp_ratio * hidden_size) < 1:
                raise ValueError(f"`mlp_ratio` must leave a width of at least 1, got {self.mlp_ratio!r}.")
        if any(value is not None for value in chosen.values()):
            self.set_output_features_output_indices(**chosen)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Self":
        """
        Read a configuration as `PreTrainedConfig.from_dict` does, also one saved without `downsampling`.

        Entries that this class does not know are kept, for those who wrote them, with a warning where one may be
        meant for an argument.

        Raises:
            ValueError: It is that of another architecture, or `kwargs` have an argument with a spelling mistake.
        """
        values = complete_saved(config_dict)
        for name in [name for name in kwargs if cls.attribute_map.get(name, name) in cls.__annotations__]:
            values[cls.attribute_map.get(name, name)] = kwargs.pop(name)
        known = {*cls.__annotations__, *PreTrainedConfig().to_dict()}
        others = {name: values.pop(name) for name in [*values] if name not in known and not _is_foreign(name)}
        refuse_misspelt(kwargs, cls.__annotations__, "HieraTokConfig")
        for name, near in misspelt(others, cls.__annotations__).items():
            _logger.warning(f"{name!r} in the configuration is no argument of HieraTokConfig, as {near!r} is.")
        loaded: Any = super().from_dict(values, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in others.items():
            setattr(config, name, value)
        return loaded

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Read `config.json` as `PreTrainedConfig` does; where there is none, raise `OSError` instead of defaults.

        A name of `SHIPPED` is that of weights in the package, unless a folder here has it.
        """
        values, unused = super().get_config_dict(*map(resolve_model, args), **kwargs)
        if not values:
            where = str(args[0]) if args else "the folder"
            raise OSError(f"{where!r} has no config.json{pipeline_hint(Path(where))}.")
        return values, unused

    def to_dict(self) -> dict[str, Any]:
        """Return all values by name, with `out_features` and `out_indices` only where they were chosen."""
        values = super().to_dict()
        return {name: value for name, value in values.items() if name not in OF_BACKBONES or value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, and `downsampling`, whose absence means `"mean"`."""
        return {**super().to_diff_dict(), "downsampling": self.downsampling}

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the configuration to a file as transformers does, whole or not at all."""
        with write_whole(json_file_path) as file:
            file.write(self.to_json_string(use_diff=use_diff).encode())

    @property
    def num_hidden_layers(self) -> int:
        """Count the blocks of the encoder and the decoder together."""
        return self.encoder_num_layers + self.decoder_num_layers

    @property
    def stage_names(self) -> list[str]:
        """Name the feature maps of a backbone: `"stem"`, the input of the first block, and `"stage1"` and so on."""
        return ["stem", *(f"stage{number}" for number in range(1, self.encoder_num_layers + 1))]

    @property
    def model_fields(self) -> dict[str, Any]:
        """Return the values that describe the model by name, which are the arguments of `AutoencoderHieraTok`."""
        return {name: getattr(self, name) for name in type(self).__annotations__}

    @property
    def pipeline_facts(self) -> dict[str, Any]:
        """Return what diffusers pipelines read of a VAE's configuration, and this model has no use for."""
        # Pipelines take the length for the downsampling, and want the statistics to be there.
        block_out_channels = [self.encoder_hidden_size] * self.patch_size.bit_length()
        return {
            "block_out_channels": block_out_channels,
            "encoder_block_out_channels": block_out_channels,
            "latents_mean": getattr(self, "latents_mean", None),
            "latents_std": getattr(self, "latents_std", None),
        }

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "Self":
        """
        Make the configuration of a named size, with single values replaced.

        Args:
            size (`str`): One of `SIZES`.
            overrides: Arguments of `HieraTokConfig` that replace those of the named size.

        Raises:
            ValueError: `size` is not one of `SIZES`, or an override is no argument of the configuration.
        """
        if not isinstance(size, str) or size not in SIZES:
            raise ValueError(f"`size` must be one of {list(SIZES)}, got {size!r}.")
        return cls(**{**SIZES[size], **overrides})


def complete_saved(values: dict[str, Any]) -> dict[str, Any]:
    """
    Copy a configuration, completed by `downsampling="mean"` where a library saved it without.

    Raises:
        ValueError: It names another architecture.
    """
    for key, own in (("model_type", HieraTokConfig.model_type), ("_class_name", "AutoencoderHieraTok")):
        if (found := values.get(key, own)) != own:
            raise ValueError(f"`config.json` must be that of HieraTok, with the {key} {own!r}, got {found!r}.")
    saved = "transformers_version" in values or "_diffusers_version" in values
    return {"downsampling": "mean", **values} if saved else {**values}


def pipeline_hint(folder: Path) -> str:
    """Say which parts of a folder, if it is a pipeline's, hold a tokenizer of this package."""
    try:
        index = read_json(folder / "model_index.json") or {}
    except ValueError:
        return ""
    parts = [name for name, value in index.items() if isinstance(value, list) and "AutoencoderHieraTok" in value]
    return "".join(f": it is a pipeline, pass subfolder={name!r}" for name in parts[:1])


def _is_foreign(name: str) -> bool:
    """Tell whether an argument is one of those that the libraries have besides the fields of a configuration."""
    return name.startswith("_") or name in _FOREIGN or name in HieraTokConfig.attribute_map


def refuse_misspelt(names: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raise `ValueError` for a name that only a few letters divide from an argument that `owner` has."""
    for name, near in misspelt(names, known).items():
        raise ValueError(f"{owner} has no argument {name!r}; did you mean {near!r}?")


def misspelt(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Find names that only a few letters divide from known ones, each with the nearest."""
    unknown = [name for name in names if name not in known]
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.85) for name in unknown}
    return {name: found[0] for name, found in near.items() if found}
