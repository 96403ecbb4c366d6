"""Encode a data set to latents once, so that a generator can be trained on them; a run that was killed goes on."""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import disable_progress_bars as disable_data_progress_bars
from tqdm import tqdm

from hieratok_hf.cli.command_line import (
    Problem,
    add_device,
    check_batch,
    device_of_process,
    load_or_explain,
    make_parser,
    one_line,
    positive,
    run_on_processes,
    seed,
    whole,
)
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_cache import DTYPES, KINDS
from hieratok_hf.data.latent_writer import write_latents
from hieratok_hf.models.autoencoder_adapter import load_codec

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    model = "a name that ships with the package, a folder, or a Hub id; of a pipeline its VAE"
    data = "folders of images, tar shards in webdataset style, or a Hub data set"
    add("--model", default="hieratok-tiny", help=model)
    add("--data", nargs="+", required=True, help=data)
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the shards go; one that is begun goes on")
    add("--split", default="train", help="split of folders and data sets; data without splits is train")
    add("--streaming", action="store_true", help="read while encoding instead of first making a copy in the cache")
    add("--limit", type=positive, help="take only the first rows of the data")
    add("--size", type=positive, help="side of the middle square; the model's own unless given")
    kinds = "what is kept of a posterior: mean and log-variance, one sample, or the mode"
    add("--kind", choices=KINDS, default="moments", help=kinds)
    add("--no_flips", action="store_true", help="leave the mirrored images out")
    add("--dtype", choices=DTYPES, default="float16", help="dtype of what is stored")
    add("--shard_size", type=positive, default=1024, help="rows of a file")
    add("--batch_size", type=positive, default=32, help="images of a batch in each process")
    add("--threads", type=whole(1, 1024), default=4, help="images that each process decodes at a time")
    add("--seed", type=seed, default=0, help="seed of the samples")
    add("--mixed_precision", choices=["no", *AUTOCAST], default="no", help="encode under torch.autocast")
    add_device(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace, state: PartialState) -> list[str]:
    """Write the cache, and return the lines to print; every process runs all of it."""
    device = device_of_process(args, state)
    codec = load_or_explain(load_codec, "--model", args.model, device)
    size = args.size or getattr(codec.model.config, "sample_size", None)
    if not isinstance(size, int):
        raise Problem(f"--size is needed: the configuration of {args.model!r} names no side of its images")
    check_batch("--size and --batch_size", args.batch_size, size)
    images = load_or_explain(load_images, "--data", args.data, split=args.split, streaming=args.streaming)
    settings = {name: getattr(args, name) for name in ("kind", "shard_size", "batch_size", "seed", "limit", "threads")}
    settings |= {"size": size, "flips": not args.no_flips, "dtype": getattr(torch, args.dtype)}
    dtype = AUTOCAST.get(args.mixed_precision)
    precision = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    shown = {"unit": "image", "disable": not state.is_local_main_process, "dynamic_ncols": True, "leave": False}
    with tqdm(**shown) as bar, precision:

        def progress(done: int, todo: int | None) -> None:
            bar.total = todo
            bar.update(done - bar.n)

        try:
            summary = write_latents(codec, images, args.output, progress=progress, **settings)
        except (OSError, ValueError) as error:
            message = f"{args.model!r} and {images.source} to --output {str(args.output)!r}: {one_line(error)}"
            raise Problem(message) from error
    counts = f"{summary['images']} images in {summary['shards']} shards, {len(summary['skipped'])} left out"
    rate = f"{summary['encoded']} encoded now at {summary['encoded'] / max(summary['seconds'], 1e-9):.1f} images/s"
    return [*(f"left out: {reason}" for reason in summary["skipped"].values()), f"{counts}; {rate}"]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    disable_data_progress_bars()
    return run_on_processes(run, args)


if __name__ == "__main__":
    sys.exit(main())
