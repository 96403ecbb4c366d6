"""Encode images and decode them again: one sheet an image with every scale, and a table of the figures."""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from tqdm import tqdm

from .. import AutoencoderHieraTok, HieraTokImageProcessorPil, open_image
from ..evaluation.metrics import SSIM_WINDOW, psnr, ssim
from ..models.autoencoder_adapter import load_codec
from ..models.losses import image_pyramid
from ..utils.extras import missing_extra
from ..utils.files import write_whole
from ..utils.images import IMAGE_SUFFIXES, encode_image
from .arguments.images import LARGEST_PANEL
from .command_line import find_device, load_or_explain
from .main import parse
from .outputs import check_writable, identify, write_report
from .terminal import Problem, align_table, one_line, run_script, tell_failures

BUNDLED = Path(__file__).parents[1] / "example_images"
SHEET = "_reconstruction"
MARGIN = 8
SMALLEST_PANEL = 256
AMPLIFY = 4
HEADER = ("image", "size", "PSNR dB", "SSIM", "latent", "compression (numbers)", "encode s", "decode s")


def find_images(sources: list[Path]) -> list[Path]:
    """Files as they are, and folders' images in a fixed order, without hidden files and sheets made earlier."""
    paths: list[Path] = []
    for source in sources:
        if not source.is_dir():
            paths.append(source)
            continue
        for path in sorted(source.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if path.suffix.lower() in IMAGE_SUFFIXES and not (hidden or path.is_dir() or path.stem.endswith(SHEET)):
                paths.append(path)
    return list(dict.fromkeys(paths))


def load_model(name: str, device: str | torch.device, dtype: str) -> AutoencoderHieraTok:
    """The model of a folder, of a name that ships with the package, or of the Hub, in this order; a pipeline's VAE."""
    if Path(name).is_file():
        raise ValueError("it is a file, not a folder")
    model = load_codec(name, device, getattr(torch, dtype)).model
    if not isinstance(model, AutoencoderHieraTok):
        raise ValueError(f"it holds {type(model).__name__}, not AutoencoderHieraTok")
    return model


def enable_advised_tiling(vae: AutoencoderHieraTok) -> None:
    """Switch on tiles of the side that a model was trained to, beyond which they are the better images and faster."""
    if vae.config.sample_size <= vae.tile_sample_min_height:
        vae.enable_tiling()


def timed(function: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> tuple[Any, float]:
    """The result of `function(tensor)` and the seconds that it took, to the end of the device's work."""
    start = time.perf_counter()
    result = function(tensor)
    torch.get_device_module(tensor.device).synchronize()
    return result, time.perf_counter() - start


def has_ssim() -> bool:
    """Tell whether torchmetrics, which computes the SSIM, is installed."""
    return find_spec("torchmetrics") is not None


@torch.inference_mode()
def encode_and_decode(
    image: Image.Image, vae: AutoencoderHieraTok, size: int | None = None
) -> tuple[list[Image.Image], list[Image.Image], torch.Tensor, dict[str, Any]]:
    """
    Encode an image and decode it.

    Returns:
        The encoded image at the size of every scale, coarse to fine; the decoded images; the latents `(1, C, h, w)`;
        and the figures.
    """
    processor = HieraTokImageProcessorPil(size_divisor=vae.spatial_compression_ratio)
    if size:
        crop_size = {"height": min(size, image.height), "width": min(size, image.width)}
        original = processor(image, do_center_crop=True, crop_size=crop_size, return_tensors="pt").pixel_values
    else:
        original = processor(image, return_tensors="pt").pixel_values  # (1, 3, H, W)

    latents, encode_seconds = timed(lambda x: vae.encode(x).latent_dist.mode(), original.to(vae.device, vae.dtype))
    decoded, decode_seconds = timed(lambda z: vae.decode(z, return_scales=True).scales, latents)  # coarse to fine
    decoded = [scale.float().cpu() for scale in decoded]
    originals = image_pyramid(original, vae.core.config)

    height, width = original.shape[2:]
    figures = {
        "width": width,
        "height": height,
        "psnr_db": psnr(decoded[-1], original).item(),
        "scales_psnr_db": [psnr(*pair).item() for pair in zip(decoded, originals)],
        "ssim": ssim(decoded[-1], original).item() if has_ssim() and min(height, width) >= SSIM_WINDOW else None,
        "latent_shape": list(latents.shape[1:]),
        "compression": original.numel() / latents.numel(),
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
    }
    first, second = (
        [cast(Image.Image, processor.postprocess(pixels)[0]) for pixels in scales] for scales in (originals, decoded)
    )
    return first, second, latents, figures


def amplify_difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """Levels of `AMPLIFY` times the distance of two images of one size."""
    return ImageChops.difference(first, second).point(lambda level: min(255, AMPLIFY * level))


def reconstruct(path: Path, vae: AutoencoderHieraTok, args: Namespace) -> tuple[Image.Image, dict[str, Any]]:
    """The sheet and the figures of one image."""
    originals, decoded, _, figures = encode_and_decode(open_image(path), vae, args.size)
    rows = [
        [
            (f"original: {original.width} x {original.height}", original),
            (f"decoded: {decibels:.2f} dB", made),
            (f"difference x{AMPLIFY}", amplify_difference(original, made)),
        ]
        for original, made, decibels in zip(originals, decoded, figures["scales_psnr_db"])
    ]
    return make_sheet(rows, args.full), {"image": str(path), **figures}


def make_sheet(rows: list[list[tuple[str, Image.Image]]], full: bool) -> Image.Image:
    """Labelled panels, a row a scale at its own size, as far as the last and largest has a handy one."""
    largest = max(rows[-1][0][1].size)
    factor = max(1.0, SMALLEST_PANEL // largest)
    if not full:
        factor = min(factor, LARGEST_PANEL / largest)
    resampling = Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST
    panels = [
        [image.resize([max(1, round(side * factor)) for side in image.size], resampling) for _, image in row]
        for row in rows
    ]
    font = ImageFont.load_default(size=max(16, round(largest * factor) // 28))
    boxes = [font.getbbox(label) for row in rows for label, _ in row]  # left, top, right, bottom
    cell_width = max(panels[-1][0].width, *(math.ceil(box[2]) for box in boxes)) + MARGIN
    label_height = max(math.ceil(box[3]) for box in boxes) + MARGIN // 2
    height = sum(label_height + row[0].height + MARGIN for row in panels)
    sheet = Image.new("RGB", (len(rows[0]) * cell_width + MARGIN, height + MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for row, row_panels in zip(rows, panels):
        for column, ((label, _), panel) in enumerate(zip(row, row_panels)):
            left = MARGIN + column * cell_width
            draw.text((left, top), label, fill="black", font=font)
            sheet.paste(panel, (left, top + label_height))
        top += label_height + row_panels[0].height + MARGIN
    return sheet


def choose_unused_name(stem: str, used: set[str]) -> str:
    """The file name of a sheet, unlike those in `used`, to which it is added."""
    names = (f"{stem}{'' if i == 1 else f'-{i}'}{SHEET}.png" for i in range(1, len(used) + 2))
    name = next(name for name in names if name.casefold() not in used)  # some file systems ignore case
    used.add(name.casefold())
    return name


def table(results: list[dict[str, Any]]) -> str:
    """The figures in aligned columns, a line an image."""
    rows = [
        (
            repr(figures["image"])[1:-1],  # line breaks in a name would break the table
            f"{figures['width']} x {figures['height']}",
            f"{figures['psnr_db']:.2f}",
            f"{figures['ssim']:.4f}" if figures["ssim"] is not None else "-",
            " x ".join(map(str, figures["latent_shape"])),
            f"{figures['compression']:.1f}x",
            f"{figures['encode_seconds']:.3f}",
            f"{figures['decode_seconds']:.3f}",
        )
        for figures in results
    ]
    return align_table([HEADER, *rows])


def mean_of(results: list[dict[str, Any]], key: str) -> float | None:
    """The mean of a figure over the images that have it, if any has; over finite ones, if any is."""
    values = [figures[key] for figures in results if figures[key] is not None]
    finite = [value for value in values if math.isfinite(value)] or values
    return sum(finite) / len(finite) if finite else None


def run(args: Namespace) -> tuple[list[str], int]:
    """Write the sheets, and return the lines to print and the exit status, 1 where an image failed."""
    args.device = find_device(args)
    sources = args.images or [BUNDLED]
    if not (paths := find_images(sources)):
        raise Problem(f"no images found in {', '.join(repr(str(source)) for source in sources)}")
    used: set[str] = set()
    sheets = [args.output / choose_unused_name(path.stem, used) for path in paths]
    check_writable("--output", args.output, folder=True)
    inputs = identify(paths)
    for sheet in sheets:
        if not sheet.is_dir():  # that is told as a failure of the one image
            check_writable("--output", sheet, overwrite=args.overwrite, inputs=inputs)
    if args.json:
        check_writable("--json", args.json, overwrite=args.overwrite, inputs=inputs | identify(sheets))
        if args.json.absolute() in [sheet.absolute() for sheet in sheets]:
            raise Problem(f"--json {str(args.json)!r} is the name of a sheet: take another name")
    vae = load_or_explain(load_model, "--model", args.model, args.device, args.dtype)
    if args.size and args.size < vae.spatial_compression_ratio:
        least = vae.spatial_compression_ratio
        raise Problem(f"--size must be at least the model's patch size {least}, got {args.size}")
    if not args.whole:
        enable_advised_tiling(vae)

    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for path, output in zip(tqdm(paths, unit="image", disable=len(paths) < 2), sheets):
        try:
            sheet, figures = reconstruct(path, vae, args)
            content = encode_image(sheet, output.name)
            with write_whole(output) as file:
                file.write(content)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch lacks memory with a RuntimeError
            failures[str(path)] = one_line(error).removeprefix(f"{str(path)!r}: ")
        else:
            results.append({**figures, "output": str(output)})

    mean = {key: mean_of(results, key) for key in ("psnr_db", "ssim")}
    lines = []
    if results:
        means = f"PSNR {mean['psnr_db']:.2f} dB" + ("" if mean["ssim"] is None else f", SSIM {mean['ssim']:.4f}")
        if exact := sum(math.isinf(figures["psnr_db"]) for figures in results):
            means += f" (PSNR without {exact} equal to the original)" if exact < len(results) else ""
        lines = [table(results), f"mean of {len(results)}: {means}; sheets in {str(args.output)!r}"]
        largest = max(max(figures["width"], figures["height"]) for figures in results)
        if vae.use_tiling and largest > vae.tile_sample_min_height:
            side = vae.tile_sample_min_height
            lines.append(f"note: in tiles of {side}x{side} pixels, the size of its training; --whole goes without")
        if not has_ssim():
            lines.append(f"note: {missing_extra('SSIM', 'torchmetrics')}")
    tell_failures(failures)
    if args.json:
        settings = {name: getattr(args, name) for name in ("model", "device", "dtype", "size", "whole")}
        write_report(args.json, {**settings, "images": results, "mean": mean, "failures": failures})
    return lines, 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, parse("reconstruct", argv))
