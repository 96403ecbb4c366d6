"""
Train a DiT on the latents of a tokenizer: from a folder of images, one folder a class, to images of these classes.

The whole loop is in sight: read it, copy it, change it. `hieratok train-dit` does the same, and resumes, caches the
latents, writes sheets on the way and shares a step among processes.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm import tqdm

from hieratok_hf import HieraTokDiTPipeline
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_batches import iterate_encoded
from hieratok_hf.data.training_batches import BatchPlan
from hieratok_hf.models.autoencoder_adapter import load_codec
from hieratok_hf.training.flow_matching import VelocityTraining, dit_from_size
from hieratok_hf.training.state import learning_rate_factor


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--vae", default="hieratok-tiny-16x", help="a name that ships, a folder, or a Hub id")
    add("--data", nargs="+", default=["examples/clothing"], help="folders, tar shards, or data sets of the Hub")
    add("--output", default="outputs/class_dit", help="folder for the pipeline and its sheet, samples.png")
    add("--image_size", type=int, default=128, help="side of the images in pixels")
    add("--layers", type=int, default=4, help="blocks of the DiT")
    add("--heads", type=int, default=4, help="heads of 48 channels each")
    add("--steps", type=int, default=2000, help="steps of the optimiser")
    add("--batch_size", type=int, default=16, help="images of a step")
    add("--lr", type=float, default=1e-3, help="largest learning rate")
    add("--ema", type=float, default=0.995, help="decay of the averaged weights, which are saved")
    add("--guidance_scale", type=float, default=3.0, help="guidance of the sheet")
    add("--seed", type=int, default=0, help="seed of the order, the crops and the noise")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    codec = load_codec(args.vae, accelerator.device)
    images = load_images(args.data)
    names = images.class_names
    if not names:
        raise SystemExit(f"--data must have a folder for each class, {args.data} has images without one")
    latent_shape = codec.latent_shape(args.image_size)

    sizes = {"num_layers": args.layers, "num_attention_heads": args.heads, "attention_head_dim": 48}
    channels, side, _ = latent_shape
    transformer = dit_from_size("dit-tiny", in_channels=channels, sample_size=side, num_classes=len(names), **sizes)
    Path(args.output).mkdir(parents=True, exist_ok=True)  # or the training would be in vain
    optimizer = torch.optim.AdamW(transformer.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    model, optimizer = accelerator.prepare(VelocityTraining(transformer).train(), optimizer)
    average = EMAModel(transformer.parameters(), decay=args.ema)

    plan = BatchPlan(args.batch_size, (args.image_size,), args.steps, args.seed)
    losses = []
    batches = iterate_encoded(codec, latent_shape, images, len(names), plan, crop_scale=(1.0, 1.0))
    for batch in tqdm(batches, total=args.steps, unit="step"):
        clean = batch["latents"].to(accelerator.device)  # (B, C, h, w), about standard normal
        labels = batch["labels"].to(accelerator.device)  # (B,)
        noise = torch.randn_like(clean)
        times = torch.randn(len(clean), device=clean.device).sigmoid()  # (B,), 0 for clean
        # The label after the last is that of no class, which guidance needs.
        dropped = torch.rand(len(clean), device=clean.device) < 0.1
        labels = labels.masked_fill(dropped, len(names))

        loss = model(clean, noise, times, labels)["loss"]  # of the velocity, noise - clean, at the times between them

        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(batch["step"], args.steps, args.steps // 20, decay=args.steps)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(transformer.parameters())
        losses.append(loss.item())

    average.copy_to(transformer.parameters())
    pipe = HieraTokDiTPipeline(codec.model, transformer, FlowMatchEulerDiscreteScheduler(), dict(enumerate(names)))
    pipe.save_pretrained(args.output)
    generator = torch.Generator().manual_seed(args.seed)
    samples = pipe(list(range(len(names))) * 2, 25, args.guidance_scale, generator=generator).images
    make_image_grid(samples, 2, len(names)).save(Path(args.output) / "samples.png")
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-50:]) / len(losses[-50:]):.3f} at last")
    print(f'HieraTokDiTPipeline.from_pretrained({args.output!r})("{names[0]}").images makes more like samples.png')
    return losses


if __name__ == "__main__":
    main()
