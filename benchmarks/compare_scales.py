"""Multi-scale tokenizers against their single-scale twin under identical settings, at a size that trains on a CPU."""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import describe_benchmark, fill_section, markdown_table
from safetensors.torch import load_file
from variants import VARIANTS

from hieratok_hf import HieraTokConfig, HieraTokCore
from hieratok_hf.cli import train as command
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.reconstruction import EvaluationBatches, ReconstructionMetrics, evaluate
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.files import write_whole
from hieratok_hf.utils.plots import draw

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compare_scales.json"
README = ROOT / "benchmarks" / "README.md"
BEGIN = "<!-- compare_scales.py --only_collect writes this -->"
PLOT = ROOT / "benchmarks" / "results" / "compare_scales.png"
DISTANCE = "FD-MobileNetV2"

# What all rows share: compression as that of hieratok-b, 48 numbers of an image to one of the latent.
SHARED = """
    --size hieratok-tiny --crop_sizes 64 --crop_scale 0.5 1 --batch_size 16 --steps 1000 --lr 1.5e-3 --warmup_steps 50
    --linear_steps 300 --statistics_batches 32 --perceptual_weight 0.05 --ema 0.99 --fid_size 64
    --validation_every 250 --save_every 500 --sample_every 1000 --log_every 10
"""
CONFIG = {"latent_channels": 4, "downsampling": "mean", "coarse_weight": 0.02}
LEARNED = {"downsampling": "learned"}
WIDE = {"encoder_hidden_size": 192, "encoder_num_heads": 6, "decoder_hidden_size": 192, "decoder_num_heads": 6}
CONFIGS = {
    "full": {"scale_causal": False},
    "single_wide": WIDE,
    "multi_wide": WIDE,
    "learned": LEARNED,
    "learned_gan": LEARNED,
    "learned_long": LEARNED,
    "single_bare": {"linear_path": 0},
    "learned_bare": {**LEARNED, "linear_path": 0},
}
GAN = "--adversarial_weight 0.1 --adversarial_start 500"

# Name: what it is, its twin, arguments beyond SHARED. A row of VARIANTS trains that model.
ROWS: dict[str, tuple[str, str, str]] = {
    "single": ("one scale", "single", "--scale_factors 1"),
    "multi": ("4 scales of averages: 8, 4, 2, 1", "single", ""),
    "full": ("4 scales, every token sees all", "single", ""),
    "two": ("2 scales: 2, 1", "single", "--scale_factors 2 1"),
    "three": ("3 scales: 4, 2, 1", "single", "--scale_factors 4 2 1"),
    "six": ("6 scales: 8, 6, 4, 3, 2, 1", "single", "--scale_factors 8 6 4 3 2 1"),
    "coarse_off": ("4 scales, the coarse ones not supervised", "single", "--coarse_weight 0"),
    "coarse_more": ("4 scales, the coarse ones at 0.2", "single", "--coarse_weight 0.2"),
    "coarse_late": ("4 scales, the coarse ones late at 0.2", "single", "--coarse_weight 0.2 --coarse_start 500"),
    "scale_layers": ("4 scales, norms and MLPs of their own", "single", ""),
    "coarse_context": ("4 scales, tokens fed the upsampled coarser scale", "single", ""),
    "encoder_too": ("4 scales, in the encoder's last block too", "single", ""),
    "single_gan": ("one scale, adversarial loss from step 500", "single_gan", f"--scale_factors 1 {GAN}"),
    "multi_gan": ("4 scales of averages, adversarial loss from step 500", "single_gan", GAN),
    "single_noise": ("one scale, noise on the latents", "single_noise", "--scale_factors 1 --latent_noise 1"),
    "multi_noise": ("4 scales of averages, noise on the latents", "single_noise", "--latent_noise 1"),
    "single_wide": ("one scale, 1.5 times as wide", "single_wide", "--scale_factors 1"),
    "multi_wide": ("4 scales of averages, 1.5 times as wide", "single_wide", ""),
    "single_long": ("one scale, 3000 steps", "single_long", "--scale_factors 1 --steps 3000"),
    "multi_long": ("4 scales of averages, 3000 steps", "single_long", "--steps 3000"),
    "learned": ("4 scales, learned tokens", "single", ""),
    "learned_gan": ("4 scales, learned tokens, adversarial loss from step 500", "single_gan", GAN),
    "learned_long": ("4 scales, learned tokens, 3000 steps", "single_long", "--steps 3000"),
    "single_bare": ("one scale, no linear path", "single_bare", "--scale_factors 1"),
    "learned_bare": ("4 scales, learned tokens, no linear path", "single_bare", ""),
}


