"""
Export encoder and decoder as programs that run without this package: ONNX, for onnxruntime and others, and PyTorch's
own `.pt2`. Batch, height and width stay free; before a program is kept, its numbers and the PSNR of images are
compared with the model's.
"""

import copy
import importlib.util
import io
import json
import logging
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import HieraTokConfig, HieraTokCore, example_image
from ..data.image_dataset import load_images
from ..evaluation.metrics import psnr
from ..evaluation.reconstruction import EvaluationBatches
from ..models.autoencoder_adapter import load_codec
from ..models.saving import stage_folder
from ..utils.extras import missing_extra
from .arguments.weights import EXPORT_SUFFIXES
from .command_line import load_or_explain
from .main import parse
from .terminal import Problem, one_line, run_script, tell_failures

# Shape letters: B batch, H W pixels, p patch size, C latent channels, h w the latent's grid (H / p, W / p).

PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}
# How far rounding may take what a program computes from what the model computes in float32; what integers do to
# single numbers says little.
TOLERANCES = {"float32": 1e-4, "float16": 5e-2, "int8": math.inf}
# A file of protobuf, which ONNX is, ends at 2 GiB; the graph takes a little beside the weights.
ONE_FILE_BYTES = 2_000_000_000
FACTS = "export.json"
POSTERIOR = (
    "moments are mean and logvar, latent_channels of each; mode: mean; "
    "sample: mean + exp(0.5 * clip(logvar, -30, 20)) * standard normal noise"
)


class Encoder(nn.Module):
    """Map `pixel_values (B, 3, H, W)` to moments `(B, 2C, h, w)`, without the weights of the decoder."""

    def __init__(self, core: HieraTokCore):
        super().__init__()
        self.core = copy.deepcopy(core)
        del self.core.decoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.core.encode_moments(pixel_values)[0]


class Decoder(nn.Module):
    """Map `latents (B, C, h, w)` to images `(B, 3, H, W)`, smaller with fewer scales, without the encoder."""

    def __init__(self, core: HieraTokCore, num_scales: int | None):
        super().__init__()
        self.core = copy.deepcopy(core)
        self.num_scales = num_scales
        del self.core.encoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.core.decode(latents, num_scales=self.num_scales)


def interface(part: str, config: HieraTokConfig, factor: int) -> dict[str, dict[str, Any]]:
    """Describe names, shapes and values of a program's input and output; sizes that stay free are given by name."""
    size, channels, least = config.patch_size, config.latent_channels, {"least_rows_and_columns": factor + 1}
    if part == "encoder":
        shape = ["batch", config.in_channels, f"{size}*rows", f"{size}*columns"]
        moments = ["batch", 2 * channels, "rows", "columns"]
        return {
            "input": {"name": "pixel_values", "shape": shape, "values": "in [-1, 1]", **least},
            "output": {"name": "moments", "shape": moments, "values": POSTERIOR},
        }
    rows, columns = (side if factor == 1 else f"ceil({side}/{factor})" for side in ("rows", "columns"))
    shape = ["batch", config.in_channels, f"{size}*{rows}", f"{size}*{columns}"]
    latents = ["batch", channels, "rows", "columns"]
    return {
        "input": {"name": "latents", "shape": latents, "values": "mode or sample", **least},
        "output": {"name": "image", "shape": shape, "values": "about [-1, 1], not clamped"},
    }


def make_inputs(part: str, config: HieraTokConfig, batch: int, rows: int, columns: int) -> Tensor:
    """Draw random images in [-1, 1] for the encoder, standard normal latents for the decoder."""
    generator = torch.Generator().manual_seed(0)
    if part == "decoder":
        return torch.randn(batch, config.latent_channels, rows, columns, generator=generator)
    height, width = rows * config.patch_size, columns * config.patch_size
    return torch.rand(batch, config.in_channels, height, width, generator=generator) * 2 - 1


