"""Take numbers as people have them: of Python, of numpy, or in a tensor."""

import math
import operator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

__all__ = ["plain_numbers", "real_number", "whole_number"]


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """
    Convert whatever `operator.index` takes to an `int`.

    Args:
        name (`str`): Name of the argument in the error.
        value (`Any`): A whole number, but no truth value.
        least, most (`int`): Smallest and largest number that will do; no limit where `most` is `None`.

    Raises:
        ValueError: `value` is no such number.
    """
    number = value if type(value) is int else None
    if number is None and not isinstance(value, bool) and getattr(value, "dtype", None) != torch.bool:
        with suppress(TypeError, ValueError, RuntimeError):  # tensors raise all three
            number = operator.index(value)
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be a whole number {limits}, got {value!r}.")
    return number


def real_number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """
    Convert a finite number to a `float`.

    Args:
        name (`str`): Name of the argument in the error.
        value (`Any`): A number, but no text and no truth value.
        least, most (`float`): Smallest and largest number that will do.

    Raises:
        ValueError: `value` is no such number.
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        limits = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"`{name}` must be a finite number {limits}, got {value!r}.")
    return number


def plain_numbers(value: Any) -> Any:
    """Turn numbers and arrays of numpy and PyTorch, also those in lists and dictionaries, into Python's."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(plain_numbers(item) for item in value)
    return {key: plain_numbers(item) for key, item in value.items()} if type(value) is dict else value
