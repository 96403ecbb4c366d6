"""Find classes by number or by name, as people write them."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.numbers import real_number, whole_number

__all__ = ["label_ids", "label_shares", "names_to_ids", "plain_name"]

_SHOWN = 10


def names_to_ids(id2label: Mapping[int, str]) -> dict[str, int]:
    """
    Map the whole name of every class to its number, and every synonym that no other class has. Commas divide synonyms.
    """
    whole = {value.strip(): key for key, value in id2label.items()}
    owners: dict[str, set[int]] = {}
    for key, value in id2label.items():
        for part in value.split(","):
            owners.setdefault(part.strip(), set()).add(key)
    unique = {name: min(keys) for name, keys in owners.items() if len(keys) == 1}
    return {name: key for name, key in {**unique, **whole}.items() if name}


def label_ids(labels: Any, names: Mapping[str, int], num_classes: int) -> list[int]:
    """
    Find the numbers of classes that are given by number or by name.

    Args:
        labels (`int`, `str`, or a sequence or tensor of them): Numbers, or names as `plain_name` compares them. Lists
            in a sequence, as diffusers' pipelines are batched, are taken one after the other.
        names (`Mapping[str, int]`): Numbers by name, as `names_to_ids` gives them.
        num_classes (`int`): Number of classes; their numbers are `0 ... num_classes - 1`.

    Returns:
        `list[int]`: A number for each label.

    Raises:
        ValueError: There is no label, or one is no such class; the message offers the near names.
    """
    if isinstance(labels, str):
        return [_find_name(labels, names)]
    # Bytes are a sequence of numbers, which would pass for classes.
    is_list = isinstance(labels, Sequence | Tensor | np.ndarray) and not isinstance(labels, bytes | bytearray)
    if is_list and getattr(labels, "ndim", 1) > 0:
        if not len(labels):
            raise ValueError("`class_labels` is empty, at least one class is needed.")
        return [key for label in labels for key in label_ids(label, names, num_classes)]
    return [whole_number("class_labels", labels, 0, num_classes - 1)]


def label_shares(labels: Any, names: Mapping[str, int], num_classes: int) -> list[dict[int, float]]:
    """
    Find the classes of each image with their shares, which are 1 in all.

    Args:
        labels: Labels as `label_ids` takes them, where a dictionary of shares by label may stand for a label.
        names, num_classes: As in `label_ids`.

    Returns:
        `list[dict[int, float]]`: The shares above 0 by the number of a class, for each image.

    Raises:
        ValueError: There is no label, one is no such class, or the shares of an image do not add up to 1.
    """
    if isinstance(labels, list | tuple) and labels:
        return [shares for label in labels for shares in label_shares(label, names, num_classes)]
    if not isinstance(labels, Mapping):
        return [{key: 1.0} for key in label_ids(labels, names, num_classes)]
    shares: dict[int, float] = {}
    for label, given in labels.items():
        try:
            share = real_number("class_labels", given, 0, 1)
        except ValueError as error:
            expected = f"the share of {label!r} must be a number from 0 to 1"
            raise ValueError(f"`class_labels`: {expected}, got {given!r}.") from error
        for key in label_ids(label, names, num_classes):
            shares[key] = shares.get(key, 0.0) + share
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"`class_labels`: the shares of an image must add up to 1, got {labels!r}.")
    return [{key: share for key, share in shares.items() if share}]


def _find_name(label: str, names: Mapping[str, int]) -> int:
    # Of ImageNet's classes one is "Cardigan" and another "cardigan".
    if (key := names.get(label.strip())) is not None:
        return key
    known: dict[str, set[int]] = {}
    for name, key in names.items():
        known.setdefault(plain_name(name), set()).add(key)
    plain = plain_name(label)
    keys = sorted(known.get(plain, ()))
    if len(keys) == 1:
        return keys[0]
    if keys:
        raise ValueError(f"`class_labels`: {label!r} is the name of several classes: {keys}; give a number.")
    near = difflib.get_close_matches(plain, known, n=3)
    near += [name for name in known if plain and plain in name and name not in near]
    shown = [name for name in names if plain_name(name) in near[:_SHOWN]] or list(names)[:_SHOWN]
    hint = f"{'did you mean' if near else 'there are'} {', '.join(map(repr, shown))}" if shown else "it has no names"
    raise ValueError(f"`class_labels`: {label!r} is no class of this pipeline; {hint}{'?' if near else '.'}")


def plain_name(name: str) -> str:
    """Normalise a name for comparison: casefold, underscores to spaces, single spaces."""
    return " ".join(name.replace("_", " ").split()).casefold()
