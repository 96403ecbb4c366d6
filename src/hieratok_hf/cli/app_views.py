"""Make what `hieratok app` shows of an image: reconstructions, what they lack, and a JPEG file of the same size."""

import io
import os
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from .. import AutoencoderHieraTok, HieraTokImageProcessorPil
from ..data.archive_shards import FILE_FORMATS, TOKENS_FORMAT, ImageRecord
from ..evaluation.metrics import psnr
from ..models.quantizing import LatentQuantizer
from ..utils.images import ImageError, decode_image
from .reconstruct import AMPLIFY, amplify_difference, encode_and_decode
from .terminal import one_line

MAX_BYTES, MAX_PIXELS, MAX_SIDE = 20 * 2**20, 32_000_000, 768
BITS = 8  # they cost the reconstruction 0.01 dB, so the one that is shown is that of the file; 6 bits cost 0.2 dB
MOST_QUALITY = 95  # Pillow advises against more


class Refused(Exception):
    """A file or a setting of a visitor that cannot be used; the message is for them."""


class Photo(NamedTuple):
    """
    Hold an image that the page was given.

    Attributes:
        name (`str`): The name of its file, without folders.
        size (`str`): One line that says what it was and, if so, that it was made smaller.
        image (`Image`): Itself, upright and in RGB, with sides of at most `MAX_SIDE` pixels.
    """

    name: str
    size: str
    image: Image.Image


class Views(NamedTuple):
    """
    Hold what the page shows of an image.

    Attributes:
        images: The image and all that may stand beside it, of one size, each with a line that says what it is.
        choices: The name of each of those but the image, and its index.
        table (`str`): Figures, as a table in Markdown.
    """

    images: list[tuple[Image.Image, str]]
    choices: list[tuple[str, int]]
    table: str


def read_photo(path: str | None) -> Photo:
    """
    Read a file that a visitor sent.

    Raises:
        Refused: There is none, or it is too large, no image, or damaged; the message has its name without the folders.
    """
    if path is None:
        raise Refused("There is none")
    name = Path(path).name
    try:
        if (size := os.stat(path).st_size) > MAX_BYTES:
            limit = f"the limit of {MAX_BYTES / 2**20:.0f} MB"
            raise Refused(f"{name!r}: is too large for {limit} ({size / 2**20:.1f} MB)")
        image = decode_image(Path(path).read_bytes(), name, max_pixels=MAX_PIXELS)
    except OSError as error:
        raise Refused(f"{name!r}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        limit = f"the limit of {MAX_PIXELS / 1e6:.0f} megapixels"
        raise Refused(str(error).replace(f"max_pixels={MAX_PIXELS}", limit)) from error
    width, height = image.size
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    smaller = f", made smaller: {image.width} x {image.height}" if image.size != (width, height) else ""
    return Photo(name, f"{width} x {height} pixels{smaller}", image)


def to_pixels(image: Image.Image) -> torch.Tensor:
    return HieraTokImageProcessorPil(size_divisor=1)(image, return_tensors="pt").pixel_values


def count_stored_bytes(
    latents: torch.Tensor, size: tuple[int, int], quantizer: LatentQuantizer | None
) -> tuple[int, str]:
    """
    Count the bytes of the file that `hieratok encode` makes of an image alone, and name its options.

    They are integers of `BITS` bits, compressed, and of a model without levels for them float16.

    Args:
        latents: Latents `(1, C, h, w)`.
        size: Width and height of the image.
        quantizer: The levels of the model, if it has any.
    """
    record = ImageRecord("image.png", *size, (0, 0, *size))
    if quantizer is None:
        return len(FILE_FORMATS["safetensors"].pack([record], [latents[0].cpu().half()])), ""
    tokens = quantizer.quantize(latents, BITS)[0].cpu().to(torch.uint8)
    return len(FILE_FORMATS[TOKENS_FORMAT].pack([record], [tokens])), f" --bits {BITS}"


def save_as_jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def find_jpeg(image: Image.Image, most: int) -> tuple[bytes, int]:
    """Find the JPEG file of the highest quality in at most so many bytes; that of quality 1 where none is as small."""
    fitting = bisect_right(range(1, MOST_QUALITY + 1), most, key=lambda quality: len(save_as_jpeg(image, quality)))
    quality = max(1, fitting)
    return save_as_jpeg(image, quality), quality


def in_kilobytes(count: int) -> str:
    return f"{count / 1000:.1f} kB"


def make_views(photo: Photo, vae: AutoencoderHieraTok) -> Views:
    """
    Reconstruct an image at every scale, and compare it with a JPEG file of as many bytes as its latent takes.

    Raises:
        Refused: The model cannot take the image; the message has the name of its file.
    """
    try:
        (*_, original), scales, latents, figures = encode_and_decode(photo.image, vae)
    except ValueError as error:
        raise Refused(f"{photo.name!r}: {one_line(error)}") from error
    stored, options = count_stored_bytes(latents, original.size, vae.quantizer)
    content, quality = find_jpeg(original, stored)
    jpeg = Image.open(io.BytesIO(content)).convert("RGB")
    told = f"JPEG of {in_kilobytes(len(content))}, quality {quality} of 100"
    if len(content) > stored:
        told += f": the smallest there is, larger than {in_kilobytes(stored)}"
    *coarse, reconstruction = scales
    *coarse_psnr, finest_psnr = figures["scales_psnr_db"]
    views = [
        (original, "original", ""),
        (reconstruction, "reconstruction", f"reconstruction from {in_kilobytes(stored)}, {finest_psnr:.1f} dB"),
        (jpeg, "JPEG of that size", f"{told}, {psnr(to_pixels(jpeg), to_pixels(original)).item():.1f} dB"),
        (amplify_difference(original, reconstruction), "what is lost", f"what is lost, {AMPLIFY} times as strong"),
    ]
    for scale in range(len(coarse), 0, -1):
        image, decibels = coarse[scale - 1], coarse_psnr[scale - 1]
        name = f"scale {scale} of {len(scales)}: {image.width} x {image.height} pixels"
        # A browser would smooth what it enlarges.
        enlarged = image.resize(original.size, Image.Resampling.NEAREST)
        views.append((enlarged, name, f"{name}, {decibels:.1f} dB to the original of that size"))
    given = 3 * original.width * original.height
    channels, height, width = figures["latent_shape"]
    rows = {
        f"`{photo.name}`": photo.size,
        "-": "-",  # what is above this is the head of the table
        "Likeness (PSNR)": f"{figures['psnr_db']:.2f} dB, more is better",
        "Likeness (SSIM)": "-" if figures["ssim"] is None else f"{figures['ssim']:.4f}, 1 is the same",
        "What is given": f"3 x {original.height} x {original.width} = {given:,} numbers",
        "What is kept": f"{channels} x {height} x {width} = {channels * height * width:,} numbers",
        "Fewer numbers": f"{figures['compression']:.1f} times",
        "Size of the file": f"{in_kilobytes(stored)}, by `hieratok encode{options}`",
    }
    return Views(
        [(image, line or name) for image, name, line in views],
        [(name, index) for index, (_, name, _) in enumerate(views) if index],
        "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )
