"""
Describe what a name, a folder or a file stands for: sizes, FLOPs, parameters, dtypes, statistics, and what a folder
has and lacks for each library.

Only JSON and the headers of tensors are read, and neither torch nor a library of models is imported, so that an answer
comes at once.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open

from ..data.manifests import checksum_of
from ..models.sizes import SIZE_FIELDS, count_flops, count_parameters, scale_grids
from ..shipped import no_weights, resolve_model
from ..utils.choices import QUANTIZER_FILE, SHIPPED, SIZES, TOKEN_BITS
from ..utils.files import read_json

__all__ = ["Facts", "describe", "read_tensors"]

Facts = dict[str, Any]
"""Facts by their names, as JSON can hold them."""

_MANIFESTS = {
    "cache.json": "cache of latents",
    "archive.json": "archive of latents",
    "export.json": "exported programs",
}
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_NAMED_BY = {"diffusers": "_class_name", "transformers": "model_type"}
_WEIGHTS = re.compile(rf"({'|'.join(_STEMS.values())})(\.[\w-]+?)?(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)")
_SHARD = re.compile(r"shard-\d+\.(safetensors|tar|parquet|xz)")
_STATE = re.compile(r"state-\d+\.pt")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
_STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
_USUAL_SIZE = 256


def describe(name: str, size: int | None = None) -> Facts:
    """
    Collect what there is to say of a model, latents or a file.

    Args:
        name (`str`): A name of `SHIPPED` or `SIZES`, a folder with a model, a pipeline, latents, programs or a
            training, a `.safetensors` or `.json` file, or the id of a repository in the cache of the Hub.
        size (`int`, *optional*): Side in pixels of the square image that FLOPs are counted for, a multiple of the
            patch size; 256, or the next multiple, unless given.

    Returns:
        `kind`, and what that has of `configuration`, `statistics`, `parameters`, `image`, `weights`, `parts`,
        `classes`, `levels` for integers of latents, `tensors`, `manifest`, `shards`, `training`, `libraries` and
        `note`.

    Raises:
        OSError: There is no such thing, or it cannot be read.
        ValueError: It is damaged or of an unknown kind, or `size` is no multiple of the patch size.
    """
    place = _find(name)
    try:
        if place is None:
            facts = {"kind": "size of a tokenizer", "note": no_weights(name), **_tokenizer(SIZES[name], size)}
        else:
            facts = _describe_folder(place, size) if place.is_dir() else _describe_file(place, size)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, SafetensorError, TypeError) as error:
        raise ValueError(f"{name!r} is damaged: {' '.join(str(error).split())}") from error
    return {"name": name, "place": None if place is None else str(place), **facts}


def _find(name: str) -> Path | None:
    """Find the folder or the file that a name stands for; `None` for a size without weights."""
    if name and Path(name).exists():
        return Path(name)
    if name in SHIPPED:
        return Path(resolve_model(name))
    if name in SIZES:
        return None
    try:
        for file in ("config.json", "model_index.json"):
            if isinstance(found := try_to_load_from_cache(name, file), str):
                return Path(found).parent
    except HFValidationError:
        pass
    known = ", ".join(dict.fromkeys([*SHIPPED, *SIZES]))
    raise FileNotFoundError(f"{name!r} is no file or folder, none of {known}, and not in the cache of the Hub.")


def _describe_folder(folder: Path, size: int | None) -> Facts:
    """Describe a pipeline, latents, programs, a model or weights alone, and the training that lies beside them."""
    index, config = (read_json(folder / name) for name in ("model_index.json", "config.json"))
    weights = _weights(folder)
    manifest = next((folder / name for name in _MANIFESTS if (folder / name).is_file()), None)
    facts: Facts = {}
    if index is not None:
        facts = _pipeline(folder, index, size)
    elif manifest is not None:
        facts = _manifest(manifest)
    elif config is not None:
        levels = _levels(folder)
        facts = {**_configuration(config, size), **weights, **levels, "libraries": _libraries(folder, config)}
    elif weights:
        facts = {"kind": "weights without a configuration", **weights}
    if "libraries" in facts:
        facts["libraries"]["model card"] = _sort_out({"README.md": (folder / "README.md").is_file()})
    if training := _training(folder):
        facts = {"kind": "training that has saved no model yet", **facts, "training": training}
    if not facts:
        wanted = ", ".join(["config.json", "model_index.json", *_MANIFESTS])
        raise ValueError(f"{str(folder)!r} must hold a model, latents, programs or a training, got none of {wanted}.")
    return facts


def _describe_file(path: Path, size: int | None) -> Facts:
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
        return {"kind": "tensors", "weights": {path.name: _sum_up([path], tensors)}, "tensors": tensors}
    if path.name in _MANIFESTS:
        return _manifest(path)
    if path.suffix == ".json":
        return _configuration(read_json(path) or {}, size)
    raise ValueError(f"{str(path)!r} must be a folder, a .safetensors or a .json file.")


def _configuration(config: Facts, size: int | None) -> Facts:
    """Describe what a `config.json` holds."""
    kind = config.get("_class_name") or config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError("A configuration must name a `_class_name` or a `model_type`.")
    if "AutoencoderHieraTok" in kind or config.get("model_type") == "hieratok":
        return {"kind": "HieraTok tokenizer", **_tokenizer(config, size)}
    plain = {name: value for name, value in config.items() if isinstance(value, bool | int | float | str)}
    return {"kind": kind, "configuration": plain, "statistics": _statistics(config)}


def _tokenizer(config: Facts, size: int | None) -> Facts:
    """Compute the sizes of a HieraTok tokenizer, and what it takes for an image."""
    sizes = SimpleNamespace(**_complete(config))
    size = math.ceil(_USUAL_SIZE / sizes.patch_size) * sizes.patch_size if size is None else size
    if size % sizes.patch_size:
        raise ValueError(f"`size` must be a multiple of the patch size {sizes.patch_size}, got {size}.")
    parameters, flops, grids = count_parameters(sizes), count_flops(sizes, size, size), scale_grids(sizes, size, size)
    # Without scale causality the coarser scales cannot be decoded alone.
    decode = [None] * (len(grids) - len(flops["decode"])) + flops["decode"]
    scales = [
        {
            "factor": factor,
            "image": [side * sizes.patch_size for side in grid],
            "tokens": math.prod(grid),
            "decode_flops": operations,
        }
        for factor, grid, operations in zip(sizes.scale_factors, grids, decode)
    ]
    latent = [sizes.latent_channels, *grids[-1]]
    return {
        "configuration": vars(sizes),
        "statistics": _statistics(config),
        "parameters": {**parameters, "total": sum(parameters.values())},
        "image": {"size": [size, size], "latent": latent, "encode_flops": flops["encode"], "scales": scales},
    }


def _complete(config: Facts) -> Facts:
    """Read the values that decide a tokenizer's sizes, by its own class where one is missing or odd."""
    values = {name: config.get(name) for name in SIZE_FIELDS}
    factors = values["scale_factors"]
    is_whole = all(type(value) is kind for value, kind in zip(values.values(), SIZE_FIELDS.values()))
    if is_whole and all(type(factor) is int and factor > 0 for factor in factors) and values["patch_size"] > 0:
        return values
    from ..models.configuration_hieratok import HieraTokConfig

    try:
        checked = HieraTokConfig.from_dict(config)
    except StrictDataclassError as error:
        raise ValueError(f"A value of the configuration is of another type: {error}") from error
    return {**{name: getattr(checked, name) for name in SIZE_FIELDS}, "scale_factors": [*checked.scale_factors]}


