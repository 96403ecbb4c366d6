"""HieraTok, the multi-scale visual tokenizer (arXiv 2509.23736), for transformers and diffusers."""

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

# A saved diffusers pipeline looks its components' base class up on the library that it names.
from diffusers.models.modeling_utils import ModelMixin
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_hieratok import SIZES, HieraTokConfig
from .image_processing_hieratok import HieraTokImageProcessor, HieraTokImageProcessorPil
from .modeling_hieratok import HieraTokDecoderOutput, HieraTokEncoderOutput, HieraTokModel, HieraTokOutput
from .pictures import PictureError, convert_to_rgb, open_picture

__version__ = "0.1.0"

_LAZY = {
    "AutoencoderHieraTok": "autoencoder_hieratok",
    "AutoencoderHieraTokOutput": "autoencoder_hieratok",
    "HieraTokAttnProcessor": "layers",
    "HieraTokCore": "tokenizer",
    "HieraTokDiTPipeline": "pipeline_hieratok_dit",
    "PyramidLayout": "pyramid",
    "SHIPPED": "shipped",
    "add_remote_code": "remote_code",
    "pretrained": "shipped",
    "scale_causal_attention": "attention",
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
    "PictureError",
    "convert_to_rgb",
    "open_picture",
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
    from .attention import scale_causal_attention
    from .autoencoder_hieratok import AutoencoderHieraTok, AutoencoderHieraTokOutput
    from .layers import HieraTokAttnProcessor
    from .pipeline_hieratok_dit import HieraTokDiTPipeline
    from .pyramid import PyramidLayout
    from .remote_code import add_remote_code
    from .shipped import SHIPPED, pretrained
    from .tokenizer import HieraTokCore

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
