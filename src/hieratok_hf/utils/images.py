"""Read image files of any mode as upright 8-bit RGB, with one-line errors, and map 8-bit levels to [-1, 1]."""

import contextlib
import io
import os
import stat
import urllib.request
from collections.abc import Callable
from typing import IO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torch import Tensor

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageError",
    "centre_crop",
    "centre_square",
    "convert_to_rgb",
    "decode_image",
    "encode_image",
    "fetch_image",
    "from_uint8",
    "largest_crop",
    "open_image",
    "read_size",
    "to_uint8",
]

# Pillow knows more: EPS is a program that Ghostscript would run, and an ICO is decoded before its size is known.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
IMAGE_SUFFIXES = frozenset(
    {".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
"""How names of files end, in lower case, in the formats that are read."""

_MOST_BYTES = 200 * 2**20

T = TypeVar("T")


class ImageError(ValueError):
    """Report an image file that cannot be used, by its path and the reason on one line."""


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """
    Make a new image of mode RGB, 8 bits a channel and upright, of an image of any size and mode.

    EXIF orientation is followed and transparency laid on white. Greys of 16 and 32 bits ("I;16*", "I") are scaled from
    0..65535, in a TIFF file of 12 bits from 0..4095, floats ("F") from [0, 1], all rounded to the nearest of 256
    levels. Colour profiles are not applied.

    Raises:
        ValueError: An "I" or "F" image has values outside those ranges, or Pillow cannot convert the mode.
        OSError: The image's file is cut short.
    """
    if not image.width or not image.height:
        raise ValueError(f"image must have pixels, got {image.width} x {image.height}")
    image.load()
    tags = getattr(image, "tag_v2", {})  # of a TIFF file; Pillow heeds them where a channel has 8 bits
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # Pillow's EXIF parser raises several types on broken metadata around intact pixels
        image = image.copy()
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip at 255 and turn a 16-bit image white
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        values, top = np.asarray(image), 1 if image.mode == "F" else 2 ** min(bits, 16) - 1
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= top):  # phrased so that NaN fails
            raise ValueError(f"image of mode {image.mode!r} must hold values in [0, {top}], got [{low}, {high}]")
        levels = np.empty(values.shape, np.uint8)
        for row, made in zip(values, levels):  # the whole in float64 would be eight times as large as the result
            made[:] = np.rint(row.astype(np.float64) * (255 / top))
        if isinstance(key := image.info.get("transparency"), int):
            levels[values == key] = 255
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            levels = 255 - levels
        image = Image.fromarray(levels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path: str | os.PathLike[str], *, max_pixels: int = 50_000_000) -> Image.Image:
    """
    Read an image file (of several frames the first) as `convert_to_rgb` makes it, and close the file.

    Args:
        path (`str` or `os.PathLike`): A regular file in PNG, JPEG, WebP, BMP, TIFF or GIF.
        max_pixels (`int`, defaults to 50 million): An image of more pixels is refused before it is decoded,
            and a file of more than 16 bytes a pixel of that number, and 16 MiB, before it is looked into.

    Raises:
        ImageError: The file is missing, a folder, empty, unreadable, no image, too large or damaged.
    """
    return _open(path, max_pixels, convert_to_rgb)


def decode_image(data: bytes, name: str, *, max_pixels: int = 50_000_000) -> Image.Image:
    """Read the image in a file's content as `open_image` does; in an `ImageError`, `name` stands for the path."""
    return _decode(data, name, max_pixels, convert_to_rgb)


def read_size(file: str | os.PathLike[str] | bytes, name: str = "") -> tuple[int, int]:
    """
    Read the height and width in pixels that an image has upright from a file's header, without decoding the image.

    Args:
        file (`str`, `os.PathLike` or `bytes`): A path as that of `open_image`, or the content of a file.
        name (`str`): The name of a content in messages.

    Raises:
        ImageError: The header cannot be read, or `open_image` would refuse the image before it is decoded.
    """
    most = 50_000_000
    return _decode(file, name, most, _upright_size) if isinstance(file, bytes) else _open(file, most, _upright_size)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    orientation = None
    if not hasattr(image, "tag_v2"):  # of a TIFF file Pillow gives the upright size
        with contextlib.suppress(Exception):  # as in `convert_to_rgb`
            # Not a PNG image's own, which decodes the image to look behind it.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return image.size if orientation in (5, 6, 7, 8) else image.size[::-1]


def _open(path: str | os.PathLike[str], max_pixels: int, convert: Callable[[Image.Image], T]) -> T:
    name = _shown(os.fspath(path))
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            raise ImageError(f"{name}: is a {'folder' if stat.S_ISDIR(info.st_mode) else 'device'}, not a file")
        if info.st_size == 0:
            raise ImageError(f"{name}: is empty (0 bytes)")
        file = open(path, "rb")  # noqa: SIM115 (closed by the block below, whose errors are others)
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError of a name that no system takes
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', error)})") from error
    with file:
        return _convert(file, name, max_pixels, convert)


def _decode(data: bytes, name: str, max_pixels: int, convert: Callable[[Image.Image], T]) -> T:
    if not data:
        raise ImageError(f"{_shown(name)}: is empty (0 bytes)")
    return _convert(io.BytesIO(data), _shown(name), max_pixels, convert)


def encode_image(image: Image.Image, name: str, *, quality: int = 95) -> bytes:
    """
    Give the content of an image's file in the format that its `name` ends with; the same for the same image.

    Args:
        image (`PIL.Image.Image`): An image of mode RGB.
        name (`str`): A name of a file, as `"photo.jpg"`.
        quality (`int`, defaults to 95): Quality of JPEG, in full colour resolution, and of WebP, from 1 to 100. A GIF
            has 256 colours, and every other format is without loss.

    Raises:
        OSError, ValueError: The format cannot hold an image of that size.
    """
    kind = Image.registered_extensions()[os.path.splitext(name)[1].lower()]
    kind = kind.replace("DIB", "BMP")  # headed as files are
    options: dict[str, int] = {"quality": quality} if kind in ("JPEG", "WEBP") else {}
    if kind == "JPEG":
        options["subsampling"] = 0
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def fetch_image(url: str, *, max_pixels: int = 50_000_000) -> Image.Image:
    """Read an image from a URL as `open_image` does from a file.

    Args:
        url: begins with `http://`, `https://` or `data:`.
        max_pixels: as that of `open_image`.
    Returns:
        A fully loaded image of mode RGB, see `convert_to_rgb`.
    Raises:
        ImageError: nothing is found there, or more than 200 MiB, or no image that `decode_image` reads.
    """
    import httpx  # as long as all else that the package imports

    name = url if len(url) <= 100 else f"{url[:97]}..."
    data = bytearray()
    try:
        if url.startswith("data:"):
            with urllib.request.urlopen(url) as answer:
                data += answer.read()
        else:
            with httpx.stream("GET", url, timeout=60, follow_redirects=True) as answer:
                answer.raise_for_status()
                for part in answer.iter_bytes():
                    data += part
                    if len(data) > _MOST_BYTES:
                        break
    except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name!r}: cannot be fetched ({reason})") from error
    if len(data) > _MOST_BYTES:
        raise ImageError(f"{name!r}: has more than {_MOST_BYTES // 2**20} MiB")
    return decode_image(bytes(data), name, max_pixels=max_pixels)


