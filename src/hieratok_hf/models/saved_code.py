"""Put the package, in one file, into a saved folder, so that it loads without it; what came by code keeps its code."""

import json
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_whole

__all__ = ["OWN_CODE", "PIPELINE_CLASSES", "add_code", "library_of", "to_json"]

OWN_CODE = None if __name__ == "hieratok_hf.models.saved_code" else Path(__file__)
"""The file that everything here was loaded from, where that is not the package."""

_MODEL_FILE, _VAE_FILE, _PIPELINE_FILE = "modeling_hieratok", "autoencoder_hieratok", "pipeline_hieratok_dit"
_AUTO_MAP = {
    "AutoConfig": f"{_MODEL_FILE}.HieraTokConfig",
    "AutoModel": f"{_MODEL_FILE}.HieraTokAutoModel",
}
PIPELINE_CLASSES = ("HieraTokDiTPipeline", [_PIPELINE_FILE, "HieraTokDiTPipeline"])
"""The `_class_name` of a pipeline without and with its code."""

# The first for Pillow, the second for torchvision.
_AUTO_IMAGE_PROCESSOR = [f"{_MODEL_FILE}.HieraTokImageProcessorPil", f"{_MODEL_FILE}.HieraTokImageProcessor"]


def library_of(code_file: str) -> str:
    """Return the module that diffusers shall import a class from: the package, or else a file of code of this name."""
    return "hieratok_hf" if OWN_CODE is None else code_file


def add_code(root: Path, code: str) -> list[str]:
    """
    Write the package's `code` into a saved folder, as `hieratok_hf.add_remote_code` says, and list the files.

    Raises:
        ValueError: The folder holds neither a HieraTok model nor a pipeline with one.
    """
    index = read_json(root / "model_index.json")
    if index is not None:
        ours = [
            name for name, value in index.items() if isinstance(value, list) and value[1:] == ["AutoencoderHieraTok"]
        ]
        if not ours:
            raise ValueError(f"`folder` {str(root)!r} is a pipeline without a HieraTok tokenizer.")
        files = {f"{name}/{_VAE_FILE}.py": code for name in ours}
        index |= {name: [_VAE_FILE, "AutoencoderHieraTok"] for name in ours}
        if index.get("_class_name") in PIPELINE_CLASSES:
            files[f"{_PIPELINE_FILE}.py"] = code
            index["_class_name"] = PIPELINE_CLASSES[1]
        files["model_index.json"] = to_json(index)
    else:
        config = read_json(root / "config.json")
        if config is None or config.get("_class_name") != "AutoencoderHieraTok":
            raise ValueError(f"`folder` {str(root)!r} is neither a saved HieraTok model nor a saved pipeline.")
        files = {f"{_MODEL_FILE}.py": code}
        if OWN_CODE is not None:  # diffusers' own pipelines look for it beside their tokenizer, and cannot write it
            files[f"{_VAE_FILE}.py"] = code
        if (processor := read_json(root / "preprocessor_config.json")) is not None:
            processor["auto_map"] = {"AutoImageProcessor": _AUTO_IMAGE_PROCESSOR}
            files["preprocessor_config.json"] = to_json(processor)
        files["config.json"] = to_json({**config, "auto_map": _AUTO_MAP})
    for name, text in files.items():
        with write_whole(root / name) as file:
            file.write(text.encode())
    return list(files)


def to_json(value: Any) -> str:
    """Write JSON as the libraries do in the folders that they save."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
