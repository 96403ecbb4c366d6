"""Seams between patches, and what decoders make of inexact latents, as those of a generator always are."""

import sys
from pathlib import Path
from typing import Any

import torch
from measuring import describe_benchmark, markdown_table, record_report
from torch import Tensor
from tqdm import tqdm

from hieratok_hf import HieraTokDiTPipeline
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.generation import GeneratedBatches, image_size
from hieratok_hf.evaluation.metrics import border_steps, psnr
from hieratok_hf.evaluation.reconstruction import EvaluationBatches, perturb
from hieratok_hf.models.autoencoder_adapter import Codec, load_codec

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
PHOTOGRAPHS, SIZE = "kodak", 512
REAL_IMAGES = "imagenette_128/val-*.tar"


def border_ratio(steps: list[Tensor]) -> float:
    """The mean step across borders over that inside of patches, of what `border_steps` gave for some batches."""
    across, inside = torch.cat(steps).mean(0).tolist()
    return round(across / inside, 3)


def measure_tokenizer(name: str, codec: Codec, batches: EvaluationBatches, deviations: list[float]) -> dict[str, Any]:
    """The figures of a tokenizer on photographs: decibels by noise on the latents, and seams."""
    channels, side, _ = codec.latent_shape(batches.size)
    std = torch.ones(channels)  # that of the latents of images that they were trained on
    patch_size = batches.size // side
    sums, count, steps, original_steps = torch.zeros(1 + len(deviations)), 0, [], []
    for batch in tqdm(batches, desc=name, leave=False):
        pixel_values = batch["pixel_values"]
        latents = codec.encode(pixel_values)
        wrong = [perturb(latents, batch["rows"], deviation, std)["noise"] for deviation in (0.0, *deviations)]
        made = [codec.decode(x).float().clamp(-1, 1) for x in wrong]
        sums += torch.stack([psnr(images, pixel_values).sum() for images in made])
        count += len(pixel_values)
        steps.append(border_steps(made[0], patch_size))
        original_steps.append(border_steps(pixel_values, patch_size))
    decibels = [round(value, 2) for value in (sums / count).tolist()]
    return {
        "name": Path(name).name,
        "images": count,
        "psnr": decibels[0],
        "psnr_with_noise": dict(zip(map(str, deviations), decibels[1:])),
        "border_ratio": border_ratio(steps),
        "border_ratio_of_originals": border_ratio(original_steps),
    }


def measure_pipeline(name: str, images: int, data: Path) -> dict[str, Any]:
    """The seams of a pipeline's images, and of real ones of that size."""
    pipe = HieraTokDiTPipeline.from_pretrained(name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    patch_size, size = pipe.vae.spatial_compression_ratio, image_size(pipe)
    settings = {"num_inference_steps": 25, "guidance_scale": 8.0, "guidance_eta": 0.5}
    settings["guidance_interval"] = (0.3, 1.0)
    made = GeneratedBatches(pipe, range(images), seed=0, batch_size=50, **settings)
    real = EvaluationBatches(load_images(str(data / REAL_IMAGES)), size, 50, limit=images)
    ratios = [border_ratio([border_steps(x["pixel_values"], patch_size) for x in batches]) for batches in (made, real)]
    keys = ("border_ratio", "border_ratio_of_real_images")
    return {"name": Path(name).name, "images": images, **dict(zip(keys, ratios))}


def tables(report: dict[str, Any]) -> str:
    """Both lists of rows in Markdown."""
    noises = report["deviations"]
    tokenizers = []
    for row in report["tokenizers"]:
        figures = [row["psnr"], *(row["psnr_with_noise"][str(noise)] for noise in noises)]
        figures += [row["border_ratio"], row["border_ratio_of_originals"]]
        tokenizers.append([row["name"], *(f"{figure:.2f}" for figure in figures)])
    generators = [
        [row["name"], f"{row['border_ratio']:.2f}", f"{row['border_ratio_of_real_images']:.2f}"]
        for row in report["generators"]
    ]
    head = " | ".join(f"with noise of {noise}" for noise in noises)
    first = markdown_table(f"| tokenizer | PSNR, dB | {head} | border ratio | of originals |", tokenizers)
    return f"{first}\n\n{markdown_table('| generator | border ratio | of real images |', generators)}"


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder of the data sets")
    tokenizers = ["hieratok-tiny", "hieratok-tiny-16x"]
    add("--models", nargs="*", default=tokenizers, help="tokenizers: folders, or names that ship")
    add("--pipelines", nargs="*", default=["hieratok-dit-tiny"], help="generators: folders, or names that ship")
    add("--deviations", nargs="+", type=float, default=[0.1, 0.2, 0.3], help="std of the noise in that of the latents")
    add("--images", type=int, default=200, help="images to make by each generator")
    add("--max_images", type=int, help="take only the first photographs")
    add("--json", action="store_true", help="add the figures to results/seams_KIND.json")
    args = parser.parse_args(argv)
    if missing := [name for name in (PHOTOGRAPHS, REAL_IMAGES) if not list(args.data.glob(name))]:
        print(f"error: --data {str(args.data)!r} lacks {missing[0]}", file=sys.stderr)
        return 2
    photographs = load_images(str(args.data / PHOTOGRAPHS))
    batches = EvaluationBatches(photographs, SIZE, batch_size=2, limit=args.max_images)
    report = {
        "machine": describe_benchmark(torch.device("cpu")),
        "deviations": args.deviations,
        "tokenizers": [measure_tokenizer(name, load_codec(name), batches, args.deviations) for name in args.models],
        "generators": [measure_pipeline(name, args.images, args.data) for name in args.pipelines],
    }
    if args.json:
        report = record_report(RESULTS, "seams", report, ("name",), ("tokenizers", "generators"))
    print(tables(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