def trace(
    part: str, module: nn.Module, config: HieraTokConfig, factor: int, dtype: torch.dtype
) -> torch.export.ExportedProgram:
    """Trace the program of a part for every batch, height and width that makes a grid of at least 2 x 2."""
    # Sides of one token would be taken for constants, so the example's have more in the coarsest grid too.
    longest = 2 * config.scale_factors[0]
    example = make_inputs(part, config, 2, longest + 1, longest + 3).to(dtype)
    batch = torch.export.Dim("batch", min=1)
    rows, columns = (torch.export.Dim(name, min=factor + 1) for name in ("rows", "columns"))
    unit = config.patch_size if part == "encoder" else 1
    sides = (rows, columns) if unit == 1 else (unit * rows, unit * columns)
    shapes = ({0: batch, 2: sides[0], 3: sides[1]},)
    # What the tracer cannot prove of every size, such as that a side is not 0 modulo four times itself, is asserted.
    program = torch.export.export(
        module, (example,), dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def save_onnx(
    program: torch.export.ExportedProgram, path: Path, names: dict[str, dict[str, Any]], opset: int, integers: bool
) -> None:
    """
    Write a program as ONNX; its weights go to a second file, `path` and `.data`, where one cannot hold them.

    As integers, the weights of each channel have a scale of their own, and what they are multiplied with gets its
    scale from its own range in each call, which lost less than scales that were fixed beforehand on images.
    """
    ends = names["input"], names["output"]
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=[ends[0]["name"]],
        output_names=[ends[1]["name"]],
        verbose=False,
    )
    graph = exported.model.graph
    value: Any
    for value, end in zip((graph.inputs[0], graph.outputs[0]), ends):
        value.shape = type(value.shape)(end["shape"])
    weights = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    for node in graph.all_nodes():
        node.metadata_props.clear()  # what the exporter knew of modules, a fifth of the file
    two_files = weights > ONE_FILE_BYTES
    exported.save(path, external_data=two_files)
    if integers:
        from onnxruntime.quantization import quantize_dynamic

        products = ["MatMul"]  # those with weights; convolutions and attention stay in float32
        logging.disable(logging.WARNING)  # it advises to optimise a graph beforehand that is as it should be
        try:
            quantize_dynamic(path, path, products, per_channel=True, use_external_data_format=two_files)
        finally:
            logging.disable(logging.NOTSET)


def list_operators(path: Path) -> dict[str, list[str]]:
    """List the operators of an ONNX program by their domain, which is `ai.onnx` for ONNX's own."""
    import onnx

    operators: dict[str, set[str]] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        operators.setdefault(node.domain or "ai.onnx", set()).add(node.op_type)
    return {domain: sorted(names) for domain, names in operators.items()}


def open_program(path: Path) -> Callable[[Tensor], Tensor]:
    """Open a program that was written, as a server would open it."""
    if path.suffix == EXPORT_SUFFIXES["torch"]:
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def check_sizes(config: HieraTokConfig, factor: int) -> Iterator[tuple[int, int, int]]:
    """List batches, rows and columns of tokens to compare at, none of them those that a program was traced with."""
    longest, least = config.scale_factors[0], factor + 1
    for batch in (1, 3):
        yield from ((batch, least, least), (batch, longest + 1, longest + 4), (batch, 2 * longest + 5, least + 1))


def largest_difference(
    run: Callable[[Tensor], Tensor],
    name: str,
    part: str,
    reference: nn.Module,
    config: HieraTokConfig,
    factor: int,
    dtype: torch.dtype,
    limit: float,
) -> float:
    """
    Measure how far a written program is from the model in float32 at several sizes and batches.

    Raises:
        Problem: It has another shape, gives what is no number, or is further away than rounding takes it.
    """
    largest = 0.0
    for sizes in check_sizes(config, factor):
        x = make_inputs(part, config, *sizes).to(dtype)
        found, expected = run(x).float(), reference(x.float())
        at = f"{name} at batch {sizes[0]} and {sizes[1]} x {sizes[2]} tokens"
        if found.shape != expected.shape:
            raise Problem(f"{at} gives {tuple(found.shape)}, the model {tuple(expected.shape)}")
        difference = (found - expected).abs().max().item()
        if not (math.isfinite(difference) and difference <= limit):
            raise Problem(f"{at} differs from the model by {difference:.2g}, more than {limit:g}")
        largest = max(largest, difference)
    return largest


def mean_psnr(
    run: Callable[[Tensor], Tensor], part: str, core: HieraTokCore, images: Sequence[Tensor], dtype: torch.dtype
) -> float:
    """Average the PSNR in dB of images of which `run` computes a part; of fewer scales that of smaller images."""
    found = []
    for pixel_values in images:
        if part == "encoder":
            made = core.decode(run(pixel_values.to(dtype)).float().chunk(2, dim=1)[0])
        else:
            made = run(core.encode(pixel_values).mode().to(dtype)).float()
        found.append(psnr(made, F.interpolate(pixel_values, made.shape[2:], mode="area")))
    return torch.cat(found).mean().item()


def export_part(
    part: str, num_scales: int | None, core: HieraTokCore, args: Namespace, images: Sequence[Tensor], folder: Path
) -> list[dict[str, Any]]:
    """Write and check the programs of a part, and give what there is to say of each."""
    config, integers = core.config, args.dtype == "int8"
    dtype = torch.float32 if integers else getattr(torch, args.dtype)
    reference = (Encoder(core) if part == "encoder" else Decoder(core, num_scales)).eval()
    module = reference if dtype == torch.float32 else copy.deepcopy(reference).to(dtype)
    factor = config.scale_factors[num_scales - 1] if num_scales else 1  # of the grid that the part gives
    program = trace(part, module, config, factor, dtype)
    names = interface(part, config, factor)
    of_model = mean_psnr(reference, part, core, images, torch.float32)
    facts = []
    for kind in args.format:
        path = folder / file_name(part, num_scales, kind)
        if kind == "onnx":
            save_onnx(program, path, names, args.opset, integers)
        else:
            content = io.BytesIO()  # PyTorch's own writer ends the process where the disk is full
            torch.export.save(program, content)
            path.write_bytes(content.getbuffer())
        run = open_program(path)
        difference = largest_difference(run, path.name, part, reference, config, factor, dtype, TOLERANCES[args.dtype])
        lost = of_model - mean_psnr(run, part, core, images, dtype)
        facts.append(
            {
                "files": sorted(found.name for found in folder.glob(f"{path.name}*")),
                "part": part,
                **({"num_scales": num_scales or len(config.scale_factors)} if part == "decoder" else {}),
                "format": kind,
                **({"opset": args.opset, "operators": list_operators(path)} if kind == "onnx" else {}),
                **names,
                "largest_difference": difference,
                "psnr_lost": round(lost, 4),
            }
        )
    return facts