def _statistics(config: Facts) -> Facts:
    return {name: config[name] for name in _STATISTICS if config.get(name) is not None}


def _pipeline(folder: Path, index: Facts, size: int | None) -> Facts:
    """Describe a pipeline of diffusers, part by part."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    bad = [name for name, value in pairs.items() if value != [None, None] and [*map(type, value)] != [str, str]]
    if bad:
        raise ValueError(f"{str(folder / 'model_index.json')!r} is damaged: {bad[0]!r} must be a library and a class.")
    parts: dict[str, Facts] = {}
    files, code = {"model_index.json": True}, {}
    for name, (library, kind) in pairs.items():
        if kind is None:  # an optional part that the pipeline is without
            continue
        place = folder / name
        config, weights = read_json(place / "config.json"), _weights(place)
        described = _configuration(config, size) if config is not None and "_class_name" in config else {}
        parts[name] = {**described, **weights, **_levels(place), "kind": kind, "library": library}
        # A scheduler or a tokenizer of text has no weights.
        files[name] = place.is_dir() and (bool(weights) or config is None)
        if kind == "AutoencoderHieraTok":
            code[f"{name}/autoencoder_hieratok.py"] = library != "hieratok_hf"
    own = index["_class_name"]
    name = own[-1] if isinstance(own, list) else own
    if name == "HieraTokDiTPipeline":
        code["pipeline_hieratok_dit.py"] = isinstance(own, list)
    libraries = {"diffusers": _sort_out(files)}
    if code:
        libraries["without hieratok_hf"] = _sort_out(
            {file: x and (folder / file).is_file() for file, x in code.items()}
        )
    labels = index.get("id2label")
    classes = {"classes": [*labels.values()]} if isinstance(labels, dict) and labels else {}
    return {"kind": f"pipeline {name}", "parts": parts, **classes, "libraries": libraries}


def _libraries(folder: Path, config: Facts) -> dict[str, dict[str, list[str]]]:
    """Tell what a model's folder has and lacks for each library that its configuration names."""
    libraries = {}
    for library in ("transformers", "diffusers"):
        if _NAMED_BY[library] not in config:
            continue
        stem = _STEMS[library]
        names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.*safetensors*", f"{stem}*.bin*")
        weights = next((path.name for name in names for path in sorted(folder.glob(name))), None)
        files = {"config.json": True, weights or names[0]: weights is not None}
        if library == "transformers":
            files["preprocessor_config.json"] = (folder / "preprocessor_config.json").is_file()
        libraries[library] = _sort_out(files)
    if config.get("model_type") == "hieratok":
        code = "modeling_hieratok.py"
        libraries["without hieratok_hf"] = _sort_out({code: "auto_map" in config and (folder / code).is_file()})
    return libraries


