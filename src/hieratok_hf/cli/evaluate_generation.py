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
from ..data.image_dataset import image_of, load_images
from ..evaluation.generation import (
    ClassAccuracy,
    GeneratedBatches,
    ImageClassifier,
    find_classes,
    image_size,
)
from ..evaluation.image_sets import InceptionScore, RowCollector
from ..evaluation.reconstruction import EvaluationBatches
from ..utils.distributed import gather
from ..utils.files import write_whole
from ..utils.images import to_uint8
from .arguments.generation import sampling_settings
from .command_line import describe_machine, device_of_process, load_or_explain, run_on_processes
from .evaluate import check_sets, make_frechet, save_sets, set_columns, show_reference
from .generate import load_pipeline
from .main import parse
from .outputs import check_writable, write_report
from .protocol import compare_with_protocol, describe_protocol
from .terminal import Problem, align_table, one_line

_OF_PIPELINES = ("model", "steps", "guidance_scale", "guidance_eta", "guidance_interval", "seed", "samples", "dtype")


def make_accuracy(
    args: Namespace, pipe: HieraTokDiTPipeline, classifier: ImageClassifier, device: torch.device
) -> ClassAccuracy:
    """Find the labels of a classifier for the pipeline's classes."""
    try:
        if not args.classifier_labels:
            args.classifier_labels = find_classes(pipe.id2label, pipe.num_classes, classifier.names)
        elif len(args.classifier_labels) != pipe.num_classes:
            raise ValueError(f"the pipeline has {pipe.num_classes} classes, not {len(args.classifier_labels)}")
        return ClassAccuracy(classifier, args.classifier_labels, device)
    except ValueError as error:
        hint = "; --classifier_labels takes its labels by number"
        raise Problem(f"--classifier {args.classifier!r}: {one_line(error).removesuffix('.')}{hint}") from error


def load_data(args: Namespace) -> tuple[EvaluationBatches, int]:
    """The images of `--data`, and the side of the first, which all are cut to."""
    source = {"split": args.split, "streaming": args.streaming}
    images = load_or_explain(load_images, "--data", args.data, **source)
    size = load_or_explain(lambda _: min(image_of(next(iter(images))).size), "--data", args.data)
    return EvaluationBatches(images, size, args.batch_size), size


