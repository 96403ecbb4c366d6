"""Encode the images in a folder to an archive, from which `hieratok decode` makes files again."""

from argparse import Namespace

import torch
from tqdm import tqdm

from ..data.latent_archive import write_archive
from ..models.autoencoder_adapter import Codec, load_codec
from .command_line import autocast, find_device, load_or_explain
from .main import parse
from .outputs import lies_in
from .terminal import Problem, one_line, run_script, show_on, tell_failures


def enable_tiling(codec: Codec) -> None:
    """Switch on tiling of a model; a `Problem` where it has none."""
    try:
        codec.model.enable_tiling()
    except (AttributeError, NotImplementedError) as error:  # some models of diffusers have no tiles
        raise Problem(f"--tiling needs a model that can encode in tiles, got {type(codec.model).__name__}") from error


def run(args: Namespace) -> tuple[list[str], int]:
    """Write the archive, and return the lines to print and the exit status, 1 where an image was left out."""
    names = f"FOLDER {str(args.folder)!r} to ARCHIVE {str(args.archive)!r}"
    if lies_in(args.archive, args.folder):
        raise Problem(f"{names}: the archive must not lie in the folder")
    device = find_device(args)
    codec: Codec = load_or_explain(load_codec, "--model", args.model, device)
    if args.tiling:
        enable_tiling(codec)
    settings = {name: getattr(args, name) for name in ("model", "fit", "bits", "shard_size", "threads")}
    settings |= {"file_format": args.format, "dtype": getattr(torch, args.dtype)}
    with tqdm(unit="image", dynamic_ncols=True, leave=False) as bar, autocast(args, device):
        try:
            summary = write_archive(codec, args.folder, args.archive, progress=show_on(bar), **settings)
        except (ImportError, OSError, ValueError) as error:
            raise Problem(f"{names}: {one_line(error)}") from error
    skipped = summary["skipped"]
    tell_failures(skipped)
    counts = f"{summary['records']} images in {str(args.archive)!r}, {len(skipped)} failed"
    return [f"{counts}; {summary['encoded']} encoded now"], 1 if skipped else 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, parse("encode", argv))
