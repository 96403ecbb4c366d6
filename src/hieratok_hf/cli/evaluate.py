"""Evaluate a tokenizer beside other autoencoders on the same images: a table, and all figures as JSON."""

import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars as disable_data_progress_bars
from tqdm import tqdm

from ..data.image_dataset import Images, load_images
from ..evaluation.faces import SQUARE_SIZE, FaceDistances, FaceNetworks
from ..evaluation.generation import ImageClassifier
from ..evaluation.image_sets import FrechetDistance, InceptionScore, RowCollector
from ..evaluation.linear_probe import linear_probe, pool_features
from ..evaluation.perceptual import PerceptualDistance, load_lpips
from ..evaluation.reconstruction import (
    EvaluationBatches,
    ReconstructionMetrics,
    evaluate,
    evaluate_perturbed,
    throughput,
)
from ..evaluation.text import PAGE_SIZE, TextReading, load_reader
from ..evaluation.vision_features import VisionFeatures
from ..models.autoencoder_adapter import Codec, load_codec
from ..utils.distributed import gather
from ..utils.npz import list_npz, write_npz
from .command_line import describe_machine, device_of_process, find_size, load_or_explain, run_on_processes
from .main import parse
from .outputs import check_writable, identify, write_report
from .protocol import compare_with_protocol, describe_faces, describe_protocol, describe_text
from .terminal import Problem, align_table, one_line


def make_frechet(
    args: Namespace, device: torch.device, notes: list[str], name: str, same_targets: bool
) -> FrechetDistance | None:
    """Make the Fréchet distance of the options, over Inception called by a name, or note why it cannot be measured."""
    options: dict[str, Any] = {"same_targets": same_targets, "suite": args.suite, "device": device}
    if args.fid_model:
        features = load_or_explain(VisionFeatures.from_pretrained, "--fid_model", args.fid_model)
        try:
            frechet = FrechetDistance(features, size=args.fid_size, **options)
        except (ImportError, ValueError) as error:
            at = args.fid_size or features.image_size
            raise Problem(f"--fid_model {args.fid_model!r} at {at} pixels: {one_line(error)}") from error
    else:
        try:
            frechet = FrechetDistance(**options)
        except (ImportError, OSError) as error:
            left_out = f"{name} was left out: {one_line(error)}; --fid_model takes another network"
            if args.save_statistics:
                raise Problem(f"--save_statistics has nothing to write: {left_out}") from error
            notes.append(left_out)
            return None
        frechet.name = name
    notes.append(f"{frechet.name} is taken of images resized to {frechet.size} x {frechet.size} pixels")
    return frechet


def check_sets(args: Namespace, *inputs: list[str] | None) -> None:
    """Raise a `Problem` where a file that `add_sets` names could not be written."""
    files = {f"--{name}": getattr(args, name) for name in ("json", "save_npz", "save_statistics")}
    known = identify([path for paths in inputs for path in paths or []] + [args.protocol] * bool(args.protocol))
    for option, path in files.items():
        if path:
            check_writable(option, path, overwrite=args.overwrite, inputs=known)


def show_reference(
    args: Namespace, frechet: FrechetDistance, size: int, notes: list[str], bar: dict[str, Any]
) -> tuple[EvaluationBatches | None, int]:
    """Compare with the statistics or the images of `--reference`; give the batches of these and how many there are."""
    (path, *others), statistics = args.reference, {}
    if path.endswith(".npz") and not others:
        statistics = load_or_explain(frechet.load_statistics, "--reference", path)
    batches, count = None, 0
    if not statistics or (args.suite and "arr_0" in list_npz(path)):
        source = {"split": args.reference_split, "streaming": args.streaming}
        images = load_or_explain(load_images, "--reference", args.reference, **source)
        batches = EvaluationBatches(images, size, args.batch_size)
        for batch in tqdm(batches, desc="reference", **bar):
            frechet.update(None, batch["pixel_values"], batch["rows"])
            count += len(batch["rows"])
    elif args.suite:
        notes.append(f"precision and recall were left out: {path!r} holds statistics and no images")
    try:
        frechet.fix_targets(statistics)
    except ValueError as error:
        raise Problem(f"--reference {path!r}: {one_line(error)}") from error
    count = sum(gather(count))
    if not statistics and count < 2:
        raise Problem(f"a Fréchet distance needs two images or more of --reference {path!r}, got {count}")
    return batches, count


