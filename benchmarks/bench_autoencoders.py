"""Encoding and decoding beside the autoencoders of diffusers that HieraTok can replace: speed, FLOPs and memory."""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_cpu import converted, save_programs
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny
from diffusers.utils import logging
from measuring import (
    best_rate,
    describe_benchmark,
    first_line,
    in_fresh_process,
    markdown_table,
    peak_memory,
    print_machine,
    record_report,
    side_by_side,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hieratok_hf import SIZES, AutoencoderHieraTok
from hieratok_hf.cli.command_line import find_device
from hieratok_hf.cli.export import open_program
from hieratok_hf.cli.parsing import add_device, make_parser
from hieratok_hf.utils.plots import draw

RESULTS = Path(__file__).parent / "results"
# What tells one row from another.
ROW = ("model", "pixels", "images", "direction")
BASELINE = "AutoencoderKL"
TILES = "tiles"
NO_MEMORY = "out of memory"
DIRECTIONS = ("encode", "decode")
MODES = ("eager", "compiled")


def kl(block_out_channels: tuple[int, ...], latent_channels: int) -> nn.Module:
    """The convolutional autoencoder of latent diffusion, with attention in its middle block alone."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        block_out_channels=block_out_channels,
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=512,  # Stable Diffusion's, the side of a tile
    )


def dc() -> nn.Module:
    """The deep compression autoencoder of Sana."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    resampling = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    return AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks, **resampling)


# Name: what it is, and how it is made with random weights for square images of a side.
MODELS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    **{size: ("HieraTok", lambda pixels, size=size: AutoencoderHieraTok.from_size(size)) for size in SIZES},
    BASELINE: ("Stable Diffusion's, f8 with 4 channels", lambda pixels: kl((128, 256, 512, 512), 4)),
    "AutoencoderKL-f16": ("32 channels, widths as VA-VAE's", lambda pixels: kl((128, 128, 256, 256, 512), 32)),
    "AutoencoderDC": ("Sana's, f32 with 32 channels", lambda pixels: dc()),
    "AutoencoderTiny": ("TAESD's", lambda pixels: AutoencoderTiny()),
    # It resizes every image to one size, of patches of 14 pixels where those that it makes have 16.
    "AutoencoderRAE": ("DINOv2-B and 8 x 512", lambda pixels: AutoencoderRAE(encoder_input_size=pixels * 14 // 16)),
}


class Programs:
    """A tokenizer as programs in onnxruntime, called as the model is."""

    def __init__(self, vae: AutoencoderHieraTok, kind: str):
        with tempfile.TemporaryDirectory() as name:
            save_programs(vae, Path(name), [kind])
            self.encoder, self.decoder = (
                open_program(Path(name) / kind / f"{x}.onnx") for x in ("encoder", "decoder")
            )

    def encode(self, pixel_values: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.encoder(pixel_values).chunk(2, dim=1)[0],)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.decoder(latents),)


def in_tiles(vae: nn.Module) -> nn.Module:
    vae.enable_tiling()
    return vae


# Name: what a model of which the name ends with it is computed by, and the dtype whose peak it is compared with.
WAYS: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "bfloat16": (lambda vae: converted(vae, "bfloat16"), "bfloat16"),
    "int8": (lambda vae: converted(vae, "int8"), "int8"),
    "onnxruntime": (lambda vae: Programs(vae, "float32, opset 23"), "float32"),
    "onnxruntime int8": (lambda vae: Programs(vae, "int8, opset 23"), "int8"),
    TILES: (in_tiles, None),
}
EAGER_ONLY = ("onnxruntime", "onnxruntime int8", TILES)
VARIANTS = [f"{size}, {way}" for size in SIZES for way in WAYS] + [f"{BASELINE}, {way}" for way in ("bfloat16", TILES)]


