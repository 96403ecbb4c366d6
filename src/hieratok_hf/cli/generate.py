"""Make images of classes: one sheet with a labelled column a class, and if asked for, one of previews."""

import math
import re
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.utils import logging
from PIL import Image, ImageDraw, ImageFont

from .. import HieraTokDiTPipeline
from ..evaluation.generation import image_size, number_images
from ..shipped import resolve_model
from ..utils.images import ImageError, encode_image, open_image
from .arguments.generation import sampling_settings
from .command_line import check_batch, find_device, load_or_explain
from .main import parse
from .outputs import check_writable, identify, write_or_explain
from .terminal import Problem, one_line, run_script

COLUMNS, MARGIN, SMALLEST_PANEL = 10, 8, 128
PREVIEWS = 6
FLOW_SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
}
OTHER_SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}


def load_pipeline(name: str, device: str | torch.device, dtype: str) -> HieraTokDiTPipeline:
    """Load the pipeline of a folder, of a name that ships with the package, or of the Hub, in this order."""
    folder = Path(resolve_model(name))
    if folder.is_file():
        raise ValueError("it is a file, not a folder")
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        raise ValueError("it is a model, not a pipeline, which has a model_index.json")
    dtype = getattr(torch, dtype)
    return HieraTokDiTPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True).to(device)


def other_scheduler(pipe: HieraTokDiTPipeline, name: str) -> Any:
    """One of another kind that steps the same noise."""
    config, kind = pipe.scheduler.config, pipe.config.prediction_type
    known = FLOW_SCHEDULERS if kind == "flow_prediction" else OTHER_SCHEDULERS
    if name not in known:
        raise Problem(f"--scheduler must be one of {', '.join(known)} for a pipeline of {kind!r}, got {name!r}")
    scheduler = known[name]
    if kind != "flow_prediction":
        return scheduler.from_config(config, prediction_type=kind)
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if name == "dpm":
        return scheduler.from_config(config, prediction_type=kind, use_flow_sigmas=True, flow_shift=shift)
    return scheduler.from_config(config, shift=shift)


def read_class_ids(pipe: HieraTokDiTPipeline, given: list[str]) -> list[int]:
    """Read the numbers of the classes off names and numbers, each once."""
    labels = [int(x) if re.fullmatch(r"-?\d+", x) and x not in pipe.labels else x for x in given]
    try:
        return list(dict.fromkeys(pipe.get_label_ids(labels))) if labels else list(range(pipe.num_classes))
    except ValueError as error:
        raise Problem(one_line(error).removeprefix("`class_labels`: ")) from error


def read_source(path: Path) -> Image.Image:
    """Read the image to begin with; a `Problem` where it cannot be read."""
    try:
        return open_image(path)
    except ImageError as error:
        raise Problem(f"--image {one_line(error)}") from error