def save_sets(
    args: Namespace, frechet: FrechetDistance | None, collector: RowCollector | None, state: PartialState
) -> None:
    """Write the files of `--save_npz` and `--save_statistics`; every process calls this."""
    samples = collector.collect() if collector else {}
    statistics = frechet.target_statistics() if frechet and args.save_statistics else {}
    if not state.is_main_process:
        return
    option = "--save_npz"
    try:
        if samples:
            arrays = {"arr_0": samples["levels"].permute(0, 2, 3, 1).contiguous().numpy()}
            arrays |= {"arr_1": samples["labels"].numpy()} if "labels" in samples else {}
            write_npz(args.save_npz, **arrays)
        option = "--save_statistics"
        if frechet and statistics:
            frechet.save_statistics(args.save_statistics, statistics)
    except OSError as error:
        raise Problem(f"{option} cannot be written: {one_line(error)}") from error


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
    inception = None
    if args.classifier:
        classifier = load_or_explain(ImageClassifier.from_pretrained, "--classifier", args.classifier)
        inception = InceptionScore(classifier.to(device))
    networks: dict[str, Any] = {"lpips": lpips, "perceptual": perceptual, "frechet": frechet, "inception": inception}
    return ReconstructionMetrics(ssim=not args.no_ssim, **networks, device=device)


def evaluate_model(
    name: str,
    codec: Codec,
    batches: EvaluationBatches,
    metrics: ReconstructionMetrics,
    state: PartialState,
    collector: RowCollector | None,
    perturb: Sequence[float] = (),
) -> dict[str, Any]:
    """The figures of one model; speed is measured in the main process while the others wait."""
    try:
        latent = codec.latent_shape(batches.size)
    except ValueError as error:
        raise Problem(f"--size {batches.size} does not suit {name!r}: {one_line(error)}") from error
    bar: dict[str, Any] = {"unit": "batch", "disable": not state.is_local_main_process, "leave": False}
    figures = evaluate(codec, tqdm(batches, desc=name, **bar), metrics, collector)
    if perturb:
        again, std = tqdm(batches, desc=f"{name}, perturbed", **bar), torch.tensor(figures["latent_std"])
        figures |= evaluate_perturbed(codec, again, perturb, std)
    rates = {}
    if state.is_main_process and (batch := next(iter(batches), None)) is not None:
        rates = throughput(codec, batch["pixel_values"])
    state.wait_for_everyone()
    parameters = sum(parameter.numel() for parameter in codec.model.parameters())
    facts = {"model": name, "class": type(codec.model).__name__, "latent_shape": latent, "parameters": parameters}
    return {**facts, **figures, "images_per_second": rates}


def set_columns(figures: dict[str, Any]) -> dict[str, str]:
    """The figures of sets of images in a table, by name."""
    known = r"[rgs]FID|IS|precision|recall|(s?FD|IS|precision|recall)-.*"
    return {name: f"{value:.4f}" for name, value in figures.items() if re.fullmatch(known, name)}


def columns(figures: dict[str, Any]) -> dict[str, str]:
    """A row of the table; what a model lacks is missing."""
    row = {
        "model": figures["model"],
        "parameters, M": f"{figures['parameters'] / 1e6:.1f}",
        "latent": "x".join(map(str, figures["latent_shape"])),
        "PSNR, dB": f"{figures['psnr']:.2f}",
    }
    for name, value in figures.items():
        if name in ("ssim", "lpips", "perceptual"):
            row[{"ssim": "SSIM", "lpips": "LPIPS"}.get(name, name)] = f"{value:.4f}"
        if name.startswith("psnr_with_"):
            kind = name.removeprefix("psnr_with_").replace("_", " ")
            row |= {f"{kind} {amount}, dB": f"{decibels:.2f}" for amount, decibels in value.items()}
    row |= set_columns(figures)
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


