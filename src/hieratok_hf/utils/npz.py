"""Read and write arrays as NumPy's `.npz` files, of which nothing is unpickled."""

import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from .files import write_whole

__all__ = ["list_npz", "read_npz", "write_npz"]


def list_npz(path: str | os.PathLike[str]) -> list[str]:
    """
    List the names of the arrays in a file.

    Raises:
        ValueError: There is no `.npz` file; the message names it.
    """
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise ValueError("there is no such file")
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)!r} is no .npz file: {error}") from error


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """
    Read those of the arrays `names` that a file holds.

    Raises:
        ValueError: There is no `.npz` file, or an array is damaged, holds Python objects or needs more memory than
            this machine has; the message names the file.
    """
    found, memory = set(list_npz(path)), psutil.virtual_memory().total
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            arrays = {}
            for name in filter(found.__contains__, names):
                if (size := archive.getinfo(f"{name}.npy").file_size) > memory:
                    raise ValueError(f"{name!r} needs {size // 2**30} GiB of memory")
                if not isinstance(array := file[name], np.ndarray):  # but the bytes of some other file
                    raise ValueError(f"{name!r} is no array")
                arrays[name] = array
            return arrays
    except Exception as error:  # zipfile, zlib and NumPy raise many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__  # NumPy goes on with advice
        raise ValueError(f"{os.fspath(path)!r} cannot be read: {reason}") from error


def write_npz(path: str | os.PathLike[str], **arrays: Any) -> None:
    """
    Write arrays to a file, whole or not at all; of the same arrays always the same bytes.

    Raises:
        OSError: The file cannot be written.
    """
    with write_whole(path) as file:
        np.savez(file, **arrays)