class Previews:
    """A callback for the pipeline that keeps what it shows at some steps, evenly spread."""

    def __init__(self) -> None:
        self.images: dict[str, list[Image.Image]] = {}

    def __call__(self, pipe: HieraTokDiTPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last = pipe.num_timesteps - 1
        if step in {round(i * last / (PREVIEWS - 1)) for i in range(PREVIEWS)}:
            levels = (255 * tensors["preview"].float().cpu()).round().byte()
            self.images.setdefault(f"step {step + 1} of {last + 1}", []).extend(as_images(levels))
        return {}


def class_label(pipe: HieraTokDiTPipeline, key: int) -> str:
    """The first name of a class, as people write it, or its number."""
    return pipe.id2label.get(key, "").split(",")[0].replace("_", " ").strip() or f"class {key}"


def as_images(levels: torch.Tensor) -> list[Image.Image]:
    """Images of levels `(B, 3, H, W)` in uint8."""
    return [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in levels]


def make_images(
    pipe: HieraTokDiTPipeline, ids: list[int], source: Image.Image | None, args: Namespace
) -> tuple[dict[int, list[Image.Image]], Previews | None, float]:
    """Images by class, made of `source` if it is given, previews of the first of each, and the seconds they took."""
    settings = {**sampling_settings(args), "image": source, "strength": args.strength}
    previews = Previews() if args.previews else None
    watched = {"callback_on_step_end": previews, "preview_scales": args.previews} if previews else {}
    # The first images are in batches of their own, which alone are watched.
    numbers = [[row * pipe.num_classes + key for row in rows for key in ids] for rows in ([0], range(1, args.rows))]
    batches = [x[i : i + args.batch_size] for x in numbers for i in range(0, len(x), args.batch_size)]
    images: dict[int, list[Image.Image]] = {key: [] for key in ids}
    start = time.perf_counter()
    for i, batch in enumerate(batches, start=1):
        pipe.set_progress_bar_config(desc=f"batch {i} of {len(batches)}", leave=False)
        more = watched if batch[0] < pipe.num_classes else {}
        for number, image in zip(batch, as_images(number_images(pipe, batch, args.seed, **settings, **more))):
            images[number % pipe.num_classes].append(image)
    return images, previews, time.perf_counter() - start


def wrapped(text: str, font: Any, width: float) -> str:
    """Text in lines of at most a width, where its words allow that."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def make_sheet(labels: list[str], columns: list[list[Image.Image]], sides: Sequence[str] = ()) -> Image.Image:
    """Columns of images under their labels, at most `COLUMNS` beside each other; `sides` are labels of the rows."""
    # An image of few pixels shows them; the last of a column has the size of all.
    width, height = columns[0][-1].size
    factor = max(1, math.ceil(SMALLEST_PANEL / min(width, height)))
    panel = (width * factor, height * factor)
    font = ImageFont.load_default(size=max(16, panel[0] // 16))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [wrapped(label, font, panel[0]) for label in labels]
    boxes = [measure.multiline_textbbox((0, 0), head, font=font) for head in heads]  # left, top, right, bottom
    side_boxes = [measure.textbbox((0, 0), side, font=font) for side in sides]
    cell_width = max(panel[0], *(math.ceil(box[2]) for box in boxes)) + MARGIN
    head_height = max(math.ceil(box[3]) for box in boxes) + MARGIN // 2
    side_width = max((math.ceil(box[2]) + MARGIN for box in side_boxes), default=0)
    band_height = head_height + len(columns[0]) * (panel[1] + MARGIN)
    bands = math.ceil(len(columns) / COLUMNS)
    size = (side_width + min(COLUMNS, len(columns)) * cell_width + MARGIN, bands * band_height + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (head, column) in enumerate(zip(heads, columns)):
        left, top = MARGIN + side_width + i % COLUMNS * cell_width, MARGIN + i // COLUMNS * band_height
        draw.multiline_text((left, top), head, fill="black", font=font)
        for j, image in enumerate(column):
            down = top + head_height + j * (panel[1] + MARGIN)
            sheet.paste(image.resize(panel, Image.Resampling.NEAREST), (left, down))
            if sides and i % COLUMNS == 0:
                draw.text((MARGIN, down + panel[1] // 2), sides[j], fill="black", font=font, anchor="lm")
    return sheet


def save(image: Image.Image, path: Path, option: str) -> Path:
    write_or_explain(option, path, encode_image(image, path.name))
    return path


def run(args: Namespace) -> list[str]:
    """Make and write all that is asked for, and return the lines to print."""
    args.device = find_device(args)
    previews_sheet = args.output.with_name(f"{args.output.stem}_previews.png")
    guarded: dict[str, Any] = {"overwrite": args.overwrite, "inputs": identify([args.image] if args.image else [])}
    check_writable("--output", args.output, **guarded)
    if args.previews:
        check_writable("--previews", previews_sheet, **guarded)
    if args.images:
        check_writable("--images", args.images, folder=True)
    source = read_source(args.image) if args.image else None
    pipe = load_or_explain(load_pipeline, "--model", args.model, args.device, args.dtype)
    if args.scheduler:
        pipe.scheduler = other_scheduler(pipe, args.scheduler)
    ids = read_class_ids(pipe, args.classes)
    labels = [class_label(pipe, key) for key in ids]
    check_batch("--rows", len(ids) * args.rows, image_size(pipe))
    files: dict[tuple[int, int], Path] = {}
    for key, label in zip(ids, labels) if args.images else ():
        stem = f"{key:04}_{re.sub(r'[^0-9A-Za-z-]+', '_', label)}"
        files |= {(key, row): args.images / f"{stem}_{row:03}.png" for row in range(args.rows)}
    for path in files.values():
        check_writable("--images", path, **guarded)
    try:
        images, previews, seconds = make_images(pipe, ids, source, args)
    except (ValueError, RuntimeError, MemoryError) as error:  # torch lacks memory with a RuntimeError
        raise Problem(one_line(error)) from error

    lines = [f"sheet: {save(make_sheet(labels, list(images.values())), args.output, '--output')}"]
    if previews:
        finals = [column[0] for column in images.values()]
        rows = [*previews.images.values(), finals]
        sheet = make_sheet(labels, [list(column) for column in zip(*rows)], [*previews.images, "image"])
        lines.append(f"previews of {args.previews} scales: {save(sheet, previews_sheet, '--previews')}")
    for (key, row), path in files.items():
        lines.append(f"image: {save(images[key][row], path, '--images')}")
    count = len(ids) * args.rows
    more = ", previews included" if previews else ""
    lines.append(
        f"{count} image{'s' * (count > 1)} in {seconds:.1f} s{more}: {count / seconds:.2f} images/s on {args.device}"
    )
    return lines


def main(argv: list[str] | None = None) -> int:
    args = parse("generate", argv)
    logging.disable_progress_bar()  # of loading
    return run_script(run, args)