def encode(vae: Any, pixel_values: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` to their latent `(B, C, h, w)`, the mode where an autoencoder gives a distribution."""
    encoded = vae.encode(pixel_values, return_dict=False)[0]
    return encoded if isinstance(encoded, Tensor) else encoded.mode()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` to images `(B, 3, H, W)`."""
    return vae.decode(latents, return_dict=False)[0]


CALLS = {"encode": encode, "decode": decode}


def split_name(name: str) -> tuple[str, str]:
    """The model and the way that a name stands for, which is empty for what PyTorch computes in `--dtype`."""
    model, _, way = name.partition(", ")
    return model, way


def baseline_of(name: str) -> str:
    """What a model is compared with: whole images with whole ones, tiles with tiles."""
    return f"{BASELINE}, {TILES}" if split_name(name)[1] == TILES else BASELINE


@torch.no_grad()
def count(name: str, pixels: int, images: int) -> dict[str, Any]:
    """Parameters, the latent's shape `(B, C, h, w)`, and FLOPs (two a multiply-add) of both directions of a batch."""
    model, way = split_name(name)
    with torch.device("meta"):
        vae = MODELS[model][1](pixels).eval()
        if way == TILES:
            vae = in_tiles(vae)
        pixel_values = torch.empty(images, 3, pixels, pixels)
    with FlopCounterMode(display=False) as encoding:
        latents = encode(vae, pixel_values)
    with FlopCounterMode(display=False) as decoding:
        decode(vae, latents)
    return {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "latent": tuple(latents.shape),
        "encode": encoding.get_total_flops(),
        "decode": decoding.get_total_flops(),
    }


def prepared(
    name: str, pixels: int, latent: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], tuple[int, ...]]:
    """One direction of a model with random weights on random input, and the shape that it must return."""
    torch.manual_seed(0)
    model, way = split_name(name)
    vae = MODELS[model][1](pixels).eval().to(device, dtype)
    if way:
        vae = WAYS[way][0](vae)
    if way == "bfloat16":
        dtype = torch.bfloat16
    image = (latent[0], 3, pixels, pixels)
    if direction == "encode":
        given, expected = torch.rand(image, device=device) * 2 - 1, latent
    else:
        given, expected = torch.randn(latent, device=device), image
    given = given.to(dtype)
    return lambda: CALLS[direction](vae, given), expected


def compiled(name: str, call: Callable[[], Tensor], expected: Tensor) -> Callable[[], Tensor]:
    """The call compiled, in one graph if the model is ours; `ValueError` where it returns another tensor."""
    # The compiler keeps its graphs by code object, and looks through those of all models before it finds one.
    call.__code__ = call.__code__.replace()
    run = torch.compile(call, fullgraph=name.startswith("hieratok"), dynamic=False)
    error = ((run().float() - expected.float()).norm() / expected.float().norm()).item()
    # Eager layers round anew where compiled ones are fused.
    if not error < (1e-4 if expected.dtype == torch.float32 and not split_name(name)[1] else 5e-2):
        raise ValueError(f"{name} compiled is off by {error:.1e}")
    return run


