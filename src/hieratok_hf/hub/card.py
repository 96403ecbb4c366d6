"""The model card (README.md) of a repository on the Hub, from its folder and from reports of evaluations."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..models.configuration_hieratok import HieraTokConfig
from ..models.saving import WEIGHTS_STEM
from ..utils.files import read_json
from .results import TASKS, entry, line, report_results

__all__ = ["card_for", "model_card"]

_SPECIAL = re.compile(r"[]!\"#$&*<>@[\\^_`{|}~]|:(?=//)")  # to Markdown, within a line
_SHOWN = 20  # classes by name
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_TAGS = {
    "tokenizer": ["image-tokenizer", "autoencoder", "vae", "latent-diffusion", "transformers"],
    "pipeline": ["class-conditional", "latent-diffusion", "dit"],
}
_KINDS = {"tokenizer": "A multi-scale image tokenizer", "pipeline": "A class-conditional generator of images"}
_INSTALLED = {
    "tokenizer": """import hieratok_hf
from transformers import AutoModel

model = AutoModel.from_pretrained("REPO")
vae = hieratok_hf.AutoencoderHieraTok.from_pretrained("REPO")""",
    "pipeline": """import hieratok_hf

pipe = hieratok_hf.HieraTokDiTPipeline.from_pretrained("REPO")
image = pipe(0, num_inference_steps=25).images[0]  # of class 0""",
}
_REMOTE = {
    "tokenizer": """import diffusers, transformers

model = transformers.AutoModel.from_pretrained("REPO", trust_remote_code=True)
vae = diffusers.AutoModel.from_pretrained("REPO", trust_remote_code=True)""",
    "pipeline": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("REPO", trust_remote_code=True)""",
}
_INTENDED = {
    "tokenizer": "Latents for generators, reconstruction, previews at coarse scales, research. It is lossy: "
    "nothing that depends on fine detail (evidence, medicine, text) should go through it.",
    "pipeline": "Research on generators. Its images show nothing that happened: do not present them as photographs.",
}
_LIMITS = {
    "tokenizer": "Attention is over all tokens of a scale, so time grows with the square of the pixels.",
    "pipeline": "It knows its classes and its size of images alone.",
}
_BIAS = """What the training images lack or misrepresent, the model does too. The figures below, if any, hold for
their data and size alone."""
_WHAT = """after HieraTok ([arXiv 2509.23736](https://arxiv.org/abs/2509.23736)), by the package `hieratok_hf`: an
independent implementation of the method, neither the authors' code nor their model."""
_UNTOLD = "How it was trained, and the terms of the data, was not recorded."
_NO_FID = "What is called FD is no FID: it compares only with figures of the same network, size and number of images."
_UNRECORDED = "The hardware and the hours of training were not recorded, and nothing is estimated from guesses."
_CITATION = """```bibtex
@article{chen2025hieratok,
  title = {HieraTok},
  author = {Chen and others},
  year = {2025},
  eprint = {2509.23736},
  archivePrefix = {arXiv}
}
```"""


def model_card(
    folder: Path,
    *,
    repo_id: str,
    results: Sequence[Mapping[str, Any]] = (),
    result_name: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
    training: str | None = None,
    hardware: str | None = None,
) -> ModelCard:
    """
    A card made of what is known. All that comes from JSON is escaped, and of places on a machine only the last name is
    told. Call it when the folder is complete: loading without the package is shown if its code is there.

    Args:
        folder (`Path`): A tokenizer, or a pipeline that holds one, as saved.
        repo_id (`str`): Of the repository that the card is for.
        results (`Sequence[Mapping]`): Reports that `--json` of `examples/evaluate_tokenizer.py` wrote (for a pipeline
            those of `examples/evaluate_generation.py`). Speeds, latent statistics and coarser scales are left out, and
            so are figures that are null.
        result_name (`str`, *optional*): The model among several of a report; that of its `--model` unless given.
        base_model (`str`, *optional*): Hub id of the model that training went on from.
        datasets (`Sequence[str]`): Hub ids of the training data.
        license (`str`, defaults to `"apache-2.0"`): Of the weights, by the Hub's identifier.
        training, hardware (`str`, *optional*): Markdown, put in as it is: the training, its data and their terms; what
            it ran on and for how long. Where there is none, the card says that it was not recorded.

    Raises:
        OSError: A file of the folder is not there or cannot be read.
        ValueError: The folder is neither a tokenizer nor a pipeline, a name is no id, or a report is of another model,
            lacks a key, has one that is not known or a value that is no figure; the message names it.
    """
    for name in (repo_id, *datasets, *([base_model] if base_model else [])):
        validate_repo_id(name)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"`license` must be an identifier of the Hub, such as 'apache-2.0', got {license!r}.")
    kind = "pipeline" if (folder / "model_index.json").is_file() else "tokenizer"
    facts, known, remote = (_pipeline if kind == "pipeline" else _tokenizer)(folder)
    figures: list[EvalResult] = []
    told: list[str] = []
    for report in results:
        found, classes = report_results(report, kind, known, result_name)
        figures += found
        told += [f"- {_text(note)}" for note in entry(report, "notes", list)]
        if 0 < len(classes) <= _SHOWN:
            rows = [("class", "images", "accuracy among the classes", "among all labels"), *classes]
            told += ["", _table([tuple(map(_text, row)) for row in rows]), ""]
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
    use = f"With the package `hieratok_hf` installed:\n\n```python\n{_INSTALLED[kind]}\n```"
    if remote:
        code = "Without it, by the code in this repository, which then runs on your machine"
        use += f"\n\n{code}:\n\n```python\n{_REMOTE[kind]}\n```"
    told_of = [f"It went on from [{base_model}](https://huggingface.co/{base_model})."] if base_model else []
    if datasets:
        links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
        told_of.append(f"Data: {links}.")
    sections = {
        "Sizes": _table([("", ""), *facts, ("licence of the weights", license)]),
        "Use": use.replace("REPO", repo_id),
        "Intended use": _INTENDED[kind],
        "Limits": f"{_LIMITS[kind]} {_BIAS}",
        "Training": "\n\n".join([*told_of, training or _UNTOLD]),
        "Figures": "\n".join([*_figures(figures), *told]).strip() or "None were recorded.",
        "Environment": hardware or _UNRECORDED,
        "Citation": f"The method is the paper's:\n\n{_CITATION}",
    }
    parts = [f"# {_text(title)}", f"{_KINDS[kind]} {_WHAT}", *(f"## {x}\n\n{part}" for x, part in sections.items())]
    text = "\n\n".join(parts)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def card_for(folder: Path, **given: Any) -> ModelCard:
    """
    The card of a folder: that of `model_card`, unless a README.md is there. That one keeps its text and all metadata
    that it has, in their order, and gets what is missing of the rest; comments in its YAML are lost.

    Args:
        folder (`Path`): As that of `model_card`.
        given: Further arguments of `model_card`.

    Raises:
        OSError, ValueError: As `model_card`, or the README.md cannot be read or has metadata that cannot be kept.
    """
    fresh, path = model_card(folder, **given), folder / "README.md"
    if not path.is_file():
        return fresh
    try:
        card = ModelCard.load(path)
        index = (metadata_load(path) or {}).get("model-index") or []
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata of {str(path)!r} cannot be kept: {line(error)}") from error
    if index and index != card.data.to_dict()["model-index"]:
        # huggingface_hub merges models and data sets, and drops what it does not know.
        card.data.eval_results = card.data.model_name = None
        card.data["model-index"] = index
    for key, value in vars(fresh.data).items():
        if card.data.get(key) is None and not (index and key in ("eval_results", "model_name")):
            card.data[key] = value
    return card


def _tokenizer(folder: Path) -> tuple[list[tuple[str, str]], dict[str, Any], bool]:
    """Rows about a tokenizer, what a report of it must say, and whether its code lies beside it."""
    saved = _read(folder / "config.json")
    if (own := _class(saved.get("_class_name"))) != "AutoencoderHieraTok":
        raise ValueError(f"{str(folder)!r} must hold a HieraTok tokenizer or pipeline, got the class {own!r}.")
    try:
        config = HieraTokConfig(**{name: saved[name] for name in HieraTokConfig.__annotations__ if name in saved})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder / 'config.json')!r}: {line(error)}") from error
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
    return facts, known, "AutoModel" in (entry(saved, "auto_map", dict) if saved.get("auto_map") else {})


