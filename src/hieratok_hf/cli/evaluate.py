"""Evaluate a tokenizer beside other autoencoders on the same images: a table, and all figures as JSON."""

import importlib.util
from argparse import Namespace
from typing import Any

import torch
from accelerate import PartialState
from datasets import ClassLabel
from datasets import disable_progress_bars as disable_data_progress_bars
from tqdm import tqdm

from ..data.image_dataset import Images, load_images
from ..evaluation.linear_probe import linear_probe, pool_features
from ..evaluation.metrics import FrechetDistance
from ..evaluation.perceptual import PerceptualDistance, load_lpips
from ..evaluation.reconstruction import EvaluationBatches, ReconstructionMetrics, evaluate, throughput
from ..evaluation.vision_features import VisionFeatures
from ..models.autoencoder_adapter import Codec, load_codec
from ..utils.distributed import gather
from .command_line import describe_machine, device_of_process, find_size, load_or_explain, run_on_processes
from .main import parse
from .outputs import check_writable, identify, write_report
from .terminal import Problem, align_table, one_line


def make_frechet(
    args: Namespace, device: torch.device, notes: list[str], name: str, same_targets: bool
) -> FrechetDistance | None:
    """Make the Fréchet distance of the options, over Inception called by a name, or note why it cannot be measured."""
    options: dict[str, Any] = {"same_targets": same_targets, "device": device}
    if args.fid_model:
        features = load_or_explain(VisionFeatures.from_pretrained, "--fid_model", args.fid_model)
        try:
            frechet = FrechetDistance(features, size=args.fid_size, **options)
        except (ImportError, ValueError) as error:
            at = args.fid_size or features.image_size
            raise Problem(f"--fid_model {args.fid_model!r} at {at} pixels: {one_line(error)}") from error
    else:
        try:
            if importlib.util.find_spec("torch_fidelity") is None:
                raise ImportError("it needs torch-fidelity (pip install torch-fidelity)")
            frechet = FrechetDistance(**options)
        except (ImportError, OSError) as error:
            notes.append(f"{name} was left out: {one_line(error)}; --fid_model takes another network")
            return None
        frechet.name = name
    notes.append(f"{frechet.name} is taken of images resized to {frechet.size} x {frechet.size} pixels")
    return frechet


def make_metrics(args: Namespace, device: torch.device, notes: list[str]) -> ReconstructionMetrics:
    """Make the metrics that the options ask for; an rFID that cannot be measured becomes a note."""
    lpips = perceptual = None
    if args.lpips:
        try:
            lpips = load_lpips()
        except (ImportError, OSError) as error:
            raise Problem(f"--lpips: {one_line(error)}") from error
    if args.perceptual_model:
        features = load_or_explain(VisionFeatures.from_pretrained, "--perceptual_model", args.perceptual_model)
        perceptual = PerceptualDistance(features)
        notes.append(f"the perceptual distance is taken over {features.name}")
    frechet = None if args.no_fid else make_frechet(args, device, notes, "rFID", same_targets=True)
    ssim = not args.no_ssim
    return ReconstructionMetrics(ssim=ssim, lpips=lpips, perceptual=perceptual, frechet=frechet, device=device)


def evaluate_model(
    name: str, codec: Codec, batches: EvaluationBatches, metrics: ReconstructionMetrics, state: PartialState
) -> dict[str, Any]:
    """The figures of one model; speed is measured in the main process while the others wait."""
    try:
        latent = codec.latent_shape(batches.size)
    except ValueError as error:
        raise Problem(f"--size {batches.size} does not suit {name!r}: {one_line(error)}") from error
    shown = tqdm(batches, desc=name, unit="batch", disable=not state.is_local_main_process, leave=False)
    figures = evaluate(codec, shown, metrics)
    rates = {}
    if state.is_main_process and (batch := next(iter(batches), None)) is not None:
        rates = throughput(codec, batch["pixel_values"])
    state.wait_for_everyone()
    parameters = sum(parameter.numel() for parameter in codec.model.parameters())
    facts = {"model": name, "class": type(codec.model).__name__, "latent_shape": latent, "parameters": parameters}
    return {**facts, **figures, "images_per_second": rates}


