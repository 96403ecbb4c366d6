"""
Train a small PixArt on the latents of a tokenizer: from images with captions to images of a prompt.

A folder's `metadata.jsonl` gives a caption for each image, as diffusers' own scripts have it
(`{"file_name": "1.png", "text": "a red dress"}`); without one, its folder does. The captions are encoded once.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.training.state import learning_rate_factor


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--vae", default="hieratok-tiny-16x", help="a name that ships, a folder, or a Hub id")
    add("--text_encoder", default="google-t5/t5-small", help="a folder or a Hub id of a T5")
    add("--data", default="examples/clothing", help="a folder of images, or a data set of the Hub")
    add("--output", default="outputs/text", help="folder for the pipeline and its sheet, samples.png")
    add("--prompts", nargs="+", help="prompts of the sheet; the first ten captions unless given")
    add("--image_size", type=int, default=128, help="side of the images in pixels")
    add("--layers", type=int, default=4, help="blocks of the transformer")
    add("--heads", type=int, default=4, help="heads of 48 channels each")
    add("--tokens", type=int, default=16, help="most tokens of a caption")
    add("--steps", type=int, default=2000, help="steps of the optimiser")
    add("--batch_size", type=int, default=16, help="images of a step")
    add("--lr", type=float, default=1e-3, help="largest learning rate")
    add("--ema", type=float, default=0.995, help="decay of the averaged weights, which are saved")
    add("--guidance_scale", type=float, default=3.0, help="guidance of the sheet")
    add("--seed", type=int, default=0, help="seed of the order and the noise")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> list[float]:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    vae = AutoencoderHieraTok.from_pretrained(args.vae)
    text_encoder = T5EncoderModel.from_pretrained(args.text_encoder, use_safetensors=True)
    transformer = PixArtTransformer2DModel(
        num_layers=args.layers, num_attention_heads=args.heads, attention_head_dim=48, patch_size=1,
        cross_attention_dim=48 * args.heads, caption_channels=text_encoder.config.d_model,
        in_channels=vae.config.latent_channels, out_channels=vae.config.latent_channels,
        sample_size=args.image_size // vae.spatial_compression_ratio,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    tokenizer = AutoTokenizer.from_pretrained(args.text_encoder)
    pipe = PixArtSigmaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).to(accelerator.device)

    rows = load_dataset(args.data, split="train")
    if "text" in rows.column_names:
        captions = rows["text"]
    elif "label" in rows.column_names:
        captions = [f"a photo of a {rows.features['label'].int2str(label)}" for label in rows["label"]]
    else:
        raise SystemExit(f"--data must have a metadata.jsonl or a folder for each class, {args.data!r} has neither")
    known = ["", *dict.fromkeys(captions)]  # the empty caption is what guidance starts from
    encode = {"do_classifier_free_guidance": False, "max_sequence_length": args.tokens}
    embeddings, masks, *_ = pipe.encode_prompt(known, **encode)  # (K, L, D) and (K, L)
    caption_ids = torch.tensor([known.index(caption) for caption in captions]).repeat(2)
    crops = [pipe.image_processor.preprocess(x, args.image_size, args.image_size, "crop") for x in rows["image"]]
    pixel_values = torch.cat(crops).to(accelerator.device)  # (N, 3, H, W) in [-1, 1]
    views = torch.cat([pixel_values, pixel_values.flip(3)]).split(args.batch_size)
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in views])  # (2 N, C, h, w), about standard normal

    Path(args.output).mkdir(parents=True, exist_ok=True)  # or the training would be in vain
    optimizer = torch.optim.AdamW(transformer.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    average = EMAModel(transformer.parameters(), decay=args.ema)
    losses = []
    for step in tqdm(range(args.steps), unit="step"):
        drawn = torch.randint(len(latents), (args.batch_size,))
        clean, chosen = latents[drawn], caption_ids[drawn].masked_fill(torch.rand(args.batch_size) < 0.1, 0)
        noise = torch.randn_like(clean)
        times = torch.randn(len(clean), device=clean.device).sigmoid()  # (B,), 0 for clean
        noisy = torch.lerp(clean, noise, times[:, None, None, None])
        text = {"encoder_hidden_states": embeddings[chosen], "encoder_attention_mask": masks[chosen]}
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(step, args.steps, args.steps // 20, decay=args.steps)
        with torch.enable_grad():
            velocity = model(noisy, timestep=1000 * times, **text).sample
            loss = F.mse_loss(velocity, noise - clean)
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(transformer.parameters())
        losses.append(loss.item())

    average.copy_to(transformer.parameters())
    pipe.save_pretrained(args.output)
    prompts = args.prompts or known[1:11]
    call = {"max_sequence_length": args.tokens, "use_resolution_binning": False, "clean_caption": False}
    call |= {"guidance_scale": args.guidance_scale, "generator": torch.Generator().manual_seed(args.seed)}
    samples = pipe(prompts * 2, num_inference_steps=25, **call).images
    make_image_grid(samples, 2, len(prompts)).save(Path(args.output) / "samples.png")
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-50:]) / len(losses[-50:]):.3f} at last")
    print(f"PixArtSigmaPipeline.from_pretrained({args.output!r}), after `import hieratok_hf`, makes images of prompts")
    return losses


if __name__ == "__main__":
    main()
