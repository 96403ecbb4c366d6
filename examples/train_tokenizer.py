"""Train a HieraTok tokenizer from pictures: tar shards in webdataset style, or folders of pictures."""

import argparse
import io
import json
import os
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokImageProcessorPil, convert_to_rgb
from hieratok_hf.losses import tokenizer_losses
from hieratok_hf.tokenizer import HieraTokCore, posterior_of

PICTURE_SUFFIXES = {".webp", ".png", ".jpg", ".jpeg", ".bmp"}


def read_pictures(sources: list[str]) -> list[bytes]:
    """The encoded pictures of tar shards and folders, in a fixed order."""
    encoded = []
    for source in map(Path, sources):
        if source.is_dir():
            paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
            encoded += [path.read_bytes() for path in paths]
        else:
            with tarfile.open(source) as shard:
                members = [member for member in shard if Path(member.name).suffix.lower() in PICTURE_SUFFIXES]
                encoded += [shard.extractfile(member).read() for member in members]
    if not encoded:
        raise SystemExit(f"No pictures found in --data {' '.join(sources)}.")
    return encoded


def random_crop(encoded: list[bytes], size: int, rng: random.Random) -> np.ndarray:
    """A random square of a random picture `(size, size, 3)`, mirrored half the time; four small ones fill a large."""
    picture = np.asarray(convert_to_rgb(Image.open(io.BytesIO(rng.choice(encoded)))))
    height, width = picture.shape[:2]
    if min(height, width) < size:
        half = [[random_crop(encoded, size // 2, rng) for _ in range(2)] for _ in range(2)]
        return np.concatenate([np.concatenate(row, axis=1) for row in half], axis=0)
    top, left = rng.randint(0, height - size), rng.randint(0, width - size)
    crop = picture[top : top + size, left : left + size]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def make_batch(encoded: list[bytes], args: argparse.Namespace, step: int) -> torch.Tensor:
    """The pictures `(B, 3, S, S)` in [-1, 1] of one step, a function of the seed and the step alone."""
    rng = random.Random(args.seed * 1_000_003 + step)
    size = rng.choice(args.crop_sizes)
    count = max(1, args.batch_size * args.crop_sizes[0] ** 2 // size**2)
    crops = np.stack([random_crop(encoded, size, rng) for _ in range(count)])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1


def losses_of(core: HieraTokCore, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of a batch, decoded from a sample of the posterior."""
    moments, _ = core.encode_moments(pixel_values)
    return tokenizer_losses(core.decode_scales(posterior_of(moments).sample()), pixel_values, moments, core.config)


@torch.no_grad()
def start_from_principal_components(core: HieraTokCore, encoded: list[bytes], args: argparse.Namespace) -> None:
    """Fit a principal component analysis to patches of training pictures and start the linear path there."""
    size = core.config.patch_size
    batches = [make_batch(encoded, args, -1 - i) for i in range(args.pca_batches)]
    unfolded = [F.unfold(batch, size, stride=size).transpose(1, 2).flatten(0, 1) for batch in batches]
    patches = torch.cat(unfolded).double()  # (n, 3 * p * p)
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((patches - mean).T))
    order = torch.arange(len(variances) - 1, len(variances) - 1 - core.config.latent_channels, -1)
    core.set_linear_path(directions.T[order].float(), mean.float(), variances[order].sqrt().float())


def fit_linear_path(core: HieraTokCore, encoded: list[bytes], args: argparse.Namespace) -> None:
    """Train the linear path alone: without the blocks a step is cheap, and they start from what it reaches."""
    blocks = core.encoder.blocks, core.decoder.blocks
    core.encoder.blocks, core.decoder.blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
    parameters = [p for name, p in core.named_parameters() if "linear_path" in name or name.endswith("head.bias")]
    optimizer = torch.optim.Adam(parameters, args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, args.linear_steps)
    for step in range(args.linear_steps):
        losses = losses_of(core, make_batch(encoded, args, step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % args.log_every == 0:
            print(json.dumps({"linear_step": step + 1, "mse": round(losses["mse"].item(), 6)}), flush=True)
    core.encoder.blocks, core.decoder.blocks = blocks
    core.zero_grad()


def make_optimizer(core: HieraTokCore, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, slower for the linear path, whose fit the noise of a full learning rate would undo."""
    fast = [p for name, p in core.named_parameters() if "linear_path" not in name]
    slow = [p for name, p in core.named_parameters() if "linear_path" in name]
    groups = [{"params": fast, "factor": 1.0}, {"params": slow, "factor": args.slow_factor}]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, a constant stretch, and a linear decay to zero over the last steps."""
    return args.lr * min(1.0, (step + 1) / args.warmup_steps, (args.steps - step) / max(1, args.decay_steps))


def save_state(path: Path, state: dict) -> None:
    """Write a training state whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def latent_statistics(core: HieraTokCore, encoded: list[bytes], args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Mean and standard deviation of each latent channel over training pictures."""
    batches = [make_batch(encoded, args, -1 - i) for i in range(args.pca_batches)]
    values = torch.cat([core.encode(batch).mode().transpose(0, 1).flatten(1) for batch in batches], dim=1)  # (C, n)
    return values.mean(1), values.std(1)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="tar shards and folders of pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder for the training state and the model")
    parser.add_argument("--size", default="hieratok-tiny", help="a named size")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON of configuration values, loss weights too")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--decay_steps", type=int, default=2_000)
    parser.add_argument("--batch_size", type=int, default=16, help="pictures of the first crop size a step")
    parser.add_argument(
        "--crop_sizes", type=int, nargs="+", default=[128], help="a step draws one; same pixels a step"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--linear_steps", type=int, default=1000, help="steps of the linear path alone at the start")
    parser.add_argument("--slow_factor", type=float, default=0.1, help="learning rate of the linear path, relative")
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the averaged weights, which are exported")
    parser.add_argument("--pca_batches", type=int, default=64, help="batches for the start and the latent statistics")
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--save_every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.output.mkdir(parents=True, exist_ok=True)
    state_path = args.output / "training_state.pt"
    encoded = read_pictures(args.data)
    torch.manual_seed(args.seed)

    core = HieraTokCore(HieraTokConfig.from_size(args.size, **args.config)).init_weights()
    if args.resume:
        state = torch.load(state_path, weights_only=True)
        core.load_state_dict(state["core"])
    elif core.config.linear_path:
        start_from_principal_components(core, encoded, args)
        fit_linear_path(core, encoded, args)
    average = torch.optim.swa_utils.AveragedModel(
        core, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    )
    core.to(device), average.to(device)
    optimizer = make_optimizer(core, args)
    first_step = 0
    if args.resume:
        first_step = state["step"]
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])

    start = time.perf_counter()
    for step in range(first_step, args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)
        losses = losses_of(core, make_batch(encoded, args, step).to(device))
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(core.parameters(), args.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["factor"]
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(core)
        if (step + 1) % args.log_every == 0:
            figures = {name: round(value.item(), 6) for name, value in {**losses, "norm": norm}.items()}
            figures["steps/s"] = round((step + 1 - first_step) / (time.perf_counter() - start), 3)
            print(json.dumps({"step": step + 1, **figures}), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"step": step + 1, "core": core.state_dict(), "average": average.state_dict()}
            save_state(state_path, {**state, "optimizer": optimizer.state_dict()})

    core = average.module.cpu()
    core.fold_latent_statistics(*latent_statistics(core, encoded, args))
    AutoencoderHieraTok.from_core(core).save_pretrained(args.output)
    HieraTokImageProcessorPil(size_divisor=core.config.patch_size).save_pretrained(args.output)


if __name__ == "__main__":
    main()
