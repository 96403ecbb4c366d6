"""Sheets of images to look at while a model trains: those that a tokenizer makes of others, or a generator."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..models.core import HieraTokCore
from ..pipelines.pipeline_hieratok_dit import HieraTokDiTPipeline
from ..utils.images import to_uint8

__all__ = ["class_grid", "sample_grid"]

_GAP = 2


@torch.no_grad()
def sample_grid(core: HieraTokCore, pixel_values: Tensor, latents: Tensor | None = None) -> Image.Image:
    """
    Show each image of `pixel_values` `(B, 3, H, W)` in [-1, 1] in a row: the image, then what every scale decodes of
    its latent, coarse to fine, at the image's size, with white gaps. `core` is on the device of the images; it encodes
    them where `latents` `(B, C, h, w)` are not given.
    """
    size = pixel_values.shape[2:]
    scales = core.decode_scales(core.encode(pixel_values).mode() if latents is None else latents)
    # Nearest, so that a coarse scale shows as coarse as it is; its last cell may reach beyond the image.
    columns = [pixel_values]
    for image, factor in zip(scales, core.config.scale_factors):
        columns.append(F.interpolate(image, scale_factor=factor, mode="nearest")[..., : size[0], : size[1]])
    return _sheet(torch.stack(columns, dim=1))  # (B, scales + 1, 3, H, W)


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


def _sheet(cells: Tensor) -> Image.Image:
    """Join images `(rows, columns, 3, H, W)` in [-1, 1] with white gaps."""
    padded = F.pad(cells, (0, _GAP, 0, _GAP), value=1.0)
    sheet = padded.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (rows * H, columns * W, 3)
    levels = to_uint8(sheet[:-_GAP, :-_GAP]).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(levels))
