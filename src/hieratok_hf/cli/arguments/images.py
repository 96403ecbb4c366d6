"""Name the arguments of the commands that work on images."""

from argparse import Namespace
from pathlib import Path

from ..parsing import Parser, add_data, add_device, add_dtype, add_protocol, add_report, positive, real, whole

TOKENIZER = "tokenizer: a name that ships with the package, a folder, or a Hub id; of a pipeline its VAE"
GENERATOR = "pipeline: a name that ships with the package, a folder, or a Hub id"
LARGEST_PANEL = 512


def add_reconstruct(parser: Parser) -> None:
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE", help="files or folders; two photographs unless given")
    add("--model", default="hieratok-tiny", help=TOKENIZER)
    add("--output", type=Path, default=Path("outputs"), help="folder for the sheets")
    add("--size", type=positive, help="cut at most SIZE x SIZE pixels out of the centre")
    tiles = (
        "encode whole images; those of more than 256 pixels go in overlapping tiles where a model was trained to 256"
    )
    add("--whole", action="store_true", help=tiles)
    add_device(parser)
    add_dtype(parser)
    add("--full", action="store_true", help=f"show panels at full size, not at most {LARGEST_PANEL} pixels")
    add_report(parser)


def add_evaluate(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="hieratok-tiny", help=TOKENIZER)
    add("--compare", nargs="+", default=[], metavar="MODEL", help="further models, also diffusers' own")
    add_data(add, "evaluating", required=True)
    add("--max_images", type=positive, help="take only the first images of the data")
    add("--size", type=positive, help="side of the middle square; the model's own unless given")
    add("--batch_size", type=positive, default=16, help="images of a batch in each process")
    add("--no_ssim", action="store_true", help="leave SSIM out, which is slow")
    add("--lpips", action="store_true", help="measure LPIPS; needs the package lpips")
    add("--perceptual_model", metavar="MODEL", help="measure a perceptual distance over this vision model")
    add("--text", action="store_true", help="read pages of text by an OCR, by letter height; needs the extra ocr")
    faces = "compare embeddings of the faces in the images by dlib, by face height; needs the extra faces"
    add("--faces", action="store_true", help=faces)
    add("--no_fid", action="store_true", help="leave the Fréchet distance out")
    add("--classifier", metavar="MODEL", help="measure the Inception Score by this image classifier")
    add_sets(parser, "these images instead of those of --data", "the reconstructions by --model")
    perturb = (
        "measure PSNR from wrong latents too: with noise of these shares of their deviation, and where the model "
    )
    perturb += "has levels with these shares of its integers replaced at random"
    add("--perturb", type=real(most=1, above=0), nargs="+", default=[], metavar="SHARE", help=perturb)
    add("--probe_data", nargs="+", help="fit a linear probe to the encoder's features of these labelled images")
    add_device(parser)
    parser.contradict("no_fid", "fid_model", "fid_size", "suite", "reference", "save_statistics")


def add_sets(parser: Parser, reference: str, images: str) -> None:
    """Add the options of comparing sets of images, and those of reports."""
    add = parser.add_argument
    data = f"measure the Fréchet distance to {reference}: folders, tar shards, a Hub data set, or an .npz file of "
    add("--reference", nargs="+", metavar="DATA", help=f"{data}images or of statistics")
    add("--reference_split", default="train", help="split of folders and data sets; data without splits is train")
    add("--fid_model", metavar="MODEL", help="take the Fréchet distance over this vision model, not over Inception")
    add("--fid_size", type=positive, help="side that images are resized to for --fid_model; its own unless given")
    suite = "measure sFID, precision and recall beside the Fréchet distance, and by Inception its score"
    add("--suite", action="store_true", help=suite)
    add("--save_npz", type=Path, metavar="FILE", help=f".npz file for {images}, as the suite of ADM takes it")
    statistics = ".npz file for mean and covariance of the features that the Fréchet distance is measured to"
    add("--save_statistics", type=Path, metavar="FILE", help=statistics)
    add_report(parser)
    add_protocol(parser)
    parser.needs(fid_size="fid_model", reference_split="reference")

    def check(args: Namespace) -> None:
        for option in ("save_npz", "save_statistics"):
            path = getattr(args, option)
            if path and path.suffix != ".npz":
                parser.error(f"--{option} must be an .npz file, got {str(path)!r}")
        if args.save_npz and args.save_npz == args.save_statistics:
            parser.error(f"--save_npz and --save_statistics must be two files, got {str(args.save_npz)!r}")

    parser.checks.append(check)


def add_app(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="hieratok-tiny", help=TOKENIZER)
    add("--generator", default="hieratok-dit-tiny", help=GENERATOR)
    add_device(parser, default="cpu")
    add("--host", help="address to serve at; that of GRADIO_SERVER_NAME, or this machine alone, unless given")
    add("--port", type=whole(0, 65535), help="port to serve at; the first that is free from 7860 unless given")