def make_text(codecs: dict[str, Codec]) -> TextReading:
    """Make what reads the pages of `--text`, which all models must take."""
    try:
        text = TextReading(load_reader())
        for codec in codecs.values():
            codec.latent_shape(PAGE_SIZE)
    except (ImportError, ValueError) as error:
        raise Problem(f"--text: {one_line(error)}") from error
    return text


def make_faces(codecs: dict[str, Codec], batches: EvaluationBatches, state: PartialState) -> FaceDistances:
    """Find the faces of `--faces`, in squares that all models must take."""
    try:
        networks = FaceNetworks()
        for codec in codecs.values():
            codec.latent_shape(SQUARE_SIZE)
        bar: dict[str, Any] = {"unit": "batch", "disable": not state.is_local_main_process, "leave": False}
        return FaceDistances(tqdm(batches.numbered_rows(), desc="faces", **bar), networks)
    except (ImportError, ValueError) as error:
        raise Problem(f"--faces in {batches.images.source}: {one_line(error)}") from error


def text_table(originals: dict[str, Any], models: list[dict[str, Any]]) -> str:
    """The characters and lines that were read right, by letter height, in aligned columns."""
    rows = {"pages as drawn": originals} | {figures["model"]: figures["text"] for figures in models}
    shown = {
        name: [f"{100 * read['characters']:.1f}, {100 * read['lines']:.1f}" for read in figures.values()]
        for name, figures in rows.items()
    }
    return table_by_height("characters, lines right, %", originals, shown)


def faces_table(originals: dict[str, Any], models: list[dict[str, Any]]) -> str:
    """How far faces are from what they were, and how many are still of one person, by face height, in columns."""
    rows = {"faces as scaled": originals} | {figures["model"]: figures["faces"] for figures in models}
    shown = {"number of faces": [str(face["faces"]) for face in originals.values()]}
    for name, figures in rows.items():
        shown[name] = [f"{face['distance']:.3f}, {100 * face['same']:.0f}" for face in figures.values()]
    return table_by_height("distance, same person, %", originals, shown)


def table_by_height(corner: str, heights: Iterable[str], rows: dict[str, list[str]]) -> str:
    """Put names before rows and heights above them, in aligned columns."""
    header = [corner, *(f"{height} px" for height in heights)]
    return align_table([header, *([name, *shown] for name, shown in rows.items())])


def load_data(args: Namespace) -> tuple[Images, Images | None]:
    """The images to evaluate on, and those to fit a probe to."""
    images = load_or_explain(load_images, "--data", args.data, split=args.split, streaming=args.streaming)
    if not args.probe_data:
        return images, None
    train = load_or_explain(load_images, "--probe_data", args.probe_data, streaming=args.streaming)
    for option, data in (("--data", images), ("--probe_data", train)):
        if data.label is None:
            raise Problem(f"a probe needs labels, and {option} {data.source} has none")
    names = [data.class_names for data in (images, train) if data.class_names]
    if len(names) == 2 and names[0] != names[1]:
        raise Problem(f"--data and --probe_data must have the same classes, got {names[0][:5]} and {names[1][:5]}")
    return images, train


