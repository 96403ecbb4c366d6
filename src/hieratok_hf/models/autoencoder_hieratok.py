"""Give HieraTok to diffusers as an autoencoder: configuration, outputs and flags around `HieraTokCore`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import is_offline_mode
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from ..ops.onednn_linear import HieraTokLinear
from ..ops.pyramid import PyramidLayout
from ..shipped import resolve_model
from .configuration_hieratok import OF_BACKBONES, OF_PIPELINES, HieraTokConfig, complete_saved, refuse_misspelt
from .core import HieraTokCore, check_latents, check_pixel_values
from .layers import HieraTokAttention
from .quantizing import TokensMixin
from .saved_code import library_of
from .saving import HubUploadMixin, check_indices, check_kind, load_whole, name_in_errors, share_between_libraries
from .tiling import TilingMixin

if TYPE_CHECKING:
    from typing_extensions import ParamSpec, Self

    _Arguments = ParamSpec("_Arguments")

    # diffusers' own have no types, so they would hide the class and the arguments of its methods from type checkers.
    def register_to_config(init: Callable[_Arguments, None]) -> Callable[_Arguments, None]: ...
    def apply_forward_hook(method: Callable[_Arguments, Any]) -> Callable[_Arguments, Any]: ...
else:
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils.accelerate_utils import apply_forward_hook

__all__ = ["AutoencoderHieraTok", "AutoencoderHieraTokOutput"]

# Shape letters: B batch, H W pixels, p patch size, h w finest grid (H / p, W / p), C latent channels.


class _HieraTokAttentionMixin(AttentionModuleMixin):
    def fuse_projections(self) -> None:
        """Fuse the projections of queries, keys and values into one linear layer."""
        super().fuse_projections()
        if self.fused_projections:
            self.to_qkv.__class__ = HieraTokLinear


# A trap: diffusers finds the layers of attention by this base. They get it here, not where they are defined, because a
# model of transformers has the same layers, and should not wait until diffusers is imported.
HieraTokAttention.__bases__ = (nn.Module, _HieraTokAttentionMixin)


@dataclass
class AutoencoderHieraTokOutput(DecoderOutput):
    """
    Hold what `AutoencoderHieraTok` decodes, in `decode` and in its call.

    Attributes:
        sample (`torch.Tensor` of shape `(B, 3, n_h * p, n_w * p)`): The image of the last scale that ran, about
            [-1, 1], not clamped.
        scales (`tuple[torch.Tensor]`, with `return_scales=True`): Images of all scales that ran, coarse to fine.
    """

    scales: tuple[Tensor, ...] | None = None


class AutoencoderHieraTok(
    HubUploadMixin, TokensMixin, ModelMixin, TilingMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin
):
    """
    Encode images and decode latents by the multi-scale visual tokenizer HieraTok, as the VAE of diffusers pipelines.

    The method is that of Chen et al. (arXiv 2509.23736), `HieraTokCore` computes it. The class loads the same folders
    as `HieraTokModel`. Latents of a trained checkpoint are normalised: `scaling_factor` is 1 and `shift_factor` 0.

    Args:
        kwargs: The arguments of `HieraTokConfig`, with the same defaults.

    Raises:
        ValueError: A method was given images, latents or a `num_scales` that the model cannot take.
        ValueError, StrictDataclassError: `HieraTokConfig` refuses a value.

    Example:

    ```python
    >>> import torch, hieratok_hf
    >>> vae = hieratok_hf.AutoencoderHieraTok.from_pretrained("hieratok-tiny")
    >>> latents = vae.encode(torch.zeros(1, 3, 64, 96)).latent_dist.mode()
    >>> latents.shape, vae.decode(latents).sample.shape, vae.decode(latents, num_scales=2).sample.shape
    (torch.Size([1, 16, 8, 12]), torch.Size([1, 3, 64, 96]), torch.Size([1, 3, 16, 24]))

    ```
    """

    # A trap: diffusers writes `__module__` of a component's class into `model_index.json`, and on loading imports that
    # module and looks up on it the class and diffusers' own `ModelMixin`. Only the package has both, and the path of
    # this file would tie every saved pipeline to it.
    __module__ = library_of("autoencoder_hieratok")

    _supports_gradient_checkpointing = True
    _no_split_modules = ["HieraTokEncoderBlock", "HieraTokDecoderBlock"]
    _repeated_blocks = ["HieraTokEncoderBlock", "HieraTokDecoderBlock"]
    _group_offload_block_modules = ["core", "encoder", "decoder"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 16,
        latent_channels: int = 16,
        scale_factors: tuple[int, ...] = (8, 4, 2, 1),
        downsampling: str = "learned",
        scale_causal: bool = True,
        encoder_hidden_size: int = 768,
        encoder_num_layers: int = 12,
        encoder_num_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        qk_norm: bool = False,
        norm_before_blocks: bool = False,
        norm_after_blocks: bool = True,
        learned_positions: int = 0,
        rotary_coordinates: str = "cells",
        rotary_scale: float = 1.0,
        rotary_base: float = 100.0,
        rotary_pairing: str = "proper",
        output_conv: bool = False,
        linear_path: int = 0,
        kl_weight: float = 1e-4,
        coarse_weight: float = 0.02,
        sample_size: int = 256,
        initializer_range: float = 0.02,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
    ):
        super().__init__()
        config = HieraTokConfig(**{name: self.config[name] for name in HieraTokConfig.__annotations__})
        # JSON turns the tuple into a list, and has no numbers of numpy.
        self.register_to_config(**config.model_fields, **config.pipeline_facts)
        self.core = HieraTokCore(config).init_weights()
        self.use_slicing = False
        self.init_tiling(config.patch_size, max(256, 2 * config.patch_size * config.scale_factors[0]))

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "Self":
        """Make a model of a named size, with random weights and the arguments of `HieraTokConfig.from_size`."""
        return cls(**HieraTokConfig.from_size(size, **overrides).model_fields).eval()

    @classmethod
    def from_core(cls, core: HieraTokCore) -> "Self":
        """Make a model around a core that exists; the weights are shared, not copied."""
        with torch.device("meta"):
            model = cls(**core.config.model_fields)
        model.core = core
        model.register_to_config(**core.config.pipeline_facts)
        return model.train(core.training)

    def register_to_config(self, **kwargs: Any) -> None:
        """Register values as `ConfigMixin` does, those that a core does not compute with in its configuration too."""
        super().register_to_config(**kwargs)
        if "core" in vars(self).get("_modules", ()):  # the arguments are registered before anything is made
            for name in kwargs.keys() & {*OF_PIPELINES, "latents_mean", "latents_std"}:
                setattr(self.core.config, name, kwargs[name])

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Sort the entries of a `config.json` as `ConfigMixin` does, with no warning of those of transformers."""
        facts = HieraTokConfig().pipeline_facts
        foreign = {*PreTrainedConfig().to_dict(), *OF_BACKBONES, *facts, "auto_map"}
        own = {key: value for key, value in complete_saved(config_dict).items() if key not in foreign}
        refuse_misspelt(kwargs, HieraTokConfig.__annotations__, cls.__name__)
        init, unused, hidden = super().extract_init_dict(own, **kwargs)
        # Those that say something are registered without the warning of an unknown argument.
        given = {key: config_dict[key] for key in ("latents_mean", "latents_std") if config_dict.get(key) is not None}
        return init, unused, {**hidden, **given}

    @property
    def spatial_compression_ratio(self) -> int:
        """Return how many pixels of an image's side one cell of its latent stands for."""
        return self.core.config.patch_size

    @property
    def post_quant_conv(self) -> nn.Module:
        """Return the layer that reads the latents, of whose parameters pipelines ask the dtype with `force_upcast`."""
        return self.core.decoder.embed

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """
        Encode images to the distribution of their latents.

        Args:
            x (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; sides are multiples of the patch size.
            return_dict (`bool`, defaults to `True`): Whether to return an `AutoencoderKLOutput` rather than a tuple.

        Returns:
            The distribution of the latent `(B, C, h, w)`, as `latent_dist`.
        """
        moments = [self._encode(part) for part in self._slices(x)]
        posterior = DiagonalGaussianDistribution(torch.cat(moments) if len(moments) > 1 else moments[0])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        num_scales: int | None = None,
        return_scales: bool = False,
    ) -> AutoencoderHieraTokOutput | tuple[Any, ...]:
        """
        Decode latents to images, by all scales or by the coarser ones alone.

        Args:
            z (`torch.Tensor` of shape `(B, C, h, w)`): Latents as `encode` gives them.
            return_dict (`bool`, defaults to `True`): Whether to return an object rather than a tuple.
            generator (`torch.Generator`, *optional*): Ignored, because decoding draws nothing; pipelines pass it.
            num_scales (`int`, *optional*): Number of scales to run, coarse to fine; all unless given. Fewer give the
                image of the last of them, for the cost of its tokens and the coarser ones.
            return_scales (`bool`, defaults to `False`): Whether to return the images of the coarser scales as well.
        """
        parts = [self._decode(part, num_scales, return_scales) for part in self._slices(z)]
        images = tuple(torch.cat(scale) if len(parts) > 1 else scale[0] for scale in zip(*parts))
        output = AutoencoderHieraTokOutput(sample=images[-1], scales=images if return_scales else None)
        return output if return_dict else output.to_tuple()

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        return_scales: bool = False,
    ) -> AutoencoderHieraTokOutput | tuple[Any, ...]:
        """
        Encode images and decode their latents.

        Args:
            sample (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; sides are multiples of the patch.
            sample_posterior (`bool`, defaults to `False`): Whether to decode a sample of the posterior, not its mode.
            return_dict (`bool`, defaults to `True`): Whether to return an object rather than a tuple.
            generator (`torch.Generator`, *optional*): Source of the sample's noise.
            return_scales (`bool`, defaults to `False`): Whether to return the images of the coarser scales as well.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict, return_scales=return_scales)

    def _encode(self, x: Tensor) -> Tensor:
        """Encode to moments `(B, 2C, h, w)`, in tiles where they are on and the images larger than one."""

        def encode(part: Tensor) -> Tensor:
            return self.core.encode_moments(part)[0]

        if not self.needs_tiles(x, 1):
            return encode(x)
        check_pixel_values(x, self.core.config)
        patch_size = self.core.config.patch_size
        return self._run_in_tiles(encode, x, 1, (1, patch_size), patch_size)

    def _decode(self, z: Tensor, num_scales: int | None, all_scales: bool) -> list[Tensor]:
        """Decode to the last scale that runs or to all, in tiles where they are on and the latent larger than one."""
        config, patch_size = self.core.config, self.core.config.patch_size
        if not self.needs_tiles(z, patch_size):
            return self.core.decode_scales(z, num_scales) if all_scales else [self.core.decode(z, num_scales)]
        check_latents(z, config)
        layout = PyramidLayout.from_grid(z.shape[2], z.shape[3], tuple(config.scale_factors))
        last = layout.num_scales if num_scales is None else layout.truncate(num_scales).num_scales

        def decode(part: Tensor, num_scales: int) -> Tensor:
            # Without scale causality the coarser scales see the finer ones, and cannot be decoded alone.
            if config.scale_causal or num_scales == last:
                return self.core.decode(part, num_scales)
            return self.core.decode_scales(part, last)[num_scales - 1]

        images = []
        for k in range(1 if all_scales else last, last + 1):
            factor = config.scale_factors[k - 1]
            of_scale = partial(decode, num_scales=k)
            images.append(self._run_in_tiles(of_scale, z, patch_size, (patch_size, factor), factor))
        return images

    def _slices(self, batch: Tensor) -> Sequence[Tensor]:
        """Split a batch into single images where slicing is on; what is no batch is left for the core to refuse."""
        is_dense = isinstance(batch, Tensor) and not batch.is_nested and batch.layout == torch.strided
        is_batch = is_dense and batch.ndim == 4 and batch.shape[0] > 1
        return batch.split(1) if self.use_slicing and is_batch else [batch]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "Self":
        """
        Load a model from a folder, the package or the Hub, with the arguments of `ModelMixin.from_pretrained`.

        A name of `SHIPPED` is that of weights in the package, unless a folder here has it. With
        `load_quantizer=False` the levels beside the weights are passed over, such as damaged ones.

        Raises:
            OSError: There is no such folder or repository, or no network to reach it; the message says what to do.
            ValueError: It is of another architecture or a backbone alone, an index of the weights names a file outside
                of the folder, the name is a size without trained weights, or the weights lack a tensor, which
                diffusers would leave random, or one of another shape was ignored and has no storage.
        """
        pretrained_model_name_or_path = resolve_model(pretrained_model_name_or_path)
        if is_offline_mode():  # in spite of which diffusers asks the Hub for the list of shards
            kwargs["local_files_only"] = True
        return_info = kwargs.pop("output_loading_info", False)
        has_levels = kwargs.pop("load_quantizer", True)
        load = partial(super().from_pretrained, pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        subfolder = kwargs.get("subfolder")

        def load_checked() -> Any:
            folder = Path(pretrained_model_name_or_path, subfolder or "")
            check_kind(folder, needs_config="config" not in kwargs)
            check_indices(folder)
            model, info = load()
            if has_levels:
                model._read_quantizer(pretrained_model_name_or_path, kwargs)
            return model, info

        with name_in_errors(pretrained_model_name_or_path):
            model, info = load_whole(pretrained_model_name_or_path, subfolder, load_checked)
        folder = repr(str(pretrained_model_name_or_path))
        if missing := sorted(info.get("missing_keys", ())):
            raise ValueError(
                f"The weights in {folder} lack {len(missing)} tensors of the model, such as {missing[0]!r}."
            )
        # With a device map, weights may rest on a disk; some quantised ones say of themselves that they are meta.
        ignored = info.get("mismatched_keys") and kwargs.get("device_map") is None
        if ignored and any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"Weights in {folder} have other shapes than `config.json` asks for; to start these at random, pass "
                "`low_cpu_mem_usage=False` beside `ignore_mismatched_sizes=True`."
            )
        return (model, info) if return_info else model  # type: ignore[return-value]

    # A pipeline hands on only the arguments that stand in this signature by name.
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """
        Save to a folder that this class and `HieraTokModel` both load; files appear whole or not at all.

        The arguments are those of `ModelMixin.save_pretrained`; a process that is not the main one does nothing. What
        `safe_serialization=False` writes loads in diffusers alone.

        Raises:
            ValueError: `save_directory` names no folder, or `register_to_config` has changed a value that the model
                computes with.
        """
        if not is_main_process:
            return
        config = self._own_config()
        kwargs |= {"variant": variant, "max_shard_size": max_shard_size}
        with self._stage_and_push(save_directory, kwargs) as stage:
            super().save_pretrained(stage, is_main_process, save_function, safe_serialization, **kwargs)
            share_between_libraries(stage, config)
            self._write_quantizer(stage)

    def _own_config(self) -> HieraTokConfig:
        """Make the configuration to save: the registered one, which must describe the core."""
        config = HieraTokConfig(**{name: self.config[name] for name in HieraTokConfig.__annotations__})
        config.latents_mean, config.latents_std = self.config["latents_mean"], self.config["latents_std"]
        core = self.core.config
        expected = {**core.model_fields, "block_out_channels": core.pipeline_facts["block_out_channels"]}
        for name in expected.keys() - OF_PIPELINES:
            found = getattr(config, name, self.config[name])
            if found != expected[name]:
                raise ValueError(f"`{name}` must stay as the weights are made, {expected[name]!r}, got {found!r}.")
        return config
