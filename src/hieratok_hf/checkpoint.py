"""One folder for both libraries: one name for the weights, one `config.json`, files written whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import __version__ as diffusers_version

from .configuration_hieratok import HieraTokConfig

__all__ = ["WEIGHTS_STEM", "share_between_libraries", "staged"]

# diffusers looks for this name only; transformers for any that `transformers_weights` gives it.
WEIGHTS_STEM = "diffusion_pytorch_model"
_TRANSFORMERS_STEM = "model"
_WEIGHTS = re.compile(
    rf"({_TRANSFORMERS_STEM}|{WEIGHTS_STEM})(\.safetensors|[.-].*\.safetensors)(\.index(\..*)?\.json)?"
)


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """
    A temporary folder whose files replace those of `folder`, one rename each, once the block has ended well.

    Weights that an earlier save left behind, such as shards of another number, go with the rename; `config.json`
    comes last. If the block raises, `folder` is as it was.

    Raises:
        ValueError: `folder` is a file.
    """
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"`save_directory` must be a folder, got the file {str(target)!r}.")
    target.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield stage
        files = sorted(stage.rglob("*"), key=lambda path: path.name == "config.json")
        written = [path.relative_to(stage) for path in files if path.is_file()]
        stale = _stale_weights(target, {str(path) for path in written})
        for path in written:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / path, target / path)
        for path in stale:
            path.unlink()
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stale_weights(target: Path, written: set[str]) -> list[Path]:
    """Weights in `target` that a save which wrote `written` makes obsolete: those of the same variant."""
    variants = {_variant(name) for name in written if _WEIGHTS.fullmatch(name)}
    names = [path for path in target.iterdir() if _WEIGHTS.fullmatch(path.name)]
    return [path for path in names if path.name not in written and _variant(path.name) in variants]


def _variant(name: str) -> str:
    """`"fp16"` of `model.fp16-00001-of-00002.safetensors` and of `model.safetensors.index.fp16.json`, else `""`."""
    name = re.sub(r"-\d{5}-of-\d{5}", "", name).removesuffix(".json")
    name = name.replace(".safetensors", "").replace(".index", "")
    return name.partition(".")[2]


def share_between_libraries(stage: Path, config: HieraTokConfig) -> None:
    """
    Turn what either library has saved to `stage` into the folder that both load.

    Weights get the name that diffusers looks for, and `config.json` the keys of both libraries.
    """
    for path in sorted(stage.glob(f"{_TRANSFORMERS_STEM}*.safetensors*")):
        renamed = WEIGHTS_STEM + path.name.removeprefix(_TRANSFORMERS_STEM)
        if path.suffix == ".json":
            index = json.loads(path.read_text())
            index["weight_map"] = {
                key: WEIGHTS_STEM + name.removeprefix(_TRANSFORMERS_STEM) for key, name in index["weight_map"].items()
            }
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        path.rename(stage / renamed)

    config_path = stage / "config.json"
    if not config_path.exists():
        return
    plain = config.to_dict()
    merged = {
        **json.loads(config_path.read_text()),
        **{key: plain[key] for key in (*config.model_fields, "model_type", "transformers_version")},
        **config.pipeline_facts,
        "architectures": ["HieraTokModel"],
        "_class_name": "AutoencoderHieraTok",
        "_diffusers_version": diffusers_version,
    }
    if weights := _weights_for_transformers(stage):
        merged["transformers_weights"] = weights
    # The weights say their own dtype; a second place could only disagree.
    merged.pop("dtype", None)
    merged.pop("_name_or_path", None)
    config_path.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


def _weights_for_transformers(stage: Path) -> str | None:
    """The one file that transformers reads: the plain variant, also where it was saved earlier, or else any."""
    index, single = f"{WEIGHTS_STEM}.safetensors.index.json", f"{WEIGHTS_STEM}.safetensors"
    folders = (stage, stage.parent)
    plain = [name for folder in folders for name in (index, single) if (folder / name).exists()]
    variants = [path.name for path in (*stage.glob("*.index.*.json"), *sorted(stage.glob("*.safetensors")))]
    return next(iter([*plain, *variants]), None)
