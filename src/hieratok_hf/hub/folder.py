"""A saved folder as it goes to the Hub: what is taken along, what is added, and the test that it must pass."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..models.autoencoder_hieratok import AutoencoderHieraTok
from ..models.modeling_hieratok import HieraTokModel
from ..models.saved_code import PIPELINE_CLASSES, to_json
from ..models.saving import WEIGHTS_STEM, finish_save, index_for_transformers, link_or_copy, variant_of
from ..pipelines.pipeline_hieratok_dit import HieraTokDiTPipeline
from ..utils.choices import QUANTIZER_FILE, TRAINING_FILE
from ..utils.files import read_json
from .card import card_for
from .remote_code import add_remote_code
from .scratch import scratch_folder

__all__ = ["add_card", "prepare_folder", "select_files"]

# Anything else in a saved folder, such as states of a training, stays where it is.
_PARTS = re.compile(
    rf"(config|model_index|preprocessor_config|scheduler_config)\.json|{re.escape(TRAINING_FILE)}|README\.md|LICEN[CS]E(\.md|\.txt)?"
    rf"|(model|{WEIGHTS_STEM})((\.[\w-]+)?(-\d{{5}}-of-\d{{5}})?\.safetensors|\.safetensors\.index(\.[\w-]+)?\.json)"
    rf"|{re.escape(QUANTIZER_FILE)}"
)
_PICTURE = re.compile(r"\w[\w.-]*\.(png|jpe?g|webp)")


def select_files(folder: str | os.PathLike[str]) -> tuple[dict[str, Path], list[str]]:
    """
    Tell the files of a saved folder that go to the Hub from those that stay.

    Files are chosen by their whole names: configurations, weights in safetensors, `training.json`, `README.md`, a
    licence (`LICENSE` or `LICENCE`, alone or as .md or .txt), and images that `README.md` shows.

    Returns:
        The places of the files that go, by their names relative to `folder`, and the names of all others.

    Raises:
        ValueError: `folder` is no folder, its `model_index.json` is none, or a file that would go is a link out of it.
    """
    source = Path(folder).resolve()
    if not source.is_dir():
        raise ValueError(f"`folder` {str(folder)!r} is not a folder.")
    parts, shown = {".", *_components(source)}, _shown_images(source)
    taken: dict[str, Path] = {}
    left_out = []
    for path in sorted(source.rglob("*")):
        name, place = path.relative_to(source), path.resolve()
        if path.is_dir():
            goes = path.is_symlink() and name.as_posix() in parts
        else:
            is_known = name.parent.as_posix() in parts and bool(_PARTS.fullmatch(name.name))
            goes = place.is_file() and (is_known or name.as_posix() in shown)
        if goes and not place.is_relative_to(source):
            raise ValueError(f"`folder` {str(folder)!r}: {name.as_posix()!r} is a link out of it; put a copy there.")
        if goes and place.is_file():
            taken[name.as_posix()] = place
        elif path.is_symlink() or not path.is_dir():
            left_out.append(name.as_posix())
    return taken, left_out


def _components(folder: Path) -> list[str]:
    """List the components of a pipeline, each in a folder of its name; none of a tokenizer."""
    path = folder / "model_index.json"
    index = read_json(path) or {}
    components = []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        # A name with a path could be any folder of the machine.
        if not name.isidentifier() or len(value) != 2 or not all(isinstance(x, str | None) for x in value):
            raise ValueError(f"{str(path)!r} must give a library and a class for each part, got {name!r}: {value!r}.")
        components.append(name)
    return components


def _shown_images(folder: Path) -> set[str]:
    """Find the names of images beside README.md that stand in it, as those in a link do."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    words = {word.removeprefix("./") for word in re.findall(r"[^\s()<>\[\]\"']+", text)}
    return {word for word in words if _PICTURE.fullmatch(word)}


@contextmanager
def prepare_folder(folder: str | os.PathLike[str], remote_code: bool = True) -> Iterator[Path]:
    """
    Put the files that `select_files` takes, as they are to be pushed, into a temporary folder.

    The folder is loaded as its users will, in both classes or as a pipeline, and run once. Weights that stand there
    under two names for the two libraries go once; `remote_code` adds the code that loads them without the package.

    Raises:
        ValueError: A file must not go, or the folder does not load, gives numbers that are not finite, or the classes
            disagree.
    """
    finish_save(Path(folder))
    files, _ = select_files(folder)
    with scratch_folder() as stage:
        for name, path in files.items():
            (stage / name).parent.mkdir(exist_ok=True)
            # Only weights are large enough to be worth it, and nobody changes them here.
            take = link_or_copy if path.suffix == ".safetensors" else shutil.copyfile
            take(path, stage / name)
        try:
            for part in (stage, *stage.iterdir()):
                if _is_tokenizer(part):
                    index_for_transformers(part)
            _try(stage)
            for path in stage.rglob("*.json"):
                saved = read_json(path)
                if saved is not None and (plain := _plain(saved)) != saved:
                    path.write_text(to_json(plain), encoding="utf-8")
        except Exception as error:  # the libraries, safetensors and torch raise many types
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            reason = " ".join(str(error).split())[:300].replace(str(stage), str(folder))
            raise ValueError(f"`folder` {str(folder)!r} does not pass its load test: {kind}{reason}") from error
        try:
            if remote_code:
                add_remote_code(stage)
            yield stage
        except ValueError as error:
            if str(stage) not in str(error):
                raise
            raise ValueError(str(error).replace(str(stage), str(folder))) from error


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
    own = made.data.get("tags") or []
    made.data["tags"] = [*own, *(tag for tag in dict.fromkeys(tags) if tag not in own)]
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