def measure(
    latents: dict[str, tuple[int, ...]],
    pixels: int,
    direction: str,
    modes: list[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> tuple[dict[str, dict[str, float]], dict[str, int], dict[str, str]]:
    """
    One direction of several models, whose latents `(B, C, h, w)` have these shapes, taking turns.

    Returns:
        Seconds of a call by model and mode; on a GPU, bytes at the peak beyond weights and input; and why models are
        left out: the device's memory does not suffice, they cannot be compiled, or their result has another shape
        than it should, is not finite, or changes when it is compiled.
    """
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    peaks: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name, latent in latents.items():
        try:
            call, shape = prepared(name, pixels, latent, direction, device, dtype)
            expected = call()
            if expected.shape != shape or not expected.isfinite().all():
                raise ValueError(f"{name} should {direction} to finite numbers {shape}, got {tuple(expected.shape)}")
            mine = {"eager": call}
            if "compiled" in modes and split_name(name)[1] not in EAGER_ONLY:
                mine["compiled"] = compiled(name, call, expected)
            del expected
            if device.type == "cuda":
                peaks[name] = peak_memory(call, device)
        except torch.OutOfMemoryError:
            reasons[name] = NO_MEMORY
        except Exception as error:  # compilers raise all kinds, and one model that fails says nothing of the others
            reasons[name] = first_line(error)
        else:
            calls |= {(name, mode): mine[mode] for mode in modes if mode in mine}
    # Programs come last, each alone: threads of onnxruntime that wait for work would take the cores from the others.
    alone = [key for key in calls if "onnxruntime" in key[0]]
    found: dict[str, float] = {}
    for keys in ([key for key in calls if key not in alone], *([key] for key in alone)):
        if keys:
            # Names are what it reports by.
            found |= side_by_side({" ".join(key): calls[key] for key in keys}, device, seconds, graphs=False)
    times: dict[str, dict[str, float]] = {}
    for name, mode in calls:
        times.setdefault(name, {})[mode] = found[f"{name} {mode}"]
    torch.compiler.reset()
    return times, peaks, reasons


def figures(
    times: dict[str, dict[str, float]],
    flops: dict[str, int],
    images: int,
    rate_of: Callable[[str], float],
    on_gpu: bool,
) -> dict[str, dict[str, Any]]:
    """Each model's figures from the seconds of a call by mode, like compared with like: compiled with compiled."""
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        rows[name] = {"gflop": round(flops[name] / 1e9, 2)}
        if (first := times.get(baseline_of(name))) is not None:
            rows[name]["times_as_fast"] = {mode: round(first[mode] / value, 3) for mode, value in seconds.items()}
        shares = {mode: round(flops[name] / value / rate_of(name), 4) for mode, value in seconds.items()}
        rows[name]["share_of_the_peak"] = shares
        if on_gpu:
            rows[name]["images_per_second"] = {mode: round(images / value, 1) for mode, value in seconds.items()}
    return rows


def one_peak(name: str, pixels: int, images: int, direction: str, dtype: torch.dtype) -> None:
    """Print the bytes that a call on the CPU holds at its peak beyond weights and input, as JSON."""
    device, patches = torch.device("cpu"), 64
    # Code and buffers that the first call of any size brings along belong to no image.
    prepared(name, patches, count(name, patches, 1)["latent"], direction, device, dtype)[0]()
    call, _ = prepared(name, pixels, count(name, pixels, images)["latent"], direction, device, dtype)
    print(json.dumps({"peak": peak_memory(call, device)}))


def batch_of(row: dict[str, Any]) -> str:
    return f"{row['images']} of {row['pixels']}x{row['pixels']}"


def table(report: dict[str, Any]) -> str:
    """A row for each model and size in Markdown; where a cell has two figures of a direction, encode comes first."""
    modes = ", ".join(report["modes"])
    header = ["images", "model", "parameters, M", "latent", "GFLOP: encode, decode"]
    header += [f"{direction}: {modes}" for direction in (*DIRECTIONS, "both")]
    header += ["of the peak: encode, decode"]
    rows = {(row["pixels"], row["images"], row["model"], row["direction"]): row for row in report["rows"]}
    has_peaks = any("peak_mib" in row for row in report["rows"])
    has_rates = any("images_per_second" in row for row in report["rows"])
    header += ["peak memory, MiB: encode, decode"] * has_peaks
    header += [f"{direction}, images/s: {modes}" for direction in DIRECTIONS] * has_rates
    lines = []

    def by_mode(row: dict[str, Any], key: str, spec: str) -> str:
        return ", ".join(format(value, spec) for value in row.get(key, {}).values())

    for pixels, images, name in dict.fromkeys(key[:3] for key in rows):
        found = {direction: rows.get((pixels, images, name, direction), {}) for direction in (*DIRECTIONS, "both")}
        both = [found[direction] for direction in DIRECTIONS]
        about = report["models"][name]
        cells = [batch_of({"pixels": pixels, "images": images}), name, f"{about['parameters'] / 1e6:.1f}"]
        cells += [about["latent"], ", ".join(f"{row['gflop']:.1f}" if row else "-" for row in both)]
        cells += [by_mode(row, "times_as_fast", ".2f") for row in found.values()]
        shares = [row.get("share_of_the_peak", {}).get(report["modes"][0]) for row in both]
        cells += [", ".join("-" if share is None else f"{100 * share:.0f} %" for share in shares)]
        cells += [", ".join(f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-" for row in both)] * has_peaks
        cells += [by_mode(row, "images_per_second", ".1f") for row in both] * has_rates
        lines.append(cells)
    return markdown_table(f"| {' | '.join(header)} |", lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of both directions at the smallest size and batch, and a curve a model over the sizes at that batch."""
    from matplotlib.ticker import LogLocator

    mode = report["modes"][0]
    rows = [row for row in report["rows"] if "times_as_fast" in row and row["direction"] in DIRECTIONS]
    rows = [row for row in rows if not split_name(row["model"])[1]]
    images = min(row["images"] for row in rows)
    rows = [row for row in rows if row["images"] == images]
    least = min(row["pixels"] for row in rows)
    names = list(dict.fromkeys(row["model"] for row in rows))
    of_directions = {
        direction: [row for row in rows if row["direction"] == direction]
        for direction in DIRECTIONS
        if any(row["direction"] == direction for row in rows)
    }

    panels = 1 + len(of_directions)
    thickness = 0.8 / len(of_directions)
    size = {"figsize": (5 * panels, 5), "width_ratios": [1.5] + [1] * (panels - 1)}
    with draw(path, panels, **size) as (figure, (bars, *curves)):
        for i, (axis, (direction, mine)) in enumerate(zip(curves, of_directions.items())):
            ratios = {row["model"]: row["times_as_fast"][mode] for row in mine if row["pixels"] == least}
            places = [names.index(name) + (i - (len(of_directions) - 1) / 2) * thickness for name in ratios]
            container = bars.barh(places, ratios.values(), thickness, label=direction, color=f"C{i}")
            bars.bar_label(container, [f"{ratio:.1f}" for ratio in ratios.values()], padding=3, fontsize=8)
            for k, name in enumerate(names):
                curve = sorted((row["pixels"], row["times_as_fast"][mode]) for row in mine if row["model"] == name)
                ours = name.startswith("hieratok")
                style = {"linestyle": "-" if ours else "--", "marker": "o" if ours else "s", "markersize": 4}
                axis.plot(*zip(*curve), color=f"C{k}", label=name, **style)
            sides = sorted({row["pixels"] for row in mine})
            axis.set(xscale="log", yscale="log", xlabel="side of the image, pixels", title=direction)
            axis.set_xticks(sides, map(str, sides))
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.grid(alpha=0.3)
        bars.set(yticks=range(len(names)), yticklabels=names, xscale="log", xlabel=f"times as fast as {BASELINE}")
        bars.set_title(f"{batch_of({'images': images, 'pixels': least})} pixels, {mode}, {report['dtype']}")
        bars.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bars.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bars.xaxis.minorticks_off()
        bars.margins(x=0.12)
        bars.axvline(1, color="grey", linewidth=0.8)
        bars.invert_yaxis()
        bars.legend()
        figure.legend(*curves[0].get_legend_handles_labels(), loc="outside lower right", ncols=5)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_device(parser)
    add("--dtype", help="dtype of the weights; bfloat16 on a GPU, float32 on a CPU unless given")
    what = f"models to time, all unless given; with a way to compute, as '{VARIANTS[0]}': {', '.join(WAYS)}"
    add("--models", nargs="+", default=list(MODELS), choices=[*MODELS, *VARIANTS], metavar="MODEL", help=what)
    add("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides of the images")
    add("--batches", type=int, nargs="+", default=[1, 16], help="numbers of images at a time")
    add("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS, help="calls to time")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--eager", dest="modes", action="store_const", const=["eager"], help="compile nothing")
    only.add_argument("--compiled", dest="modes", action="store_const", const=["compiled"], help="time nothing eager")
    add("--limit", type=float, help="leave out calls of more TFLOP; 3 on a CPU, none on a GPU unless given")
    add("--seconds", type=float, default=20, help="time for each size, batch and direction")
    add("--memory", action="store_true", help="measure peaks on a CPU too, each in its own process")
    add("--json", action="store_true", help="write autoencoders_MODES_KIND.json, after each size")
    add("--plot", type=Path, help="write an image of the ratios here")
    add("--peak_of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # it warns of every cast, of no layers at all
    device = find_device(args)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    if args.peak_of:
        name, pixels, images, direction = args.peak_of
        with torch.inference_mode():
            one_peak(name, int(pixels), int(images), direction, dtype)
        return 0
    limit = (float("inf") if on_gpu else 3.0) if args.limit is None else args.limit
    modes = args.modes or list(MODES)
    names = list(dict.fromkeys(args.models))
    for name in names:
        if baseline_of(name) not in names:
            parser.error(f"--models must name {baseline_of(name)}, which {name} is compared with")
    if not all(pixels > 0 and pixels % 32 == 0 for pixels in args.sizes) or not all(x > 0 for x in args.batches):
        parser.error("--sizes must be multiples of 32, the largest factor of a model, and --batches positive")

    rates: dict[str, float] = {}

    def rate_of(name: str) -> float:
        way = split_name(name)[1]
        compared = (WAYS[way][1] if way else None) or str(dtype).removeprefix("torch.")
        if compared not in rates:
            rates[compared] = best_rate(device, getattr(torch, compared))
        return rates[compared]

    about = describe_benchmark(device)
    print_machine(about)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    wrong: list[str] = []
    models: dict[str, dict[str, Any]] = {}
    for pixels, images in itertools.product(args.sizes, args.batches):
        counted = {name: count(name, pixels, images) for name in names}
        group = {"pixels": pixels, "images": images}
        for name, found in counted.items():
            channels, height = found["latent"][1:3]
            about_model = {"what": MODELS[split_name(name)[0]][0], "parameters": found["parameters"]}
            models[name] = {**about_model, "latent": f"{channels} of 1/{pixels // height}"}
        timed: dict[str, dict[str, dict[str, float]]] = {}
        for direction in args.directions:
            flops = {name: found[direction] for name, found in counted.items()}
            reasons = {
                name: f"{x / 1e12:.1f} TFLOP a call, more than --limit {limit:g}"
                for name, x in flops.items()
                if x > limit * 1e12
            }
            if not on_gpu:
                without = {name: baseline_of(name) for name in names if baseline_of(name) in reasons}
                reasons |= {name: f"{first} is left out" for name, first in without.items() if name not in reasons}
            latents = {name: counted[name]["latent"] for name in names if name not in reasons}
            peaks: dict[str, int] = {}
            if latents:
                with torch.inference_mode():
                    found = measure(latents, pixels, direction, modes, device, dtype, args.seconds)
                timed[direction], peaks, failures = found
                reasons |= failures
                wrong += [f"{name}: {why}" for name, why in failures.items() if why != NO_MEMORY]
            left_out += [{"model": name, **group, "direction": direction, "why": why} for name, why in reasons.items()]
            for name, row in figures(timed.get(direction, {}), flops, images, rate_of, on_gpu).items():
                rows.append({"model": name, **group, "direction": direction, **row})
                if args.memory and not on_gpu:
                    given = ["--peak_of", name, pixels, images, direction, "--device", "cpu", "--dtype"]
                    told = in_fresh_process(__file__, [*given, str(dtype).removeprefix("torch.")], seconds=3600)
                    if "peak" in told:
                        peaks[name] = told["peak"]
                if name in peaks:
                    rows[-1]["peak_mib"] = round(peaks[name] / 2**20, 1)
        if len(timed) == len(DIRECTIONS):
            first, second = timed.values()
            both = {n: {m: first[n][m] + second[n][m] for m in first[n]} for n in first if n in second}
            flops = {name: found["encode"] + found["decode"] for name, found in counted.items()}
            for name, row in figures(both, flops, images, rate_of, on_gpu).items():
                rows.append({"model": name, **group, "direction": "both", **row})
        report = {
            "machine": about, "dtype": str(dtype).removeprefix("torch."), "modes": modes, "baseline": BASELINE,
            "limit_tflop": limit if limit < float("inf") else None, "models": models, "rows": rows,
            "left_out": left_out,
        }  # fmt: skip
        if args.json:
            name = "_".join(["autoencoders", *modes])
            report = record_report(RESULTS, name, report, ROW, lists=("rows", "left_out"))

    print(f"{report['dtype']}, times as fast as {BASELINE} ({MODELS[BASELINE][0]}) on the same images:")
    print(table(report))
    for row in report["left_out"]:
        print(f"left out: {row['model']}, {row['direction']}, {batch_of(row)}: {row['why']}")
    if args.plot:
        plot(report, args.plot)
    for failure in wrong:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