def core_class(row: str) -> type[HieraTokCore]:
    """The model of a row: the package's, or one of the variants."""
    return VARIANTS.get(row, HieraTokCore)


def train(row: str, seed: int, data: Path, folder: Path) -> None:
    """Train one row in this process, or go on where it was interrupted."""
    command.HieraTokCore = core_class(row)
    config = CONFIG | CONFIGS.get(row, {})
    arguments = [*SHARED.split(), "--config", json.dumps(config), "--seed", str(seed), "--output", str(folder)]
    arguments += ["--data", str(data / "imagenette_128" / "train-*.tar")]
    arguments += ["--validation_data", str(data / "imagenette_128" / "val-*.tar")]
    arguments += ["--validation_size", "64", "--validation_fid"]
    arguments += ["--vision_model", str(data / "mobilenet_v2_1.0_224"), "--resume"]
    if command.main([*arguments, *ROWS[row][2].split()]):
        raise SystemExit(f"The training of {row!r} failed; {folder / 'log.txt'} says why.")


def measure(row: str, folder: Path, data: Path) -> dict[str, Any]:
    """PSNR and SSIM of a finished row on the whole validation split, and its curves."""
    config = HieraTokConfig.from_pretrained(folder)
    core = core_class(row)(config)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    core.load_state_dict({name.removeprefix("core."): x for name, x in weights.items()})
    held_out = EvaluationBatches(load_images(str(data / "imagenette_128" / "val-*.tar")), 64, 64)
    figures = evaluate(Codec(core.eval()), held_out, ReconstructionMetrics())
    curve = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return {
        "curve": [{name: record[name] for name in ("step", "psnr", DISTANCE)} for record in curve],
        "psnr": figures["psnr"],
        "ssim": figures["ssim"],
        DISTANCE: curve[-1][DISTANCE],
        "scales_psnr": figures["scales_psnr"],
        "images": figures["images"],
        "parameters": sum(p.numel() for p in core.parameters()),
    }


def recorded() -> dict[str, dict[str, Any]]:
    """The runs whose figures are in the results already."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}


def steps_to_reach(curve: list[dict[str, float]], distance: float) -> float | None:
    """The step at which a curve, straight between its points, comes down to a distance."""
    for before, after in pairwise(curve):
        if before[DISTANCE] > distance >= after[DISTANCE]:
            share = (before[DISTANCE] - distance) / (before[DISTANCE] - after[DISTANCE])
            return before["step"] + share * (after["step"] - before["step"])
    return None


def by_seed(runs: dict[str, dict[str, Any]], row: str) -> dict[int, dict[str, Any]]:
    """Choose the runs of a row, by their seeds, of all runs by their names, as `multi-0`."""
    named = ((*name.rsplit("-", 1), run) for name, run in runs.items())
    return {int(seed): run for name, seed, run in sorted(named, key=lambda x: int(x[1])) if name == row}


def pairs_with_twin(runs: dict[str, dict[str, Any]], row: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair each seed of a row with its twin's run of that seed; a twin itself has no pairs."""
    twin = ROWS[row][1]
    others = by_seed(runs, twin) if twin != row else {}
    return [(run, others[seed]) for seed, run in by_seed(runs, row).items() if seed in others]


