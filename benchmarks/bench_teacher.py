"""Tokenizers that learn another autoencoder's latents: how well, what a generator makes through them, and previews."""

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from measuring import describe_benchmark, markdown_table, print_machine, record_report, side_by_side
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hieratok_hf import AutoencoderHieraTok, HieraTokPreviewer
from hieratok_hf.cli import train
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.training_batches import BatchPlan, training_loader
from hieratok_hf.evaluation.image_sets import FrechetDistance
from hieratok_hf.evaluation.metrics import psnr
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.training.teacher import LatentTeacher, agreement
from hieratok_hf.utils.images import from_uint8

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
SIDE, CHANNELS, CLASSES, BATCH = 64, 4, 10, 16
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
TEACHER = BLOCKS | {"block_out_channels": (16, 32, 32), "norm_num_groups": 4, "layers_per_block": 1}
STUDENT = {"qk_norm": True, "linear_path": 3, "output_conv": True, "learned_positions": SIDE // 4, "sample_size": SIDE}
STUDENT |= {"encoder_hidden_size": 96, "encoder_num_layers": 3, "encoder_num_heads": 3}
STUDENT |= {"decoder_hidden_size": 96, "decoder_num_layers": 3, "decoder_num_heads": 3}
DENOISER = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "patch_size": 2}
OPTIONS = "--crop_scale 1 1 --lr 2e-3 --ema 0.99 --linear_lr_factor 1 --pixel_loss mse "
OPTIONS += "--teacher_images --latent_jitter 0.5 --latent_noise 0.5"


def batches(data: str, steps: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Batches of whole images, with `pixel_values` `(B, 3, S, S)` in [-1, 1] and `labels`."""
    plan = BatchPlan(BATCH, (SIDE,), steps, seed=seed)
    for batch in training_loader(load_images(data), plan, crop_scale=(1.0, 1.0)):
        yield batch | {"pixel_values": from_uint8(batch["pixel_values"])}


def fit(parameters: Iterable[Tensor], steps: int, losses: Iterable[Tensor], name: str, rate: float = 2e-3) -> None:
    """Take a step of Adam for each loss, the learning rate falling to nothing."""
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for loss in tqdm(losses, name, steps, leave=False):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def make_teacher(data: str, steps: int) -> AutoencoderKL:
    """An autoencoder of diffusers after some steps of training, none for random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**TEACHER, latent_channels=CHANNELS, sample_size=SIDE)
    if steps:
        images = (batch["pixel_values"] for batch in batches(data, steps))
        fit(vae.parameters(), steps, ((vae(x).sample - x).abs().mean() for x in images), "teacher")
    vae.eval().requires_grad_(False)
    spread = torch.cat([Codec(vae).encode(batch["pixel_values"]) for batch in batches(data, 16, seed=1)]).std()
    vae.register_to_config(scaling_factor=1 / spread.item())
    return vae


def teach(teacher: AutoencoderKL, data: str, steps: int) -> AutoencoderHieraTok:
    """A tokenizer of the teacher's latents, trained by the command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher.save_pretrained(folder / "teacher")
        given = [*OPTIONS.split(), "--teacher", folder / "teacher", "--data", data, "--output", folder / "student"]
        given += ["--crop_sizes", SIDE, "--batch_size", BATCH, "--steps", steps, "--config", json.dumps(STUDENT)]
        if code := train.main(list(map(str, given))):
            raise SystemExit(code)
        return AutoencoderHieraTok.from_pretrained(folder / "student").eval().requires_grad_(False)


def compare(teacher: AutoencoderKL, student: AutoencoderHieraTok, data: str) -> dict[str, float]:
    """The student's share of the latents' variance, and decibels of both decoders on the teacher's latents."""
    images = [batch["pixel_values"] for batch in EvaluationBatches(load_images(data), SIDE, BATCH)]
    judge = LatentTeacher(Codec(teacher), CHANNELS)
    judge.measure(images)
    figures = {}
    for name, vae in (("teacher", teacher), ("student", student)):
        made = [psnr(vae.decode(Codec(teacher).encode(x)).sample.clamp(-1, 1), x) for x in images]
        figures[f"{name}_psnr"] = round(torch.cat(made).mean().item(), 2)
    own = [psnr(student(x).sample.clamp(-1, 1), x) for x in images]
    judge.take_in(student.core)
    explained = agreement(student.core, judge, images)
    judge.hand_over(student.core)
    return figures | {"round_trip_psnr": round(torch.cat(own).mean().item(), 2), "r2": round(explained, 4)}


