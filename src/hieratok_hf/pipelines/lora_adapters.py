"""LoRA (Hu et al., arXiv 2106.09685) for the transformer of a pipeline, by the methods that diffusers has for it."""

import os
import re
from importlib import import_module
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

from ..models.saving import stage_folder

__all__ = ["LoraAdaptersMixin"]

_PEFT_PREFIX = "base_model.model."
_KEY = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<kind>A\.weight|B\.weight|B\.bias|magnitude_vector)")


class LoraAdaptersMixin(SanaLoraLoaderMixin):
    """
    Load, mix, fuse and save adapters of `transformer`. Of the mixins of diffusers with these methods, that of Sana
    knows a transformer and nothing else.
    """

    @property
    def _lora_loadable_modules(self) -> list[str]:
        """Return the names of the parts that can hold adapters, which a DiT can once one was loaded."""
        transformer = getattr(self, "transformer", None)
        _check_is_plain(transformer)
        return ["transformer"] if isinstance(transformer, PeftAdapterMixin) else []

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Put an adapter around layers of the transformer: of `save_lora_weights`, or of peft's own `save_pretrained`.

        `set_adapters`, `fuse_lora`, `unload_lora_weights` and the other methods of diffusers then act on it.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`): A folder, a file
                or a Hub id of weights in the format of safetensors, or the weights themselves.
            adapter_name (`str`, *optional*): The name by which `set_adapters` knows it; `default_0` and so on unless
                given.
            hotswap (`bool`, defaults to `False`): Whether to replace the weights of the adapter of that name.
            kwargs: Further arguments of diffusers' `load_lora_weights`, as `weight_name` and `subfolder`.

        Raises:
            ValueError: The weights are not those of an adapter of this transformer, or no safetensors; or the name is
                taken or cannot be one; or the transformer is wrapped by `torch.compile`.
            OSError: There is no such folder, file or repository.
        """
        if not isinstance(transformer := self.transformer, nn.Module):
            raise ValueError(f"`transformer` must be a model to load an adapter into it, got {transformer!r}.")
        if adapter_name is not None and not re.fullmatch(r"[^.]+", adapter_name):
            raise ValueError(f"`adapter_name` must be a name without dots, got {adapter_name!r}.")
        _check_is_plain(transformer)
        let_adapters_in(transformer)
        try:
            super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of peft, safetensors, json and torch
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"The adapter cannot be loaded into this `transformer` ({reason}).") from error

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Read the weights of an adapter, each under `transformer.` and the name of its layer.

        Args:
            pretrained_model_name_or_path_or_dict: As `load_lora_weights` takes it.
            return_lora_metadata (`bool`, defaults to `False`): Whether to return a pair of weights and configuration.
            kwargs: Further arguments of diffusers' method. Pickled files are refused.

        Raises:
            ValueError: They are no whole adapter of a transformer in safetensors: there are none, a name is another, a
                layer has one of its two matrices, or a number is not finite.
        """
        source = pretrained_model_name_or_path_or_dict
        kwargs["use_safetensors"] = True
        if not str(name := kwargs.get("weight_name") or ".safetensors").endswith(".safetensors"):
            raise ValueError(f"`weight_name` must be that of a file of safetensors, got {name!r}.")
        weights, metadata = super().lora_state_dict(source, return_lora_metadata=True, **kwargs)
        if any(_PEFT_PREFIX in name for name in weights):
            if metadata is None and not isinstance(source, dict):
                metadata = _read_peft_config(source, kwargs)
            parted = ((name, *name.partition(_PEFT_PREFIX)[1:]) for name in weights)
            weights = {f"transformer.{layer}" if peft else name: weights[name] for name, peft, layer in parted}
        _check_weights(weights)
        return (weights, metadata) if return_lora_metadata else weights

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict: dict[str, torch.Tensor], transformer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """
        Put the weights of `lora_state_dict` around layers of a `transformer`, with further arguments of diffusers'
        method; `ValueError` for weights of a layer that it does not have.
        """
        layers = {name.removesuffix(".base_layer") for name, _ in transformer.named_modules()}
        if strange := sorted({_layer_of(name) for name in state_dict} - layers):
            raise ValueError(f"The adapter has weights of {strange[0]!r}, which is no layer of this `transformer`.")
        super().load_lora_into_transformer(state_dict, transformer, *args, **kwargs)

    @classmethod
    def save_lora_weights(cls, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        Save the weights of an adapter, whole or not at all, for `load_lora_weights`.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            args, kwargs: Arguments of diffusers' `save_lora_weights`: `transformer_lora_layers`, the weights as
                `peft.get_peft_model_state_dict` gives them, and `transformer_lora_adapter_metadata`, the dictionary of
                the adapter's configuration.

        Raises:
            ValueError: `safe_serialization` is `False`, or `save_directory` names no folder.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError("`safe_serialization` must be True, got False: pickled files cannot be loaded again.")
        with stage_folder(save_directory) as stage:
            super().save_lora_weights(stage, *args, **kwargs)


def _check_is_plain(transformer: Any) -> None:
    """Raise `ValueError` for what `torch.compile` returned, in which diffusers would not find the adapters."""
    if hasattr(transformer, "_orig_mod"):
        way = "`pipe.transformer.compile()` compiles it where it is"
        raise ValueError(f"`transformer` must not be wrapped by `torch.compile` for adapters: {way}.")


def _layer_of(name: str) -> str:
    """Read the layer in the name of a weight."""
    match = _KEY.fullmatch(name)
    if match is None:
        raise ValueError(f"The adapter must have weights as 'transformer.LAYER.lora_A.weight', got {name!r}.")
    return match["layer"]


def _check_weights(weights: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless they are those of a whole adapter."""
    if not weights:
        raise ValueError("The adapter must have weights, got none.")
    for name, tensor in weights.items():
        layer = _layer_of(name)
        if absent := [x for x in "AB" if f"transformer.{layer}.lora_{x}.weight" not in weights]:
            raise ValueError(f"The adapter must have two matrices for each layer, {layer!r} lacks lora_{absent[0]}.")
        if not tensor.isfinite().all():
            raise ValueError(f"The adapter must have finite weights, {name!r} has others.")


def let_adapters_in(transformer: nn.Module) -> None:
    """Give a model of diffusers that has no methods for adapters, as its DiT, those of the models that have them."""
    kind = type(transformer)
    if not isinstance(transformer, PeftAdapterMixin):
        transformer.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})


def _read_peft_config(source: str | os.PathLike[str], where: dict[str, Any]) -> dict[str, Any]:
    """Read the configuration beside weights that peft saved, as diffusers keeps it in its files."""
    # No import that transformers can see: where peft is missing, it would refuse the package's code from the Hub.
    peft = import_module("peft")
    names = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
    given = {name: where[name] for name in names if name in where}
    config = peft.LoraConfig.from_pretrained(os.fspath(source), **given)
    return {f"transformer.{name}": value for name, value in config.to_dict().items()}
