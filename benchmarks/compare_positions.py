"""Reconstruction from 128 to 1024 pixels with positions in cells, in fractions, and with scaled frequencies."""

import copy
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_reconstruction import as_values
from measuring import describe_benchmark, markdown_table, record_report
from PIL import Image
from torch import Tensor

from hieratok_hf import AutoencoderHieraTok, open_image
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.evaluation.metrics import psnr

RESULTS = Path(__file__).parent / "results"
SIZES = ("128", "256", "512", "768x512", "1024")


def centre(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels in the middle of an image."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def at_size(images: list[Path], size: str) -> list[Tensor]:
    """Images of one size, in [-1, 1]: centres, whole ones, or four centres of 512 pixels beside each other."""
    if size == "768x512":
        return [as_values(open_image(path))[None] for path in images]
    side = int(size)
    crops = [as_values(centre(open_image(path), min(side, 512)))[None] for path in images]
    if side <= 512:
        return crops
    rows = [torch.cat([crops[i], crops[i + 1]], dim=3) for i in range(0, len(crops) - 1, 2)]
    return [torch.cat([rows[i], rows[i + 1]], dim=2) for i in range(0, len(rows) - 1, 2)]


def cells(vae: AutoencoderHieraTok, longest: int, trained: int) -> None:
    """Leave the model as it is: a cell is as far from the next in a large image as in a small one."""


def fractions(vae: AutoencoderHieraTok, longest: int, trained: int) -> None:
    """Positions in fractions of each side, in the unit that an image of the trained size has."""
    config = vae.core.config
    config.rotary_scale, config.rotary_coordinates = config.rotary_scale * (trained - 1), "fraction"


def interpolated(vae: AutoencoderHieraTok, longest: int, trained: int) -> None:
    """Positions of larger images squeezed into the range that was trained (Chen et al., arXiv 2306.15595)."""
    vae.core.config.rotary_scale *= min(trained / longest, 1)


def scaled_frequencies(vae: AutoencoderHieraTok, longest: int, trained: int) -> None:
    """Low frequencies lowered for larger images, the highest kept ("NTK-aware", arXiv 2309.00071, section 3.1)."""
    vae.core.config.rotary_base *= max(longest / trained, 1)


def sharper_attention(vae: AutoencoderHieraTok, longest: int, trained: int) -> None:
    """Scores times the ratio of the logarithms of the numbers of tokens (Chiang and Cholak, arXiv 2202.12172)."""
    factor = max(math.log(longest) / math.log(trained), 1)
    for block in [*vae.core.encoder.blocks, *vae.core.decoder.blocks]:
        query = block.attn.to_q if block.attn.norm_q is None else block.attn.norm_q
        for parameter in query.parameters():
            parameter.mul_(factor)


def tiles(vae: AutoencoderHieraTok, longest: int, trained: int) -> None:
    """Tiles of the trained size."""
    vae.enable_tiling(trained * vae.config.patch_size, trained * vae.config.patch_size)


VARIANTS: dict[str, Callable[[AutoencoderHieraTok, int, int], None]] = {
    "cells": cells,
    "fractions": fractions,
    "interpolated": interpolated,
    "scaled_frequencies": scaled_frequencies,
    "sharper_attention": sharper_attention,
    "tiles": tiles,
}


def table(report: dict[str, Any]) -> str:
    """The report as rows of Markdown, PSNR in dB."""
    rows = [
        [variant.replace("_", " "), *(f"{value:.2f}" for value in values.values())]
        for variant, values in report["psnr_db"].items()
    ]
    return markdown_table(f"| | {' | '.join(report['psnr_db']['cells'])} |", rows)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--kodak", required=True, type=Path, help="folder of the Kodak images")
    add("--model", default="hieratok-tiny", help="a name that ships, or a folder")
    add("--trained", type=int, default=256, help="largest side of its training images, in pixels")
    add("--images", type=int, default=24, help="most images to measure on")
    add("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="sizes of the images")
    add("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="kinds of positions")
    add("--json", action="store_true", help="write results/positions_MODEL_KIND.json")
    args = parser.parse_args(argv)
    paths = sorted(args.kodak.glob("*.png"))[: args.images]
    if len(paths) < 4:
        parser.error(f"--kodak must hold four images or more, found {len(paths)} in {str(args.kodak)!r}")
    original = AutoencoderHieraTok.from_pretrained(args.model).eval()
    patch_size = original.config.patch_size

    psnr_db: dict[str, dict[str, float]] = {variant: {} for variant in args.variants}
    for size in args.sizes:
        images = at_size(paths, size)
        for variant in args.variants:
            vae = copy.deepcopy(original)
            VARIANTS[variant](vae, max(images[0].shape[2:]) // patch_size, args.trained // patch_size)
            values = [psnr(vae(image).sample, image).item() for image in images]
            psnr_db[variant][size] = round(statistics.mean(values), 2)
            print(f"{size:8} {variant:20} {psnr_db[variant][size]:6.2f} dB", flush=True)
    report = {
        "machine": describe_benchmark(torch.device("cpu")), "model": args.model, "trained": args.trained,
        "images": len(paths), "psnr_db": psnr_db,
    }  # fmt: skip
    print(table(report) if "cells" in psnr_db else json.dumps(psnr_db))
    if args.json:
        record_report(RESULTS, f"positions_{Path(args.model).name}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
