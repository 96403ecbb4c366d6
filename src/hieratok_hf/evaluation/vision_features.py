"""Compute features of a frozen vision model of transformers, for perceptual losses, alignment, Fréchet distances."""

import inspect
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

__all__ = ["FrozenVisionModel", "VisionFeatures"]

# Shape letters: B batch, H W pixels, C channels of a map, h w its grid, N tokens.

ModelType = TypeVar("ModelType", bound="FrozenVisionModel")


class FrozenVisionModel(nn.Module):
    """
    Hold a vision model of transformers that never trains, with the statistics of the colours that it was trained with.

    Args:
        model (`PreTrainedModel`): Model that takes `pixel_values`; its weights are frozen in place.
        mean, std (`list[float]`): Statistics of each colour in [0, 1], as the model was trained with.

    Raises:
        ValueError: `mean` or `std` are not three numbers, or a standard deviation is not positive.
    """

    _auto_class: Any = AutoModel

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
            raise ValueError(f"`mean` and `std` must be three numbers, those of `std` positive, got {mean} and {std}.")
        self.model: Any = model.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_pretrained(cls: type[ModelType], name_or_path: str | os.PathLike[str]) -> ModelType:
        """
        Load a model by folder or Hub id, in float32, with the statistics of its image processor, or 0.5 where it has
        none.

        Raises:
            OSError: There is no such folder or repository, or no network to reach it.
            ValueError: transformers knows no such vision model, or the weights of a layer are not there.
        """
        name = os.fspath(name_or_path)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # that a classifier's head is left out is meant so
        try:
            model, report = cls._auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        finally:
            logging.set_verbosity(verbosity)
        if getattr(model, "main_input_name", None) != "pixel_values":
            raise ValueError(f"{name!r} must be a vision model, got {type(model).__name__}.")
        missing = sorted(report["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing):
            model.pooler = None  # of many classifiers: it would be random, and another one in every process
        elif missing:
            raise ValueError(f"{name!r} must hold all weights of {type(model).__name__}, but lacks {missing}.")
        try:
            settings: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(name)[0]
        except OSError:
            settings = {}
        return cls(model, settings.get("image_mean") or [0.5] * 3, settings.get("image_std") or [0.5] * 3)

    @property
    def name(self) -> str:
        """Name the network as figures made with it do, such as `"MobileNetV2"`."""
        return type(self.model).__name__.removesuffix("Model").removesuffix("ForImageClassification")

    @property
    def image_size(self) -> int:
        """Return the side in pixels of the images that the model was trained with, 224 if it does not say so."""
        size = getattr(self.model.config, "image_size", 224)
        return size if isinstance(size, int) else size[0]

    def train(self: ModelType, mode: bool = True) -> ModelType:
        """Stay in evaluation mode: statistics of batches would make the features depend on their company."""
        return super().train(False)

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """Turn `pixel_values` `(B, 3, H, W)` in [-1, 1] into what the model takes."""
        return (pixel_values * 0.5 + 0.5 - self.mean) / self.std


class VisionFeatures(FrozenVisionModel):
    """
    Compute the features of a frozen vision model, a convolutional network or a ViT.

    Args:
        model (`PreTrainedModel`): Model from `pixel_values` to `hidden_states`; its weights are frozen in place.
        mean, std (`list[float]`): Statistics of each colour in [0, 1], as the model was trained with.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__(model, mean, std)
        self.model.to(memory_format=torch.channels_last)  # convolutions are a third faster
        # Some ViTs take images of other sizes only when told so.
        asks = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._any_size = {"interpolate_pos_encoding": True} if asks else {}

    def forward(self, pixel_values: Tensor, size: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """
        Compute the pooled features `(B, C)` and the maps of all layers, each `(B, C, h, w)`, or `(B, C, N)` of a model
        whose layers hold tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
            size (`int`, *optional*): Side that images are resized to first, bilinearly with antialiasing.

        Raises:
            ValueError: The model gives no hidden states.
        """
        pixel_values = pixel_values.float()
        if size is not None and pixel_values.shape[-2:] != (size, size):
            pixel_values = F.interpolate(pixel_values, (size, size), mode="bilinear", antialias=True)
        # Autocasting would round what the losses and statistics are made of.
        with torch.autocast(pixel_values.device.type, enabled=False):
            normalised = self.normalise(pixel_values).to(memory_format=torch.channels_last)
            outputs = self.model(normalised, output_hidden_states=True, **self._any_size)
        if getattr(outputs, "hidden_states", None) is None or getattr(outputs, "last_hidden_state", None) is None:
            raise ValueError(f"`model` must give hidden states, which {type(self.model).__name__} does not.")
        maps = [x.transpose(1, 2) if x.ndim == 3 else x for x in (*outputs.hidden_states, outputs.last_hidden_state)]
        pooled = getattr(outputs, "pooler_output", None)
        return maps[-1].flatten(2).mean(2) if pooled is None else pooled.flatten(1), maps

    def feature_maps(self, pixel_values: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """
        Compute the maps `(B, C, h, w)` of some layers, float32, each at its own grid; of a ViT the patches' tokens,
        which come after all others.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
            layers (sequence of `int`): Indices of the maps that `forward` gives.

        Raises:
            ValueError: The model's layers hold tokens and it has no patch size, or fewer tokens than patches.
        """
        found = self(pixel_values)[1]
        return [self.to_grid(found[layer], pixel_values.shape[2:]) for layer in layers]

    def to_grid(self, features: Tensor, image_shape: Sequence[int]) -> Tensor:
        """
        Put a map of `forward` on its grid, `(B, C, h, w)`; of a ViT the patches' tokens.

        Args:
            features (`torch.Tensor` of shape `(B, C, h, w)` or `(B, C, N)`): The map.
            image_shape (sequence of `int`): Height and width in pixels of the images that it is of.

        Raises:
            ValueError: As `feature_maps`.
        """
        if features.ndim == 4:
            return features
        size = getattr(self.model.config, "patch_size", None)
        if size is None:
            raise ValueError(f"`features` must give maps, or have a `patch_size`; {self.name} has tokens and none.")
        sizes = (size, size) if isinstance(size, int) else size
        height, width = (side // cell for side, cell in zip(image_shape, sizes))
        if not 0 < height * width <= features.shape[2]:
            raise ValueError(
                f"`features` must give a token a patch, got {features.shape[2]} of {self.name} for {height}x{width} "
                "patches."
            )
        return features[:, :, -height * width :].unflatten(2, (height, width))