def save_images(batch: dict[str, Any], folder: Path) -> None:
    levels = ((batch["pixel_values"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    for image, row, label in zip(levels, batch["rows"], batch["labels"]):
        with write_whole(folder / f"{row:06}_class{label:04}.png") as file:
            Image.fromarray(image).save(file, format="PNG")


def tables(figures: dict[str, Any], names: dict[int, str]) -> list[str]:
    """The figures, and those of each class; class accuracy is among the pipeline's classes, top-1 among all labels."""
    shown = set_columns(figures)
    for key, name in (("class_accuracy", "class accuracy, %"), ("top1_accuracy", "top-1 accuracy, %")):
        if key in figures:
            shown[name] = f"{100 * figures[key]:.2f}"
    if "images_per_second" in figures:
        shown["images/s"] = f"{figures['images_per_second']:.2f}"
    lines = [align_table([tuple(shown), tuple(shown.values())])] if shown else []
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
    check_sets(args, args.data, args.reference)
    if args.save:
        check_writable("--save", args.save, folder=True)
        if any(args.save.iterdir()):
            raise Problem(f"--save {str(args.save)!r} must be a new or empty folder")

    notes: list[str] = []
    pipe = None if args.data else load_or_explain(load_pipeline, "--model", args.model, device, args.dtype)
    names: dict[int, str] = pipe.id2label if pipe else {}
    accuracy = scores = None
    if args.classifier:
        classifier = load_or_explain(ImageClassifier.from_pretrained, "--classifier", args.classifier).to(device)
        accuracy, scores = pipe and make_accuracy(args, pipe, classifier, device), InceptionScore(classifier)
    frechet = make_frechet(args, device, notes, "gFID", same_targets=False) if args.reference else None
    samples: GeneratedBatches | EvaluationBatches
    if pipe:
        pipe.set_progress_bar_config(disable=True)
        mine = range(args.samples)[state.process_index :: state.num_processes]
        samples = GeneratedBatches(pipe, mine, seed=args.seed, batch_size=args.batch_size, **sampling_settings(args))
        size = image_size(pipe)
    else:
        samples, size = load_data(args)
        for name in _OF_PIPELINES:  # nobody asked for the defaults
            setattr(args, name, None)
    bar = {"unit": "batch", "disable": not state.is_local_main_process, "leave": False}
    reference, reference_images = show_reference(args, frechet, size, notes, bar) if frechet else (None, 0)
    collector = RowCollector() if args.save_npz else None
    # No process writes images before all have seen that the folder is empty.
    state.wait_for_everyone()

    count = 0
    try:
        for batch in tqdm(samples, desc="samples", **bar):
            rows, labels, pixel_values = batch["rows"], batch["labels"], batch["pixel_values"]
            count += len(rows)
            if frechet:
                frechet.update(pixel_values, None, rows)
            if scores:
                logits = scores.classifier(pixel_values.to(device))
                scores.count(logits, rows)
                if accuracy:
                    accuracy.count(logits, labels)
            if args.save:
                save_images(batch, args.save)
            if collector:
                collector.add(rows, levels=to_uint8(pixel_values), labels=torch.tensor(labels))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch lacks memory with a RuntimeError
        raise Problem(one_line(error)) from error
    if not (count := sum(gather(count))):
        raise Problem(f"--data {args.data!r} holds no image that could be decoded")
    read = {"data": None if isinstance(samples, GeneratedBatches) else samples, "reference": reference}
    skipped = {name: reason for found in read.values() if found for name, reason in found.skipped.items()}
    facts: dict[str, Any] = {"reference_images": reference_images} if reference else {}
    if any(read.values()):
        facts["skipped"] = {name: reason for part in gather(skipped) for name, reason in part.items()}
        if facts["skipped"]:
            notes.append(f"images that could not be decoded and were skipped: {len(facts['skipped'])}")
    if frechet and count <= frechet.num_features:
        notes.append(f"{frechet.name} has few samples for {frechet.num_features} features: compare only equal numbers")

    try:
        figures: dict[str, Any] = frechet.compute_all() if frechet else {}
    except ValueError as error:
        raise Problem(f"{'--samples' if pipe else '--data'} and --reference: {one_line(error)}") from error
    for metric in (scores, accuracy):
        figures |= metric.compute() if metric else {}
    if isinstance(samples, GeneratedBatches):
        figures["images_per_second"] = count / max(gather(samples.seconds))
    save_sets(args, frechet, collector, state)
    if (args.json or args.protocol) and state.is_main_process:
        weights = {"transformer": pipe.transformer, "vae": pipe.vae} if pipe else {}
        weights |= {"frechet": frechet.network} if frechet else {}
        weights |= {"classifier": scores.classifier} if scores else {}
        protocol = describe_protocol(
            "evaluate-generation",
            args,
            data={name: found.images for name, found in read.items() if found},
            weights=weights,
            frechet=frechet,
            size=size,
            images=count,
            precision=args.dtype,
            seed=args.seed,
            sampler=pipe and {"class": type(pipe.scheduler).__name__, "steps": args.steps, **pipe.scheduler.config},
            guidance=pipe and {k: value for k, value in sampling_settings(args).items() if k.startswith("guidance")},
        )
        report: dict[str, Any] = {"settings": {**vars(args), "size": size, "fid_size": frechet and frechet.size}}
        if pipe:
            report["settings"] |= {"labels": "balanced", "scheduler": type(pipe.scheduler).__name__}
        report |= {"machine": describe_machine(device, state.num_processes), "classes": names, "notes": notes}
        report |= {**facts, **figures, "protocol": protocol}
        notes += compare_with_protocol(args, report)
        if args.json:
            write_report(args.json, report)
    source = samples.images.source if isinstance(samples, EvaluationBatches) else repr(args.model)
    title = f"{count} images of {source} at {size} x {size} pixels"
    if pipe:
        low, high = args.guidance_interval
        guidance = f"guidance {args.guidance_scale:g} with eta {args.guidance_eta:g} from {low:g} to {high:g}"
        title += f", balanced labels, {args.steps} steps, {guidance}"
    return [title, *tables(figures, names), *(f"note: {x}" for x in notes)]


def main(argv: list[str] | None = None) -> int:
    args = parse("evaluate-generation", argv)
    disable_data_progress_bars()
    logging.disable_progress_bar()  # of loading
    return run_on_processes(run, args)
