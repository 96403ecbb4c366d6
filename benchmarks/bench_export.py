"""Exported programs beside the model: bytes, what Kodak's images lose, and speed in onnxruntime and OpenVINO."""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import describe_benchmark, markdown_table, print_machine, record_report, side_by_side
from torch import Tensor

from hieratok_hf import SIZES, AutoencoderHieraTok
from hieratok_hf.cli import export
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.utils.choices import SHIPPED

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data" / "kodak"
CPU = torch.device("cpu")
KINDS = {
    "float32": [],
    "float32, opset 23": ["--opset", "23"],
    "int8": ["--dtype", "int8"],
    "int8, opset 23": ["--dtype", "int8", "--opset", "23"],
}
PARTS = ("encoder", "decoder")


def save_programs(model: str, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Export a model in all kinds, and return bytes and lost decibels of each kind and part."""
    source, measured = model, ["--data", str(data)]
    if model in SIZES and model not in SHIPPED:  # random weights, of which images say nothing
        torch.manual_seed(0)
        AutoencoderHieraTok.from_size(model).save_pretrained(folder / "model")
        source, measured = str(folder / "model"), []
    rows = []
    for kind, options in KINDS.items():
        made = folder / kind
        if export.main([source, str(made), "--format", "onnx", *options, *measured]):
            raise SystemExit(f"{model} could not be exported in {kind}.")
        for program in json.loads((made / export.FACTS).read_text())["programs"]:
            size = sum((made / name).stat().st_size for name in program["files"])
            row = {"model": model, "part": program["part"], "kind": kind, "megabytes": round(size / 1e6, 1)}
            rows.append({**row, "psnr_lost": program["psnr_lost"] if measured else None})
    return rows


def openers(folder: Path, part: str) -> dict[str, Callable[[], Callable[[Tensor], Any]]]:
    """Name what opens the programs of a part in onnxruntime, and in OpenVINO where it is installed."""
    found = {f"onnxruntime, {kind}": partial(export.open_program, folder / kind / f"{part}.onnx") for kind in KINDS}
    if importlib.util.find_spec("openvino"):
        for kind in ("float32", "int8"):
            found[f"OpenVINO, {kind}"] = partial(open_in_openvino, folder / kind / f"{part}.onnx")
    return found


def open_in_openvino(path: Path) -> Callable[[Tensor], Any]:
    import openvino

    program = openvino.compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return lambda x: program(x.numpy())


@torch.inference_mode()
def measure(model: str, data: Path, seconds: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Export a model and time its programs beside it, for one image of 256 x 256 pixels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = save_programs(model, data, folder)
        source = str(folder / "model") if (folder / "model").exists() else model
        core = AutoencoderHieraTok.from_pretrained(source).eval().core
        rows = 256 // core.config.patch_size
        speeds = []
        for part in PARTS:
            x = export.make_inputs(part, core.config, 1, rows, rows)
            of_model = core.encode_moments if part == "encoder" else core.decode
            times = {}
            # One library after the other: threads of one that wait for work would take the cores from the next.
            for name, opener in {"PyTorch, float32": lambda run=of_model: run, **openers(folder, part)}.items():
                times |= side_by_side({name: partial(opener(), x)}, CPU, seconds)
            first = times["PyTorch, float32"]
            faster = {name: round(first / time, 2) for name, time in times.items()}
            speeds.append({"model": model, "part": part, "times_as_fast": faster})
    return sizes, speeds


def tables(report: dict[str, Any]) -> str:
    """What programs weigh and lose, and how fast they are, in Markdown."""
    lost = [
        [x["model"], x["part"], x["kind"], x["megabytes"], "-" if x["psnr_lost"] is None else f"{x['psnr_lost']:.3f}"]
        for x in report["sizes"]
    ]
    names = list(report["speeds"][0]["times_as_fast"])
    rows = [
        [x["model"], x["part"], *(f"{x['times_as_fast'].get(name, '-')}" for name in names)] for x in report["speeds"]
    ]
    first = markdown_table("| model | part | program | MB | dB lost |", lost)
    return first + "\n\n" + markdown_table(f"| model | part | {' | '.join(names)} |", rows)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    models = ["hieratok-tiny", "hieratok-tiny-16x", "hieratok-b"]
    add("--models", nargs="+", default=models, help="names that ship, folders, or named sizes with random weights")
    add("--data", type=Path, default=DATA, help="folder of the images whose loss is measured")
    add("--seconds", type=float, default=3, help="time for each program")
    add("--json", action="store_true", help="write results/export_KIND.json")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": describe_benchmark(CPU), "sizes": [], "speeds": []}
    print_machine(report["machine"])
    for model in args.models:
        for rows, more in zip((report["sizes"], report["speeds"]), measure(model, args.data, args.seconds)):
            rows.extend(more)
    print(tables(report))
    if args.json:
        record_report(RESULTS, "export", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