def _pipeline(folder: Path) -> tuple[list[tuple[str, str]], dict[str, Any], bool]:
    """The same of a pipeline."""
    index = _read(folder / "model_index.json")
    if (own := _class(index.get("_class_name"))) != "HieraTokDiTPipeline":
        raise ValueError(f"{str(folder)!r} must hold a HieraTokDiTPipeline, got the class {own!r}.")
    classes = {part: _text(_class(entry(index, part, list))) for part in ("vae", "transformer", "scheduler")}
    names = entry(index, "id2label", dict) if index.get("id2label") else {}
    transformer = _read(folder / "transformer" / "config.json")
    count, grid = entry(transformer, "num_embeds_ada_norm", int), entry(transformer, "sample_size", int)
    shown = "; ".join(f"{_text(key)} {_text(name)}" for key, name in list(names.items())[:_SHOWN])
    shown += f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    latent = f"{entry(transformer, 'in_channels', int)}x{grid}x{grid}"
    facts = [("latent", latent), ("classes", f"{count}{': ' if shown else ''}{shown}")]
    if classes["vae"] == "AutoencoderHieraTok":
        patch = entry(_read(folder / "vae" / "config.json"), "patch_size", int)
        facts.insert(0, ("images", f"{patch * grid}x{patch * grid} pixels"))
    for name in ("transformer", "vae"):
        parameters, dtype = _parameters(folder / name)
        facts.append((name, f"{classes[name]}, {parameters:,} parameters in {dtype}"))
    facts += [("scheduler", classes["scheduler"]), ("it predicts", _text(index.get("prediction_type")))]
    return facts, {"names": names}, isinstance(index["_class_name"], list)


