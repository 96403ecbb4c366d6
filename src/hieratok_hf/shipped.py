"""Find the trained weights that are part of the package."""

from pathlib import Path

from .utils.choices import SHIPPED, SIZES

__all__ = ["example_image", "pretrained", "resolve_model"]

_WEIGHTS = Path(__file__).parent / "weights"
_IMAGES = Path(__file__).parent / "example_images"


def pretrained(name: str) -> str:
    """
    Return the folder of weights that ship with the package, for `from_pretrained`.

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
    >>> vae = hieratok_hf.AutoencoderHieraTok.from_pretrained(hieratok_hf.pretrained("hieratok-tiny"))

    ```
    """
    if name not in SHIPPED:
        raise ValueError(f"`name` must be one of {list(SHIPPED)}, which ship with the package, got {name!r}.")
    folder = _WEIGHTS / name
    if not any((folder / file).is_file() for file in ("config.json", "model_index.json")):
        raise FileNotFoundError(f"The installed package lacks the weights of {name!r}: {str(folder)!r} is not there.")
    return str(folder)


def example_image(name: str = "hat") -> str:
    """
    Return the file of a photograph that ships with the package, `"hat"` or `"jacket"`, of 256 x 256 pixels.

    Raises:
        ValueError: There is no photograph of that name.
    """
    files = {path.stem: path for path in _IMAGES.glob("*.webp")}
    if name not in files:
        raise ValueError(f"`name` must be one of {sorted(files)}, which ship with the package, got {name!r}.")
    return str(files[name])


def resolve_model(name_or_path: str) -> str:
    """
    Return the folder of a name that ships, unless a folder here has that name, and anything else as it is.

    Raises:
        ValueError: It is a name of `SIZES` that has no trained weights.
    """
    if Path(name_or_path).is_dir():
        return name_or_path
    if name_or_path in SIZES and name_or_path not in SHIPPED:
        weights = f"the package ships those of {list(SHIPPED)}"
        raise ValueError(f"{name_or_path!r} is a size, of which there are no trained weights; {weights}.")
    return pretrained(name_or_path) if name_or_path in SHIPPED else name_or_path
