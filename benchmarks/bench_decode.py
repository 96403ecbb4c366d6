"""Decoding a batch end to end with every attention backend, plain and compiled, side by side."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import (
    add_model_options,
    describe_benchmark,
    print_machine,
    record_report,
    settle_model_options,
    side_by_side,
)

from hieratok_hf import HieraTokAttnProcessor, HieraTokConfig, HieraTokCore
from hieratok_hf.cli.parsing import make_parser

RESULTS = Path(__file__).parent / "results"
BASELINE = "sdpa_mask"


def with_backend(core: HieraTokCore, backend: str) -> HieraTokCore:
    """A copy of a model whose decoder attends by one backend, `+rotary` for the fused kernel before it."""
    core = copy.deepcopy(core)
    name, _, extra = backend.partition("+")
    for block in core.decoder.blocks:
        fused = None if name == "auto" else extra == "rotary"
        block.attn.set_processor(HieraTokAttnProcessor(name, fused_rotary=fused))
    return core


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--backends", nargs="+", help="ways to attend; all that the device has unless given")
    add("--seconds", type=float, default=10, help="time for all together")
    add("--json", action="store_true", help="write results/decode_SIZE_KIND.json")
    args = parser.parse_args(argv)
    device, dtype, images = settle_model_options(args)
    on_gpu = device.type == "cuda"
    backends = args.backends or ["sdpa_mask", "sdpa", *(["flex", "triton", "triton+rotary"] if on_gpu else []), "auto"]
    if BASELINE not in backends:
        parser.error(f"--backends must name {BASELINE}, which the others are compared with")

    torch.manual_seed(0)
    config = HieraTokConfig.from_size(args.size)
    core = HieraTokCore(config).init_weights().eval().to(device, dtype)
    side = args.pixels // config.patch_size
    latents = torch.randn(images, config.latent_channels, side, side, device=device).to(dtype)
    calls: dict[str, Any] = {}
    expected = with_backend(core, "reference").decode(latents)
    for backend in backends:
        for compiled in (False,) if args.plain_only else (False, True):
            decode = with_backend(core, backend).decode
            run = torch.compile(decode, fullgraph=True, dynamic=False) if compiled else decode
            error = ((run(latents).float() - expected.float()).norm() / expected.float().norm()).item()
            # Every block rounds anew, so the images differ by more than one rounding.
            if not error < (1e-4 if dtype == torch.float32 else 5e-2):
                print(f"error: the image by {backend!r} is off by {error:.1e}; nothing is reported", file=sys.stderr)
                return 1
            calls[f"{backend}, compiled" if compiled else backend] = lambda run=run: run(latents)
    seconds = side_by_side(calls, device, args.seconds, graphs=False)

    report = {
        "machine": describe_benchmark(device), "size": args.size, "images": images, "pixels": args.pixels,
        "dtype": str(dtype).removeprefix("torch."),
        "times_as_fast": {name: round(seconds[BASELINE] / value, 3) for name, value in seconds.items()},
    }  # fmt: skip
    if on_gpu:
        report["milliseconds"] = {name: round(value * 1e3, 3) for name, value in seconds.items()}
    print_machine(report["machine"])
    batch = f"{images} images of {args.pixels}x{args.pixels}"
    print(f"{args.size}, {batch}, {report['dtype']}: times as fast as {BASELINE}")
    for name, ratio in report["times_as_fast"].items():
        milliseconds = f"{seconds[name] * 1e3:12.3f} ms" if on_gpu else ""
        print(f"    {name:24}{ratio:8.3f}{milliseconds}")
    if args.json:
        record_report(RESULTS, f"decode_{args.size}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
