"""Measure time and memory of an image as it grows to 4096 pixels a side, whole and in tiles."""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import (
    MemoryWatch,
    describe_benchmark,
    in_fresh_process,
    markdown_table,
    peak_memory,
    print_machine,
    record_report,
    resident,
)

from hieratok_hf import SIZES, AutoencoderHieraTok
from hieratok_hf.cli.command_line import find_device
from hieratok_hf.cli.parsing import add_device, make_parser
from hieratok_hf.utils.choices import SHIPPED

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = ("encode", "decode")


def load(model: str, device: torch.device) -> AutoencoderHieraTok:
    """A tokenizer that ships or lies in a folder, or one of a named size with random weights."""
    if model in SIZES and model not in SHIPPED:
        torch.manual_seed(0)
        return AutoencoderHieraTok.from_size(model).to(device)
    return AutoencoderHieraTok.from_pretrained(model).eval().to(device)


@torch.inference_mode()
def one_row(model: str, side: int, direction: str, tiled: bool, device: torch.device) -> dict[str, float]:
    """Seconds of a call, the most bytes that it holds beyond weights and input, and those of all the process."""
    vae = load(model, device)
    grid = side // vae.config.patch_size
    if tiled:
        vae.enable_tiling()

    def call(pixels: int = side, cells: int = grid) -> None:
        if direction == "encode":
            vae.encode(image[..., :pixels, :pixels]).latent_dist.mode()
        else:
            vae.decode(latents[..., :cells, :cells])

    image = torch.rand(1, 3, side, side, device=device) * 2 - 1 if direction == "encode" else None
    latents = torch.randn(1, vae.config.latent_channels, grid, grid, device=device) if direction == "decode" else None
    # What the first call of any size brings along belongs to no image.
    call(256, 256 // vae.config.patch_size)
    seconds, peaks = [], []
    while not seconds or (sum(seconds) < 2 and len(seconds) < 5):
        started = time.perf_counter()
        peaks.append(peak_memory(call, device))
        seconds.append(time.perf_counter() - started)
    process = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return {"seconds": statistics.median(seconds), "peak": peaks[0], "process": process}


@torch.inference_mode()
def stream(model: str, images: int, longest: int, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Encode and decode images of random sides, one after the other, and watch memory and numbers."""
    vae, draw = load(model, device), random.Random(seed)
    patch_size = vae.config.patch_size
    not_finite, watch = 0, MemoryWatch()
    for i in range(images):
        height, width = (patch_size * draw.randint(64 // patch_size, longest // patch_size) for _ in range(2))
        sample = torch.rand(1, 3, height, width, device=device) * 2 - 1
        latents = vae.encode(sample).latent_dist.sample()
        not_finite += int(not vae.decode(latents).sample.isfinite().all())
        if (i + 1) % max(images // 10, 1) == 0:
            del sample, latents
            watch.look(device)
    return {"images": images, "longest": longest, "not_finite": not_finite, **watch.figures()}


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By which power of the pixels time and memory grow between the two largest sizes of each kind."""
    found = []
    for direction, tiled in itertools.product(DIRECTIONS, (False, True)):
        kind = {"direction": direction, "tiled": tiled}
        mine = [row for row in rows if kind.items() <= row.items() and "peak_mib" in row]
        if len(mine) < 2:
            continue
        small, large = mine[-2:]
        growth = 2 * math.log(large["side"] / small["side"])
        laws = {
            name: round(math.log(large[key] / small[key]) / growth, 2)
            for name, key in (("time", "times_the_smallest"), ("memory", "peak_mib"))
        }
        found.append({**kind, "between": [small["side"], large["side"]], **laws})
    return found


def table(report: dict[str, Any]) -> str:
    """A row a side in Markdown: time against the smallest image whole, and peak memory in MiB."""
    kinds = list(itertools.product(DIRECTIONS, (False, True)))
    names = [f"{direction}{' in tiles' if tiled else ''}: time, MiB" for direction, tiled in kinds]
    lines = []
    rows = {(row["side"], row["direction"], row["tiled"]): row for row in report["rows"]}
    for side in dict.fromkeys(row["side"] for row in report["rows"]):
        found = [rows.get((side, *kind), {}) for kind in kinds]
        cells = [
            f"{row['times_the_smallest']:.1f}, {row['peak_mib']:.0f}" if "peak_mib" in row else row.get("failed", "-")
            for row in found
        ]
        lines.append([side, *cells])
    return markdown_table(f"| side | {' | '.join(names)} |", lines)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="hieratok-tiny", help="a name that ships, a folder, or a named size")
    add_device(parser)
    add("--sides", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="sides of the images")
    add("--longest_whole", type=int, default=2048, help="longest side of an image that is not tiled")
    add("--seconds", type=float, default=300, help="time for each row, after which it is given up")
    add("--stream", type=int, default=1000, help="number of images of random sides; 0 for none")
    add("--longest", type=int, default=512, help="longest side of the images of --stream")
    add("--json", action="store_true", help="write results/image_sizes_MODEL_KIND.json")
    add("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = find_device(args)
    if args.row:
        side, direction, tiled = args.row
        print(json.dumps(one_row(args.model, int(side), direction, tiled == "tiled", device)))
        return 0
    if any(side < 256 or side % 32 for side in args.sides):
        parser.error(f"--sides must be multiples of 32 from 256 on, got {args.sides}")

    report: dict[str, Any] = {"machine": describe_benchmark(device), "model": args.model, "rows": []}
    print_machine(report["machine"])
    first: dict[str, float] = {}
    for side in sorted(args.sides):
        for direction in DIRECTIONS:
            for tiled in (False, True) if side <= args.longest_whole else (True,):
                given = ["--row", side, direction, "tiled" if tiled else "whole"]
                told = in_fresh_process(__file__, [*given, "--model", args.model, "--device", device], args.seconds)
                row = {"side": side, "direction": direction, "tiled": tiled}
                if "failed" in told:
                    row["failed"] = told["failed"]
                else:
                    ratio = told["seconds"] / first.setdefault(direction, told["seconds"])
                    row["times_the_smallest"] = round(ratio, 2)
                    row |= {f"{key}_mib": round(told[key] / 2**20, 1) for key in ("peak", "process")}
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
    report["exponents"] = exponents(report["rows"])
    for law in report["exponents"]:
        print(json.dumps(law))
    print(table(report))
    if args.stream:
        report["stream"] = stream(args.model, args.stream, args.longest, device)
        print(json.dumps(report["stream"]))
    if args.json:
        record_report(RESULTS, f"image_sizes_{Path(args.model).name}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
