"""Griffe's extension for Hugging Face's docstrings: types of Google's sections without backticks and defaults."""

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"^( +[\w, ]+) \((`.+?)(, defaults to `[^`]*`)?\):", re.MULTILINE)


class HuggingFaceTypes(griffe.Extension):
    """Let griffe, which prints types as they stand and defaults of its own, read `name (`type`, defaults to ...)`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the entries of a docstring's sections."""
        if obj.docstring is not None:
            obj.docstring.value = _ENTRY.sub(
                lambda entry: f"{entry[1]} ({entry[2].replace('`', '')}):", obj.docstring.value
            )
