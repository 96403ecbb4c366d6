"""JSON files that say what lies beside them: of a known format, with entries that a schema checks, and a checksum."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.files import read_json, remove_leftovers, write_whole

__all__ = ["Settings", "checksum_of", "is_count", "is_number", "is_text", "read_manifest", "settle", "write_manifest"]

Settings = dict[str, Any]
"""Entries of a manifest."""

Schema = dict[str, Callable[[Any], bool]]
"""Functions that tell, by the name of an entry, whether its value is valid."""


def is_count(least: int) -> Callable[[Any], bool]:
    """Make a check for a whole number from `least` on."""
    return lambda value: type(value) is int and least <= value < 2**40


def is_text(value: Any) -> bool:
    """Tell whether a value is text."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Tell whether a value is a number of a size that a model may work with."""
    return type(value) in (int, float) and abs(value) < 1e9


def checksum_of(settings: Settings) -> str:
    """Compute a CRC-32 of entries in any order."""
    return f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"


def write_manifest(path: Path, settings: Settings) -> None:
    """Write a manifest with a checksum of its entries, whole or not at all."""
    content = json.dumps({**settings, "checksum": checksum_of(settings)}, indent=1) + "\n"
    with write_whole(path) as file:
        file.write(content.encode())


def settle(path: Path, what: str, old: Settings | None, new: Settings) -> None:
    """
    Write the manifest of a folder of shards, which is made. `ValueError` where the `old` one, if there is one, is
    that of another `what`, or where there are shards without one.
    """
    folder, names = path.parent, {**(old or {}), **new}
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if old is None and any(folder.glob("shard-*")):
        raise ValueError(f"{str(folder)!r} holds shards, but no {path.name} that says what they are.")
    if old is not None and (differing := [name for name in names if old.get(name) != new.get(name)]):
        told = {name: f"{name} {old.get(name)!r}, not {new.get(name)!r}" for name in differing}
        told |= {"buckets": "other buckets"} if "buckets" in differing else {}
        raise ValueError(f"{str(folder)!r} holds another {what}: {'; '.join(told.values())}.")
    write_manifest(path, new)


def read_manifest(path: Path, what: str, version: int, schema: Schema) -> Settings:
    """
    Read a manifest whose `format` is a `version`, with checked entries. `FileNotFoundError` says that its folder is
    no `what`; `ValueError`, that it is of another format, damaged, or changed by hand.
    """
    settings = read_json(path)
    if settings is None:
        raise FileNotFoundError(f"{str(path.parent)!r} is no {what}: it has no {path.name}.")
    if (got := settings.get("format")) != version:
        raise ValueError(f"{str(path)!r} must have the format {version}, got {got!r}; write it anew.")
    found = settings.pop("checksum", None)
    wrong = [name for name, is_valid in schema.items() if name not in settings or not is_valid(settings[name])]
    if wrong or found != checksum_of(settings):
        reason = f"it has no valid {wrong[0]!r}" if wrong else "its checksum is another"
        raise ValueError(f"{str(path)!r} is damaged: {reason}.")
    return settings