def _shown(name: str | bytes) -> str:
    """Give a name for a message, on one line whatever it holds, and short where it is no name but a content."""
    return repr(name if len(name) <= 1000 else name[:1000]) + "..." * (len(name) > 1000)


def _convert(file: IO[bytes], name: str, max_pixels: int, convert: Callable[[Image.Image], T]) -> T:
    try:
        if (size := file.seek(0, io.SEEK_END)) > 16 * max_pixels + 2**24:  # Pillow reads a WebP file whole
            raise Image.DecompressionBombError(f"{size} bytes")
        file.seek(0)
        image = Image.open(file, formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        return convert(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: is too large for max_pixels={max_pixels} ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: is no image in a format that is read here: {', '.join(_FORMATS)}") from error
    except Exception as error:  # Pillow's plugins raise many types on broken data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded ({reason})") from error


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """Cut the middle square of an image, and resize it bicubically to `size` x `size` pixels unless it is that."""
    return centre_crop(image, (size, size))


def centre_crop(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Cut as much of an image's middle as has the aspect of `shape`, a height and a width, and resize it to that."""
    height, width = map(round, largest_crop(image, shape))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    if (height, width) == shape:
        return image.crop(box)
    return image.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)


def largest_crop(image: Image.Image, shape: tuple[int, int]) -> tuple[float, float]:
    """Give the height and width, not rounded, of the largest rectangle in an image that has the aspect of `shape`."""
    height, width = shape
    if image.width * height <= image.height * width:
        return max(1, image.width * (height / width)), image.width
    return image.height, max(1, image.height * (width / height))


def from_uint8(levels: Tensor) -> Tensor:
    """Turn 8-bit `levels` `(...)` into float32 in [-1, 1]."""
    return levels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Round `images` `(...)` in [-1, 1] to the nearest of 256 levels; values beyond are clamped."""
    return (255 * (images.float() * 0.5 + 0.5).clamp(0, 1)).round().byte()
