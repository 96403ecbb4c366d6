"""Figures for a model card, from the reports that `--json` of `hieratok evaluate` writes."""

import re
import shlex
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from huggingface_hub import EvalResult

from ..utils.places import line, place

__all__ = ["TASKS", "entry", "machine_line", "report_results"]

# The Hub has no tag for images of named classes; such models stand under this one.
TASKS = {"tokenizer": "image-to-image", "pipeline": "unconditional-image-generation"}
"""The Hub's name of the task, by what a folder holds."""

_SHARES = ("images_per_class", "class_accuracy_per_class", "top1_accuracy_per_class")


# Beyond every decibel, distance and score that images can have.
_LARGEST = 1e6
_OVER_INCEPTION = {"rFID": "fid", "gFID": "fid", "sFID": "sfid", "precision": "precision", "recall": "recall"}
_OVER_A_NETWORK = {
    "FD": "frechet_distance",
    "sFD": "frechet_distance",
    "precision": "precision",
    "recall": "recall",
}

_PERTURBED = {
    "psnr_with_noise": "noise of {} of the latents' deviation",
    "psnr_with_replaced_levels": "{} of the latents' integers of 8 bits replaced",
}


def report_results(
    report: Mapping[str, Any], kind: str, known: Mapping[str, Any], name: str | None = None
) -> tuple[list[EvalResult], list[tuple[Any, ...]]]:
    """
    Read the figures of one model out of a report, and for a pipeline a row for each class that was judged.

    Paths of a machine are cut to their last name; speeds, latent statistics, coarser scales, deviations of scores,
    whole lines of text, figures that are null and those of an unknown name are left out.

    Args:
        report (`Mapping`): A report of `hieratok evaluate` (`kind` `"tokenizer"`), or of `hieratok
            evaluate-generation` (`"pipeline"`).
        known (`Mapping`): Facts that it must agree with: `parameters` and `channels` of the latent of a tokenizer,
            `names` (as in JSON) of the classes of a pipeline.
        name (`str`, *optional*): The model among several of a report; that of its `--model` unless given.

    Returns:
        The figures, whose `metric_args` hold the command and the machine, and rows of a class's name, the number of
        its images, and the accuracies among the model's classes and among all labels.

    Raises:
        ValueError: The report is of another model, lacks a key or has a value that is no figure; the message names it.
    """
    settings = entry(report, "settings", dict)
    rows: list[tuple[Any, ...]] = []
    if kind == "tokenizer":
        figures = _of_tokenizer(report, settings, known, name)
    else:
        figures, rows = _of_generator(report, settings, known)
    source = {"command": _command(kind, settings), "machine": machine_line(entry(report, "machine", dict))}
    for figure in figures:
        figure.metric_args = source
    return figures, rows


def entry(mapping: Any, key: str, kind: type, name: str = "results") -> Any:
    """Take what stands under a key of `name`, or raise a `ValueError` that names both unless it is of that type."""
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"`{name}`: {key!r} must be of type {kind.__name__}, got {value!r}.")
    return value


def _figure(mapping: Any, key: str) -> float:
    value = entry(mapping, key, Real)
    if abs(value) <= _LARGEST:  # not so of NaN
        return float(value)
    raise ValueError(f"`results`: {key!r} must be a number of at most {_LARGEST:g} in size, got {value!r}.")


def _count(mapping: Any, key: str) -> int:
    value = entry(mapping, key, int)
    if value < 0:
        raise ValueError(f"`results`: {key!r} must not be negative, got {value!r}.")
    return value


def _pixels(height: str) -> str:
    """Name a height that figures are told for, or raise a `ValueError` unless it is a number of pixels."""
    if not height.isdecimal():
        raise ValueError(f"`results`: heights must be numbers of pixels, got {height!r}.")
    return f"{height} pixels"


def _of_tokenizer(
    report: Mapping[str, Any], settings: Mapping[str, Any], known: Mapping[str, Any], name: str | None
) -> list[EvalResult]:
    name = name or entry(settings, "model", str)
    models = [model for model in entry(report, "models", list) if entry(model, "model", str) == name]
    if len(models) != 1:
        raise ValueError(f"`results`: a report must have one model {name!r}, got {len(models)}.")
    (model,) = models
    found = entry(model, "parameters", int), entry(model, "latent_shape", list)[:1]
    if found != (known["parameters"], [known["channels"]]):
        raise ValueError(f"`results`: {name!r} has other parameters or channels than the folder: another model.")
    size = _count(settings, "size")
    where = {"task_type": TASKS["tokenizer"], **_dataset(entry(settings, "data", list))}
    where["dataset_config"] = f"{_count(report, 'images')} images at {size}x{size}"
    kinds = {
        "psnr": ("psnr", "PSNR, dB"),
        "ssim": ("ssim", "SSIM"),
        "lpips": ("lpips", "LPIPS"),
        "perceptual": ("perceptual_distance", f"perceptual distance over {place(settings.get('perceptual_model'))}"),
        "probe_accuracy": ("accuracy", "accuracy of a linear probe"),
    }
    sets = where
    if settings.get("reference"):  # which the sets of images are compared with in the place of the data
        sets = {**where, **_dataset(entry(settings, "reference", list))}
    return [
        *_figures(model, kinds, where),
        *_perturbed(model, where),
        *_text(model, report),
        *_faces(model, where),
        *_scores(model, where),
        *_distances(model, settings, sets),
    ]


