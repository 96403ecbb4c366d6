"""Describe how figures were made, so that `--protocol` makes them again, and say what became different."""

import hashlib
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from ..data.image_dataset import Images
from ..data.latent_cache import digest_of
from ..evaluation.faces import SAME_PERSON, SQUARE_SIZE, FaceDistances
from ..evaluation.image_sets import FrechetDistance
from ..evaluation.text import PAGE_SIZE, TextReading
from ..utils.files import read_json
from .outputs import as_written
from .parsing import OUTPUT_OPTIONS

__all__ = ["compare_with_protocol", "describe_faces", "describe_protocol", "describe_text"]

_LIBRARIES = ("hieratok_hf", "torch", "numpy", "pillow", "diffusers", "transformers", "torchmetrics", "torch-fidelity")
# What may differ although nothing else does, and what is not compared but read by people.
_FREE = {"settings", "options", "notes", "skipped", "images_per_second"}


def describe_protocol(
    command: str,
    args: Namespace,
    *,
    data: Mapping[str, Images],
    weights: Mapping[str, nn.Module],
    frechet: FrechetDistance | None,
    size: int,
    images: int,
    precision: str,
    **facts: Any,
) -> dict[str, Any]:
    """
    Describe how figures were made.

    Args:
        command (`str`): Name of the command.
        args (`Namespace`): Its arguments.
        data (mapping of `Images`): The images that were read, by option.
        weights (mapping of `torch.nn.Module`): The models that were run, by option and name.
        frechet (`FrechetDistance`, *optional*): The distance that was measured.
        size, images (`int`): Side of the images in pixels, and how many were measured.
        precision (`str`): The dtype of the models that were evaluated.
        facts: What else there is to say: `seed`, `sampler` and `guidance` of generated images, none of them unless
            given, and more.
    """
    options = {name: value for name, value in vars(args).items() if name not in OUTPUT_OPTIONS}
    resize = {"images": f"bicubic with antialiasing, Pillow {version('pillow')}"}
    if args.classifier:
        resize["classifier"] = f"bicubic with antialiasing, PyTorch {torch.__version__}"
    if frechet:
        inception = f"bilinear as TensorFlow 1, torch-fidelity {_version('torch-fidelity')}"
        other = f"bilinear with antialiasing, PyTorch {torch.__version__}"
        filter_and_library = inception if frechet.name in ("rFID", "gFID") else other
        resize[frechet.name] = f"{filter_and_library}, to {frechet.size} x {frechet.size} pixels"
    read = {
        name: {"source": found.source, "split": _split(args, name), "fingerprint": found.fingerprint}
        for name, found in data.items()
    }
    given = frechet.given.items() if frechet else ()
    statistics = {f"{kind}.{i}": values for kind, pair in given for i, values in enumerate(pair)}
    return {
        "command": f"hieratok {command}",
        "options": {k: value for k, value in options.items() if not (value is None or value is False or value == [])},
        "data": read,
        "reference_statistics": digest_of(statistics.items()) if statistics else None,
        "crop": "the largest square in the middle",
        "size": size,
        "resize": resize,
        "images": images,
        "precision": {
            "models": precision,
            "features": "float32",
            "statistics": "float64",
            "matmul": torch.get_float32_matmul_precision(),
        },
        "seed": None,
        "sampler": None,
        "guidance": None,
        **facts,
        "versions": {name: _version(name) for name in _LIBRARIES},
        "weights": {name: digest_of(model.state_dict().items()) for name, model in weights.items()},
    }


def describe_text(text: TextReading) -> dict[str, Any]:
    """Describe what was read of `--text`, and by what; nothing of it is random."""
    return {
        "pages": digest_of((f"{height} px", pages.levels) for height, pages in text.pages.items()),
        "page_size": PAGE_SIZE,
        "lines": len(next(iter(text.pages.values())).lines),
        "characters": "without spaces",
        "versions": {name: _version(name) for name in ("rapidocr-onnxruntime", "onnxruntime", "opencv-python")},
    }


def describe_faces(faces: FaceDistances) -> dict[str, Any]:
    """Describe where the faces of `--faces` were found, and by what; nothing of it is random."""
    files = faces.networks.files
    return {
        "found": [dict(zip(("row", "x", "y", "height"), face)) for face in faces.found],
        "square_size": SQUARE_SIZE,
        "same_person_below": SAME_PERSON,
        "networks": {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "versions": {name: _version(name) for name in ("dlib-bin", "face_recognition_models")},
    }


def compare_with_protocol(args: Namespace, report: dict[str, Any]) -> list[str]:
    """Say what is different from the report of `--protocol`, in a line each; nothing without one."""
    if not args.protocol:
        return []
    was, now = _flatten(read_json(args.protocol) or {}), _flatten(as_written(report))
    changed = [name for name in {**was, **now} if was.get(name, ...) != now.get(name, ...)]
    if not changed:
        return ["all figures are those of --protocol, to the last digit"]
    return [
        f"{name} was {was.get(name, 'not there')} in --protocol, is {now.get(name, 'not there')}" for name in changed
    ]


def _split(args: Namespace, option: str) -> str:
    names = {"data": "split", "reference": "reference_split"}
    return getattr(args, names.get(option, ""), "train")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Give the values in a report by their paths, as `models.0.psnr`."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, inner in entries:
        if key not in _FREE:
            flat |= _flatten(inner, f"{name}.{key}".removeprefix("."))
    return flat
