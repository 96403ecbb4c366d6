"""Save a pipeline's folder whole, and load it from a disk or the Hub, with or without code of its own."""

import inspect
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..models.core import has_adapters
from ..models.saved_code import OWN_CODE
from ..models.saving import HubUploadMixin, load_whole, name_in_errors
from ..shipped import resolve_model
from ..utils.files import read_json

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PipelineFolderMixin"]

_CLASS, _PARTS = "AutoencoderHieraTok", ("vae", "transformer", "scheduler")


class PipelineFolderMixin(HubUploadMixin, DiffusionPipeline):
    """
    Save a pipeline, and load it by the installed class: code that `add_remote_code` put into the folder is not run,
    and no `trust_remote_code` is needed.
    """

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        # Read before the download, when names of files would still have to be names of modules.
        index = read_json(Path(json_file)) or {}
        if not isinstance(name := index.get("_class_name"), str) and not _is_pair(name):
            raise ValueError(f"{str(json_file)!r} must name a class under '_class_name', got {name!r}.")
        for part in _PARTS:
            if not _is_pair(pair := index.get(part)) and pair != [None, None]:
                raise ValueError(f"{str(json_file)!r} must name a library and a class under {part!r}, got {pair!r}.")
        if OWN_CODE is not None:
            return index
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][-1]
        for name, value in index.items():
            if isinstance(value, list) and _CLASS in value[-1:]:
                # Of a library that it does not know, diffusers wants a file of code.
                index[name] = ["diffusers", _CLASS]
        return index

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load `model_index.json` with the package's class for the tokenizer, not that of a file in the folder."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in index.items():
            if value == ["diffusers", _CLASS]:
                index[name] = ["hieratok_hf", _CLASS]
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "Self":
        """
        Load a pipeline from a folder, the package or the Hub, with `DiffusionPipeline.from_pretrained`'s arguments.

        A name of `SHIPPED` is that of weights in the package, unless a folder here has it.

        Raises:
            OSError: There is no such folder or repository, or no network to reach it; the message names the way out.
            ValueError: A file is not as that of a pipeline must be, or the name is a size without trained weights.
        """
        pretrained_model_name_or_path = resolve_model(pretrained_model_name_or_path)
        folder = Path(pretrained_model_name_or_path)
        index = read_json(folder / "model_index.json") or {}
        for part in _PARTS:
            if _is_pair(index.get(part)) and part not in kwargs and not (folder / part).is_dir():
                raise OSError(f"{str(folder)!r} lacks the folder {part!r} that its model_index.json names.")
        load = partial(super().from_pretrained, pretrained_model_name_or_path, **kwargs)
        try:
            with name_in_errors(pretrained_model_name_or_path):
                return load_whole(pretrained_model_name_or_path, None, load)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            # What diffusers' own classes make of a configuration with a wrong type.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"Could not load {str(pretrained_model_name_or_path)!r} ({reason}).") from error

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, dtype: torch.dtype | None = None, **kwargs: Any) -> "Self":
        """
        Make a pipeline that shares the parts of another.

        Args:
            pipeline (`DiffusionPipeline`): A pipeline with a `vae`, a `transformer` and a `scheduler`.
            dtype (`torch.dtype`, *optional*): Dtype to which the parts are cast, in `pipeline` as well. Each keeps its
                own unless given.
            kwargs: Arguments of the class, in the place of what `pipeline` has.

        Raises:
            ValueError: `pipeline` is none, it lacks a part that is not given, or the parts do not fit together.
        """
        # That of diffusers casts all parts to float32 unless told, and hands on models of the signature's very classes
        # alone.
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"`pipeline` must be a pipeline of diffusers, got {pipeline!r}.")
        dtype = kwargs.pop("torch_dtype", dtype)
        held = {**pipeline.config, **pipeline.components, **kwargs}
        parameters = inspect.signature(cls).parameters
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in held:
                raise ValueError(f"`pipeline` is a {type(pipeline).__name__}, which has no {name!r}: give one.")
        made = cls(**kwargs, **{name: held[name] for name in parameters if name in held and name not in kwargs})
        return made if dtype is None else made.to(dtype)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """
        Save to a folder, with the arguments of `DiffusionPipeline`; files appear whole or not at all.

        With `is_main_process=False`, as in the models, nothing is done. A pipeline that was loaded by the code of its
        folder keeps that code.

        Raises:
            ValueError: `save_directory` names no folder, or a part has adapters, which a saved pipeline cannot keep.
        """
        if not is_main_process:
            return
        for name in ("transformer", "vae"):
            if has_adapters(getattr(self, name)):
                ways = "`save_lora_weights` saves them alone, `fuse_lora` and `unload_lora_weights` put them into it"
                raise ValueError(f"`{name}` has adapters, which a saved pipeline cannot keep: {ways}.")
        with self._stage_and_push(save_directory, kwargs) as stage:
            super().save_pretrained(stage, *args, **kwargs)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)
