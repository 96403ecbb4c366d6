"""Fit the levels by which the latents of an autoencoder become integers, and put them beside its weights."""

from argparse import Namespace
from itertools import chain

from datasets import disable_progress_bars as disable_data_progress_bars
from tqdm import tqdm

from ..data.image_dataset import load_images
from ..evaluation.reconstruction import EvaluationBatches
from ..models.autoencoder_adapter import Codec, load_codec
from ..models.quantizing import LatentQuantizer
from ..utils.choices import QUANTIZER_FILE
from .command_line import find_device, find_size, load_or_explain
from .main import parse
from .outputs import check_writable, write_or_explain
from .terminal import Problem, one_line, run_script, tell_failures


def run(args: Namespace) -> tuple[list[str], int]:
    """Write the levels, and return the line to print and the exit status, 1 where an image was left out."""
    args.model = str(args.folder)
    if not (args.folder / "config.json").is_file():
        raise Problem(f"FOLDER {args.model!r} must be that of an autoencoder: it has no config.json")
    path = args.folder / QUANTIZER_FILE
    check_writable("FOLDER", path)
    if path.is_file() and not args.overwrite:
        raise Problem(f"FOLDER {str(path)!r} is there already: add --overwrite to replace it")
    device = find_device(args)
    codec: Codec = load_or_explain(load_codec, "FOLDER", args.model, device, load_quantizer=False)
    size = find_size(args, codec)
    images = load_or_explain(load_images, "--data", args.data, split=args.split, streaming=args.streaming)
    batches = EvaluationBatches(images, size, args.batch_size, limit=args.max_images)
    with tqdm(batches, unit="batch", dynamic_ncols=True, leave=False) as shown:
        try:
            codec.latent_shape(size)  # or other libraries' errors would tell that the size does not suit
            latents = (codec.encode(batch["pixel_values"]) for batch in shown)
            if (first := next(latents, None)) is None:
                raise ValueError(f"none of its images can be read, such as {next(iter(batches.skipped.values()))}")
            quantizer = LatentQuantizer.fit(chain([first], latents))
        except (OSError, ValueError) as error:
            raise Problem(f"--data {' '.join(args.data)!r} at {size} pixels: {one_line(error)}") from error
    write_or_explain("FOLDER", path, quantizer.to_bytes())
    tell_failures(batches.skipped)
    return [f"levels written to {str(path)!r}"], 1 if batches.skipped else 0


def main(argv: list[str] | None = None) -> int:
    args = parse("fit-quantizer", argv)
    disable_data_progress_bars()
    return run_script(run, args)