def _sort_out(files: dict[str, bool]) -> dict[str, list[str]]:
    """Divide the names of files into those that are there and those that are not."""
    there = [name for name, is_there in files.items() if is_there]
    return {"has": there, "lacks": [name for name in files if name not in there]}


def _weights(folder: Path) -> Facts:
    """Sum up the weights in a folder, by each name and variant that they are saved under, diffusers' own first."""
    groups: dict[tuple[bool, str], list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := _WEIGHTS.fullmatch(path.name):
            stem, variant, _, suffix = match.groups("")
            groups.setdefault((stem == _STEMS["transformers"], f"{stem}{variant}.{suffix}"), []).append(path)
    found = {}
    for (_, name), paths in sorted(groups.items(), key=lambda group: (group[0][0], len(group[0][1]))):
        readable = [path for path in paths if path.suffix == ".safetensors"]
        found[name] = _sum_up(paths, {key: value for path in readable for key, value in read_tensors(path).items()})
    return {"weights": found} if found else {}


def read_tensors(path: Path) -> dict[str, Facts]:
    """Read shapes and dtypes of all tensors from the header of a file; `ValueError` of what is no file."""
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{str(path)!r} is no file.")
    tensors = {}
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            values = file.get_slice(name)
            dtype = values.get_dtype()
            tensors[name] = {"shape": list(values.get_shape()), "dtype": _DTYPES.get(dtype, dtype)}
    return tensors


def _sum_up(paths: Iterable[Path], tensors: dict[str, Facts]) -> Facts:
    """Add up files and their tensors, of which pickles, which are not opened, have none."""
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        numbers[tensor["dtype"]] += math.prod(tensor["shape"])
    files = {path.name: path.stat().st_size for path in paths}
    return {"files": files, "num_tensors": len(tensors), "numbers": numbers.total(), "dtypes": dict(numbers)}


def _levels(folder: Path) -> Facts:
    """Tell of the levels in a folder, if there are any, how many channels they have, and for which bits they are."""
    path = folder / QUANTIZER_FILE
    if not path.is_file():
        return {}
    try:
        tensors = read_tensors(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no file of levels: {' '.join(str(error).split())}") from error
    shapes = {bits: tensors.get(f"levels_{bits}", {}).get("shape") for bits in TOKEN_BITS}
    channels = math.prod(shapes[1] or [0]) // 2
    if wrong := [bits for bits, shape in shapes.items() if shape != [channels, 2**bits]]:
        raise ValueError(f"{str(path)!r} is no file of levels: it has none for {wrong[0]} bits, or of other channels.")
    return {"levels": {"channels": channels, "bits": [*TOKEN_BITS]}}


def _manifest(path: Path) -> Facts:
    """Describe latents or programs by the file that lies beside them, and count the shards that it asks for."""
    entries = read_json(path) or {}
    has_checksum = path.name == "archive.json" or "checksum" in entries  # which older caches lack
    if has_checksum and entries.pop("checksum", None) != checksum_of(entries):
        raise ValueError(f"{str(path)!r} is damaged: its checksum is another.")
    facts = {"kind": _MANIFESTS[path.name], "manifest": entries}
    if "bits" in entries:
        facts |= _levels(path.parent)
        if "levels" not in facts:
            raise ValueError(f"{str(path.parent)!r} is damaged: it lacks the {QUANTIZER_FILE} of its integers.")
    if "shard_size" in entries:
        shards = [shard for shard in sorted(path.parent.glob("shard-*")) if _SHARD.fullmatch(shard.name)]
        groups = [group["rows"] for group in entries.get("buckets", [entries])]  # a shard holds one bucket's alone
        is_known = None not in groups  # not as long as a stream has not come to its end
        wanted = sum(math.ceil(rows / max(entries["shard_size"], 1)) for rows in groups) if is_known else None
        size = sum(shard.stat().st_size for shard in shards)
        facts["shards"] = {"there": len(shards), "wanted": wanted, "bytes": size}
    return facts


def _training(folder: Path) -> Facts:
    """Describe the states and the last records of a training, oldest state first; states are not opened."""
    found: Facts = {name: _last_record(folder / f"{name}.jsonl") for name in ("losses", "validation")}
    states = [path for path in sorted(folder.glob("state-*.pt")) if _STATE.fullmatch(path.name)]
    found["states"] = {path.name: path.stat().st_size for path in states}
    return {name: value for name, value in found.items() if value}


def _last_record(path: Path) -> Facts | None:
    """Read the last whole line of a file of records; a kill may have cut the very last."""
    for line in reversed(path.read_bytes().splitlines() if path.is_file() else []):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return None