def file_name(part: str, num_scales: int | None, kind: str) -> str:
    """Name the file of a program: `decoder-2.onnx` decodes two scales, `decoder.onnx` all."""
    return f"{part}{f'-{num_scales}' if num_scales else ''}{EXPORT_SUFFIXES[kind]}"


def prepare(args: Namespace) -> HieraTokCore:
    """Load the model; a `Problem` where what was asked for cannot be done."""
    missing = [name for kind in args.format for name in PACKAGES[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_extra("--format onnx", *missing)
    if args.output.exists() and not args.output.is_dir():
        raise Problem(f"OUTPUT {str(args.output)!r} must be a folder, got a file")
    if args.output.is_dir() and any(args.output.iterdir()):
        raise Problem(f"OUTPUT {str(args.output)!r} must be a new or an empty folder, this one has files")
    core = load_or_explain(load_codec, "MODEL", args.model).core
    if core is None:
        raise Problem(f"MODEL {args.model!r} is no HieraTok tokenizer")
    for num_scales in args.num_scales or []:
        try:
            core.decode(torch.zeros(1, core.config.latent_channels, 1, 1), num_scales)
        except ValueError as error:
            raise Problem(f"--num_scales {num_scales}: {one_line(error)}") from error
    return core


def take_images(args: Namespace, config: HieraTokConfig) -> tuple[list[Tensor], int]:
    """Take batches of the images whose loss is measured, in the model's size, and the exit status, 1 for lost ones."""
    data = args.data or [str(Path(example_image()).parent)]
    size = max(config.sample_size // config.patch_size, 2) * config.patch_size
    batches = EvaluationBatches(load_or_explain(load_images, "--data", data), size, limit=args.max_images)
    images = [batch["pixel_values"] for batch in batches]
    tell_failures(batches.skipped)
    if not images:
        raise Problem(f"--data {' '.join(data)!r} must hold images, got none that can be read")
    return images, 1 if batches.skipped else 0


@torch.no_grad()
def run(args: Namespace) -> tuple[list[str], int]:
    """Export, check, write, and return the lines to print and the exit status, 1 where an image was left out."""
    core = prepare(args)
    config, last = core.config, len(core.config.scale_factors)
    scales = [None if k == last else k for k in dict.fromkeys(args.num_scales or [last])]
    parts = [(part, k) for part in dict.fromkeys(args.parts) for k in (scales if part == "decoder" else [None])]
    if args.dry_run:
        names = [file_name(part, k, kind) for part, k in parts for kind in args.format]
        return [f"would write {', '.join([*names, FACTS])} to {str(args.output)!r}; nothing was written"], 0
    images, status = take_images(args, config)
    try:
        with stage_folder(args.output) as stage:
            programs = [facts for part, k in parts for facts in export_part(part, k, core, args, images, stage)]
            packages = ["hieratok_hf", "torch", *(x for kind in args.format for x in PACKAGES[kind])]
            report = {
                "model": args.model,
                "dtype": args.dtype,
                **{key: getattr(config, key) for key in ("patch_size", "latent_channels", "in_channels")},
                **{key: getattr(config, key) for key in ("scaling_factor", "shift_factor", "scale_factors")},
                "psnr_images": sum(len(batch) for batch in images),
                "programs": programs,
                "versions": {name: version(name) for name in packages},
            }
            (stage / FACTS).write_text(json.dumps(report, indent=2) + "\n")
    except Problem:
        raise
    except Exception as error:  # the exporters and onnxruntime raise many types
        raise Problem(f"{args.model!r} cannot be exported to {str(args.output)!r}: {one_line(error)}") from error
    found = "{}: within {:.1e} of the model, {:.3f} dB lost"
    lines = [found.format(" + ".join(x["files"]), x["largest_difference"], x["psnr_lost"]) for x in programs]
    return [*lines, f"{args.dtype} programs: {len(programs)}, in {str(args.output)!r} with {FACTS}"], status


def main(argv: list[str] | None = None) -> int:
    args = parse("export", argv)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, of which nothing is needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporters use parts of PyTorch that will go
        return run_script(run, args)
