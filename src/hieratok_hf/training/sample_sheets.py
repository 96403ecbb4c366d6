"""Sheets of images to look at while a model trains: those that a tokenizer makes of others, or a generator."""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ..data.image_dataset import Images, Row, decode_ahead
from ..evaluation.metrics import psnr
from ..models.core import HieraTokCore
from ..pipelines.pipeline_hieratok_dit import HieraTokDiTPipeline
from ..utils.images import ImageError, from_uint8, to_uint8

__all__ = ["class_grid", "images_for_sheet", "label_sheet", "sample_grid"]

_GAP = 2


def images_for_sheet(images: Images, size: int, count: int = 8) -> Tensor:
    """
    Load `count` images from all over the data, and the first of a stream, `(count, 3, size, size)` in [-1, 1],
    centre-cropped, without those among them that cannot be decoded; `ImageError` where no image of the data can.
    """
    rows = enumerate(images) if images.streaming else _spread(images, count)
    decoded = decode_ahead(iter(lambda: list(islice(rows, count)), []), (size, size), threads=4)
    for batch in decoded:
        if len(batch["levels"]):
            return from_uint8(batch["levels"].permute(0, 3, 1, 2))
    raise ImageError(f"{images.source}: no image can be decoded.")


@torch.no_grad()
def sample_grid(core: HieraTokCore, pixel_values: Tensor, step: int, latents: Tensor | None = None) -> Image.Image:
    """
    Show each image of `pixel_values` `(B, 3, H, W)` in [-1, 1] in a row: the image, then what every scale decodes of
    its latent, coarse to fine, at the image's size, with white gaps, below the `step` and beside the PSNR. `core` is
    on the device of the images; it encodes them where `latents` `(B, C, h, w)` are not given.
    """
    size = pixel_values.shape[2:]
    scales = core.decode_scales(core.encode(pixel_values).mode() if latents is None else latents)
    # Nearest, so that a coarse scale shows as coarse as it is; its last cell may reach beyond the image.
    columns = [pixel_values]
    for image, factor in zip(scales, core.config.scale_factors):
        columns.append(F.interpolate(image, scale_factor=factor, mode="nearest")[..., : size[0], : size[1]])
    sheet = _sheet(torch.stack(columns, dim=1))  # (B, scales + 1, 3, H, W)
    decibels = psnr(columns[-1].float(), pixel_values.float()).tolist()
    title = f"step {step}: PSNR {sum(decibels) / len(decibels):.2f} dB"
    names = ["image", *(f"1/{factor}" for factor in core.config.scale_factors)]
    return label_sheet(sheet, title, [f"{number:.1f} dB" for number in decibels], names)


def class_grid(
    pipe: HieraTokDiTPipeline, steps: int, guidance_scale: float, seed: int, *, rows: int = 4, classes: int = 10
) -> Image.Image:
    """
    Show `rows` images of each of the first `classes`, a column a class, with white gaps; the noise is the same
    whatever the weights.
    """
    labels = list(range(min(classes, pipe.num_classes))) * rows
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipe(labels, steps, guidance_scale, generator=generator, output_type="pt").images
    return _sheet((2 * images - 1).unflatten(0, (rows, -1)))


def _spread(images: Images, count: int) -> Iterator[tuple[int, Row]]:
    """Give all rows with their indices, `count` at a time from all over the data, which may be sorted by class."""
    step = -(-len(images) // count)
    for first in range(step):
        for index in range(first, len(images), step):
            yield index, images[index]


def label_sheet(sheet: Image.Image, title: str, rows: list[str], columns: list[str]) -> Image.Image:
    """Write a title and the names of its columns above a sheet, and those of its rows on the left."""
    font = ImageFont.load_default(max(10, sheet.height // len(rows) // 16))
    line, above = sum(font.getmetrics()), _GAP + 2 * sum(font.getmetrics())
    width = max(sheet.width + max(map(font.getlength, rows)) + 2 * _GAP, font.getlength(title))
    labelled = Image.new("RGB", (math.ceil(width), above + sheet.height), "white")
    left = labelled.width - sheet.width
    labelled.paste(sheet, (left, above))
    draw = ImageDraw.Draw(labelled)
    draw.text((0, 0), title, "black", font)
    for index, name in enumerate(columns):
        draw.text((left + index * (sheet.width + _GAP) // len(columns), line), name, "black", font)
    for index, name in enumerate(rows):
        draw.text((0, above + index * (sheet.height + _GAP) // len(rows)), name, "black", font)
    return labelled


def _sheet(cells: Tensor) -> Image.Image:
    """Join images `(rows, columns, 3, H, W)` in [-1, 1] with white gaps."""
    padded = F.pad(cells, (0, _GAP, 0, _GAP), value=1.0)
    sheet = padded.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (rows * H, columns * W, 3)
    levels = to_uint8(sheet[:-_GAP, :-_GAP]).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(levels))
