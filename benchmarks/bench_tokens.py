"""Integers of quantised latents: bytes against quality beside JPEG and WebP, and what changes them."""

import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import describe_benchmark, in_fresh_process, markdown_table, print_machine, record_report
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.data.archive_shards import FILE_FORMATS, TOKENS_FORMAT, ImageRecord
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.perceptual import PerceptualDistance
from hieratok_hf.evaluation.reconstruction import EvaluationBatches, ReconstructionMetrics
from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.models.autoencoder_adapter import load_codec
from hieratok_hf.utils.images import from_uint8, to_uint8
from hieratok_hf.utils.plots import draw

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
PHOTOGRAPHS, SIZE = "kodak", 512
VISION_MODEL = "mobilenet_v2_1.0_224"
KINDS = {"JPEG": 95, "WebP": 100}  # highest quality; Pillow advises against more of JPEG
FIGURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "perceptual": "perceptual distance"}
NARROW = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def photographs(data: Path, batch_size: int, limit: int | None) -> list[Tensor]:
    """Batches of images `(B, 3, 512, 512)`."""
    batches = EvaluationBatches(load_images(str(data / PHOTOGRAPHS)), SIZE, batch_size, limit=limit)
    return [batch["pixel_values"] for batch in batches]


def file_bytes(tokens: Tensor) -> int:
    """Bytes of an archive's file of one image with the integers `(C, h, w)`."""
    record = ImageRecord("0.png", SIZE, SIZE, (0, 0, SIZE, SIZE))
    return len(FILE_FORMATS[TOKENS_FORMAT].pack([record], [tokens.to(torch.uint8)]))


def best_file(image: Image.Image, kind: str, most: int) -> bytes:
    """The file of the highest quality within so many bytes, by bisection; the lowest quality where none is."""

    def content(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, quality=quality)
        return file.getvalue()

    low, high = 1, KINDS[kind] + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(content(middle)) <= most else (low, middle)
    return content(low)


def measure_curve(
    name: str, images: list[Tensor], bits: list[int], network: PerceptualDistance | None
) -> list[dict[str, Any]]:
    """The figures of a tokenizer's latents, of their integers, and of other files of as many bytes for each image."""
    model: Any = load_codec(name).model
    metrics: dict[tuple[int | None, str], ReconstructionMetrics] = {}
    sizes: dict[tuple[int | None, str], list[int]] = {}

    def add(row: tuple[int | None, str], made: Tensor, target: Tensor, size: int | None = None) -> None:
        metrics.setdefault(row, ReconstructionMetrics(perceptual=network)).update(made.clamp(-1, 1), target)
        sizes.setdefault(row, []).extend([] if size is None else [size])

    for image in tqdm(images, desc=name, leave=False):
        add((None, "latents"), model.decode(model.encode(image).latent_dist.mode()).sample, image)
        original = Image.fromarray(to_uint8(image[0]).permute(1, 2, 0).numpy())
        for count in bits:
            tokens = model.tokenize(image, count)
            most = file_bytes(tokens[0])
            add((count, "integers"), model.detokenize(tokens, count).sample, image, most)
            for kind in KINDS:
                content = best_file(original, kind, most)
                decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB")))
                add((count, kind), from_uint8(decoded.permute(2, 0, 1)[None]), image, len(content))
    return [
        {"model": Path(name).name, "bits": count, "code": code}
        | ({"bytes": round(sum(sizes[count, code]) / len(images))} if sizes[count, code] else {})
        | {key: round(value, 4) for key, value in found.compute().items()}
        for (count, code), found in metrics.items()
    ]


def tokens_of(name: str, images: list[Tensor], bits: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The integers of images in batches, `(N, C, h, w)`."""
    model: Any = load_codec(name, dtype=dtype).model
    return torch.cat([model.tokenize(batch.to(dtype), bits) for batch in images]).numpy().astype(np.uint8)


def tokens_elsewhere(name: str, data: Path, limit: int | None, bits: int, settings: dict[str, str]) -> np.ndarray:
    """The integers that a process with other settings of the environment makes."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--data", data, "--models", name, "--bits", bits, "--write", Path(folder, "tokens.npy")]
        given += [] if limit is None else ["--max_images", limit]
        before = {key: os.environ.get(key) for key in settings}
        os.environ.update(settings)
        try:
            capability = in_fresh_process(__file__, given, 600)["capability"]
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        if capability != "AVX2":
            raise RuntimeError(f"the process must have used AVX2, got {capability}")
        return np.load(Path(folder, "tokens.npy"))