def columns(figures: dict[str, Any]) -> dict[str, str]:
    """A row of the table; what a model lacks is missing."""
    row = {
        "model": figures["model"],
        "parameters, M": f"{figures['parameters'] / 1e6:.1f}",
        "latent": "x".join(map(str, figures["latent_shape"])),
        "PSNR, dB": f"{figures['psnr']:.2f}",
    }
    for name, value in figures.items():
        if name in ("ssim", "lpips", "perceptual") or name == "rFID" or name.startswith("FD-"):
            row[{"ssim": "SSIM", "lpips": "LPIPS"}.get(name, name)] = f"{value:.4f}"
    if "scales_psnr" in figures:
        row["coarser scales, dB"] = " ".join(f"{value:.2f}" for value in figures["scales_psnr"][:-1]) or "-"
    row["largest |mean|"] = f"{max(map(abs, figures['latent_mean'])):.3f}"
    row["std"] = f"{min(figures['latent_std']):.3f} ... {max(figures['latent_std']):.3f}"
    if "probe_accuracy" in figures:
        row["probe, %"] = f"{100 * figures['probe_accuracy']:.2f}"
    for name, value in figures["images_per_second"].items():
        row[f"{name}, images/s"] = f"{value:.1f}"
    return row


def table(models: list[dict[str, Any]]) -> str:
    """The figures in aligned columns, a line a model."""
    rows = [columns(figures) for figures in models]
    # The first model may lack a figure that another has.
    header = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    return align_table([header, *([row.get(name, "-") for name in header] for row in rows)])


def load_data(args: Namespace) -> tuple[Images, Images | None]:
    """The images to evaluate on, and those to fit a probe to."""
    images = load_or_explain(load_images, "--data", args.data, split=args.split, streaming=args.streaming)
    if not args.probe_data:
        return images, None
    train = load_or_explain(load_images, "--probe_data", args.probe_data, streaming=args.streaming)
    for option, data in (("--data", images), ("--probe_data", train)):
        if data.label is None:
            raise Problem(f"a probe needs labels, and {option} {data.source} has none")
    classes = [data.dataset.features[data.label] for data in (images, train)]
    names = [feature.names for feature in classes if isinstance(feature, ClassLabel)]
    if len(names) == 2 and names[0] != names[1]:
        raise Problem(f"--data and --probe_data must have the same classes, got {names[0][:5]} and {names[1][:5]}")
    return images, train


def run(args: Namespace, state: PartialState) -> list[str]:
    """Evaluate, write the JSON, and return the lines to print; every process runs all of it."""
    device = device_of_process(args, state)
    if args.json:
        inputs = identify([*args.data, *(args.probe_data or [])])
        check_writable("--json", args.json, overwrite=args.overwrite, inputs=inputs)
    # All of them before any work, so that a wrong name is told at once.
    codecs = {args.model: load_or_explain(load_codec, "--model", args.model, device)}
    codecs |= {name: load_or_explain(load_codec, "--compare", name, device) for name in args.compare}
    size = find_size(args, codecs[args.model])
    notes: list[str] = []
    metrics = make_metrics(args, device, notes)
    images, train = load_data(args)
    batches = EvaluationBatches(images, size, args.batch_size, limit=args.max_images)
    probe_batches = EvaluationBatches(train, size, args.batch_size) if train else None

    models: list[dict[str, Any]] = []
    for name, codec in codecs.items():
        try:
            figures = evaluate_model(name, codec, batches, metrics, state)
            if probe_batches and codec.core is not None:
                fitted = pool_features(codec, probe_batches)
                figures["probe_accuracy"] = linear_probe(*fitted, *pool_features(codec, batches))
        except ValueError as error:
            raise Problem(f"{name!r} cannot be evaluated on {images.source}: {one_line(error)}") from error
        models.append(figures)

    mine = batches.skipped | (probe_batches.skipped if probe_batches else {})
    skipped = {name: reason for part in gather(mine) for name, reason in part.items()}
    if skipped:
        notes.append(f"images that could not be decoded and were skipped: {len(skipped)}")
    count = models[0]["images"]
    if metrics.frechet and count <= metrics.frechet.num_features:
        few = f"few images for {metrics.frechet.num_features} features: it compares only on the same images"
        notes.append(f"{metrics.frechet.name} has {few}")
    if args.json and state.is_main_process:
        settings = {**vars(args), "size": size, "fid_size": metrics.frechet and metrics.frechet.size}
        report = {"settings": settings, "machine": describe_machine(device, state.num_processes), "images": count}
        write_report(args.json, {**report, "notes": notes, "skipped": skipped, "models": models})
    title = f"{count} images of {images.source} at {size} x {size} pixels, mode of the posterior, float32"
    return [title, table(models), *(f"note: {x}" for x in notes), *(f"skipped: {x}" for x in skipped.values())]


def main(argv: list[str] | None = None) -> int:
    args = parse("evaluate", argv)
    disable_data_progress_bars()
    return run_on_processes(run, args)
