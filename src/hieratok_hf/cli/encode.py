"""Encode the images in a folder to an archive of latents, from which `hieratok decode` makes files again."""

import contextlib
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from ..data.latent_archive import write_archive
from ..models.autoencoder_adapter import Codec, load_codec
from .arguments.training import AUTOCAST
from .command_line import find_device, load_or_explain, run_script
from .main import parse
from .terminal import Problem, one_line


def autocast(args: Namespace) -> contextlib.AbstractContextManager[Any]:
    """Make the context of `--mixed_precision` on the device of `--device`."""
    name = AUTOCAST.get(args.mixed_precision)
    return torch.autocast(find_device(args).type, getattr(torch, name)) if name else contextlib.nullcontext()


def enable_tiling(codec: Codec) -> None:
    """Switch on tiling of a model; a `Problem` where it has none."""
    try:
        codec.model.enable_tiling()
    except (AttributeError, NotImplementedError) as error:  # of diffusers' models not all can
        raise Problem(f"--tiling needs a model that can encode in tiles, got {type(codec.model).__name__}") from error


def tell_failures(failures: Mapping[str, str]) -> None:
    """Print to stderr, a line each, which images failed, and why."""
    for name, reason in failures.items():
        print(f"failed: {name!r}: {reason}", file=sys.stderr)


def run(args: Namespace) -> tuple[list[str], int]:
    """Write the archive, and return the lines to print and the exit status, 1 where an image was left out."""
    names = f"FOLDER {str(args.folder)!r} to ARCHIVE {str(args.archive)!r}"
    if args.archive.resolve().is_relative_to(args.folder.resolve()):
        raise Problem(f"{names}: the archive must not lie in the folder")
    codec: Codec = load_or_explain(load_codec, "--model", args.model, find_device(args))
    if args.tiling:
        enable_tiling(codec)
    settings = {name: getattr(args, name) for name in ("model", "fit", "shard_size", "threads")}
    settings |= {"file_format": args.format, "dtype": getattr(torch, args.dtype)}
    with tqdm(unit="image", dynamic_ncols=True, leave=False) as bar, autocast(args):

        def progress(done: int, todo: int) -> None:
            bar.total = todo
            bar.update(done - bar.n)

        try:
            summary = write_archive(codec, args.folder, args.archive, progress=progress, **settings)
        except (ImportError, OSError, ValueError) as error:
            raise Problem(f"{names}: {one_line(error)}") from error
    skipped = summary["skipped"]
    tell_failures(skipped)
    counts = f"{summary['records']} images in {str(args.archive)!r}, {len(skipped)} failed"
    return [f"{counts}; {summary['encoded']} encoded now"], 1 if skipped else 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, parse("encode", argv))