def measure_changes(name: str, data: Path, limit: int | None, bits: list[int]) -> list[dict[str, Any]]:
    """How many integers differ from those of single images, in one thread, in float32, by what is another."""
    single, pairs = (photographs(data, count, limit) for count in (1, 2))
    threads = torch.get_num_threads()
    rows = []
    for count in bits:
        torch.set_num_threads(1)
        plain = tokens_of(name, single, count)
        others = {
            "the same again": tokens_of(name, single, count),
            "batches of 2": tokens_of(name, pairs, count),
            "AVX2 in the place of AVX-512": tokens_elsewhere(name, data, limit, count, NARROW),
            "bfloat16": tokens_of(name, single, count, torch.bfloat16),
        }
        torch.set_num_threads(2)
        others["2 threads"] = tokens_of(name, single, count)
        torch.set_num_threads(threads)
        for what, found in others.items():
            steps = np.abs(found.astype(int) - plain)
            row = {"model": Path(name).name, "bits": count, "change": what, "numbers": plain.size}
            rows.append(row | {"differing": int((steps > 0).sum()), "largest": int(steps.max())})
    return rows


def tables(report: dict[str, Any]) -> str:
    """Both lists of rows in Markdown."""
    places: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in report["rows"]:
        places.setdefault((row["model"], row["bits"]), {})[row["code"]] = row
    curves = []
    for (model, bits), codes in places.items():
        found = list(codes.values())  # latents alone, or integers, JPEG and WebP
        cells = [model, "latents in float32" if bits is None else bits]
        cells.append(", ".join(f"{row['bytes'] / 1000:.1f}" for row in found if "bytes" in row))
        for key, digits in (("psnr", 2), ("ssim", 3), ("perceptual", 3)):
            cells.append(", ".join(f"{row[key]:.{digits}f}" for row in found))
        curves.append(cells)
    head = "| tokenizer | bits | kB: integers, JPEG, WebP | PSNR, dB | SSIM | perceptual distance |"
    changes = [
        [x["model"], x["bits"], x["change"], f"{x['differing']} of {x['numbers']}", x["largest"]]
        for x in report["changes"]
    ]
    second = markdown_table("| tokenizer | bits | change | integers that differ | by at most |", changes)
    return f"{markdown_table(head, curves)}\n\n{second}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Each figure over the bytes of an image: integers of each tokenizer, and all JPEG and WebP files."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["code"] != "latents":
            name = f"integers of {row['model']}" if row["code"] == "integers" else row["code"]
            curves.setdefault(name, []).append(row)
    styles = {"JPEG": {"color": "grey", "linestyle": "--"}, "WebP": {"color": "black", "linestyle": ":"}}
    with draw(path, len(FIGURES), figsize=(14, 4.4)) as (_, axes):
        for axis, (key, label) in zip(axes, FIGURES.items()):
            for name, points in curves.items():
                points = sorted(points, key=lambda row: row["bytes"])
                sizes = [row["bytes"] / 1000 for row in points]
                axis.semilogx(sizes, [row[key] for row in points], marker=".", label=name, **styles.get(name, {}))
                if name not in KINDS:
                    for row, size in zip(points, sizes):
                        place = {"xytext": (4, -10), "textcoords": "offset points", "fontsize": 8}
                        axis.annotate(f"{row['bits']}", (size, row[key]), **place)
            ticks = [size for size in (5, 10, 20, 50, 100) if axis.get_xlim()[0] <= size <= axis.get_xlim()[1]]
            axis.set_xticks(ticks, map(str, ticks))
            axis.set_xticks([], minor=True)
            axis.set(xlabel="kB an image of 512x512 pixels", ylabel=label)
            axis.grid(alpha=0.3, which="both")
        axes[0].legend()


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder of the data sets")
    add("--models", nargs="+", default=["hieratok-tiny", "hieratok-tiny-16x"], help="folders, or names that ship")
    add("--bits", nargs="+", type=int, default=[4, 5, 6, 8], help="bits of an integer")
    add("--changes", nargs="*", type=int, default=[6, 8], help="bits to look at what changes integers with")
    add("--max_images", type=int, help="take only the first photographs")
    add("--json", action="store_true", help="write results/tokens_KIND.json and results/tokens.png")
    add("--write", type=Path, help="write only the integers of the first model to this file")
    args = parser.parse_args(argv)
    if missing := [name for name in (PHOTOGRAPHS, VISION_MODEL) if not (args.data / name).exists()]:
        print(f"error: --data {str(args.data)!r} lacks {missing[0]}", file=sys.stderr)
        return 2
    if args.write:
        np.save(args.write, tokens_of(args.models[0], photographs(args.data, 1, args.max_images), args.bits[0]))
        print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability()}))
        return 0
    about = describe_benchmark(torch.device("cpu"))
    print_machine(about)
    network = PerceptualDistance(VisionFeatures.from_pretrained(str(args.data / VISION_MODEL)))
    images = photographs(args.data, 1, args.max_images)
    rows = [row for name in args.models for row in measure_curve(name, images, args.bits, network)]
    changes = [row for name in args.models for row in measure_changes(name, args.data, args.max_images, args.changes)]
    report = {"machine": about, "rows": rows, "changes": changes}
    print(tables(report))
    if args.json:
        record_report(RESULTS, "tokens", report)
        plot(rows, RESULTS / "tokens.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
