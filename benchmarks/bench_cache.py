"""Caching latents from image files to shards, beside nothing but encoding the same images from memory."""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import describe_benchmark, print_machine, record_report, side_by_side
from PIL import Image

from hieratok_hf import HieraTokConfig, HieraTokCore, open_image
from hieratok_hf.cli.command_line import find_device
from hieratok_hf.cli.parsing import add_device, make_parser
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_cache import LatentCache
from hieratok_hf.data.latent_writer import write_latents
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.autoencoder_adapter import Codec, load_codec
from hieratok_hf.utils.choices import SHIPPED

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "src" / "hieratok_hf" / "example_images"


def make_images(folder: Path, number: int, pixels: int) -> Path:
    """JPEG files cut out of the photographs of the examples, at the size that is encoded."""
    rng = random.Random(0)
    photographs = [open_image(path) for path in sorted(IMAGES.glob("*.webp"))]
    folder.mkdir()
    for i in range(number):
        photograph = photographs[i % len(photographs)]
        side = rng.randint(min(photograph.size) // 2, min(photograph.size))
        left, top = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
        box = (left, top, left + side, top + side)
        crop = photograph.resize((pixels, pixels), Image.Resampling.BICUBIC, box=box)
        crop.save(folder / f"{i:05}.jpg", quality=90)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_device(parser)
    add("--size", help="a named size or shipped weights; hieratok-b on a GPU, else hieratok-tiny")
    add("--data", nargs="+", help="images or tar shards; JPEG files are made unless given")
    add("--images", type=int, help="images to encode; 4096 on a GPU, 256 on a CPU unless given")
    add("--pixels", type=int, default=256, help="side of the images")
    add("--batch_size", type=int, default=32, help="images of a batch")
    add("--threads", type=int, default=4, help="images decoded at a time")
    add("--shard_batches", type=int, help="batches of a shard; an eighth of all unless given")
    add("--mixed_precision", action="store_true", help="encode under torch.autocast in bfloat16")
    add("--seconds", type=float, default=60, help="time for both together")
    add("--json", action="store_true", help="write results/cache_SIZE_KIND.json")
    args = parser.parse_args(argv)
    device = find_device(args)
    on_gpu = device.type == "cuda"
    size = args.size or ("hieratok-b" if on_gpu else "hieratok-tiny")
    images = args.images or (4096 if on_gpu else 256)
    # Whole batches in every shard, so that both sides encode the same ones.
    shard_size = args.batch_size * (args.shard_batches or max(images // args.batch_size // 8, 1))
    if size in SHIPPED:
        codec = load_codec(size, device)
    else:
        codec = Codec(HieraTokCore(HieraTokConfig.from_size(size)).init_weights().eval().to(device))
    core = codec.core
    precision: Callable[[], Any] = nullcontext
    if args.mixed_precision:
        precision = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as temporary:
        space, numbers = Path(temporary), count()
        datasets.config.HF_DATASETS_CACHE = space / "datasets"
        data_set = load_images(args.data or str(make_images(space / "images", images, args.pixels)))
        batches = EvaluationBatches(data_set, args.pixels, args.batch_size, limit=images)
        memory = [batch["pixel_values"] for batch in batches]
        images = sum(map(len, memory))

        def encode() -> None:
            with torch.inference_mode(), precision():
                for batch in memory:
                    pixel_values = batch.to(device)
                    core.encode_moments(pixel_values)
                    core.encode_moments(pixel_values.flip(-1))

        def cache() -> None:
            options = {"size": args.pixels, "batch_size": args.batch_size, "shard_size": shard_size, "limit": images}
            with precision():
                write_latents(codec, data_set, space / f"{next(numbers)}", threads=args.threads, **options)

        cache()
        written = LatentCache(space / "0")
        with torch.inference_mode(), precision():
            expected = core.encode_moments(memory[0].to(device))[0].float().cpu()
        found = torch.stack([written[i]["moments"] for i in range(len(expected))])
        error = ((found - expected).norm() / expected.norm()).item()
        if not error < 1e-2:
            print(f"error: the moments in the cache are off by {error:.1e}; nothing is reported", file=sys.stderr)
            return 1
        calls = {"encoding": encode, "caching": cache}
        work: dict[str, list[float]] = {name: [] for name in calls}

        def counted(name: str) -> None:
            started = time.process_time()
            calls[name]()
            work[name].append(time.process_time() - started)

        timers: dict[str, Callable[[], Any]] = {name: partial(counted, name) for name in calls}
        seconds = side_by_side(timers, device, args.seconds, graphs=False)

    report = {
        "machine": describe_benchmark(device), "size": size, "images": images, "pixels": args.pixels, "flips": True,
        "batch_size": args.batch_size, "shard_size": shard_size, "threads": args.threads,
        "dtype": "bfloat16 autocast" if args.mixed_precision else "float32",
        "caching_over_encoding": round(seconds["encoding"] / seconds["caching"], 3),
    }  # fmt: skip
    if not on_gpu:  # of all threads together, so other programs on the machine change it less
        cpu = {name: statistics.median(values) for name, values in work.items()}
        report["caching_over_encoding_in_cpu_time"] = round(cpu["encoding"] / cpu["caching"], 3)
    rates = {name: round(images / value, 1) for name, value in seconds.items()}
    if on_gpu:
        report["images_per_second"] = rates
    print_machine(report["machine"])
    print(f"{size}, {images} images of {args.pixels}x{args.pixels} and their mirror images, {report['dtype']}")
    for name, rate in rates.items():
        print(f"    {name:12}{rate:10.1f} images/s")
    print(f"    caching runs at {report['caching_over_encoding']:.3f} of the speed of encoding alone")
    if not on_gpu:
        print(f"    and by processor time at {report['caching_over_encoding_in_cpu_time']:.3f}")
    if args.json:
        record_report(RESULTS, f"cache_{size}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