def _figures(figures: Sequence[EvalResult]) -> list[str]:
    """A table, and under it what printed each."""
    if not figures:
        return []
    rows = [(x.metric_name, x.metric_value, f"{x.dataset_name}, {x.dataset_config}") for x in figures]
    sources = dict.fromkeys((x.metric_args["machine"], x.metric_args["command"]) for x in figures if x.metric_args)
    return [
        _table([("", "value", "of"), *(tuple(map(_text, row)) for row in rows)]),
        *(f"\nPrinted on {_text(machine)} by\n\n```bash\n{command}\n```" for machine, command in sources),
        *([f"\n{_NO_FID}"] if any(x.metric_type == "frechet_distance" for x in figures) else []),
        "",
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _parameters(folder: Path) -> tuple[int, str]:
    """How many numbers the weights of a folder are, and of which kinds; variants and shards hold each tensor once."""
    sizes: dict[str, int] = {}
    dtypes: dict[str, None] = {}
    for path in sorted(folder.glob(f"{WEIGHTS_STEM}*.safetensors")):
        try:
            with safe_open(path, "np") as weights:
                for name in weights.keys():  # noqa: SIM118
                    tensor = weights.get_slice(name)
                    sizes[name] = math.prod(tensor.get_shape())
                    dtypes[_DTYPES.get(tensor.get_dtype(), tensor.get_dtype())] = None
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file: {line(error)}") from error
    if not sizes:
        raise FileNotFoundError(f"{str(folder)!r} holds no weights {WEIGHTS_STEM}*.safetensors")
    return sum(sizes.values()), " and ".join(dtypes)


def _class(named: Any) -> Any:
    """A class alone; diffusers puts its library or, beside code of its own, its file before it."""
    return named[-1] if isinstance(named, list) and named else named


def _read(path: Path) -> dict[str, Any]:
    if (value := read_json(path)) is None:
        raise FileNotFoundError(f"there is no {str(path)!r}")
    return value


def _text(value: Any) -> str:
    """One line for Markdown, in which no character has a meaning."""
    return _SPECIAL.sub(r"\\\g<0>", line(value))