def against_twin(runs: dict[str, dict[str, Any]], row: str) -> list[float]:
    """Give the percent by which each seed of a row has another Fréchet distance than its twin with that seed."""
    return [100 * (mine[DISTANCE] / other[DISTANCE] - 1) for mine, other in pairs_with_twin(runs, row)]


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The rows that have run, each seed's figures side by side, in Markdown."""
    head = f"| row | | parameters, M | PSNR, dB | coarse scales, dB | SSIM | {DISTANCE} | against its twin "
    rows = []
    for row, (text, _, _) in ROWS.items():
        if not (own := list(by_seed(runs, row).values())):
            continue
        steps = [steps_to_reach(mine["curve"], other[DISTANCE]) for mine, other in pairs_with_twin(runs, row)]
        cells = [
            f"`{row}`",
            text,
            f"{own[0]['parameters'] / 1e6:.2f}",
            ", ".join(f"{run['psnr']:.2f}" for run in own),
            " ".join(f"{value:.1f}" for value in own[0]["scales_psnr"][:-1]),
            ", ".join(f"{run['ssim']:.3f}" for run in own),
            ", ".join(f"{run[DISTANCE]:.0f}" for run in own),
            ", ".join(f"{change:+.1f} %" for change in against_twin(runs, row)),
            ", ".join("not" if step is None else f"{step:.0f}" for step in steps),
        ]
        rows.append(cells)
    return markdown_table(f"{head}| steps to the twin's last |", rows)


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Each row's distance against its twin, a dot a seed, beside the band of what seeds differ by."""
    found = {row: against_twin(runs, row) for row in ROWS}
    rows = [row for row, changes in found.items() if changes]
    # What chance does: by how many percent the seeds of one scale differ.
    first, second = (by_seed(runs, "single")[seed][DISTANCE] for seed in (0, 1))
    spread = 100 * abs(first / second - 1)
    with draw(path, figsize=(9, 1.2 + 0.3 * len(rows))) as (_, (axis,)):
        axis.axvspan(-spread, spread, color="0.9", label=f"seeds of one scale differ by {spread:.1f} %")
        axis.axvline(0, color="0.6", linewidth=0.8)
        for place, row in enumerate(rows):
            axis.plot(found[row], [place] * len(found[row]), "o", color="C0" if "learned" in row else "0.35")
        axis.set(yticks=range(len(rows)), xlabel=f"{DISTANCE} against the twin with one scale, % (left is better)")
        axis.set_yticklabels([f"{ROWS[row][0]}, against {ROWS[row][1]}" for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.legend(loc="upper right", fontsize=8)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    add("--output", type=Path, default=ROOT / "runs" / "compare_scales", help="folder for the runs")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table to train")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the trainings")
    add("--only_collect", action="store_true", help="train nothing; add what has finished to the results")
    add("--in_process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for seed in args.seeds:
        for row in args.rows:
            folder = args.output / f"{row}-{seed}"
            if args.in_process:
                train(row, seed, args.data, folder)
            elif not (args.only_collect or folder.name in recorded() or (folder / "config.json").exists()):
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, __file__, "--in_process", "--data", str(args.data)]
                command += ["--output", str(args.output), "--rows", row, "--seeds", str(seed)]
                with (folder / "log.txt").open("a") as log:
                    subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
            if not args.in_process and (folder / "config.json").exists() and not (folder / "final.json").exists():
                with write_whole(folder / "final.json") as file:
                    file.write(json.dumps(measure(row, folder, args.data), indent=1).encode())
    if args.only_collect:
        finished = {path.parent.name: json.loads(path.read_text()) for path in args.output.glob("*/final.json")}
        runs = dict(sorted((recorded() | finished).items()))
        report = {"machine": describe_benchmark(torch.device("cpu")), "runs": runs}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        plot(runs, PLOT)
        README.write_text(fill_section(README.read_text(), BEGIN, table(runs)))
        print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
