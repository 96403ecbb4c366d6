"""
Measure how much faster a large image is in tiles that processes share, and compare the results bit for bit:
`torchrun --nproc-per-node 2 benchmarks/bench_parallel_tiles.py`.

The most that can be won is what the processes get done side by side, each an image of its own, over what one of them
gets done alone: less than their number where cores share an execution unit or memory.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import describe_benchmark, markdown_table, print_machine, record_report

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.cli.parsing import make_parser, positive

RESULTS = Path(__file__).parent / "results"


@torch.inference_mode()
def measure(model: str, side: int, repeats: int) -> list[dict[str, Any]]:
    """Time calls of the first process alone, of all side by side, and shared by all, in turn; a row a direction."""
    vae = AutoencoderHieraTok.from_pretrained(model).eval()
    grid = side // vae.config.patch_size
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    latents = torch.randn(1, vae.config.latent_channels, grid, grid, generator=generator)
    calls = {
        "encode": lambda: vae.encode(image).latent_dist.parameters,
        "decode": lambda: vae.decode(latents).sample,
    }
    rows = []
    for direction, call in calls.items():
        seconds: dict[str, list[float]] = {"alone": [], "side by side": [], "shared": []}
        results = {}
        for _ in range(repeats):
            for how, times in seconds.items():
                vae.disable_tiling()
                vae.enable_parallel_tiling() if how == "shared" else vae.enable_tiling()
                dist.barrier()
                started = time.perf_counter()
                if dist.get_rank() == 0 or how != "alone":
                    results[how] = call()
                dist.barrier()  # also so that the others leave the cores to the one that works alone
                times.append(time.perf_counter() - started)
        alone, side_by_side, shared = (statistics.median(times) for times in seconds.values())
        ratios = {"times_as_fast": alone / shared, "at_most": dist.get_world_size() * alone / side_by_side}
        equal = torch.equal(results["side by side"], results["shared"])
        rows.append({"direction": direction, **{name: round(x, 2) for name, x in ratios.items()}, "equal": equal})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="hieratok-tiny", help="a name that ships, or a folder")
    add("--side", type=positive, default=2048, help="side of the image in pixels")
    add("--repeats", type=positive, default=5, help="calls of each kind, of which the median counts")
    add("--json", action="store_true", help="write results/parallel_tiles_KIND.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rows = measure(args.model, args.side, args.repeats)
        rank, processes = dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
    if rank:
        return 0
    machine = describe_benchmark(torch.device("cpu"))
    print_machine(machine)
    header = f"| {processes} processes | times as fast as one | at most | equal |"
    print(markdown_table(header, [list(row.values()) for row in rows]))
    if args.json:
        report = {"machine": machine, "model": args.model, "side": args.side, "processes": processes, "rows": rows}
        record_report(RESULTS, "parallel_tiles", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
