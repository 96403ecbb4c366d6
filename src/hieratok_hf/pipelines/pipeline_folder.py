"""Save a pipeline's folder whole, and load it from a disk or the Hub, with or without code of its own."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..models.saving import HubUploadMixin, load_whole, name_in_errors

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PipelineFolderMixin"]

_CLASS = "AutoencoderHieraTok"


class PipelineFolderMixin(HubUploadMixin, DiffusionPipeline):
    """
    Save a pipeline, and load it by the installed class: code that `add_remote_code` put into the folder is not run,
    and no `trust_remote_code` is needed.
    """

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        # Read before the download, when names of files would still have to be names of modules.
        index = super()._dict_from_json_file(json_file)
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
        Load a pipeline from a folder or a Hub id, with the arguments of `DiffusionPipeline.from_pretrained`.

        Raises:
            OSError: There is no such folder or repository, or no network to reach it; the message names the way out.
        """
        load = partial(super().from_pretrained, pretrained_model_name_or_path, **kwargs)
        with name_in_errors(pretrained_model_name_or_path):
            return load_whole(Path(pretrained_model_name_or_path), load)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "Self":
        """Make a pipeline of another's parts, with the arguments of `DiffusionPipeline.from_pipe`."""
        # By itself, diffusers hands on models of the signature's very classes alone.
        parts = {name: part for name, part in pipeline.components.items() if name in cls._get_signature_types()}
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """
        Save to a folder, with the arguments of `DiffusionPipeline`; files appear whole or not at all.

        With `is_main_process=False`, as in the models, nothing is done.

        Raises:
            ValueError: `save_directory` names no folder.
        """
        if not is_main_process:
            return
        with self._stage_and_push(save_directory, kwargs) as stage:
            super().save_pretrained(stage, *args, **kwargs)
