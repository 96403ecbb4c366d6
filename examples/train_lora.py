"""
Teach a generator other classes by an adapter (LoRA): its weights stay, and the adapter is a small file beside them.

The images of folder 0 take the place of its class 0, and so on. The adapter is peft's `get_peft_model` around the DiT;
denoisers of diffusers that have `add_adapter` (SD3, Flux, Sana, UNets) take the same configuration by it.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tqdm import tqdm

from hieratok_hf import HieraTokDiTPipeline
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_batches import iterate_encoded
from hieratok_hf.data.training_batches import BatchPlan
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.training.flow_matching import VelocityTraining
from hieratok_hf.training.state import learning_rate_factor

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--generator", default="hieratok-dit-tiny", help="a name that ships, a folder, or a Hub id of a pipeline")
    add("--data", nargs="+", default=["examples/clothing"], help="folders, tar shards, or data sets of the Hub")
    add("--output", default="outputs/lora", help="folder for the adapter and its sheet, samples.png")
    add("--rank", type=int, default=16, help="rank of the adapter")
    add("--steps", type=int, default=600, help="steps of the optimiser")
    add("--batch_size", type=int, default=16, help="images of a step")
    add("--lr", type=float, default=2e-3, help="largest learning rate")
    add("--guidance_scale", type=float, default=3.0, help="guidance of the sheet")
    add("--seed", type=int, default=0, help="seed of the order, the crops and the noise")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipe = HieraTokDiTPipeline.from_pretrained(args.generator).to(accelerator.device)
    images = load_images(args.data)
    names = images.class_names
    if not names:
        raise SystemExit(f"--data must have a folder for each class, {args.data} has images without one")
    if len(names) > pipe.num_classes:
        raise SystemExit(f"--data has {len(names)} classes, --generator {args.generator!r} has {pipe.num_classes}")

    generator = torch.Generator()
    settings = {"num_inference_steps": 25, "guidance_scale": args.guidance_scale, "generator": generator}
    classes = list(range(len(names)))
    before = pipe(classes, **settings | {"generator": generator.manual_seed(args.seed)}).images

    pipe.transformer.requires_grad_(False)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS)
    adapted = get_peft_model(pipe.transformer, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    Path(args.output).mkdir(parents=True, exist_ok=True)  # or the training would be in vain
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    model, optimizer = accelerator.prepare(VelocityTraining(adapted), optimizer)

    codec = Codec(pipe.vae)
    image_size = pipe.transformer.config.sample_size * pipe.vae.spatial_compression_ratio
    plan = BatchPlan(args.batch_size, (image_size,), args.steps, args.seed)
    losses = []
    batches = iterate_encoded(codec, codec.latent_shape(image_size), images, len(names), plan, crop_scale=(0.8, 1.0))
    for batch in tqdm(batches, total=args.steps, unit="step"):
        clean = batch["latents"].to(accelerator.device)  # (B, C, h, w), about standard normal
        labels = batch["labels"].to(accelerator.device)  # (B,)
        noise = torch.randn_like(clean)
        times = torch.randn(len(clean), device=clean.device).sigmoid()  # (B,), 0 for clean
        dropped = torch.rand(len(clean), device=clean.device) < 0.1  # for guidance
        labels = labels.masked_fill(dropped, pipe.num_classes)

        loss = model(clean, noise, times, labels)["loss"]  # of the velocity, noise - clean, at the times between them

        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(batch["step"], args.steps, args.steps // 20, decay=args.steps)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    weights = get_peft_model_state_dict(adapted)
    HieraTokDiTPipeline.save_lora_weights(args.output, weights, transformer_lora_adapter_metadata=config.to_dict())

    # What a user of the adapter does: load the generator, load the adapter, name the classes anew.
    pipe = HieraTokDiTPipeline.from_pretrained(args.generator, id2label=dict(enumerate(names)))
    pipe.load_lora_weights(args.output, adapter_name="new")
    rows = [before]
    for strength in (0.5, 1.0):
        pipe.set_adapters("new", strength)
        rows.append(pipe(names, **settings | {"generator": generator.manual_seed(args.seed)}).images)
    grid = [image for row in rows for image in row]
    make_image_grid(grid, len(rows), len(names)).save(Path(args.output) / "samples.png")
    size = sum(x.numel() * x.element_size() for x in weights.values())
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-50:]) / len(losses[-50:]):.3f} at last")
    print(f"{args.output!r} holds an adapter of {size / 2**20:.1f} MiB: pipe.load_lora_weights({args.output!r})")
    return losses


if __name__ == "__main__":
    main()