def run(args: Namespace, state: PartialState) -> list[str]:
    """Evaluate, write the JSON, and return the lines to print; every process runs all of it."""
    device = device_of_process(args, state)
    check_sets(args, args.data, args.probe_data, args.reference)
    # All of them before any work, so that a wrong name is told at once.
    codecs = {args.model: load_or_explain(load_codec, "--model", args.model, device)}
    codecs |= {name: load_or_explain(load_codec, "--compare", name, device) for name in args.compare}
    args.size = size = find_size(args, codecs[args.model])
    notes: list[str] = []
    metrics = make_metrics(args, device, notes)
    text = make_text(codecs) if args.text else None
    images, train = load_data(args)
    batches = EvaluationBatches(images, size, args.batch_size, limit=args.max_images)
    faces = make_faces(codecs, batches, state) if args.faces else None
    probe_batches = EvaluationBatches(train, size, args.batch_size) if train else None
    reference = None
    if metrics.frechet and args.reference:
        bar = {"unit": "batch", "disable": not state.is_local_main_process, "leave": False}
        reference, _ = show_reference(args, metrics.frechet, size, notes, bar)
    collector = RowCollector() if args.save_npz else None

    models: list[dict[str, Any]] = []
    for name, codec in codecs.items():
        try:
            figures = evaluate_model(name, codec, batches, metrics, state, None if models else collector, args.perturb)
            if probe_batches and codec.core is not None:
                fitted = pool_features(codec, probe_batches)
                figures["probe_accuracy"] = linear_probe(*fitted, *pool_features(codec, batches))
            if text:
                figures["text"] = text.measure(codec, args.batch_size)
            if faces:
                figures["faces"] = faces.measure(codec, args.batch_size)
        except ValueError as error:
            raise Problem(f"{name!r} cannot be evaluated on --data {images.source}: {one_line(error)}") from error
        models.append(figures)

    originals = {"text": text.measure()} if text else {}
    originals |= {"faces": faces.measure()} if faces else {}
    read = {"data": batches, "probe_data": probe_batches, "reference": reference}
    mine = {name: reason for found in read.values() if found for name, reason in found.skipped.items()}
    skipped = {name: reason for part in gather(mine) for name, reason in part.items()}
    if skipped:
        notes.append(f"images that could not be decoded and were skipped: {len(skipped)}")
    count = models[0]["images"]
    if metrics.frechet and count <= metrics.frechet.num_features:
        few = f"few images for {metrics.frechet.num_features} features: it compares only on the same images"
        notes.append(f"{metrics.frechet.name} has {few}")
    save_sets(args, metrics.frechet, collector, state)
    if (args.json or args.protocol) and state.is_main_process:
        weights = {name: codec.model for name, codec in codecs.items()} | metrics.networks
        weights |= {"frechet": metrics.frechet.network} if metrics.frechet else {}
        weights |= {"classifier": metrics.inception.classifier} if metrics.inception else {}
        protocol = describe_protocol(
            "evaluate",
            args,
            data={name: found.images for name, found in read.items() if found},
            weights=weights,
            frechet=metrics.frechet,
            size=size,
            images=count,
            precision="float32",
            latents="mode of the posterior",
            **({"text": describe_text(text)} if text else {}),
            **({"faces": describe_faces(faces)} if faces else {}),
        )
        settings = {**vars(args), "fid_size": metrics.frechet and metrics.frechet.size}
        report = {"settings": settings, "machine": describe_machine(device, state.num_processes), "images": count}
        report |= {"protocol": protocol, "notes": notes, "skipped": skipped, "models": models}
        report |= {f"{name}_of_originals": figures for name, figures in originals.items()}
        notes += compare_with_protocol(args, report)
        if args.json:
            write_report(args.json, report)
    title = f"{count} images of {images.source} at {size} x {size} pixels, mode of the posterior, float32"
    tables = [table(models)]
    for name, show in (("text", text_table), ("faces", faces_table)):
        tables += ["", show(originals[name], models)] if name in originals else []
    return [title, *tables, *(f"note: {x}" for x in notes), *(f"skipped: {x}" for x in skipped.values())]


def main(argv: list[str] | None = None) -> int:
    args = parse("evaluate", argv)
    disable_data_progress_bars()
    return run_on_processes(run, args)
