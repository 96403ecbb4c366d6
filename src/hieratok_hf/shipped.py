"""Find the trained weights that are part of the package."""

import difflib
import os
from pathlib import Path
from typing import Any

from .models.saved_code import OWN_CODE
from .utils.choices import SHIPPED, SIZES

__all__ = ["example_image", "no_weights", "pretrained", "resolve_model"]

_SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
_SHIPPED_IMAGES = Path(__file__).parent / "example_images"


def pretrained(name: str) -> str:
    """
    Return the folder of weights that ship with the package, for all that takes no name of them.

    The classes of this package take the names themselves, `AutoModel` and others of the libraries take folders.

    `"hieratok-tiny"` and `"hieratok-tiny-16x"` are tokenizers that either library loads, and `"hieratok-dit-tiny"` is
    a `HieraTokDiTPipeline`.

    Args:
        name (`str`): One of `SHIPPED`.

    Raises:
        ValueError: `name` is not one of `SHIPPED`.
        FileNotFoundError: The installation lacks the folder.

    Example:

    ```python
    >>> import hieratok_hf
    >>> from transformers import AutoModel
    >>> model = AutoModel.from_pretrained(hieratok_hf.pretrained("hieratok-tiny"))

    ```
    """
    if name not in SHIPPED:
        raise ValueError(f"`name` must be one of {list(SHIPPED)}, which ship with the package, got {name!r}.")
    folder = _SHIPPED_WEIGHTS / name
    if not any((folder / file).is_file() for file in ("config.json", "model_index.json")):
        raise FileNotFoundError(f"The installed package lacks the weights of {name!r}: {str(folder)!r} is not there.")
    return str(folder)


def example_image(name: str = "hat") -> str:
    """
    Return the file of a photograph that ships with the package, `"hat"` or `"jacket"`, of 256 x 256 pixels.

    Raises:
        ValueError: There is no photograph of that name.
    """
    files = {path.stem: path for path in _SHIPPED_IMAGES.glob("*.webp")}
    if name not in files:
        raise ValueError(f"`name` must be one of {sorted(files)}, which ship with the package, got {name!r}.")
    return str(files[name])


def resolve_model(name_or_path: Any) -> Any:
    """
    Return the folder of a name that ships, unless a folder here has that name, and anything else as it is.

    Code that a folder brings has no weights beside it, so there the names are names of folders or Hub ids alone.

    Raises:
        FileNotFoundError: The installation lacks the folder.
        ValueError: It is a name of `SIZES` that has no trained weights, or nearly one of the names.
    """
    is_name = isinstance(name_or_path, (str, os.PathLike))
    if not is_name or OWN_CODE is not None or Path(name_or_path).is_dir():
        return name_or_path
    name = os.fspath(name_or_path)
    if name in SHIPPED:
        return pretrained(name)
    if name in SIZES:
        raise ValueError(no_weights(name))
    if "/" in name:  # as in an id on the Hub, between owner and name
        return name_or_path
    if near := difflib.get_close_matches(name, (*SHIPPED, *SIZES), n=1, cutoff=0.9):
        raise ValueError(f"There is no folder {name!r} and no model of that name: did you mean {near[0]!r}?")
    return name_or_path


def no_weights(name: str) -> str:
    """Say of a size without trained weights which others have some, and how to make some."""
    return (
        f"{name!r} is a size without trained weights: the package ships those of {', '.join(SHIPPED)}. "
        f"`hieratok train --size {name}` begins with random ones. Weights of hieratok-b can be made of l-DeTok's by "
        "`hieratok convert detok hieratok-b` and then `hieratok train --model hieratok-b --scale_factors 8 4 2 1 "
        "--data IMAGES --output FOLDER`."
    )
