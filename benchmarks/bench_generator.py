"""A generator's images through two judges, beside real ones, and how near to its training images they come."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from judges import Judge, Reconstructions, frechet_distance, load_judges, reconstruct
from measuring import describe_benchmark, markdown_table, print_machine, record_report
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hieratok_hf import HieraTokDiTPipeline
from hieratok_hf.cli.arguments.generation import add_sampling, sampling_settings
from hieratok_hf.cli.command_line import find_device, load_or_explain
from hieratok_hf.cli.generate import as_images, load_pipeline, make_sheet
from hieratok_hf.cli.outputs import check_writable
from hieratok_hf.cli.parsing import make_parser, positive, whole
from hieratok_hf.cli.terminal import Problem, run_script
from hieratok_hf.data.image_dataset import Images, image_of, load_images
from hieratok_hf.evaluation.generation import ClassAccuracy, GeneratedBatches, find_classes, image_size
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.pipelines.class_names import plain_name
from hieratok_hf.utils.files import write_whole
from hieratok_hf.utils.images import centre_square, encode_image, from_uint8, to_uint8

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
IMAGES = "imagenette_128"
TRAINING, VALIDATION, META = f"{IMAGES}/train-*.tar", f"{IMAGES}/val-*.tar", f"{IMAGES}/meta.json"
VISION = "mobilenet_v2_1.0_224"
HELD_OUT = "validation, through the tokenizer"
SHEET_ROWS = 20
BATCH = 16

# Shape letters: N images of a set, M training images, S side of an image, F features.


class Pictures(NamedTuple):
    """Images `(N, 3, S, S)` in uint8, and the class of each."""

    levels: Tensor
    labels: list[int]

    def batches(self) -> list[dict[str, Any]]:
        """Give them as batches of `pixel_values` in [-1, 1]."""
        return [{"pixel_values": from_uint8(part)} for part in self.levels.split(BATCH)]


def generate(pipe: HieraTokDiTPipeline, args: Namespace) -> Pictures:
    """Make images of all classes in turn."""
    call = {"seed": args.seed, "batch_size": args.batch_size, **sampling_settings(args)}
    made = GeneratedBatches(pipe, range(args.samples), **call)
    batches = list(tqdm(made, desc="samples", leave=False))
    levels = torch.cat([to_uint8(batch["pixel_values"]) for batch in batches])
    return Pictures(levels, [label for batch in batches for label in batch["labels"]])


def take_balanced(batches: EvaluationBatches, count: int, num_classes: int) -> Pictures:
    """Take the first images of each class, of which there are as many but for those that the data has too few of."""
    taken: dict[int, list[Tensor]] = {label: [] for label in range(num_classes)}
    for batch in batches:
        for label, levels in zip(batch["labels"], to_uint8(batch["pixel_values"])):
            if len(taken[label]) < len(range(label, count, num_classes)):
                taken[label].append(levels)
    # In turn, as generated ones are: the first of a set are balanced too.
    order = sorted((i, label) for label, found in taken.items() for i in range(len(found)))
    return Pictures(torch.stack([taken[label][i] for i, label in order]), [label for _, label in order])


class Neighbours(NamedTuple):
    """The nearest training image of each of `N` images: how far, its number, and whether its mirror image is meant."""

    distances: Tensor
    indices: Tensor
    mirrored: Tensor

    @classmethod
    def nearest(cls, found: Tensor) -> "Neighbours":
        """Choose among distances `(2, N, M)`, of the images and of their mirror images to training images."""
        distances, indices = found.min(2)
        mirrored = distances[1] < distances[0]
        return cls(distances.amin(0), torch.where(mirrored, indices[1], indices[0]), mirrored)

    def split(self, counts: list[int]) -> "list[Neighbours]":
        """Divide those of several sets, which were looked for together."""
        return [Neighbours(*parts) for parts in zip(*(x.split(counts) for x in self))]


def both_ways(levels: Tensor) -> Tensor:
    """Put the mirror images `(N, 3, S, S)` behind images: training images are seen mirrored half of the time."""
    return torch.cat([levels, levels.flip(3)])


def nearest_by_features(judge: Judge, levels: Tensor, training: Tensor) -> Neighbours:
    """Find neighbours by the cosine distance of features; `training` are those `(M, F)` of the training images."""
    found = judge.look(Pictures(both_ways(levels), []).batches(), "nearest by features")[0]
    distances = 1 - F.normalize(found) @ F.normalize(training).T
    return Neighbours.nearest(distances.unflatten(0, (2, -1)))


def nearest_by_pixels(levels: Tensor, training: Reconstructions) -> Neighbours:
    """Find neighbours by the root mean square of differences in 8-bit levels."""
    images, parts = both_ways(levels).flatten(1).double(), []  # in float32 the products would be rounded
    squares = images.square().sum(1, keepdim=True)
    for batch in tqdm(training, desc="nearest by pixels", leave=False):
        others = to_uint8(batch["pixel_values"]).flatten(1).double()
        parts.append(squares + others.square().sum(1) - 2 * images @ others.T)
    distances = (torch.cat(parts, 1) / images.shape[1]).sqrt().float()
    return Neighbours.nearest(distances.unflatten(0, (2, -1)))


def summarise(distances: Tensor, held_out: Tensor) -> dict[str, float]:
    """The middle and the low end of distances, and how many are lower than all but 5 % of the held-out ones."""
    return {
        "images": len(distances),
        "median": round(distances.quantile(0.5).item(), 4),
        "percentile_5": round(distances.quantile(0.05).item(), 4),
        "nearest": round(distances.min().item(), 4),
        "nearer_than_5_percent_of_held_out": round((distances < held_out.quantile(0.05)).float().mean().item(), 4),
    }


def judge_set(judge: Judge, pictures: Pictures, labels: list[int], reference: Tensor, what: str) -> dict[str, Any]:
    """What a judge says of a set of images."""
    features, logits = judge.look(pictures.batches(), what)
    accuracy = ClassAccuracy(judge, labels, judge.mean.device)
    accuracy.count(logits, pictures.labels)
    return {
        "images_of": what,
        "judge": judge.name,
        "images": len(features),
        **accuracy.compute(),
        "frechet_distance": round(frechet_distance(features, reference), 3),
    }


def draw_neighbours(
    sets: dict[str, tuple[Tensor, dict[str, Neighbours]]], images: Images, rows: list[int], size: int
) -> Image.Image:
    """
    Draw the images of each set that come nearest by features, beside the training images that they are nearest to;
    `rows` are the numbers of those in the data.
    """
    labels, columns = [], []
    for what, (levels, neighbours) in sets.items():
        closest = neighbours["features"].distances.argsort()[:SHEET_ROWS].tolist()
        labels.append(what)
        columns.append(as_images(levels[closest]))
        for by, found in neighbours.items():
            originals = [centre_square(image_of(images[rows[found.indices[i]]]), size) for i in closest]
            labels.append(f"nearest by {by}")
            columns.append([ImageOps.mirror(x) if found.mirrored[i] else x for i, x in zip(closest, originals)])
    return make_sheet(labels, columns)


def tables(report: dict[str, Any]) -> str:
    """The figures of both judges side by side, and those of the neighbours, in Markdown."""
    names = list(dict.fromkeys(row["judge"] for row in report["rows"]))
    lines = []
    for what in dict.fromkeys(row["images_of"] for row in report["rows"]):
        found = [row for row in report["rows"] if row["images_of"] == what]
        shares = [f"{100 * row[key]:.1f}" for key in ("class_accuracy", "top1_accuracy") for row in found]
        lines.append([what, found[0]["images"], *shares, *(f"{row['frechet_distance']:.1f}" for row in found)])
    heads = ["of the ten classes, %", "of all 1000, %", "Fréchet distance"]
    columns = " | ".join(f"{head}: {name}" for head in heads for name in names)
    first = markdown_table(f"| images | number | {columns} |", lines)
    lines = []
    for row in report["neighbours"]:
        figures = [f"{row[key]:.4g}" for key in ("median", "percentile_5", "nearest")]
        share = f"{100 * row['nearer_than_5_percent_of_held_out']:.1f}"
        lines.append([row["images_of"], row["images"], row["by"], *figures, share])
    head = "median | 5th percentile | nearest | nearer than 5 % of held-out ones are, %"
    second = markdown_table(f"| images | number | distance to the nearest training image by | {head} |", lines)
    return f"{first}\n\n{second}"


def check_classes(pipe: HieraTokDiTPipeline, names: list[str]) -> None:
    """Refuse a pipeline whose classes are not those of the data, by number."""
    own = [pipe.id2label.get(key, str(key)) for key in range(pipe.num_classes)]
    if [plain_name(name.split(",")[0]) for name in own] != [plain_name(name) for name in names]:
        raise Problem(f"--model must make the classes {', '.join(names)}, in this order, got {', '.join(own)}")


def run(args: Namespace) -> list[str]:
    """Judge, write what is asked for, and return the tables."""
    device = find_device(args)
    if missing := [name for name in (TRAINING, VALIDATION, META, VISION) if not list(args.data.glob(name))]:
        raise Problem(f"--data {str(args.data)!r} lacks {missing[0]}")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise Problem(f"--sheet must be a PNG file, got {str(args.sheet)!r}")
    if args.sheet:
        check_writable("--sheet", args.sheet)
    if args.features:
        check_writable("--features", args.features, folder=True)
    judges = load_judges(str(args.data / VISION), device)
    pipe = load_or_explain(load_pipeline, "--model", args.model, device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    check_classes(pipe, json.loads((args.data / META).read_text())["classes"])
    size, codec = image_size(pipe), Codec(pipe.vae)

    images = load_images(str(args.data / TRAINING))
    reference = EvaluationBatches(images, size, BATCH, limit=args.reference_images)
    training = Reconstructions(codec, EvaluationBatches(images, size, BATCH, limit=args.max_images))
    validation = EvaluationBatches(load_images(str(args.data / VALIDATION)), size, BATCH)
    real = take_balanced(validation, args.samples, pipe.num_classes)
    held_out = torch.cat([to_uint8(reconstruct(codec, x["pixel_values"])) for x in real.batches()])
    samples = generate(pipe, args)
    sets = {"generated": samples, "validation": real, HELD_OUT: Pictures(held_out, real.labels)}
    rows = []
    for judge in judges:
        of_reference = judge.features(reference, "training images", args.features)
        labels = find_classes(pipe.id2label, pipe.num_classes, judge.names)
        rows += [judge_set(judge, pictures, labels, of_reference, what) for what, pictures in sets.items()]

    # Everything has been through the tokenizer's decoder: a generated image always has, and against sharper originals
    # it would look farther from its training image, and held-out originals farther from everything, than they are.
    judge = judges[-1]
    of_training = judge.features(training, "reconstructed training images", args.features)
    compared = {"generated": samples.levels, HELD_OUT: held_out}
    compared = {what: levels[: args.neighbours] for what, levels in compared.items()}
    counts, levels = [len(x) for x in compared.values()], torch.cat(list(compared.values()))
    by_features = nearest_by_features(judge, levels, of_training).split(counts)
    by_pixels = nearest_by_pixels(levels, training).split(counts)
    found = {what: {"features": x, "pixels": y} for what, x, y in zip(compared, by_features, by_pixels)}
    neighbours = [
        {"images_of": what, "by": by, **summarise(of_set[by].distances, found[HELD_OUT][by].distances)}
        for by in ("features", "pixels")
        for what, of_set in found.items()
    ]

    report = {
        "machine": describe_benchmark(device),
        "model": Path(args.model).name,
        "size": size,
        "seed": args.seed,
        **sampling_settings(args),
        "reference_images": len(of_reference),
        "training_images": len(of_training),
        "rows": rows,
        "neighbours": neighbours,
    }
    if args.sheet:
        pairs = {what: (compared[what], found[what]) for what in compared}
        drawn = draw_neighbours(pairs, images, training.rows, size)
        with write_whole(args.sheet) as file:
            file.write(encode_image(drawn, args.sheet.name))
    print_machine(report["machine"])
    if args.json:
        record_report(RESULTS, f"generator_{report['model']}", report)
    return [tables(report)]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_sampling(parser)
    add("--data", type=Path, default=DATA, help="folder of the data sets")
    add("--samples", type=whole(2), default=1000, help="images to make, of all classes in turn; as many real ones")
    add("--neighbours", type=positive, default=200, help="images of a set whose nearest training image is looked for")
    add("--max_images", type=positive, help="look for neighbours among the first training images alone")
    add("--reference_images", type=whole(2), help="take Fréchet distances to the first training images alone")
    keep = "folder that keeps the features of the training images for the next run"
    add("--features", type=Path, metavar="FOLDER", help=keep)
    sheet = "PNG file for the images that come nearest, beside the training images that they are nearest to"
    add("--sheet", type=Path, metavar="FILE", help=sheet)
    add("--json", action="store_true", help="write results/generator_MODEL_KIND.json")
    return run_script(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
