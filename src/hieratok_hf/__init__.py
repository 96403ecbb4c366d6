"""Encode images to latents and back by the multi-scale tokenizer HieraTok, in transformers and diffusers."""

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel

from .hub.remote_code import add_remote_code
from .models.attention_dispatch import register_attention_backend
from .models.backbone_hieratok import HieraTokBackbone
from .models.configuration_hieratok import HieraTokConfig
from .models.core import HieraTokCore
from .models.image_processing_hieratok import HieraTokImageProcessor, HieraTokImageProcessorPil
from .models.layers import HieraTokAttnProcessor
from .models.modeling_hieratok import HieraTokDecoderOutput, HieraTokEncoderOutput, HieraTokModel, HieraTokOutput
from .ops.attention import scale_causal_attention
from .ops.pyramid import PyramidLayout
from .shipped import example_image, pretrained
from .utils.choices import SHIPPED, SIZES
from .utils.images import ImageError, convert_to_rgb, open_image

__version__ = "0.1.0"

# Importing these loads diffusers.
_LAZY = {
    "AutoencoderHieraTok": "hieratok_hf.models.autoencoder_hieratok",
    "AutoencoderHieraTokOutput": "hieratok_hf.models.autoencoder_hieratok",
    "HieraTokDiTPipeline": "hieratok_hf.pipelines.pipeline_hieratok_dit",
    "HieraTokPreviewer": "hieratok_hf.pipelines.previewer",
    # A saved pipeline looks its components' base class up on the library that it names.
    "ModelMixin": "diffusers.models.modeling_utils",
}

__all__ = [
    "SIZES",
    "HieraTokBackbone",
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
    "HieraTokPreviewer",
    "PyramidLayout",
    "SHIPPED",
    "add_remote_code",
    "example_image",
    "pretrained",
    "register_attention_backend",
    "scale_causal_attention",
]

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from .models.autoencoder_hieratok import AutoencoderHieraTok, AutoencoderHieraTokOutput
    from .pipelines.pipeline_hieratok_dit import HieraTokDiTPipeline
    from .pipelines.previewer import HieraTokPreviewer

AutoConfig.register(HieraTokConfig.model_type, HieraTokConfig)
AutoModel.register(HieraTokConfig, HieraTokModel)
AutoBackbone.register(HieraTokConfig, HieraTokBackbone)
with contextlib.suppress(ImportError):  # in transformers 5.17 AutoImageProcessor itself needs torchvision
    AutoImageProcessor.register(
        HieraTokConfig,
        image_processor_classes={"pil": HieraTokImageProcessorPil, "torchvision": HieraTokImageProcessor},
    )


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
