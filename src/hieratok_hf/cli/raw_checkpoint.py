"""Tensors by name out of whatever a training has written: files, shards, nestings and wrappers; no code is run."""

import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.saving import WEIGHTS_STEM
from ..training.state import check_archive, states_in
from ..utils.files import read_json
from .terminal import Problem, one_line

__all__ = ["TRAINING_STATE", "find_weights", "read_checkpoint", "without_wrappers"]

TRAINING_STATE = {"step", "parts", "average", "updates"}
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_PLAIN = ("model", "model_state_dict", "state_dict", "module", "tokenizer")
_AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")
# What DDP, FSDP, `torch.compile` and activation checkpointing put into names, at any depth; then who holds the core.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_HOLDERS = {"ema_model", "model", "tokenizer", "core"}


def read_checkpoint(path: Path) -> Any:
    """
    Read what a file or a folder holds, tensors mapped from the disk where the format allows it; no code in it is run.

    Raises:
        Problem: It cannot be read as a whole; the message names the file.
    """
    if path.is_dir():
        indices, shards = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        states = states_in(path)
        # A folder for both libraries has two indices, or two names for the same weights.
        if path / f"{WEIGHTS_STEM}.safetensors" in shards:
            return read_checkpoint(path / f"{WEIGHTS_STEM}.safetensors")
        if indices:
            return read_checkpoint(indices[0])
        if not shards and not states:
            raise Problem(f"{str(path)!r} holds no .safetensors and no training state")
        return _unite(dict.fromkeys(shards)) if shards else read_checkpoint(states[-1])
    if not path.is_file():
        raise Problem(f"there is no {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".json":
            return _unite(_shards(path))
        if path.suffix in _PICKLED:
            if path in states_in(path.parent):
                check_archive(path)
            # Trainings keep their arguments beside the weights; an `argparse.Namespace` has no code.
            with torch.serialization.safe_globals([Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Problem:
        raise
    except Exception as error:  # damaged files make safetensors, zipfile, pickle and torch raise many types
        # torch's own text advises to run the code.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {code[1]}, which is code and no tensor" if code else one_line(error)[:300]
        raise Problem(f"{str(path)!r} cannot be read: {reason}") from error
    raise Problem(f"{str(path)!r} must end in .safetensors, .index.json or one of {', '.join(_PICKLED)}")


def _shards(index: Path) -> dict[Path, set[str]]:
    """List the files that an index names, and the tensors that each must hold."""
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Problem(f"{str(index)!r} has no `weight_map` of names and files")
    shards: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        # A name with a path could be any file of the machine.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise Problem(f"{str(index)!r} names {name!r} for {key!r}, expected a .safetensors beside it")
        shards.setdefault(index.parent / name, set()).add(key)
    return shards


def _unite(shards: Mapping[Path, set[str] | None]) -> dict[str, Tensor]:
    """Unite the tensors of several files, which hold exactly those that are expected where that is known."""
    weights: dict[str, Tensor] = {}
    for shard, expected in shards.items():
        part = read_checkpoint(shard)
        if expected is not None and expected != part.keys():
            lacking, more = sorted(expected - part.keys()), sorted(part.keys() - expected)
            raise Problem(f"{str(shard)!r} must hold what its index says: missing {lacking[:5]}, beside it {more[:5]}")
        if twice := sorted(weights.keys() & part.keys()):
            raise Problem(f"{str(shard)!r} holds {twice[0]!r}, and so does another file of its folder")
        weights |= part
    return weights


def find_weights(tree: Any, averaged: bool, trail: tuple[str, ...] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """
    Find the names and tensors in what `read_checkpoint` gave, and the keys that lead to them.

    Raises:
        Problem: There are none, several, or with `averaged` none that are averaged.
    """
    at = f" under {'.'.join(trail)!r}" if trail else ""
    # A pickle can hold itself.
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree) or len(trail) > 8:
        raise Problem(f"the checkpoint holds a {type(tree).__name__}{at}, expected tensors by name")
    if tree.keys() >= TRAINING_STATE:
        try:
            model, average = tree["parts"][0]["model"], tree["average"]
            tree = {"model": _core_alone(model), "ema": _core_alone(average)}
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise Problem("the training state is none of this package's") from error
    nested = [key for key, value in tree.items() if isinstance(value, Mapping)]
    plain, means = ([key for key in nested if key in names] for names in (_PLAIN, _AVERAGED))
    chosen = means if averaged and means else plain
    if len(chosen) > 1:
        raise Problem(f"the checkpoint holds several weights{at}, under {chosen}: which to take is not clear")
    if chosen:
        return find_weights(tree[chosen[0]], averaged and not means, (*trail, chosen[0]))
    if means:
        raise Problem(f"the checkpoint holds averaged weights alone, under {means}: add --ema to take them")
    if averaged:
        raise Problem(f"--ema: the checkpoint holds no averaged weights{at}, under one of {list(_AVERAGED)}")
    if not any(isinstance(value, Tensor) for value in tree.values()):
        raise Problem(f"the checkpoint holds no tensors by name{at}: found {list(tree)[:8]}")
    return dict(tree), trail


def _core_alone(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Take the tensors of the tokenizer: a training has more, such as the map of an alignment."""
    return {key: x for key, x in weights.items() if key.startswith("core.")}


def without_wrappers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Give the same with the names that `HieraTokCore` gives; a `Problem` where two become one."""
    plain: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, x in weights.items():
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        while parts and parts[0] in _HOLDERS:
            parts.pop(0)
        name = ".".join(parts)
        if name in plain:
            raise Problem(f"the checkpoint holds {origin[name]!r} and {key!r}, which are both {name!r}")
        plain[name], origin[name] = x, key
    return plain
