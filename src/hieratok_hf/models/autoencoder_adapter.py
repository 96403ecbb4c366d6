"""Use every image autoencoder, of this package and of diffusers, in one way."""

import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..shipped import resolve_model
from .core import HieraTokCore
from .quantizing import LatentQuantizer, read_quantizer

__all__ = ["Codec", "load_codec"]

# Shape letters: B batch, S side of a square image in pixels, C latent channels, h w the latent's grid.


class Codec:
    """
    Encode and decode images in [-1, 1] by any autoencoder, with the same calls.

    Args:
        model (`torch.nn.Module`): A `HieraTokCore`, a model around one, or an image autoencoder of diffusers.
        quantizer (`LatentQuantizer`, *optional*): Levels for the latents; those of a HieraTok model unless given.

    Attributes:
        core (`HieraTokCore` or `None`): The core of a HieraTok model, `None` for another autoencoder.
        quantizer (`LatentQuantizer` or `None`): The levels, if there are any.
    """

    def __init__(self, model: nn.Module, quantizer: LatentQuantizer | None = None):
        self.model = model
        self.quantizer: LatentQuantizer | None = quantizer or getattr(model, "quantizer", None)
        core = model if isinstance(model, HieraTokCore) else getattr(model, "core", None)
        self.core: HieraTokCore | None = core if isinstance(core, HieraTokCore) else None

    def encode(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """
        Encode images to latents `(B, C, h, w)`, in the dtype and on the device of the model.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, S, S)`): Images in [-1, 1], in any dtype, on any device.
            noise (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): Standard normal noise to sample the posterior
                with, whose mode is taken unless given. A model without a posterior takes no notice.

        Raises:
            ValueError: A HieraTok model refuses the images, as `HieraTokCore.encode_moments` says.
        """
        weight = next(self.model.parameters())
        pixel_values = pixel_values.to(weight.device, weight.dtype)
        if self.core is not None and not self.is_tiled:
            posterior: Any = self.core.encode(pixel_values)
        else:
            output: Any = self.model.encode(pixel_values)
            if not hasattr(output, "latent_dist"):
                return output.latents if hasattr(output, "latents") else output.latent
            posterior = output.latent_dist
        return posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)

    @property
    def is_tiled(self) -> bool:
        """Tell whether `model.enable_tiling()` has been called, which `encode` and `decode` then heed."""
        return bool(getattr(self.model, "use_tiling", False))

    @property
    def statistics(self) -> dict[str, float]:
        """Return the `scaling_factor` and `shift_factor` of the configuration, 1 and 0 where it has none."""
        config = getattr(self.model, "config", None)
        scale, shift = (getattr(config, name, None) for name in ("scaling_factor", "shift_factor"))
        return {"scaling_factor": scale or 1.0, "shift_factor": shift or 0.0}

    def normalise(self, latents: Tensor) -> Tensor:
        """Scale `latents` `(B, C, h, w)` as pipelines of diffusers do: `(latents - shift) * scale`."""
        return (latents - self.statistics["shift_factor"]) * self.statistics["scaling_factor"]

    def decode(self, latents: Tensor, num_scales: int | None = None) -> Tensor:
        """
        Decode `latents` `(B, C, h, w)` to images of about [-1, 1], not clamped: `(B, 3, S, S)`, or smaller ones by the
        first `num_scales` scales of a HieraTok model, as `HieraTokCore.decode` makes them.
        """
        if self.core is not None and not self.is_tiled:
            return self.core.decode(latents, num_scales)
        options = {} if num_scales is None else {"num_scales": num_scales}
        return self.model.decode(latents, **options).sample

    def decode_scales(self, latents: Tensor) -> list[Tensor]:
        """Decode `latents` `(B, C, h, w)` to the images of all scales that the model has, the last `(B, 3, S, S)`."""
        return [self.decode(latents)] if self.core is None else self.core.decode_scales(latents)

    def latent_shape(self, size: int | tuple[int, int]) -> tuple[int, ...]:
        """
        Find the shape `(C, h, w)` of the latent of an image of `size` x `size` pixels, or of a height and width, by a
        blank one.

        Raises:
            ValueError: The model cannot take an image of that size, or decodes it to another size.
        """
        height, width = (size, size) if isinstance(size, int) else size
        blank = torch.zeros(1, 3, height, width)
        name = type(self.model).__name__
        try:
            with torch.no_grad():
                latents = self.encode(blank)
                shape = tuple(self.decode(latents).shape)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{name} cannot take images of {height} x {width} pixels: {reason}") from error
        if shape != blank.shape:
            raise ValueError(f"{name} makes images of shape {shape[1:]} of those of {tuple(blank.shape[1:])}.")
        return tuple(latents.shape[1:])


def load_codec(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    load_quantizer: bool = True,
) -> Codec:
    """
    Load a HieraTok model or an autoencoder of diffusers, from safetensors alone.

    Args:
        name_or_path (`str` or `os.PathLike`): A name of `SHIPPED`, a folder, or a Hub id, also of a pipeline with a
            part `vae`.
        device (`torch.device` or `str`, defaults to `"cpu"`): The device that the weights are put on.
        dtype (`torch.dtype`, defaults to `torch.float32`): The dtype that they get.
        load_quantizer (`bool`, defaults to `True`): Whether to take the levels beside the weights.

    Returns:
        `Codec`: The model in evaluation mode, its parameters without gradients.

    Raises:
        OSError: There is no such folder or repository, no network to reach it, or it holds no safetensors.
        ValueError: The configuration names no autoencoder that this package or diffusers has, or its weights or
            levels do not suit it.
    """
    import diffusers

    from .autoencoder_hieratok import AutoencoderHieraTok

    name = resolve_model(os.fspath(name_or_path))
    for subfolder in (None, "vae"):
        with suppress(OSError):
            config = AutoencoderHieraTok.load_config(name, subfolder=subfolder)
            break
    else:
        raise OSError(f"{name!r} is no folder or repository with a config.json, in itself or in its vae.")
    kind = config.get("_class_name")
    is_own = kind == AutoencoderHieraTok.__name__ or config.get("model_type") == "hieratok"
    model_class: Any = AutoencoderHieraTok if is_own else getattr(diffusers, str(kind), None)
    if not (hasattr(model_class, "encode") and hasattr(model_class, "decode")):
        raise ValueError(
            f"{name!r} must hold an autoencoder of HieraTok or diffusers, its config.json names {kind!r}."
        )
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "subfolder": subfolder}
    levels = None
    if is_own:
        options["load_quantizer"] = load_quantizer
    elif load_quantizer:
        levels = read_quantizer(name, config.get("latent_channels"), options)
    model = model_class.from_pretrained(name, **options)
    return Codec(model.eval().requires_grad_(False).to(device), levels)
