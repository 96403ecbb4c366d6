"""A saved folder as it goes to the Hub: what is taken along, what is added, and the test that it must pass."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..models.autoencoder_hieratok import AutoencoderHieraTok
from ..models.modeling_hieratok import HieraTokModel
from ..models.saving import WEIGHTS_STEM, finish_save, index_for_transformers, link_or_copy, variant_of
from ..pipelines.pipeline_hieratok_dit import HieraTokDiTPipeline
from ..utils.files import read_json
from .card import card_for
from .remote_code import PIPELINE_CLASSES, add_remote_code

__all__ = ["add_card", "prepare_folder"]

# Anything else in a saved folder, such as states of a training, stays where it is.
_PARTS = re.compile(
    r"(config|model_index|preprocessor_config|scheduler_config)\.json|README\.md|LICEN[CS]E.*"
    r"|[^.]*\.([\w-]+\.)?safetensors(\.index(\.[\w-]+)?\.json)?|.*\.(png|jpe?g|webp)"
)


@contextmanager
def prepare_folder(folder: str | os.PathLike[str], remote_code: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """
    Put the files of a saved tokenizer or pipeline as they are to be pushed into a temporary folder, and name the rest.

    The folder is loaded as its users will, in both classes or as a pipeline, and run once. Weights that stand there
    under two names for the two libraries go once; `remote_code` adds the code that loads them without the package.

    Raises:
        ValueError: It does not load, gives numbers that are not finite, or the classes disagree.
    """
    source = Path(folder)
    if not source.is_dir():
        raise ValueError(f"`folder` {str(source)!r} is not a folder.")
    finish_save(source)
    with tempfile.TemporaryDirectory() as temporary:
        stage, left_out = Path(temporary), []
        try:
            index = read_json(source / "model_index.json") or {}
            parts = {".", *(name for name, value in index.items() if isinstance(value, list) and name[0] != "_")}
            for path in sorted(path for path in source.rglob("*") if path.is_file()):
                name = path.relative_to(source)
                if name.parent.as_posix() in parts and _PARTS.fullmatch(name.name):
                    (stage / name).parent.mkdir(exist_ok=True)
                    # Only weights are large enough to be worth it, and nobody changes them here.
                    take = link_or_copy if path.suffix == ".safetensors" else shutil.copyfile
                    take(path.resolve(), stage / name)
                else:
                    left_out.append(name.as_posix())
            for part in (stage / part for part in parts):
                if _is_tokenizer(part):
                    index_for_transformers(part)
            _try(stage)
        except (ValueError, OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0].replace(str(stage), str(source))
            raise ValueError(f"`folder` {str(source)!r} does not pass its load test: {reason}") from error
        for path in stage.rglob("*.json"):
            saved = read_json(path)
            if saved is not None and (plain := _plain(saved)) != saved:
                path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if remote_code:
            add_remote_code(stage)
        yield stage, left_out


def _plain(saved: dict[str, Any]) -> dict[str, Any]:
    """Take away where a model once lay, and the names of code that stays behind."""
    plain = {key: value for key, value in saved.items() if key not in ("_name_or_path", "auto_map")}
    if plain.get("_class_name") in PIPELINE_CLASSES:
        plain["_class_name"] = PIPELINE_CLASSES[0]
    coded = ["autoencoder_hieratok", "AutoencoderHieraTok"]
    return {key: ["hieratok_hf", value[1]] if value == coded else value for key, value in plain.items()}


def add_card(stage: Path, repo_id: str, tags: Sequence[str] = (), **card: Any) -> None:
    """Write the model card of a prepared folder, by `card_for` with further `tags`."""
    made = card_for(stage, repo_id=repo_id, **card)
    made.data["tags"] = list(dict.fromkeys([*(made.data.get("tags") or []), *tags]))
    made.save(stage / "README.md")


def _try(root: Path) -> None:
    """Load and run what a folder holds; a `ValueError` that says what is wrong with it."""
    index = read_json(root / "model_index.json")
    if index is not None and index.get("_class_name") in PIPELINE_CLASSES:
        for variant in _variants(root.glob(f"*/{WEIGHTS_STEM}*.safetensors")):
            pipe = HieraTokDiTPipeline.from_pretrained(root, variant=variant)
            pipe.set_progress_bar_config(disable=True)
            images = pipe([0], num_inference_steps=1, output_type="pt", generator=torch.manual_seed(0)).images
            if not images.isfinite().all():
                raise ValueError("its images are not finite")
    for part in [root] if index is None else [path for path in root.glob("*") if _is_tokenizer(path)]:
        _check_tokenizer(part)


def _variants(weights: Iterable[Path]) -> list[str | None]:
    return [name or None for name in sorted({variant_of(path.name) for path in weights})]


def _is_tokenizer(folder: Path) -> bool:
    return (read_json(folder / "config.json") or {}).get("_class_name") == "AutoencoderHieraTok"


@torch.no_grad()
def _check_tokenizer(folder: Path) -> None:
    variants = _variants(folder.glob(f"{WEIGHTS_STEM}*.safetensors"))
    if not variants:
        raise ValueError(f"it has no {WEIGHTS_STEM}.safetensors")
    for variant in variants:
        vae = AutoencoderHieraTok.from_pretrained(folder, variant=variant)
        model = HieraTokModel.from_pretrained(folder, variant=variant, dtype=vae.dtype)
        patch_size = vae.config.patch_size
        shape = (1, 3, 3 * patch_size, 2 * patch_size)
        image = (torch.rand(shape, generator=torch.manual_seed(0)) * 2 - 1).to(vae.dtype)
        latents, other = vae.encode(image).latent_dist.mode(), model.encode(image).latents
        decoded = vae.decode(latents).sample
        if not (latents.isfinite().all() and decoded.isfinite().all()):
            raise ValueError("its results are not finite")
        if not torch.equal(latents, other) or not torch.equal(decoded, model.decode(latents).reconstruction):
            raise ValueError("the two libraries load different weights from it")
