"""Evaluate a class-conditional generator: Fréchet distance, class accuracy and speed, in a table and as JSON."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars as disable_data_progress_bars
from diffusers.utils import logging
from PIL import Image
from tqdm import tqdm

from .. import HieraTokDiTPipeline
from ..data.image_dataset import load_images
from ..evaluation.generation import (
    ClassAccuracy,
    GeneratedBatches,
    ImageClassifier,
    find_classes,
    image_size,
)
from ..evaluation.reconstruction import EvaluationBatches
from ..utils.distributed import gather
from ..utils.files import write_whole
from .arguments.generation import sampling_settings
from .command_line import describe_machine, device_of_process, load_or_explain, run_on_processes
from .evaluate import make_frechet
from .generate import load_pipeline
from .main import parse
from .outputs import check_writable, identify, write_report
from .terminal import Problem, align_table, one_line


def make_accuracy(
    args: Namespace, pipe: HieraTokDiTPipeline, names: dict[int, str], device: torch.device
) -> ClassAccuracy | None:
    """The classifier, and its labels for the pipeline's classes."""
    if not args.classifier:
        return None
    classifier = load_or_explain(ImageClassifier.from_pretrained, "--classifier", args.classifier)
    try:
        if not args.classifier_labels:
            args.classifier_labels = find_classes(names, pipe.num_classes, classifier.names)
        elif len(args.classifier_labels) != pipe.num_classes:
            raise ValueError(f"the pipeline has {pipe.num_classes} classes, not {len(args.classifier_labels)}")
        return ClassAccuracy(classifier, args.classifier_labels, device)
    except ValueError as error:
        hint = "; --classifier_labels takes its labels by number"
        raise Problem(f"--classifier {args.classifier!r}: {one_line(error).removesuffix('.')}{hint}") from error


def save_images(batch: dict[str, Any], folder: Path) -> None:
    levels = ((batch["pixel_values"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    for image, row, label in zip(levels, batch["rows"], batch["labels"]):
        with write_whole(folder / f"{row:06}_class{label:04}.png") as file:
            Image.fromarray(image).save(file, format="PNG")


def tables(figures: dict[str, Any], names: dict[int, str]) -> list[str]:
    """The figures, and those of each class; class accuracy is among the pipeline's classes, top-1 among all labels."""
    shown = {name: f"{value:.4f}" for name, value in figures.items() if name == "gFID" or name.startswith("FD-")}
    for key, name in (("class_accuracy", "class accuracy, %"), ("top1_accuracy", "top-1 accuracy, %")):
        if key in figures:
            shown[name] = f"{100 * figures[key]:.2f}"
    shown["images/s"] = f"{figures['images_per_second']:.2f}"
    lines = [align_table([tuple(shown), tuple(shown.values())])]
    if "class_accuracy_per_class" in figures:
        rows: list[tuple[str, ...]] = [("class", "images", "class accuracy, %", "top-1 accuracy, %")]
        columns = (f"{name}_per_class" for name in ("images", "class_accuracy", "top1_accuracy"))
        for label, (count, *shares) in enumerate(zip(*(figures[name] for name in columns))):
            rows.append((names.get(label, str(label)), str(count), *(f"{100 * share:.2f}" for share in shares)))
        lines += ["", align_table(rows)]
    return lines


def run(args: Namespace, state: PartialState) -> list[str]:
    """Evaluate, write the JSON, and return the lines to print; every process runs all of it."""
    device = device_of_process(args, state)
    if args.json:
        check_writable("--json", args.json, overwrite=args.overwrite, inputs=identify(args.reference or []))
    if args.save:
        check_writable("--save", args.save, folder=True)
        if any(args.save.iterdir()):
            raise Problem(f"--save {str(args.save)!r} must be a new or empty folder")

    notes: list[str] = []
    pipe = load_or_explain(load_pipeline, "--model", args.model, device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    names = pipe.id2label
    accuracy = make_accuracy(args, pipe, names, device)
    frechet = make_frechet(args, device, notes, "gFID", same_targets=False) if args.reference else None
    if frechet and args.samples <= frechet.num_features:
        notes.append(f"{frechet.name} has few samples for {frechet.num_features} features: compare only equal numbers")
    facts: dict[str, Any] = {}
    size, bar = image_size(pipe), {"unit": "batch", "disable": not state.is_local_main_process, "leave": False}
    source = {"split": args.reference_split, "streaming": args.streaming}
    reference = load_or_explain(load_images, "--reference", args.reference, **source) if frechet else None
    # No process writes images before all have seen that the folder is empty.
    state.wait_for_everyone()

    mine = range(args.samples)[state.process_index :: state.num_processes]
    samples = GeneratedBatches(pipe, mine, seed=args.seed, batch_size=args.batch_size, **sampling_settings(args))
    try:
        for batch in tqdm(samples, desc="samples", **bar):
            if frechet:
                frechet.update(batch["pixel_values"], None)
            if accuracy:
                accuracy.update(batch["pixel_values"], batch["labels"])
            if args.save:
                save_images(batch, args.save)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch lacks memory with a RuntimeError
        raise Problem(one_line(error)) from error
    if frechet and reference is not None:
        batches, count = EvaluationBatches(reference, size, args.batch_size), 0
        for batch in tqdm(batches, desc="reference", **bar):
            frechet.update(None, batch["pixel_values"])
            count += len(batch["rows"])
        facts["reference_images"] = sum(gather(count))
        facts["skipped"] = {name: reason for part in gather(batches.skipped) for name, reason in part.items()}
        if skipped := len(facts["skipped"]):
            notes.append(f"reference images that could not be decoded and were skipped: {skipped}")
        if min(facts["reference_images"], args.samples) < 2:
            raise Problem(f"a Fréchet distance needs two samples and two images or more of {reference.source}")

    figures: dict[str, Any] = {frechet.name: frechet.compute()} if frechet else {}
    figures |= accuracy.compute() if accuracy else {}
    figures["images_per_second"] = args.samples / max(gather(samples.seconds))
    if args.json and state.is_main_process:
        report: dict[str, Any] = {"settings": {**vars(args), "labels": "balanced", "size": size}}
        report["settings"] |= {"scheduler": type(pipe.scheduler).__name__, "fid_size": frechet and frechet.size}
        report |= {"machine": describe_machine(device, state.num_processes), "classes": names, "notes": notes, **facts}
        write_report(args.json, {**report, **figures})
    lowest, highest = args.guidance_interval
    guidance = f"guidance {args.guidance_scale:g} with eta {args.guidance_eta:g} from {lowest:g} to {highest:g}"
    title = f"{args.samples} images of {args.model!r} at {size} x {size} pixels, balanced labels, {args.steps} steps"
    return [f"{title}, {guidance}", *tables(figures, names), *(f"note: {x}" for x in notes)]


def main(argv: list[str] | None = None) -> int:
    args = parse("evaluate-generation", argv)
    disable_data_progress_bars()
    logging.disable_progress_bar()  # of loading
    return run_on_processes(run, args)
