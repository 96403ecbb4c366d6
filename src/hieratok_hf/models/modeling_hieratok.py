"""Give HieraTok to transformers as a model: configuration, outputs and flags around `HieraTokCore`."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import ModelOutput, TransformersKwargs

from ..ops.attention import REGISTERED_BACKENDS
from ..shipped import resolve_model
from .attention_dispatch import ATTENTION_IMPLEMENTATIONS
from .configuration_hieratok import HieraTokConfig
from .core import HieraTokCore, HieraTokDecoder, posterior_of
from .layers import HieraTokAttention, HieraTokBlock, init_weights
from .losses import tokenizer_losses
from .quantizing import TokensMixin
from .saving import (
    HubUploadMixin,
    check_indices,
    check_kind,
    load_whole,
    name_in_errors,
    share_between_libraries,
)

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from typing_extensions import ParamSpec, Self

    _Arguments = ParamSpec("_Arguments")

    # transformers' own have no types, so they would hide the arguments of what they decorate from type checkers.
    def can_return_tuple(method: Callable[_Arguments, Any]) -> Callable[_Arguments, Any]: ...
    def capture_outputs(method: Callable[_Arguments, Any]) -> Callable[_Arguments, Any]: ...
    def capture_both_sides(method: Callable[_Arguments, Any]) -> Callable[_Arguments, Any]: ...
else:
    from transformers.utils.generic import can_return_tuple
    from transformers.utils.output_capturing import capture_outputs

    # The last hidden state of all is the decoder's.
    capture_both_sides = capture_outputs(tie_last_hidden_states=False)

__all__ = ["HieraTokDecoderOutput", "HieraTokEncoderOutput", "HieraTokModel", "HieraTokOutput"]

# Shape letters: B batch, H W pixels, p patch size, h w finest grid (H / p, W / p), C latent channels.


class _HasPosterior:
    @property
    def posterior(self) -> "DiagonalGaussianDistribution":
        """Make the distribution of the latent, which has `mode()`, `sample(generator)` and `kl()`."""
        return posterior_of(self.moments)  # type: ignore[attr-defined]


@dataclass
class HieraTokEncoderOutput(_HasPosterior, ModelOutput):
    """
    Hold what `HieraTokModel.encode` returns.

    Attributes:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Mode of the posterior.
        moments (`torch.Tensor` of shape `(B, 2C, h, w)`): Mean and log-variance of the posterior.
        posterior (`DiagonalGaussianDistribution`): The distribution that the moments describe.
        hidden_states (`tuple`, with `output_hidden_states=True`): Input of the encoder's first block, then the output
            of each of its blocks, `(B, h * w, D)`.
        attentions (`tuple`, with `output_attentions=True` and the eager attention): Weights of each encoder block.
    """

    latents: Tensor | None = None
    moments: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class HieraTokDecoderOutput(ModelOutput):
    """
    Hold what `HieraTokModel.decode` returns.

    Attributes:
        reconstruction (`torch.Tensor` of shape `(B, 3, n_h * p, n_w * p)`): The image of the last scale that ran,
            about [-1, 1], not clamped.
        scales (`tuple[torch.Tensor]`, with `return_scales=True`): Images of all scales that ran, coarse to fine.
    """

    reconstruction: Tensor | None = None
    scales: tuple[Tensor, ...] | None = None


@dataclass
class HieraTokOutput(_HasPosterior, ModelOutput):
    """
    Hold what `HieraTokModel` returns.

    Attributes:
        last_hidden_state (`torch.Tensor` of shape `(B, h * w, D)`): Tokens of the encoder before its head. It comes
            first, because transformers' pipeline `"image-feature-extraction"` takes what is first.
        pooler_output (`torch.Tensor` of shape `(B, D)`): Mean of these tokens.
        loss (`torch.Tensor` of shape `()`): Weighted sum of `tokenizer_losses`; `None` where only coarser scales ran.
        reconstruction (`torch.Tensor` of shape `(B, 3, H, W)`): The decoded image, about [-1, 1], not clamped.
        scales (`tuple[torch.Tensor]`, with `return_scales=True`): Images of all scales that ran, coarse to fine.
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents that were decoded: the posterior's mode or a sample.
        moments (`torch.Tensor` of shape `(B, 2C, h, w)`): Mean and log-variance of the posterior.
        posterior (`DiagonalGaussianDistribution`): The distribution that the moments describe.
        hidden_states (`tuple`, with `output_hidden_states=True`): Input of the first block of the encoder, then the
            output of each of its blocks `(B, h * w, D)` and of each block of the decoder `(B, N, D)`.
        attentions (`tuple`, with `output_attentions=True` and the eager attention): Weights of each block.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    scales: tuple[Tensor, ...] | None = None
    latents: Tensor | None = None
    moments: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class HieraTokPreTrainedModel(PreTrainedModel):
    """Hold what the models of transformers share: flags, loading, attention implementations and random weights."""

    config_class = HieraTokConfig
    base_model_prefix = "hieratok"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["HieraTokEncoderBlock", "HieraTokDecoderBlock"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": HieraTokBlock, "attentions": HieraTokAttention}

    def __init__(self, config: HieraTokConfig):
        HieraTokConfig(**config.model_fields)  # checks values that were set since it was made
        super().__init__(config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> "Self":
        """
        Load a model from a folder, the package or the Hub, with the arguments of `PreTrainedModel.from_pretrained`.

        A name of `SHIPPED` is that of weights in the package, unless a folder here has it. With
        `load_quantizer=False` the levels beside the weights are passed over, such as damaged ones.

        Raises:
            OSError: There is no such folder or repository, or no network to reach it; the message says what to do.
            ValueError: It is of another architecture or a backbone alone, an index of the weights names a file outside
                of the folder, or the name is a size without trained weights.
        """
        pretrained_model_name_or_path = resolve_model(pretrained_model_name_or_path)
        if kwargs.get("subfolder", "") is None:  # diffusers has it as the default, transformers fails at it
            del kwargs["subfolder"]
        has_levels = kwargs.pop("load_quantizer", True)
        load = partial(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        if pretrained_model_name_or_path is None:
            return load()
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")

        def load_checked() -> Any:
            check_kind(folder, kwargs.get("config") is None, needs_decoder=issubclass(cls, TokensMixin))
            check_indices(folder)
            loaded = load()
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # beside the info that was asked for
            if has_levels and isinstance(model, TokensMixin):
                model._read_quantizer(pretrained_model_name_or_path, kwargs)
            return loaded

        with name_in_errors(pretrained_model_name_or_path):
            return load_whole(pretrained_model_name_or_path, kwargs.get("subfolder"), load_checked)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Check a name of `ATTENTION_IMPLEMENTATIONS` as transformers does; any other is a `ValueError`."""
        # The names of this package stay out of the library's registry, whose functions are given no layout.
        is_own = str(requested_attention).startswith("hieratok_") or requested_attention in REGISTERED_BACKENDS
        if requested_attention in ATTENTION_IMPLEMENTATIONS and is_own:
            return requested_attention
        implementation = super().get_correct_attn_implementation(requested_attention, is_init_check)
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"`attn_implementation` must be one of {list(ATTENTION_IMPLEMENTATIONS)}, got {implementation!r}."
            )
        return implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)
        if isinstance(module, HieraTokDecoder):
            module.init_weights(self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """Return the convolution that embeds the patches."""
        return self.core.encoder.patch_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the convolution that embeds the patches by another of the same shapes."""
        self.core.encoder.patch_embed = value

    def _to_own_dtype(self, tensor: Tensor) -> Tensor:
        """Cast a floating-point tensor to the dtype of the weights; leave anything else for the core to refuse."""
        return tensor.to(self.dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


class HieraTokModel(HubUploadMixin, TokensMixin, HieraTokPreTrainedModel):
    """
    Encode images and decode latents by the multi-scale visual tokenizer HieraTok, as a transformers model.

    The method is that of Chen et al. (arXiv 2509.23736), `HieraTokCore` computes it. The class loads the same folders
    as `AutoencoderHieraTok`, and takes images and latents of any floating dtype.

    Args:
        config (`HieraTokConfig`): Sizes and options.

    Raises:
        ValueError: A method was given images, latents or a `num_scales` that the model cannot take.

    Example:

    ```python
    >>> import torch, hieratok_hf
    >>> from transformers import AutoModel
    >>> model = AutoModel.from_pretrained(hieratok_hf.pretrained("hieratok-tiny"))
    >>> output = model(torch.zeros(1, 3, 64, 96))
    >>> output.latents.shape, output.reconstruction.shape
    (torch.Size([1, 16, 8, 12]), torch.Size([1, 3, 64, 96]))

    ```
    """

    def __init__(self, config: HieraTokConfig):
        super().__init__(config)
        self.core = HieraTokCore(config)
        self.post_init()

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "Self":
        """Make a model of a named size, with random weights and the arguments of `HieraTokConfig.from_size`."""
        return cls(HieraTokConfig.from_size(size, **overrides)).eval()

    @classmethod
    def from_core(cls, core: HieraTokCore) -> "Self":
        """Make a model around a core that exists; the weights are shared, not copied."""
        with torch.device("meta"):
            model = cls(core.config)
        model.core = core
        return model.train(core.training)

    @capture_outputs
    def encode(self, pixel_values: Tensor, **kwargs: Any) -> HieraTokEncoderOutput:
        """
        Encode images to the distribution of their latents.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; sides are multiples of the patch.
            kwargs: `return_dict`, `output_hidden_states`, `output_attentions` as in every transformers model.
        """
        moments, _ = self.core.encode_moments(self._to_own_dtype(pixel_values))
        return HieraTokEncoderOutput(latents=moments.chunk(2, dim=1)[0], moments=moments)

    @can_return_tuple
    def decode(
        self,
        latents: Tensor,
        num_scales: int | None = None,
        return_scales: bool = False,
        return_dict: bool | None = None,  # `can_return_tuple` takes it
    ) -> HieraTokDecoderOutput:
        """
        Decode latents to images, by all scales or by the coarser ones alone.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents as `encode` gives them.
            num_scales (`int`, *optional*): Number of scales to run, coarse to fine; all unless given. Fewer give the
                image of the last of them, for the cost of its tokens and the coarser ones.
            return_scales (`bool`, defaults to `False`): Whether to return the images of the coarser scales as well.
            return_dict (`bool`, *optional*): Whether to return a `HieraTokDecoderOutput` rather than a tuple.
        """
        latents = self._to_own_dtype(latents)
        if not return_scales:
            return HieraTokDecoderOutput(reconstruction=self.core.decode(latents, num_scales))
        scales = tuple(self.core.decode_scales(latents, num_scales))
        return HieraTokDecoderOutput(reconstruction=scales[-1], scales=scales)

    @capture_outputs
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        Compute the encoder's features for understanding tasks.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1], as for `encode`.
            kwargs: `return_dict`, `output_hidden_states`, `output_attentions` as in every transformers model.

        Returns:
            `last_hidden_state` of shape `(B, h * w, D)`, the tokens before the head, and `pooler_output` of shape
            `(B, D)`, their mean.
        """
        _, features = self.core.encode_moments(self._to_own_dtype(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features.mean(dim=1))

    @capture_both_sides
    def forward(
        self,
        pixel_values: Tensor,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
        num_scales: int | None = None,
        return_loss: bool = True,
        return_scales: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HieraTokOutput:
        """
        Encode images, decode their latents, and compute the loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; sides are multiples of the patch.
            sample_posterior (`bool`, defaults to `False`): Whether to decode a sample of the posterior, not its mode.
            generator (`torch.Generator`, *optional*): Source of the sample's noise.
            num_scales (`int`, *optional*): Number of scales to run, coarse to fine; all unless given.
            return_loss (`bool`, defaults to `True`): Whether to compute the loss, for which all images are made.
            return_scales (`bool`, defaults to `False`): Whether to return the images of the coarser scales as well.
            kwargs: `return_dict`, `output_hidden_states`, `output_attentions` as in every transformers model.
        """
        pixel_values = self._to_own_dtype(pixel_values)
        moments, features = self.core.encode_moments(pixel_values)
        latents = posterior_of(moments).sample(generator) if sample_posterior else moments.chunk(2, dim=1)[0]
        has_loss = return_loss and num_scales in (None, len(self.config.scale_factors))
        if has_loss or return_scales:
            images = self.core.decode_scales(latents, num_scales)
        else:
            images = [self.core.decode(latents, num_scales)]
        return HieraTokOutput(
            last_hidden_state=features,
            pooler_output=features.mean(dim=1),
            loss=tokenizer_losses(images, pixel_values, moments, self.config)["loss"] if has_loss else None,
            reconstruction=images[-1],
            scales=tuple(images) if return_scales else None,
            latents=latents,
            moments=moments,
        )

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """
        Save to a folder that this class and `AutoencoderHieraTok` both load; files appear whole or not at all.

        The arguments are those of `PreTrainedModel.save_pretrained`; a process that is not the main one writes
        nothing.

        Raises:
            ValueError: `save_directory` names no folder.
        """
        if not is_main_process:
            # It may still have to send its share of the weights to the main one.
            with tempfile.TemporaryDirectory() as nowhere:
                return super().save_pretrained(nowhere, is_main_process, **{**kwargs, "push_to_hub": False})
        with self._stage_and_push(save_directory, kwargs) as stage:
            super().save_pretrained(stage, is_main_process, **kwargs)
            share_between_libraries(stage, self.config, for_transformers=True)
            self._write_quantizer(stage)
