"""One class for the `AutoModel` of both libraries, where a folder brings its own code."""

from typing import Any

from ..models.autoencoder_hieratok import AutoencoderHieraTok
from ..models.modeling_hieratok import HieraTokModel

__all__ = ["HieraTokAutoModel"]


class HieraTokAutoModel(HieraTokModel):
    """
    Choose a class for the `auto_map` of a folder, one entry that both libraries read and want different classes from.

    transformers' `AutoModel` hands over the configuration that it has loaded, and gets a `HieraTokModel`; diffusers'
    hands over none, and gets an `AutoencoderHieraTok`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `HieraTokModel.from_pretrained` with `config`, `AutoencoderHieraTok.from_pretrained` without."""
        if kwargs.get("config") is None:
            kwargs.pop("config", None)
            return AutoencoderHieraTok.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return HieraTokModel.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> AutoencoderHieraTok:
        """Make the model that diffusers' `AutoModel.from_config` asks for."""
        return AutoencoderHieraTok.from_config(config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> HieraTokModel:
        """Make the model that transformers' `AutoModel.from_config` asks for."""
        return HieraTokModel._from_config(config, **kwargs)
