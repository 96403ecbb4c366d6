"""Encode a data set to latents once, so that a generator can be trained on them; a run that was killed goes on."""

from argparse import Namespace

import torch
from accelerate import PartialState
from datasets import disable_progress_bars as disable_data_progress_bars
from tqdm import tqdm

from ..data.image_dataset import load_images
from ..data.latent_cache import LatentCache
from ..data.latent_writer import write_latents
from ..evaluation.vision_features import VisionFeatures
from ..models.autoencoder_adapter import load_codec
from .command_line import autocast, check_steps, device_of_process, find_size, load_or_explain, run_on_processes
from .main import parse
from .terminal import Problem, one_line, show_on


def describe_latents(cache: LatentCache) -> str:
    """Tell in a line how many latents there are, of what shape and dtype, and how their channels are distributed."""
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in cache.latent_shapes.values() or [cache.latent_shape])
    told = [f"{x.min():.2f} to {x.max():.2f}" for x in cache.latent_statistics()]
    mirrored = " and as many mirrored" if cache.flips else ""
    kind = f"{len(cache)} latents{mirrored} of {shapes} in {cache.settings['dtype']}"
    return f"{kind}, their channels of mean {told[0]} and std {told[1]}"


def run(args: Namespace, state: PartialState) -> list[str]:
    """Write the cache, and return the lines to print; every process runs all of it."""
    device = device_of_process(args, state)
    codec = load_or_explain(load_codec, "--model", args.model, device)
    size = find_size(args, codec)
    check_steps("--size", [size], 1, args.bucket_step)
    vision = None
    if args.vision_model is not None:
        vision = load_or_explain(VisionFeatures.from_pretrained, "--vision_model", args.vision_model).to(device)
    images = load_or_explain(load_images, "--data", args.data, split=args.split, streaming=args.streaming)
    settings = {name: getattr(args, name) for name in ("kind", "shard_size", "batch_size", "seed", "threads")}
    settings |= {"max_aspect": args.aspect_buckets, "multiple": args.bucket_step, "limit": args.max_images}
    settings |= {"vision": vision, "vision_layers": args.vision_layers}
    settings |= {"size": size, "flips": not args.no_flips, "dtype": getattr(torch, args.dtype)}
    shown = {"unit": "image", "disable": not state.is_local_main_process, "dynamic_ncols": True, "leave": False}
    with tqdm(**shown) as bar, autocast(args, device):
        try:
            summary = write_latents(codec, images, args.output, progress=show_on(bar), **settings)
        except (OSError, ValueError) as error:
            message = f"{args.model!r} and {images.source} to --output {str(args.output)!r}: {one_line(error)}"
            raise Problem(message) from error
    if not state.is_main_process:
        return []
    counts = f"{summary['images']} images in {str(args.output)!r}, {len(summary['skipped'])} left out"
    rate = f"{summary['encoded']} encoded now at {summary['encoded'] / max(summary['seconds'], 1e-9):.1f} images/s"
    lines = [*(f"left out: {reason}" for reason in summary["skipped"].values()), f"{counts}; {rate}"]
    return [*lines, describe_latents(LatentCache(args.output))] if summary["images"] else lines


def main(argv: list[str] | None = None) -> int:
    args = parse("cache", argv)
    disable_data_progress_bars()
    return run_on_processes(run, args)
