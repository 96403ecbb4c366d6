"""Encode images to latents and back by the multi-scale tokenizer HieraTok, in transformers and diffusers."""

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

# A saved diffusers pipeline looks its components' base class up on the library that it names.
from diffusers.models.modeling_utils import ModelMixin
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .models.configuration_hieratok import SIZES, HieraTokConfig
from .models.image_processing_hieratok import HieraTokImageProcessor, HieraTokImageProcessorPil
from .models.modeling_hieratok import HieraTokDecoderOutput, HieraTokEncoderOutput, HieraTokModel, HieraTokOutput
from .utils.images import ImageError, convert_to_rgb, open_image

__version__ = "0.1.0"

_LAZY = {
    "AutoencoderHieraTok": "models.autoencoder_hieratok",
    "AutoencoderHieraTokOutput": "models.autoencoder_hieratok",
    "HieraTokAttnProcessor": "models.layers",
    "HieraTokCore": "models.core",
    "HieraTokDiTPipeline": "pipelines.pipeline_hieratok_dit",
    "PyramidLayout": "ops.pyramid",
    "SHIPPED": "shipped",
    "add_remote_code": "hub.remote_code",
    "pretrained": "shipped",
    "scale_causal_attention": "ops.attention",
}

__all__ = [
    "SIZES",
    "HieraTokConfig",
    "HieraTokDecoderOutput",
    "HieraTokEncoderOutput",
    "HieraTokImageProcessor",
    "HieraTokImageProcessorPil",
    "HieraTokModel",
    "HieraTokOutput",
    "ModelMixin",
    "ImageError",
    "convert_to_rgb",
    "open_image",
    "AutoencoderHieraTok",
    "AutoencoderHieraTokOutput",
    "HieraTokAttnProcessor",
    "HieraTokCore",
    "HieraTokDiTPipeline",
    "PyramidLayout",
    "SHIPPED",
    "add_remote_code",
    "pretrained",
    "scale_causal_attention",
]

if TYPE_CHECKING:
    from .hub.remote_code import add_remote_code
    from .models.autoencoder_hieratok import AutoencoderHieraTok, AutoencoderHieraTokOutput
    from .models.core import HieraTokCore
    from .models.layers import HieraTokAttnProcessor
    from .ops.attention import scale_causal_attention
    from .ops.pyramid import PyramidLayout
    from .pipelines.pipeline_hieratok_dit import HieraTokDiTPipeline
    from .shipped import SHIPPED, pretrained

AutoConfig.register(HieraTokConfig.model_type, HieraTokConfig)
AutoModel.register(HieraTokConfig, HieraTokModel)
with contextlib.suppress(ImportError):  # in transformers 5.17 AutoImageProcessor itself needs torchvision
    AutoImageProcessor.register(
        HieraTokConfig,
        image_processor_classes={"pil": HieraTokImageProcessorPil, "torchvision": HieraTokImageProcessor},
    )


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
