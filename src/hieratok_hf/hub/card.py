"""The model card (README.md) of a repository on the Hub, from its folder and from reports of evaluations."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.utils import validate_repo_id

from ..models.configuration_hieratok import HieraTokConfig
from ..models.saving import WEIGHTS_STEM
from ..utils.choices import TRAINING_FILE
from ..utils.files import read_json
from ..utils.places import line
from .describe import read_tensors
from .results import TASKS, entry, machine_line, report_results

__all__ = ["card_for", "license_of", "model_card"]

_SPECIAL = re.compile(r"[]!\"#$&*<>@[\\^_`{|}~]|:(?=//)")  # to Markdown, within a line
_SHOWN = 20  # classes by name
_TEMPLATE = Path(__file__).with_name("card_template.md")

_TAGS = {
    "tokenizer": ["image-tokenizer", "autoencoder", "vae", "latent-diffusion", "transformers"],
    "pipeline": ["class-conditional", "latent-diffusion", "dit"],
}


def model_card(
    folder: Path,
    *,
    repo_id: str,
    results: Sequence[Mapping[str, Any]] = (),
    result_name: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    training: str | None = None,
    hardware: str | None = None,
) -> ModelCard:
    """
    Make a card from what a complete folder and reports of its evaluations tell.

    All that comes from JSON is escaped, and of places on a machine only the last name is told. Loading without the
    package is shown if the code for it is in the folder. A `training.json` tells of the training what is not given.

    Args:
        folder (`Path`): A tokenizer, or a pipeline that holds one, as saved.
        repo_id (`str`): The repository that the card is for.
        results (`Sequence[Mapping]`): Reports that `--json` of `hieratok evaluate` wrote, for a pipeline that of
            `hieratok evaluate-generation`. Speeds, latent statistics, coarser scales and figures that are
            null are left out.
        result_name (`str`, *optional*): The model among several of a report; that of its `--model` unless given.
        base_model (`str`, *optional*): Hub id of the model that training went on from.
        datasets (`Sequence[str]`): Hub ids of the training data.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; that of `license_of` unless it is
            given, and where there is none, the card says that it is not stated.
        training, hardware (`str`, *optional*): Markdown, put in as it is: the training, its data and their terms; what
            it ran on and for how long. Where there is none, the card says that it was not recorded.

    Raises:
        OSError: A file of the folder is not there or cannot be read.
        ValueError: The class in the folder is neither a tokenizer nor a pipeline, a name is no id, a report is of
            another model, or it or `training.json` lacks a key or has a value of another kind; the message names it.
    """
    own = _training(folder)
    base_model, training, hardware = base_model or own[0], training or own[1], hardware or own[2]
    for name in (repo_id, *datasets, *([base_model] if base_model else [])):
        validate_repo_id(name)
    license = license_of(folder) if license is None else _identifier(license)
    kind = "pipeline" if (folder / "model_index.json").is_file() else "tokenizer"
    try:
        facts, known, has_code = (_pipeline if kind == "pipeline" else _tokenizer)(folder)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a missing key, a value of another type, and huggingface_hub's own types
        reason = f"{type(error).__name__}: {line(error)[:300]}"
        raise ValueError(f"The configurations in {str(folder)!r} must be as they were saved, got {reason}.") from error
    figures: list[EvalResult] = []
    notes: list[str] = []
    for report in results:
        found, classes = report_results(report, kind, known, result_name)
        figures += found
        notes += [f"- {_text(note)}" for note in entry(report, "notes", list)]
        if 0 < len(classes) <= _SHOWN:
            rows = [("class", "images", "accuracy among the classes", "among all labels"), *classes]
            notes += ["", _table([tuple(map(_text, row)) for row in rows]), ""]
    title = repo_id.rpartition("/")[2]
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASKS[kind],
        tags=["hieratok", *_TAGS[kind]],
        datasets=list(datasets) or None,
        base_model=base_model,
        model_name=title if figures else None,
        eval_results=figures or None,
    )
    rows = [(x.metric_name, x.metric_value, f"{x.dataset_name}, {x.dataset_config}") for x in figures]
    sources = {(_text(x.metric_args["machine"]), x.metric_args["command"]): None for x in figures if x.metric_args}
    return ModelCard.from_template(
        data,
        str(_TEMPLATE),
        title=_text(title),
        repo_id=repo_id,
        is_pipeline=kind == "pipeline",
        has_code=has_code,
        sizes=_table([("", ""), *facts, ("licence of the weights", license or "not stated")]),
        training=training,
        figures=_table([("", "value", "of"), *(tuple(map(_text, row)) for row in rows)]) if figures else "",
        sources=list(sources),
        has_distances=any(x.metric_type == "frechet_distance" for x in figures),
        notes="\n".join(notes).strip(),
        hardware=hardware,
    )


def card_for(folder: Path, **given: Any) -> ModelCard:
    """
    Make the card of a folder by `model_card`, which takes the arguments, unless a README.md is there.

    That one keeps its text and all metadata that it has, in their order, and gets what is missing of the rest; the
    licence is lowered, and comments in its YAML are lost.

    Raises:
        OSError, ValueError: As `model_card`, or the README.md cannot be read or has metadata that cannot be kept.
    """
    fresh, path = model_card(folder, **given), folder / "README.md"
    if not path.is_file():
        return fresh
    card, head = _load(path)
    card.data["license"] = _license_in(head, path)
    index = head.get("model-index") or []
    if index and index != card.data.to_dict()["model-index"]:
        # huggingface_hub merges models and data sets, and drops what it does not know.
        card.data.eval_results = card.data.model_name = None
        card.data["model-index"] = index
    for key, value in vars(fresh.data).items():
        if card.data.get(key) is None and not (index and key in ("eval_results", "model_name")):
            card.data[key] = value
    return card


def license_of(folder: Path) -> str | None:
    """
    Find the licence that the README.md of a folder names, or else its `training.json`; `None` where neither does.

    It is in lower case, as the Hub's identifiers are.

    Raises:
        OSError, ValueError: A file cannot be read, or its licence is no identifier.
    """
    readme, record = folder / "README.md", folder / TRAINING_FILE
    named = _license_in(_load(readme)[1], readme) if readme.is_file() else None
    return named or _license_in(read_json(record) or {}, record)


def _license_in(metadata: Mapping[str, Any], path: Path) -> str | None:
    """Take the licence from the metadata of a file; `None` where it is empty."""
    named = metadata.get("license")
    if named is None or named == "":
        return None
    return _identifier(named.lower() if isinstance(named, str) else named, f" of {str(path)!r}")


def _identifier(license: Any, where: str = "") -> str:
    if not isinstance(license, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"`license`{where} must be an identifier of the Hub, such as 'apache-2.0', got {license!r}.")
    return license


def _load(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read a card, and its metadata as they stand there."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # `ModelCard.load` takes the mark for text
            return ModelCard(file.read()), dict(metadata_load(path) or {})
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata of {str(path)!r} cannot be kept: {line(error)[:300]}") from error


def _training(folder: Path) -> tuple[str | None, str | None, str | None]:
    """Tell by `training.json` the Hub id of the model that it went on from, of the training, and its environment."""
    if (record := read_json(folder / TRAINING_FILE)) is None:
        return None, None, None
    kinds = {"command": str, "steps": int, "hours": Real, "data": dict, "parents": dict, "machine": dict, "seed": int}
    command, steps, hours, data, parents, machine, seed = (
        entry(record, key, kind, TRAINING_FILE) for key, kind in kinds.items()
    )
    count = f"{images:,} images" if isinstance(images := data.get("images"), int) else "a stream of images"
    names = ", ".join(map(_text, entry(data, "names", list, TRAINING_FILE)))
    of = "; ".join(f"{_text(option)} {_text(name)}" for option, name in parents.items()) or "none, from scratch"
    training = f"{steps:,} steps of {_text(command)} with seed {seed} on {count}: {names}. Parents: {of}. "
    training += f"All arguments are in `{TRAINING_FILE}`; the terms of the data were not recorded."
    # A folder has lost its path, so a name with a slash is an id.
    ids = [name for option in ("model", "transformer") if "/" in (name := str(parents.get(option, "")))]
    return next(iter(ids), None), training, f"{hours:.3g} hours on {_text(machine_line(machine))}."


def _tokenizer(folder: Path) -> tuple[list[tuple[str, str]], dict[str, Any], bool]:
    """Collect rows about a tokenizer, what a report of it must say, and whether its code lies beside it."""
    saved = _read(folder / "config.json")
    if (own := _class(saved.get("_class_name"))) != "AutoencoderHieraTok":
        raise ValueError(f"{str(folder)!r} must hold a HieraTok tokenizer or pipeline, got the class {own!r}.")
    config = HieraTokConfig(**{name: saved[name] for name in HieraTokConfig.__annotations__ if name in saved})
    patch = config.patch_size
    grid = -(-config.sample_size // patch)
    scales = ", ".join(map(str, config.scale_factors))
    if config.scale_causal and len(config.scale_factors) > 1:
        scales += "; `decode(latents, num_scales=k)` stops after the first `k`"
    parameters, dtype = _parameters(folder)
    facts = [
        ("input and output", f"images of {config.in_channels} channels in [-1, 1], sides multiples of {patch}"),
        ("latent", f"{config.latent_channels}x{grid}x{grid} for {patch * grid}x{patch * grid} pixels"),
        ("scales: cells of the latent on a side, coarse to fine", scales),
        ("parameters", f"{parameters:,} in {dtype}"),
    ]
    for side in ("encoder", "decoder"):
        layers, width, heads = (getattr(config, f"{side}_{x}") for x in ("num_layers", "hidden_size", "num_heads"))
        facts.append((side, f"{layers} blocks of width {width} with {heads} heads"))
    known = {"parameters": parameters, "channels": config.latent_channels}
    return facts, known, "AutoModel" in saved.get("auto_map", {})


def _pipeline(folder: Path) -> tuple[list[tuple[str, str]], dict[str, Any], bool]:
    """Collect the same about a pipeline."""
    index = _read(folder / "model_index.json")
    if (own := _class(index.get("_class_name"))) != "HieraTokDiTPipeline":
        raise ValueError(f"{str(folder)!r} must hold a HieraTokDiTPipeline, got the class {own!r}.")
    classes = {part: _text(_class(index[part])) for part in ("vae", "transformer", "scheduler")}
    names = index.get("id2label") or {}
    transformer = _read(folder / "transformer" / "config.json")
    grid = transformer["sample_size"]
    shown = "; ".join(f"{_text(key)} {_text(name)}" for key, name in list(names.items())[:_SHOWN])
    shown += f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    facts = [
        ("latent", f"{transformer['in_channels']}x{grid}x{grid}"),
        ("classes", f"{transformer['num_embeds_ada_norm']}{': ' if shown else ''}{shown}"),
    ]
    if classes["vae"] == "AutoencoderHieraTok":
        side = grid * _read(folder / "vae" / "config.json")["patch_size"]
        facts.insert(0, ("images", f"{side}x{side} pixels"))
    for name in ("transformer", "vae"):
        parameters, dtype = _parameters(folder / name)
        facts.append((name, f"{classes[name]}, {parameters:,} parameters in {dtype}"))
    facts += [("scheduler", classes["scheduler"]), ("it predicts", _text(index.get("prediction_type")))]
    return facts, {"names": names}, isinstance(index["_class_name"], list)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _parameters(folder: Path) -> tuple[int, str]:
    """Count the numbers in a folder's weights, a tensor of several variants once, and name their dtypes."""
    paths = sorted(folder.glob(f"{WEIGHTS_STEM}*.safetensors"))
    tensors = [item for path in paths for item in read_tensors(path).items()]
    sizes = {name: math.prod(tensor["shape"]) for name, tensor in tensors}
    return sum(sizes.values()), " and ".join(dict.fromkeys(tensor["dtype"] for _, tensor in tensors))


def _class(named: Any) -> Any:
    """Take a class alone; diffusers puts its library or, beside code of its own, its file before it."""
    return named[-1] if isinstance(named, list) else named


def _read(path: Path) -> dict[str, Any]:
    if (found := read_json(path)) is None:
        raise FileNotFoundError(f"There is no {str(path)!r}.")
    return found


def _text(value: Any) -> str:
    """Put a value on one line of Markdown, in which no character has a meaning."""
    return _SPECIAL.sub(r"\\\g<0>", line(value))
