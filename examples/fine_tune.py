"""
Fine-tune a tokenizer with the whole loop in sight: read it, copy it, change it.

`hieratok train` gives the same losses with the same settings. It has more of them, and it resumes, validates, compiles
and shares a step among processes.
"""

import argparse

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessorPil
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.training_batches import BatchPlan, to_pixel_values, training_loader
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.models.core import posterior_of
from hieratok_hf.models.losses import tokenizer_losses
from hieratok_hf.training.pca_init import latent_statistics
from hieratok_hf.training.state import learning_rate_factor
from hieratok_hf.training.tokenizer_loss import step_noise


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="hieratok-tiny", help="a name that ships, a folder, or a Hub id")
    add("--data", nargs="+", default=["examples/clothing"], help="folders, tar shards, or data sets of the Hub")
    add("--output", default="outputs/fine_tuned", help="folder for the model")
    add("--steps", type=int, default=500, help="steps of the optimiser")
    add("--batch_size", type=int, default=16, help="images of a step")
    add("--crop_size", type=int, default=128, help="side of the crops in pixels")
    add("--lr", type=float, default=2e-4, help="largest learning rate")
    add("--warmup_steps", type=int, default=50, help="steps in which the learning rate rises")
    add("--ema", type=float, default=0.99, help="decay of the averaged weights, which are saved")
    add("--seed", type=int, default=0, help="seed of the order, the crops and the noise")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    args = parse_args(argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    core = AutoencoderHieraTok.from_pretrained(args.model).core.train()
    config = core.config

    # The linear path is at its best already, and moves slowly.
    slow = [p for name, p in core.named_parameters() if "linear_path" in name]
    fast = [p for name, p in core.named_parameters() if "linear_path" not in name]
    groups = [{"params": fast, "factor": 1.0}, {"params": slow, "factor": 0.1}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], args.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    model, optimizer = accelerator.prepare(core, optimizer)
    average = EMAModel(core.parameters(), decay=args.ema)

    images = load_images(args.data)
    plan = BatchPlan(args.batch_size, (args.crop_size,), args.steps, args.seed)
    history = []
    for batch in tqdm(training_loader(images, plan), total=args.steps, unit="step"):
        rate = args.lr * learning_rate_factor(batch["step"], args.steps, args.warmup_steps, decay=args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        pixel_values = to_pixel_values(batch).to(accelerator.device)  # (B, 3, S, S) in [-1, 1]
        noise, _ = step_noise(batch, config, args.seed)

        moments, _ = model.encode_moments(pixel_values)  # (B, 2C, h, w)
        posterior = posterior_of(moments)
        latents = posterior.mean + posterior.std * noise[0].to(accelerator.device)  # (B, C, h, w)
        decoded = model.decode_scales(latents)  # images coarse to fine, the last (B, 3, S, S)
        losses = tokenizer_losses(decoded, pixel_values, moments, config, kind="l1")

        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(core.parameters())
        history.append({name: loss.item() for name, loss in losses.items()})

    average.copy_to(core.parameters())
    # Latents of mean 0 and deviation 1 are what generators train on; the statistics go into the weights.
    first = training_loader(images, BatchPlan(args.batch_size, (args.crop_size,), 16, args.seed + 1))
    core.fold_latent_statistics(
        *latent_statistics(Codec(core), (to_pixel_values(batch).to(accelerator.device) for batch in first))
    )
    AutoencoderHieraTok.from_core(core.eval()).save_pretrained(args.output)
    HieraTokImageProcessorPil(size_divisor=config.patch_size).save_pretrained(args.output)
    print(
        f"loss {history[0]['loss']:.4f} at first, {history[-1]['loss']:.4f} at last; the model is in {args.output!r}"
    )
    return history


if __name__ == "__main__":
    main()
