"""A whole training step (forward, backward, AdamW), plain and compiled: images a second and the use of the chip."""

import sys
from pathlib import Path

import torch
from measuring import (
    add_model_options,
    describe_benchmark,
    matrix_rate,
    print_machine,
    record_report,
    settle_model_options,
    side_by_side,
)
from torch.utils.flop_counter import FlopCounterMode

from hieratok_hf import HieraTokConfig, HieraTokCore
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.models.losses import tokenizer_losses
from hieratok_hf.training.tokenizer_loss import TokenizerTraining

RESULTS = Path(__file__).parent / "results"


def model_flops(config: HieraTokConfig, pixels: int) -> int:
    """Operations of the forward and backward pass of one image, two a multiply-add, without any recomputation."""
    training = TokenizerTraining(HieraTokCore(config).init_weights())
    side = pixels // config.patch_size
    noise = torch.zeros(2, 1, config.latent_channels, side, side)
    pixel_values = torch.zeros(1, 3, pixels, pixels)
    with FlopCounterMode(display=False) as counted:
        made, moments, *_ = training(pixel_values, noise, noise[0, :, :1, :1, :1])
        tokenizer_losses(made, pixel_values, moments, config)["loss"].backward()
    return counted.get_total_flops()


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_model_options(parser, dtypes=("bfloat16", "float32"))
    add("--seconds", type=float, default=20, help="time for all together")
    add("--json", action="store_true", help="write results/train_SIZE_KIND.json")
    args = parser.parse_args(argv)
    device, dtype, images = settle_model_options(args)
    on_gpu = device.type == "cuda"

    torch.manual_seed(0)
    config = HieraTokConfig.from_size(args.size)
    flops = model_flops(config, args.pixels) * images
    training = TokenizerTraining(HieraTokCore(config).init_weights()).to(device)
    optimizer = torch.optim.AdamW(training.parameters(), 1e-4, fused=on_gpu)
    side = args.pixels // config.patch_size
    pixel_values = torch.rand(images, 3, args.pixels, args.pixels, device=device) * 2 - 1
    noise = torch.randn(2, images, config.latent_channels, side, side, device=device)
    mix = torch.zeros(images, 1, 1, 1, device=device)

    def step(model: torch.nn.Module) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            made, moments, *_ = model(pixel_values, noise, mix)
        tokenizer_losses(made, pixel_values, moments, config)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    models = {"plain": training} if args.plain_only else {"plain": training, "compiled": torch.compile(training)}
    calls = {name: lambda model=model: step(model) for name, model in models.items()}
    seconds = side_by_side(calls, device, args.seconds, graphs=False)
    rate = matrix_rate(device, dtype)
    report = {
        "machine": describe_benchmark(device), "size": args.size, "images": images, "pixels": args.pixels,
        "dtype": str(dtype).removeprefix("torch."),
        "gflop_an_image": float(f"{flops / images / 1e9:.4g}"),
        "share_of_the_matrix_rate": {name: round(flops / value / rate, 3) for name, value in seconds.items()},
    }  # fmt: skip
    if on_gpu:
        report["images_per_second"] = {name: round(images / value, 1) for name, value in seconds.items()}
        report["matrix_tflops"] = round(rate / 1e12, 1)
        report["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print_machine(report["machine"])
    print(f"{args.size}, {images} images of {args.pixels}x{args.pixels}, {report['dtype']}, a training step:")
    for name, share in report["share_of_the_matrix_rate"].items():
        speed = f"{images / seconds[name]:12.1f} images/s" if on_gpu else ""
        print(f"    {name:10}{100 * share:6.1f} % of the measured matrix rate{speed}")
    if args.json:
        record_report(RESULTS, f"train_{args.size}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
