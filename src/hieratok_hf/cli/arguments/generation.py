"""Name the arguments of the commands that make images of classes."""

import math
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from ..parsing import Parser, add_device, add_dtype, positive, real, seed, whole
from .images import GENERATOR, add_sets


def add_sampling(parser: Parser) -> None:
    """Add the options of a call of the pipeline."""
    add = parser.add_argument
    add("--model", default="hieratok-dit-tiny", help=GENERATOR)
    add("--steps", type=whole(1, 100_000), default=50, help="steps of the scheduler")
    add("--guidance_scale", type=real(-math.inf), default=4.0, help="strength of the guidance; 1 is none")
    kept = "share that is kept of the guidance along the image itself; below 1, high scales keep colours natural"
    add("--guidance_eta", type=real(0, 1), default=1.0, help=kept)
    interval = "shares of noise between which guidance acts, from 0, clean, to 1"
    parser.add_range(add, "--guidance_interval", (0.0, 1.0), interval)
    add("--seed", type=seed, default=0, help="seed of all noise")
    add("--batch_size", type=positive, default=16, help="images of a batch, in each process")
    add_device(parser)
    add_dtype(parser)


def sampling_settings(args: Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's call that `add_sampling` reads."""
    guidance = {"guidance_scale": args.guidance_scale, "guidance_eta": args.guidance_eta}
    return {"num_inference_steps": args.steps, **guidance, "guidance_interval": tuple(args.guidance_interval)}


def add_generate(parser: Parser) -> None:
    add = parser.add_argument
    add("classes", nargs="*", metavar="CLASS", help="names or numbers of classes; all of the pipeline unless given")
    add_sampling(parser)
    add("--rows", type=positive, default=4, help="images of a class")
    add("--image", type=Path, metavar="FILE", help="image to begin with, of which the middle is taken")
    share = "share of the steps, from 0 to 1, that are taken from --image on: 1 leaves little of it, or nothing"
    add("--strength", type=real(0, 1), default=0.6, help=share)
    add("--scheduler", choices=("euler", "heun", "dpm", "ddim"), help="scheduler; the pipeline's own unless given")
    add("--output", type=Path, default=Path("outputs/generated.png"), metavar="FILE", help="PNG file for the sheet")
    add("--images", type=Path, metavar="FOLDER", help="folder to write each image to as well")
    previews = "write a second sheet, of what the first K scales of the tokenizer show on the way"
    add("--previews", type=positive, metavar="K", help=previews)
    add("--overwrite", action="store_true", help="replace files that are there already")

    parser.needs(strength="image")

    def check(args: Namespace) -> None:
        if args.output.suffix.lower() != ".png":
            parser.error(f"--output must be a PNG file, got {str(args.output)!r}")

    parser.checks.append(check)


def add_evaluate_generation(parser: Parser) -> None:
    add = parser.add_argument
    add_sampling(parser)
    add("--samples", type=positive, default=5000, help="images to make, of all classes in turn")
    ready = (
        "evaluate these images, of which the first is as large as all, instead of making some: folders, tar shards, "
    )
    add("--data", nargs="+", help=f"{ready}data sets of the Hub, or an .npz file")
    add("--split", default="train", help="split of --data")
    add("--streaming", action="store_true", help="read data sets of the Hub without first making a copy of them")
    add(
        "--classifier",
        metavar="MODEL",
        help="measure how often this image classifier finds the classes, and its score",
    )
    labels = "label of --classifier for each class of the pipeline, as 0 217 or 0-999; found by name unless given"
    add("--classifier_labels", type=_numbers, nargs="+", metavar="ID", help=labels)
    add("--save", type=Path, metavar="FOLDER", help="write the images here, as PNG files in a new or empty folder")
    add_sets(parser, "these images", "the images")
    parser.needs(fid_model="reference", suite="reference", save_statistics="reference", classifier_labels="classifier")
    parser.needs(split="data")
    parser.contradict("data", "model", "steps", "guidance_scale", "guidance_eta", "guidance_interval")
    parser.contradict("data", "seed", "samples", "dtype")
    parser.contradict("data", "save", "save_npz", "classifier_labels")

    def check(args: Namespace) -> None:
        if args.streaming and not (args.data or args.reference):
            parser.error("--streaming needs --data or --reference")
        if args.classifier_labels:
            args.classifier_labels = [label for part in args.classifier_labels for label in part]

    parser.checks.append(check)


def _numbers(text: str) -> range:
    """Read one number, or the first and the last of several, as in 0-999."""
    first, _, last = text.partition("-")
    label = whole(0, 10**6)
    if not (labels := range(label(first), label(last or first) + 1)):
        raise ArgumentTypeError(f"must be a number or a range, as 0-999, got {text!r}")
    return labels