def make_pipeline(teacher: AutoencoderKL, data: str, steps: int) -> DiTPipeline:
    """A pipeline whose denoiser was trained on the teacher's latents."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    sizes = {"in_channels": CHANNELS, "sample_size": SIDE // 4, "num_embeds_ada_norm": CLASSES}
    denoiser = DiTTransformer2DModel(**DENOISER, **sizes, out_channels=CHANNELS)

    def losses() -> Iterator[Tensor]:
        for batch in batches(data, steps):
            clean = Codec(teacher).encode(batch["pixel_values"]) * teacher.config.scaling_factor
            noise, times = torch.randn_like(clean), torch.randint(1000, (len(clean),))
            made = denoiser(scheduler.add_noise(clean, noise, times), times, class_labels=batch["labels"])
            yield F.mse_loss(made.sample, noise)

    fit(denoiser.parameters(), steps, losses(), "denoiser", 5e-4)
    pipe = DiTPipeline(denoiser.eval(), teacher, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiTPipeline, count: int) -> Iterator[Tensor]:
    """Images `(B, 3, S, S)` in [-1, 1] of all classes in turn, the same noise for any autoencoder."""
    source = torch.Generator().manual_seed(0)
    for first in tqdm(range(0, count, 50), "images", leave=False):
        labels = [number % CLASSES for number in range(first, min(first + 50, count))]
        made = pipe(labels, 1.0, source, 20, output_type="np").images
        yield torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1


def swap(pipe: DiTPipeline, student: AutoencoderHieraTok, data: str, vision: Path, count: int) -> dict[str, float]:
    """The Fréchet distance of generated to real images, by the teacher's decoder and by the student's."""
    distance = FrechetDistance(VisionFeatures.from_pretrained(vision))
    for batch in EvaluationBatches(load_images(data), SIDE, 50):
        distance.update(None, batch["pixel_values"])
    distance.fix_targets()
    figures = {}
    for name, vae in (("teacher", pipe.vae), ("student", student)):
        pipe.vae = vae
        distance.reset()
        for images in generate(pipe, count):
            distance.update(images, None)
        figures[f"{name}_{distance.name}"] = round(distance.compute(), 2)
    return figures


def preview(pipe: DiTPipeline, teacher: AutoencoderKL, student: AutoencoderHieraTok) -> dict[str, float]:
    """How previews by two scales go with the teacher's images averaged to their size, and what they cost."""
    pipe.vae = teacher
    previewer = HieraTokPreviewer(student, num_scales=2)
    with previewer.watch(pipe):
        images = next(generate(pipe, 50))
    shown = from_uint8(torch.from_numpy(np.stack([np.asarray(image) for image in previewer.images])))
    small = F.adaptive_avg_pool2d(images, shown.shape[1:3]).permute(0, 2, 3, 1)
    pairs = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(shown, small)]
    latents = torch.randn(1, CHANNELS, 64, 64)
    calls = {"two scales": lambda: student.decode(latents, num_scales=2), "all": lambda: student.decode(latents)}
    calls["teacher"] = lambda: teacher.decode(latents)
    with torch.inference_mode():
        times = side_by_side(calls, torch.device("cpu"), 5)
    correlations = torch.stack(pairs)
    return {
        "correlation": round(correlations.mean().item(), 3),
        "least_correlation": round(correlations.min().item(), 3),
        "share_of_its_decoding": round(times["two scales"] / times["all"], 3),
        "share_of_the_teachers_decoding": round(times["two scales"] / times["teacher"], 3),
    }


def table(report: dict[str, Any]) -> str:
    """A column for each teacher in Markdown."""
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "teacher"))
    lines = [[name.replace("_", " "), *(str(row.get(name, "-")) for row in rows)] for name in names]
    return markdown_table(f"| | {' | '.join(row['teacher'] for row in rows)} |", lines)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder with clothing_256 and mobilenet_v2_1.0_224")
    add("--teacher_steps", type=int, default=600, help="steps of the trained teacher")
    steps = "steps of the students of a random teacher and of a trained one"
    add("--steps", type=int, nargs=2, default=[3000, 1500], help=steps)
    add("--denoiser_steps", type=int, default=800, help="steps of the denoiser")
    add("--samples", type=int, default=500, help="images of the Fréchet distance")
    add("--json", action="store_true", help="write the record into results")
    args = parser.parse_args(argv)
    train_data, test_data = (str(args.data / "clothing_256" / f"{part}-*.tar") for part in ("train", "test"))
    about = describe_benchmark(torch.device("cpu"))
    print_machine(about)
    rows: list[dict[str, Any]] = []
    for kind, teacher_steps, steps in zip(("random", "trained"), (0, args.teacher_steps), args.steps):
        teacher = make_teacher(train_data, teacher_steps)
        student = teach(teacher, train_data, steps)
        with torch.no_grad():
            rows.append({"teacher": kind, "steps": steps, **compare(teacher, student, test_data)})
        print(rows[-1], flush=True)
    pipe = make_pipeline(teacher, train_data, args.denoiser_steps)
    rows[-1] |= swap(pipe, student, train_data, args.data / "mobilenet_v2_1.0_224", args.samples)
    rows[-1] |= preview(pipe, teacher, student)
    report = {"machine": about, "rows": rows}
    if args.json:
        record_report(RESULTS, "teacher", report)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