def _of_generator(
    report: Mapping[str, Any], settings: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[list[EvalResult], list[tuple[Any, ...]]]:
    names = entry(report, "classes", dict)
    if names != known["names"]:
        raise ValueError("`results`: the classes of a report are not the folder's: a report of another model.")
    size, samples, steps = (_count(settings, key) for key in ("size", "samples", "steps"))
    guidance, dtype = f"{_figure(settings, 'guidance_scale'):g}", line(settings.get("dtype"))
    if "guidance_eta" in settings and (eta := _figure(settings, "guidance_eta")) != 1:
        guidance += f" with eta {eta:g}"
    config = f"{samples} samples at {size}x{size}, {steps} steps, guidance {guidance}, {dtype}"
    where = {"task_type": TASKS["pipeline"], "dataset_config": config}
    judge = f"accuracy of {place(settings.get('classifier'))}"
    kinds = {
        "class_accuracy": ("accuracy", f"{judge} among the classes of the model"),
        "top1_accuracy": ("accuracy", f"{judge} among all its labels"),
    }
    generated = {"dataset_name": "its own images, each class as often", "dataset_type": "generated"}
    figures = _figures(report, kinds, {**where, **generated}) + _scores(report, {**where, **generated})
    if settings.get("reference"):
        figures += _distances(report, settings, {**where, **_dataset(entry(settings, "reference", list))})
    shares = [entry(report, key, list) for key in _SHARES if key in report]
    return figures, [(names.get(str(label), label), *row) for label, row in enumerate(zip(*shares))]


def _figures(
    found: Mapping[str, Any], kinds: Mapping[str, tuple[str, str]], where: Mapping[str, Any]
) -> list[EvalResult]:
    """Take the figures that are not null, as what is infinite is in a report, to four places."""
    figures = []
    for key, (metric_type, name) in kinds.items():
        if found.get(key) is None:
            continue
        rounded = round(_figure(found, key), 4)
        figures.append(EvalResult(metric_type=metric_type, metric_name=name, metric_value=rounded, **where))
    return figures


def _distances(found: Mapping[str, Any], settings: Mapping[str, Any], where: Mapping[str, Any]) -> list[EvalResult]:
    """Take what compares two sets of images, under the name of its network; only Inception's distances are FIDs."""
    side = line(settings.get("fid_size"))
    resized = f"of images resized to {side}x{side}"
    kinds = {}
    for key in found:
        name, _, network = key.partition("-")
        if metric_type := (_OVER_A_NETWORK if network else _OVER_INCEPTION).get(name):
            kinds[key] = (metric_type, f"{line(key)} {resized}")
    return _figures(found, kinds, where)


def _scores(found: Mapping[str, Any], where: Mapping[str, Any]) -> list[EvalResult]:
    """Take Inception Scores, that of a classifier under its name."""
    kinds = {key: ("inception_score", line(key)) for key in found if key.partition("-")[0] == "IS"}
    return _figures(found, kinds, where)


def _perturbed(model: Mapping[str, Any], where: Mapping[str, Any]) -> list[EvalResult]:
    """Take the PSNR from wrong latents, a figure for each amount."""
    figures = []
    for kind, what in _PERTURBED.items():
        decibels = entry(model, kind, dict) if kind in model else {}
        kinds = {amount: ("psnr", f"PSNR with {what.format(line(amount))}, dB") for amount in decibels}
        figures += _figures(decibels, kinds, where)
    return figures


def _text(model: Mapping[str, Any], report: Mapping[str, Any]) -> list[EvalResult]:
    """Take the characters that were read right, a figure for each height of letters beside that of the originals."""
    if "text" not in model:
        return []
    originals = entry(report, "text_of_originals", dict)
    where = {"task_type": TASKS["tokenizer"], "dataset_name": "pages of drawn text", "dataset_type": "generated"}
    figures = []
    for height, shares in entry(model, "text", dict).items():
        drawn = _figure(entry(originals, height, dict), "characters")
        kinds = {"characters": ("accuracy", f"characters that an OCR reads right, {drawn:.4f} of the pages as drawn")}
        figures += _figures(shares, kinds, {**where, "dataset_config": f"letters of {_pixels(height)}"})
    return figures


def _faces(model: Mapping[str, Any], where: Mapping[str, Any]) -> list[EvalResult]:
    """Take the distances of faces from what they were, a figure for each height of faces that there were."""
    figures = []
    for height, found in (entry(model, "faces", dict) if "faces" in model else {}).items():
        if count := _count(found, "faces"):
            name = f"distance of {count} faces from the originals by dlib's network, {_pixels(height)} high"
            figures += _figures(found, {"distance": ("face_distance", name)}, where)
    return figures


def _dataset(data: Sequence[Any]) -> dict[str, str]:
    name = ", ".join(map(place, data))
    return {"dataset_name": name, "dataset_type": re.sub(r"[^\w./-]+", "-", name)}


def _command(kind: str, settings: Mapping[str, Any]) -> str:
    """Write the command line that gave a report these settings."""
    words = ["hieratok", "evaluate-generation" if kind == "pipeline" else "evaluate"]
    # No options, or an option that only goes with another.
    told = {"labels", "scheduler", "size"} if kind == "pipeline" else set()
    told |= set() if settings.get("fid_model") else {"fid_size"}
    for key, value in settings.items():
        if value is None or value is False or value == [] or key in told:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{line(key)}", *map(place, values)]
    return shlex.join(words)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Put what `describe_machine` of the commands tells on one line."""
    keys = ("cpu", "device", "torch", "threads", "processes")
    return ", ".join(f"{key} {line(machine.get(key, 'unknown'))}" for key in keys).removeprefix("cpu ")
