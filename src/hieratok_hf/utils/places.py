"""Name what a machine holds without telling where on the machine it lies."""

import re
from typing import Any

__all__ = ["line", "place"]


def line(value: Any) -> str:
    """Put text on one line, of characters that can be seen and written."""
    return "".join(character for character in " ".join(str(value).split()) if character.isprintable())


def place(name: Any) -> str:
    """Shorten a path that tells of the machine to its last part, of a shard to the folder's name and that."""
    text = line(name)
    parts = re.split(r"[/\\]+", text)
    if ".." not in parts and not re.fullmatch(r"|~.*|.*:", parts[0]):
        return text
    return "/".join([part for part in parts if part not in ("", "..")][-2 if text.endswith(".tar") else -1 :])
