"""Ways to run a tokenizer on a CPU: speed, bytes, what images lose, and where the time goes beside the peak."""

import copy
import importlib.util
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from measuring import (
    best_rate,
    copy_rate,
    describe_benchmark,
    markdown_table,
    print_machine,
    record_report,
    side_by_side,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hieratok_hf import SIZES, AutoencoderHieraTok, HieraTokCore
from hieratok_hf.cli import export
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.utils.choices import SHIPPED

Model = TypeVar("Model", bound=nn.Module)
# What tells one row from another.
ROW = ("model", "part", "program", "dtype")
RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data" / "kodak"
CPU = torch.device("cpu")
PARTS = ("encoder", "decoder")
PLAIN = "PyTorch, float32"
DTYPES = ("float32", "bfloat16", "int8")
PROGRAMS = {
    "float32": [],
    "float32, opset 23": ["--opset", "23"],
    "int8": ["--dtype", "int8"],
    "int8, opset 23": ["--dtype", "int8", "--opset", "23"],
}
# Programs and the precision that OpenVINO may compute in; left to itself it takes bfloat16 where it can.
IN_OPENVINO = {"float32": ("float32", "f32"), "bfloat16": ("float32", "bf16"), "int8": ("int8", "f32")}
# What the operator of a kind is called, of which the time includes all that it calls.
OPERATORS = {
    "products": ("aten::linear", "mkldnn::_linear_pointwise"),  # the second on processors of AMD
    "attention": ("aten::scaled_dot_product_attention",),
    "convolutions": ("aten::conv2d",),
    "norms": ("aten::rms_norm",),
}


def has_random_weights(model: str) -> bool:
    """Tell whether a model is a named size without weights, of which images say nothing."""
    return model in SIZES and model not in SHIPPED


def load(model: str) -> HieraTokCore:
    """Load a tokenizer that ships or lies in a folder; a named size otherwise gets random weights."""
    torch.manual_seed(0)
    make = AutoencoderHieraTok.from_size if has_random_weights(model) else AutoencoderHieraTok.from_pretrained
    return make(model).eval().core


def call_of(part: str, core: HieraTokCore, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """Pixels to moments or latents to pixels, in the dtype of the weights."""
    if part == "encoder":
        return lambda x: core.encode_moments(x.to(dtype))[0]
    return lambda x: core.decode(x.to(dtype))


def converted(model: Model, dtype: str) -> Model:
    """A copy with weights of another dtype; as integers by torchao, with a scale for each channel and each token."""
    model = copy.deepcopy(model)
    if dtype != "int8":
        return model.to(getattr(torch, dtype))
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def in_pytorch(part: str, core: HieraTokCore, dtype: str, compiled: bool) -> Callable[[Tensor], Tensor]:
    call = call_of(part, converted(core, dtype), torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    return torch.compile(call, options={"freezing": True}) if compiled else call


def in_openvino(path: Path, precision: str) -> Callable[[Tensor], Tensor]:
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    program = openvino.compile_model(path, "CPU", hints)
    return lambda x: torch.from_numpy(program(x.numpy())[0])


def save_programs(vae: AutoencoderHieraTok, folder: Path, kinds: Iterable[str]) -> list[dict[str, Any]]:
    """Export a tokenizer in several kinds, each into a folder of its name, and return the bytes of each and part."""
    vae.save_pretrained(folder / "model")
    rows = []
    for kind in kinds:
        made = folder / kind
        if export.main([str(folder / "model"), str(made), "--format", "onnx", *PROGRAMS[kind]]):
            raise RuntimeError(f"The model could not be exported in {kind}.")
        for program in json.loads((made / export.FACTS).read_text())["programs"]:
            size = sum((made / name).stat().st_size for name in program["files"])
            rows.append({"part": program["part"], "program": kind, "megabytes": round(size / 1e6, 1)})
    return rows


def ways(core: HieraTokCore, part: str, folder: Path) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Name what makes a part ready in each way that there are packages for, beginning with the plain one."""
    found: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {}
    for dtype in DTYPES:
        if dtype == "int8" and not importlib.util.find_spec("torchao"):
            continue
        for compiled in (False, True):
            found[f"PyTorch, {dtype}{', compiled' * compiled}"] = partial(in_pytorch, part, core, dtype, compiled)
    for kind in PROGRAMS:
        found[f"onnxruntime, {kind}"] = partial(export.open_program, folder / kind / f"{part}.onnx")
    if importlib.util.find_spec("openvino"):
        for name, (kind, precision) in IN_OPENVINO.items():
            found[f"OpenVINO, {name}"] = partial(in_openvino, folder / kind / f"{part}.onnx", precision)
    return found


def measure_ways(core: HieraTokCore, images: list[Tensor], folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Time every way for one image of 256 x 256 pixels; measure what images lose where it is not a compiled one."""
    rows = 256 // core.config.patch_size
    found = []
    for part in PARTS:
        x = export.make_inputs(part, core.config, 1, rows, rows)
        times: dict[str, float] = {}
        lost: dict[str, float] = {}
        psnr = export.mean_psnr(call_of(part, core), part, core, images, torch.float32) if images else 0.0
        # One library after the other: threads of one that wait for work would take the cores from the next.
        for name, opener in ways(core, part, folder).items():
            run = opener()
            times |= side_by_side({name: partial(run, x)}, CPU, seconds)
            if images and name != PLAIN and "compiled" not in name:
                lost[name] = round(psnr - export.mean_psnr(run, part, core, images, torch.float32), 4)
            torch.compiler.reset()
        faster = {name: round(times[PLAIN] / time, 2) for name, time in times.items()}
        found.append({"part": part, "times_as_fast": faster, "psnr_lost": lost})
    return found


def profile_part(core: HieraTokCore, part: str, dtype: str, rate: float, copied: float) -> dict[str, Any]:
    """Divide the time of one image among kinds of operators, and compare it with the peak and with reading weights."""
    side = 256 // core.config.patch_size
    x = export.make_inputs(part, core.config, 1, side, side)
    call = in_pytorch(part, core, dtype, compiled=False)
    repeats = 10
    seconds = side_by_side({part: partial(call, x)}, CPU, 2)[part]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            call(x)
    events = {event.key: event for event in profiled.key_averages()}
    whole = sum(event.self_cpu_time_total for event in events.values())
    shares = {
        kind: sum(events[name].cpu_time_total for name in names if name in events) / whole
        for kind, names in OPERATORS.items()
    }
    shares["the rest"] = 1 - sum(shares.values())
    module = core.encoder if part == "encoder" else core.decoder
    weights = sum(parameter.numel() for parameter in module.parameters()) * getattr(torch, dtype).itemsize
    with torch.device("meta"):
        counted = HieraTokCore(core.config)
    with FlopCounterMode(display=False) as counter:
        call_of(part, counted)(x.to("meta"))
    flops = counter.get_total_flops()
    of_operators = counter.get_flop_counts()["Global"]
    linear = sum(of_operators.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return {
        "part": part,
        "dtype": dtype,
        "share_of_time": {kind: round(share, 3) for kind, share in shares.items()},
        "products_of_peak": round(linear / (seconds * shares["products"]) / rate, 3),
        "whole_of_peak": round(flops / seconds / rate, 3),
        # A copy reads and writes.
        "reading_weights_of_time": round(weights / (copied / 2) / seconds, 3),
    }


def table(report: dict[str, Any]) -> str:
    """How fast the ways are and what they lose, what programs weigh, and where the time goes, in Markdown."""
    columns = [(row["model"], row["part"]) for row in report["ways"]]
    heads = " | ".join(f"{model}, {part}" for model, part in columns)
    by_way = []
    for name in report["ways"][0]["times_as_fast"]:
        cells = []
        for row in report["ways"]:
            lost = row["psnr_lost"].get(name)
            cells.append(f"{row['times_as_fast'][name]:.2f}{'' if lost is None else f', {lost:.3f} dB'}")
        by_way.append([name, *cells])
    weights = []
    for program in PROGRAMS:
        sizes = {(x["model"], x["part"]): x["megabytes"] for x in report["programs"] if x["program"] == program}
        weights.append([program, *(sizes.get(column, "-") for column in columns)])
    time = []
    for row in report["time"]:
        percent = [*row["share_of_time"].values(), row["products_of_peak"], row["whole_of_peak"]]
        cells = [f"{100 * share:.0f} %" for share in (*percent, row["reading_weights_of_time"])]
        time.append([row["model"], row["part"], row["dtype"], *cells])
    kinds = " | ".join(report["time"][0]["share_of_time"])
    ends = "products, of the peak | all, of the peak | reading the weights once, of the time"
    return "\n\n".join(
        [
            markdown_table(f"| way | {heads} |", by_way),
            markdown_table(f"| MB of the program | {heads} |", weights),
            markdown_table(f"| model | part | dtype | {kinds} | {ends} |", time),
        ]
    )


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    models = ["hieratok-tiny", "hieratok-tiny-16x", "hieratok-b"]
    add("--models", nargs="+", default=models, help="names that ship, folders, or named sizes with random weights")
    add("--data", type=Path, default=DATA, help="folder of the images whose loss is measured")
    add("--seconds", type=float, default=3, help="time for each way")
    add("--json", action="store_true", help="write results/cpu_KIND.json")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": describe_benchmark(CPU)}
    print_machine(report["machine"])
    peaks = {dtype: best_rate(CPU, getattr(torch, dtype)) for dtype in DTYPES}
    copied = copy_rate(CPU)
    report["peak_over_float32"] = {dtype: round(peak / peaks["float32"], 2) for dtype, peak in peaks.items()}
    print("peaks, over that of float32: " + ", ".join(f"{k} {v}" for k, v in report["peak_over_float32"].items()))
    report |= {"ways": [], "programs": [], "time": []}
    for model in args.models:
        core = load(model)
        wanted = Namespace(data=[str(args.data)], max_images=None)
        images = [] if has_random_weights(model) else export.take_images(wanted, core.config)[0]
        for dtype in ("float32", "bfloat16"):
            for part in PARTS:
                report["time"].append({"model": model, **profile_part(core, part, dtype, peaks[dtype], copied)})
        with tempfile.TemporaryDirectory() as name:
            sizes = save_programs(AutoencoderHieraTok.from_core(core), Path(name), PROGRAMS)
            report["programs"] += [{"model": model, **row} for row in sizes]
            found = measure_ways(core, images, Path(name), args.seconds)
        report["ways"] += [{"model": model, **row} for row in found]
    print(table(report))
    if args.json:
        record_report(RESULTS, "cpu", report, ROW, lists=("ways", "programs", "time"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
