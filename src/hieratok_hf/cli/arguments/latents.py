"""Name the arguments of the commands that turn images into latents and back, and that describe latents."""

from argparse import Namespace
from pathlib import Path

from ...utils.choices import ARCHIVE_FITS, ARCHIVE_FORMATS, LATENT_DTYPES, TOKEN_BITS
from ..parsing import Parser, add_data, add_device, add_report, positive, whole
from .images import TOKENIZER
from .training import AUTOCAST

FILES = ("keep", "png", "jpeg", "webp")
SHEETS = (".png", ".jpg", ".jpeg", ".webp")


def _add_precision(parser: Parser) -> None:
    text = "run the model under torch.autocast"
    parser.add_argument("--mixed_precision", choices=("no", *AUTOCAST), default="no", help=text)
    add_device(parser)


def _add_archive(parser: Parser) -> None:
    text = "a folder that `hieratok encode` has written, or one file of latents in safetensors"
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help=text)


def _add_model(parser: Parser) -> None:
    parser.add_argument("--model", help=f"{TOKENIZER}; the one that the archive names unless given")


def add_encode(parser: Parser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a folder of images, also in folders below it")
    add("archive", type=Path, metavar="ARCHIVE", help="folder of the archive; one that is begun goes on")
    add("--model", default="hieratok-tiny", help=TOKENIZER)
    add("--format", choices=ARCHIVE_FORMATS, default="safetensors", help="format of the files")
    add("--dtype", choices=LATENT_DTYPES, default="float16", help="dtype of what is stored")
    bits = "store integers of this many bits in the place of latents, compressed, by the levels of the model"
    add("--bits", type=whole(TOKEN_BITS[0], TOKEN_BITS[-1]), help=bits)
    fits = "what to do to sides that are no multiples of the model's patches: continue the border, or take the middle"
    add("--fit", choices=ARCHIVE_FITS, default="pad", help=fits)
    tiles = "encode and decode large images in tiles, in time that grows with their pixels instead of the square"
    add("--tiling", action="store_true", help=tiles)
    add("--shard_size", type=positive, default=128, help="images of a file")
    add("--threads", type=whole(1, 1024), default=4, help="images to read at a time")
    _add_precision(parser)
    parser.contradict("bits", "format", "dtype")

    def check(args: Namespace) -> None:
        if args.dtype not in (dtypes := ARCHIVE_FORMATS[args.format]):
            parser.error(f"--dtype must be one of {', '.join(dtypes)} with --format {args.format}, got {args.dtype}")

    parser.checks.append(check)


def add_fit_quantizer(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="a folder of an autoencoder, which gets the levels as one more file",
    )
    add_data(add, "fitting", required=True)
    add("--max_images", type=positive, default=3000, help="take only the first images of the data")
    add("--size", type=positive, help="side of the middle square; the model's own unless given")
    add("--batch_size", type=positive, default=16, help="images of a batch")
    add("--overwrite", action="store_true", help="replace levels that are there already")
    add_device(parser)


def add_decode(parser: Parser) -> None:
    add = parser.add_argument
    _add_archive(parser)
    add("folder", type=Path, metavar="FOLDER", help="where the images go; a decoding that was killed goes on")
    _add_model(parser)
    add("--num_scales", type=positive, help="run only this many scales, to smaller images; all unless given")
    add("--format", choices=FILES, default="keep", help="format of the images; keep: that of their names")
    add("--quality", type=whole(1, 100), default=95, help="quality of JPEG and WebP")
    add("--overwrite", action="store_true", help="replace files that are there already")
    _add_precision(parser)


def add_preview(parser: Parser) -> None:
    add = parser.add_argument
    _add_archive(parser)
    add("sheet", type=Path, metavar="SHEET", help="image file to write")
    _add_model(parser)
    add("--num_scales", type=positive, help="run only this many scales; half of the model's unless given")
    add("--max_images", type=positive, default=64, help="most images to show, the first of the archive")
    add("--columns", type=positive, default=8, help="images of a row")
    add("--side", type=whole(8, 1024), default=128, help="largest side of an image on the sheet, in pixels")
    add("--overwrite", action="store_true", help="replace a sheet that is there already")
    add_device(parser)

    def check(args: Namespace) -> None:
        if args.sheet.suffix.lower() not in SHEETS:
            parser.error(f"SHEET must end with one of {', '.join(SHEETS)}, got {str(args.sheet)!r}")

    parser.checks.append(check)


def add_latents(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="hieratok-tiny", help=TOKENIZER)
    add("--compare", nargs="+", default=[], metavar="MODEL", help="further models, also diffusers' own")
    add_data(add, "measuring", required=True)
    add("--max_images", type=positive, default=2000, help="take only the first images of the data")
    add("--size", type=positive, help="side of the middle square; the model's own unless given")
    add("--batch_size", type=positive, default=16, help="images of a batch")
    add("--plot", type=Path, metavar="FILE", help="PNG file for spectra, tails and errors of equivariance")
    add_device(parser)
    add_report(parser)

    def check(args: Namespace) -> None:
        if args.plot and args.plot.suffix.lower() != ".png":
            parser.error(f"--plot must be a .png file, got {str(args.plot)!r}")

    parser.checks.append(check)
