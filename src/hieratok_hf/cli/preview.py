"""Show the images of an archive of latents on one sheet, decoded by the first scales alone."""

from argparse import Namespace
from itertools import islice

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..data.latent_archive import decode_record
from ..utils.images import encode_image
from .decode import open_archive
from .main import parse
from .outputs import check_writable, write_or_explain
from .terminal import Problem, one_line, run_script

MARGIN, LABEL, FONT_SIZE = 8, 16, 11


def make_sheet(records: list[tuple[str, Image.Image]], columns: int, side: int) -> Image.Image:
    """Lay images out in rows, each in a square with its name below it, of a long one the end."""
    columns = min(columns, len(records))
    rows = -(-len(records) // columns)
    width, height = side + MARGIN, side + LABEL + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE)
    for index, (name, image) in enumerate(records):
        left, top = MARGIN + index % columns * width, MARGIN + index // columns * height
        factor = side / max(image.size)
        panel = image.resize([max(1, round(length * factor)) for length in image.size], Image.Resampling.BICUBIC)
        sheet.paste(panel, (left + (side - panel.width) // 2, top + (side - panel.height) // 2))
        name = label = repr(name)[1:-1]  # a line break would not stay within its line
        while name and font.getlength(label) > side:
            name = name[1:]
            label = f"...{name}"
        draw.text((left, top + side), label, fill="black", font=font)
    return sheet


def run(args: Namespace) -> list[str]:
    """Write the sheet, and return the line to print."""
    archive, codec = open_archive(args)
    if not archive.records:
        raise Problem(f"ARCHIVE {str(args.archive)!r} holds no images")
    check_writable("SHEET", args.sheet, overwrite=args.overwrite)
    scales = args.num_scales
    if scales is None and codec.core is not None and codec.core.config.scale_causal:
        scales = -(-len(codec.core.config.scale_factors) // 2)
    count = min(args.max_images, len(archive))
    shown = tqdm(islice(archive, count), total=count, unit="image", dynamic_ncols=True, leave=False)
    try:
        records = [(record.name, decode_record(codec, record, latent, scales)) for record, latent in shown]
        content = encode_image(make_sheet(records, args.columns, args.side), args.sheet.name)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch lacks memory with a RuntimeError
        message = f"ARCHIVE {str(args.archive)!r} cannot be shown on {str(args.sheet)!r}: {one_line(error)}"
        raise Problem(message) from error
    write_or_explain("SHEET", args.sheet, content)
    return [f"{count} of {len(archive)} images on {str(args.sheet)!r}"]


def main(argv: list[str] | None = None) -> int:
    return run_script(run, parse("preview", argv))
