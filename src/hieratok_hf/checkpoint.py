"""One folder for both libraries: one name for the weights, one `config.json`, files written whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from diffusers import __version__ as diffusers_version
from safetensors import safe_open

from .configuration_hieratok import HieraTokConfig

__all__ = ["WEIGHTS_STEM", "pop_hub_arguments", "share_between_libraries", "staged", "written_whole"]

# diffusers looks for this name only; transformers takes any that an index under its own name points to.
WEIGHTS_STEM = "diffusion_pytorch_model"
_TRANSFORMERS_STEM = "model"
_WEIGHTS = re.compile(
    rf"({_TRANSFORMERS_STEM}|{WEIGHTS_STEM})(\.safetensors|[.-].*\.safetensors)(\.index(\..*)?\.json)?"
)
_LAST = ("config.json", "model_index.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` once it is whole; after an error the old one stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """
    A temporary folder whose files replace those of `folder`, one rename each, once the block has ended well.

    Weights that an earlier save left behind, such as shards of another number, go with the rename; `config.json`
    comes last, and after it the `model_index.json` of a pipeline. If the block raises, `folder` is as it was.

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
        files = sorted(stage.rglob("*"), key=lambda path: _LAST.index(path.name) if path.name in _LAST else -1)
        written = [path.relative_to(stage) for path in files if path.is_file()]
        stale = []
        for part in {path.parent for path in written}:
            names = {path.name for path in written if path.parent == part}
            stale += _stale_weights(target / part, names)
        for path in written:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / path, target / path)
        for path in stale:
            path.unlink()
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stale_weights(target: Path, written: set[str]) -> list[Path]:
    """Weights in `target` that a save which wrote `written` makes obsolete: those of the same variant."""
    if not target.is_dir():
        return []
    variants = {_variant(name) for name in written if _WEIGHTS.fullmatch(name)}
    names = [path for path in target.iterdir() if _WEIGHTS.fullmatch(path.name)]
    return [path for path in names if path.name not in written and _variant(path.name) in variants]


def _variant(name: str) -> str:
    """`"fp16"` of `model.fp16-00001-of-00002.safetensors` and of `model.safetensors.index.fp16.json`, else `""`."""
    name = _SHARD.sub("", name).removesuffix(".json")
    name = name.replace(".safetensors", "").replace(".index", "")
    return name.partition(".")[2]


def pop_hub_arguments(arguments: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Take what concerns an upload out of the arguments of `save_pretrained`; `None` unless one was asked for."""
    names = ("repo_id", "commit_message", "private", "create_pr", "token")
    hub_arguments = {name: arguments.pop(name) for name in names if name in arguments}
    if not arguments.pop("push_to_hub", False):
        return None
    variant = {"variant": arguments["variant"]} if arguments.get("variant") else {}
    return {"repo_id": Path(folder).resolve().name, **hub_arguments, **variant}


def share_between_libraries(stage: Path, config: HieraTokConfig, for_transformers: bool = False) -> None:
    """
    Turn what either library has saved to `stage` into the folder that both load.

    Weights get the name that diffusers looks for, transformers finds them through an index that names those files,
    and `config.json` gets the keys of both. With `for_transformers`, weights in one file have transformers' own name
    as well, a second name of the same file where the file system has such, for tools that look for it.
    """
    for path in sorted(stage.glob(f"{_TRANSFORMERS_STEM}*.safetensors*")):
        renamed = path.rename(stage / _for_diffusers(path.name))
        if path.suffix == ".json":
            index = json.loads(renamed.read_text())
            index["weight_map"] = {key: _for_diffusers(name) for key, name in index["weight_map"].items()}
            renamed.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    indices = {
        path.name: json.loads(path.read_text()) for path in stage.glob(f"{WEIGHTS_STEM}.safetensors.index*.json")
    }
    for path in stage.glob(f"{WEIGHTS_STEM}*.safetensors"):
        if _SHARD.search(path.name) is None and for_transformers:
            second_name = stage / (_TRANSFORMERS_STEM + path.name.removeprefix(WEIGHTS_STEM))
            try:
                os.link(path, second_name)
            except OSError:
                shutil.copyfile(path, second_name)
        elif _SHARD.search(path.name) is None:
            with safe_open(path, "pt") as weights:
                index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), path.name)}
            variant = f".{_variant(path.name)}" if _variant(path.name) else ""
            indices[f"{WEIGHTS_STEM}.safetensors.index{variant}.json"] = index
    for name, index in indices.items():
        alias = stage / (_TRANSFORMERS_STEM + name.removeprefix(WEIGHTS_STEM))
        alias.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

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
    # The files say their own names; a second place could only disagree. So would the dtype of one of several variants.
    has_variant = any(_variant(path.name) for path in stage.glob(f"{WEIGHTS_STEM}*"))
    for key in ("transformers_weights", "_name_or_path", *(["dtype"] if has_variant else [])):
        merged.pop(key, None)
    config_path.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


def _for_diffusers(name: str) -> str:
    return WEIGHTS_STEM + name.removeprefix(_TRANSFORMERS_STEM)
