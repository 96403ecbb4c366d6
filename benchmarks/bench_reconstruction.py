"""Tokenizers beside principal components and JPEG of as many numbers and bytes: PSNR, SSIM and a Fréchet distance."""

import copy
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import describe_benchmark, markdown_table, print_machine, record_report
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hieratok_hf import HieraTokImageProcessorPil
from hieratok_hf.cli.command_line import find_device
from hieratok_hf.cli.parsing import add_device, make_parser
from hieratok_hf.data.image_dataset import Images, image_of, load_images
from hieratok_hf.evaluation.image_sets import FrechetDistance
from hieratok_hf.evaluation.reconstruction import EvaluationBatches, ReconstructionMetrics, evaluate
from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.models.autoencoder_adapter import Codec, load_codec

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
# Name: what lies in --data, and the side of the square that is cut from the middle.
SETS = {
    "kodak": ("kodak", 512),
    "imagenet_sample_256": ("imagenet_sample_256", 256),
    "imagenette_128, validation": ("imagenette_128/val-*.tar", 128),
}
PROCESSOR = HieraTokImageProcessorPil()
FITTED_TO = "imagenette_128/train-*.tar"
# What tells one row from another.
ROW = ("data", "like", "code")


def as_values(image: Image.Image) -> Tensor:
    """An image as `(3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class PrincipalComponents:
    """Patches projected to their first principal components and back, the best linear code of single patches."""

    def __init__(self, images: Images, patch_size: int, channels: int):
        self.patch_size, count = patch_size, 0
        numbers = 3 * patch_size**2
        total, products = torch.zeros(numbers).double(), torch.zeros(numbers, numbers).double()
        for i in tqdm(range(len(images)), desc=f"components of {patch_size}x{patch_size} patches"):
            image = as_values(image_of(images[i]))[None]
            patches = F.unfold(image, patch_size, stride=patch_size)[0].T.double()  # (n, 3 * p * p)
            total, products = total + patches.sum(0), products + patches.T @ patches
            count += len(patches)
        self.mean = (total / count).float()
        covariance = products / count - torch.outer(total, total) / count**2
        self.directions = torch.linalg.eigh(covariance).eigenvectors[:, -channels:].float()  # (3 * p * p, C)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        patches = F.unfold(pixel_values, self.patch_size, stride=self.patch_size).transpose(1, 2) - self.mean
        decoded = patches @ self.directions @ self.directions.T + self.mean
        return F.fold(decoded.transpose(1, 2), pixel_values.shape[-2:], self.patch_size, stride=self.patch_size)


class Jpeg:
    """
    The best JPEG of each image within some bytes, which are those of its scan alone: headers and tables, half a
    kilobyte that small images should not pay for, are not counted.
    """

    def __init__(self, bytes_a_pixel: float):
        self.bytes_a_pixel = bytes_a_pixel

    def __call__(self, pixel_values: Tensor) -> Tensor:
        return torch.stack([as_values(self.best(image)) for image in PROCESSOR.postprocess(pixel_values)])

    def best(self, image: Image.Image) -> Image.Image:
        """By bisection over the quality; the lowest one where even that takes more bytes."""
        low, high = 1, 96  # Pillow advises against more than 95
        while high - low > 1:
            middle = (low + high) // 2
            within = self._scan(self._file(image, middle)) <= self.bytes_a_pixel * image.width * image.height
            low, high = (middle, high) if within else (low, middle)
        return Image.open(io.BytesIO(self._file(image, low)))

    @staticmethod
    def _file(image: Image.Image, quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return file.getvalue()

    @staticmethod
    def _scan(file: bytes) -> int:
        return len(file) - file.index(b"\xff\xda")


def measured(
    code: Callable[[Tensor], Tensor], batches: Iterable[dict[str, Any]], metrics: ReconstructionMetrics
) -> dict[str, Any]:
    """The figures of something that takes images `(B, 3, H, W)` to what it makes of them."""
    metrics.reset()
    for batch in batches:
        metrics.update(code(batch["pixel_values"]), batch["pixel_values"])
    return dict(metrics.compute())


def linear_path_alone(codec: Codec) -> Callable[[Tensor], Tensor]:
    """Zero the heads of both transformers of a HieraTok model."""
    core = copy.deepcopy(codec.core)
    assert core is not None
    for side in (core.encoder, core.decoder):
        side.head.weight.zero_()
    return lambda pixel_values: core.decode(core.encode(pixel_values).mode())


def baselines(codec: Codec, data: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """Make the codes to measure a tokenizer beside: a part of itself, and codes of as many numbers of a byte."""
    channels, side, _ = codec.latent_shape(256)
    patch_size = 256 // side
    has_linear_path = codec.core is not None and codec.core.config.linear_path
    return {
        **({"its linear path alone": linear_path_alone(codec)} if has_linear_path else {}),
        "principal components": PrincipalComponents(load_images(str(data / FITTED_TO)), patch_size, channels),
        "JPEG": Jpeg(channels / patch_size**2),
    }


def table(report: dict[str, Any]) -> str:
    """A row for each data set, tokenizer and code in Markdown."""
    name = report["distance"]
    rows = []
    for row in report["rows"]:
        cells = [f"{row['images']} of {row['data']} at {row['size']}x{row['size']}", row["like"], row["code"]]
        cells += [f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row[name]:.3f}" if name in row else ""]
        rows.append(cells)
    return markdown_table(f"| images | size of | method | PSNR, dB | SSIM | {name} |", rows)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder of the data sets")
    add("--models", nargs="+", default=["hieratok-tiny"], help="folders, names that ship, or Hub repositories")
    add("--sets", nargs="+", default=list(SETS), choices=SETS, help="data sets to measure on")
    add("--vision_model", help="model of the Fréchet distance; mobilenet_v2_1.0_224 in --data unless given")
    add_device(parser)
    add("--max_images", type=int, help="take only the first images of each set")
    add("--json", action="store_true", help="write results/reconstruction_KIND.json, after each set")
    args = parser.parse_args(argv)
    needed = [args.data / FITTED_TO, *(args.data / SETS[name][0] for name in args.sets)]
    if missing := [path for path in needed if not list(path.parent.glob(path.name))]:
        print(f"error: --data {str(args.data)!r} lacks {missing[0].relative_to(args.data)}", file=sys.stderr)
        return 2
    device = find_device(args)
    about = describe_benchmark(device)
    print_machine(about)
    vision_model = args.vision_model or str(args.data / "mobilenet_v2_1.0_224")
    codecs = {name: load_codec(name, device) for name in args.models}
    codes = {name: baselines(codec, args.data) for name, codec in codecs.items()}
    for data in args.sets:
        where, size = SETS[data]
        # Of one set, the features of the originals are computed once.
        frechet = FrechetDistance(VisionFeatures.from_pretrained(vision_model), same_targets=True)
        metrics = ReconstructionMetrics(frechet=frechet)
        images = load_images(str(args.data / where))
        rows = []
        for name, codec in codecs.items():
            for code, call in {"tokenizer": codec, **codes[name]}.items():
                batches = EvaluationBatches(images, size, batch_size=4 if size > 256 else 16, limit=args.max_images)
                progress = tqdm(batches, desc=f"{data}, {code} as {name}")
                found = evaluate(call, progress, metrics) if call is codec else measured(call, progress, metrics)
                kept = {key: value for key, value in found.items() if not key.startswith("latent_")}
                rounded = {key: [round(x, 4) for x in v] if isinstance(v, list) else v for key, v in kept.items()}
                row = {"data": data, "size": size, "like": Path(name).name, "code": code}
                rows.append(row | {k: round(v, 4) if isinstance(v, float) else v for k, v in rounded.items()})
        report = {"machine": about, "distance": frechet.name, "rows": rows}
        print(table(report), flush=True)
        if args.json:
            record_report(RESULTS, "reconstruction", report, ROW)
    return 0


if __name__ == "__main__":
    sys.exit(main())
