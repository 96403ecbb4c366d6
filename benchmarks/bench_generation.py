"""A pipeline's sampling: the share of decoding, what a preview costs, and how like the final image it is."""

import sys
from pathlib import Path
from typing import Any

import torch
from measuring import describe_benchmark, print_machine, record_report, side_by_side
from torch import Tensor
from torch.nn import functional as F

from hieratok_hf import HieraTokConfig, HieraTokCore, HieraTokDiTPipeline
from hieratok_hf.cli.command_line import find_device
from hieratok_hf.cli.parsing import add_device, make_parser

RESULTS = Path(__file__).parent / "results"
# Tokenizers whose decoding is timed with random weights: name, side of the image, images on a CPU and on a GPU.
DECODERS = [("hieratok-tiny", 64, 16, 256), ("hieratok-tiny", 256, 2, 64), ("hieratok-b", 256, 2, 64)]


def correlation(previews: Tensor, finals: Tensor) -> Tensor:
    """Pearson's, of each image `(B, 3, h, w)` with the final `(B, 3, H, W)` averaged to its size."""
    shrunk = F.adaptive_avg_pool2d(finals, previews.shape[2:])
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (previews, shrunk))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)


def preview_correlations(pipe: HieraTokDiTPipeline, scales: int, steps: int, images: int, scale: float) -> list[float]:
    """The mean over images after each quarter of the steps."""
    previews: list[Tensor] = []

    def keep(pipe: HieraTokDiTPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        previews.append(tensors["preview"].float())
        return {}

    labels = [i % pipe.num_classes for i in range(images)]
    generators = [torch.Generator().manual_seed(i) for i in range(images)]
    settings: dict[str, Any] = {"preview_scales": scales, "callback_on_step_end": keep, "output_type": "pt"}
    finals = pipe(labels, steps, scale, generator=generators, **settings).images.float()
    quarters = [previews[len(previews) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]
    return [correlation(preview, finals).mean().item() for preview in quarters]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="hieratok-dit-tiny", help="a pipeline: a folder, Hub id or shipped name")
    add_device(parser)
    add("--steps", type=int, default=25, help="steps of the scheduler")
    add("--guidance_scale", type=float, default=4.0, help="strength of the guidance; 1 is none")
    add("--preview_scales", type=int, default=2, help="scales that a preview is decoded by")
    add("--images", type=int, default=50, help="images for the correlation and the speed")
    add("--seconds", type=float, default=20, help="time for each comparison")
    add("--json", action="store_true", help="write results/generation_KIND.json")
    args = parser.parse_args(argv)
    device = find_device(args)
    on_gpu = device.type == "cuda"

    costs = []
    for size, pixels, *batches in DECODERS:
        config = HieraTokConfig.from_size(size)
        core = HieraTokCore(config).init_weights().eval().to(device)
        batch, side = batches[on_gpu], pixels // config.patch_size
        latents = torch.randn(batch, config.latent_channels, side, side, device=device)
        calls = {k: (lambda k=k, core=core, z=latents: core.decode(z, k)) for k in range(1, 5)}
        seconds = side_by_side({str(k): call for k, call in calls.items()}, device, args.seconds / 4, graphs=False)
        share = {k: round(value / seconds["4"], 4) for k, value in seconds.items()}
        costs.append({"size": size, "pixels": pixels, "images": batch, "of_full_decode": share})

    pipe = HieraTokDiTPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    labels = [i % pipe.num_classes for i in range(args.images)]
    latents = pipe(labels, **given, output_type="latent").images
    calls = {
        "images": lambda: pipe(labels, **given, output_type="pt"),
        "decode": lambda: pipe.vae.decode(latents),
        "preview": lambda: pipe.vae.decode(latents, num_scales=args.preview_scales),
    }
    seconds = side_by_side(calls, device, args.seconds, graphs=False)
    quarters = preview_correlations(pipe, args.preview_scales, args.steps, args.images, args.guidance_scale)
    report: dict[str, Any] = {
        "machine": describe_benchmark(device), "model": Path(args.model).name, "images": args.images,
        "steps": args.steps, "guidance_scale": args.guidance_scale, "preview_scales": args.preview_scales,
        "images_per_second": round(args.images / seconds["images"], 2),
        "decode_share": round(seconds["decode"] / seconds["images"], 4),
        "preview_of_decode": round(seconds["preview"] / seconds["decode"], 4),
        "correlation_at_each_quarter": [round(value, 3) for value in quarters],
        "decoders": costs,
    }  # fmt: skip
    print_machine(report["machine"])
    print(
        f"{report['model']}: {report['images_per_second']} images/s at {args.steps} steps with guidance, of which "
        f"decoding takes {100 * report['decode_share']:.1f} %"
    )
    print(
        f"    previews of {args.preview_scales} scales cost {100 * report['preview_of_decode']:.1f} % of decoding; "
        f"correlation with the final image after each quarter: {report['correlation_at_each_quarter']}"
    )
    for row in costs:
        shares = ", ".join(f"{k}: {100 * value:.1f} %" for k, value in row["of_full_decode"].items())
        print(f"{row['size']}, {row['images']} images of {row['pixels']}x{row['pixels']}, cost by scales: {shares}")
    if args.json:
        record_report(RESULTS, "generation", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
