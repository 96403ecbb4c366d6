"""Train a DiT on the latents of a tokenizer by flow matching, for `HieraTokDiTPipeline`."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from .. import HieraTokDiTPipeline
from ..data.aspect_buckets import Buckets, buckets_of_sizes
from ..data.image_dataset import load_images
from ..data.latent_batches import iterate_cached, iterate_encoded
from ..data.latent_cache import LatentCache, encoder_facts
from ..data.local_images import read_class_names
from ..data.training_batches import BatchPlan
from ..models.autoencoder_adapter import load_codec
from ..shipped import resolve_model
from ..training.alignment import BlockAlignment
from ..training.flow_matching import VelocityTraining, dit_from_size, flow_draws
from ..training.report import TrainingReport
from ..training.sample_sheets import class_grid
from ..training.state import TrainingState, learning_rate_factor, options_of, state_to_resume
from ..utils.choices import DIT_SIZES
from .command_line import (
    begin_training,
    check_batch,
    check_memory,
    check_steps,
    load_or_explain,
    record_training,
    run_training,
)
from .main import parse
from .terminal import Problem, one_line


def find_transformer(name: str) -> DiTTransformer2DModel:
    """The transformer of a folder, of a name that ships, or of the Hub, also of a pipeline."""
    folder = resolve_model(name)
    try:
        return DiTTransformer2DModel.from_pretrained(folder, use_safetensors=True)
    except OSError:
        return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", use_safetensors=True)


def load_transformer(args: Namespace, shape: tuple[int, ...], num_classes: int) -> DiTTransformer2DModel:
    """The transformer to begin with, random or pretrained, for latents of that shape."""
    if args.transformer is None:
        sizes = {"in_channels": shape[0], "sample_size": shape[1], "num_classes": num_classes}
        size = args.size or "dit-s"
        try:
            layers, heads, width = ({**DIT_SIZES[size], **args.config}[name] for name in DIT_SIZES[size])
            check_memory("--config: a transformer of that size", 4 * layers * 10 * (heads * width) ** 2)
            return dit_from_size(size, **sizes, patch_size=args.patch_size, **args.config)
        except Problem:
            raise
        except Exception as error:  # diffusers and torch raise many types
            raise ValueError(f"--config and --patch_size make no transformer: {one_line(error)}") from error
    found = load_or_explain(find_transformer, "--transformer", args.transformer)
    config = found.config
    if (config.in_channels, config.sample_size, config.num_embeds_ada_norm) != (shape[0], shape[1], num_classes):
        raise ValueError(
            f"--transformer {args.transformer!r} is for latents of {config.in_channels} channels on a grid of side "
            f"{config.sample_size} and {config.num_embeds_ada_norm} classes, these are {shape[0]}, {shape[1]} and "
            f"{num_classes}."
        )
    return found.float()


def train(args: Namespace) -> None:
    options = options_of(vars(args))
    if args.data:
        check_batch("--image_size and --batch_size", -(-args.batch_size // args.accumulate), args.image_size)
    accelerator = begin_training(args)
    device, is_main = accelerator.device, accelerator.is_main_process
    process = (accelerator.num_processes, accelerator.process_index)

    codec = load_or_explain(load_codec, "--vae", args.vae, device)
    given_names = read_class_names(args.class_names)
    batches: Any
    if args.latents is not None:
        cache = LatentCache(args.latents)
        cache.check_encoder(codec)
        if not len(cache):
            raise ValueError(f"--latents {str(args.latents)!r} holds no images: none could be decoded.")
        options["latents"] = cache.fingerprint  # wherever they lie
        shape, names = cache.latent_shape, given_names or cache.class_names
        num_classes = len(names) or int(cache.labels.max()) + 1
        if int(cache.labels.min()) < 0:
            raise ValueError(f"--latents {str(args.latents)!r} holds images without labels.")
        if int(cache.labels.max()) >= num_classes:
            raise ValueError(f"The labels of --latents {str(args.latents)!r} must be from 0 to {num_classes - 1}.")
        if args.alignment_weight and not cache.has_features:
            told = "no features to align with: write it anew with `hieratok cache --vision_model`"
            raise ValueError(f"--latents {str(args.latents)!r} holds {told}.")
        batches = partial(iterate_cached, cache, with_features=bool(args.alignment_weight))
    else:
        images = load_images(args.data, split=args.split, streaming=args.streaming)
        options["data"] = images.fingerprint
        shape, names = codec.latent_shape(args.image_size), given_names or images.class_names
        if not (num_classes := len(names)):
            raise ValueError("--class_names is needed: the data does not name its classes.")
        given = {"crop_scale": tuple(args.crop_scale), "num_workers": args.num_workers}
        batches = partial(iterate_encoded, codec, shape, images, num_classes, **given)

    transformer = load_transformer(args, shape, num_classes)
    blocks = len(transformer.transformer_blocks)
    if (block := args.alignment_block or max(1, blocks // 2)) > blocks:
        raise ValueError(f"--alignment_block must be from 1 to {blocks}, the transformer's blocks, got {block}.")
    buckets: tuple[Buckets, ...] = ()
    if args.latents is not None:
        buckets = (cache.buckets,) if cache.buckets else ()
        patch = transformer.config.patch_size
        if wrong := [grid for _, *grid in cache.latent_shapes.values() if grid[0] % patch or grid[1] % patch]:
            sides = " x ".join(map(str, wrong[0]))
            raise ValueError(
                f"--latents {str(args.latents)!r}: a grid of {sides} is no multiple of --patch_size {patch}."
            )
    elif args.aspect_buckets:
        token = args.image_size // shape[1] * transformer.config.patch_size
        multiple = check_steps("--image_size", [args.image_size], token, args.bucket_step)
        buckets = buckets_of_sizes(images.read_sizes(), [args.image_size], multiple, args.aspect_buckets)
    sizes = (args.image_size,)
    plan = BatchPlan(args.batch_size, sizes, args.steps, args.seed, *process, args.accumulate, buckets)
    time_options = [args.time_mean, args.time_std, args.time_shift]
    facts = {**transformer.config, "encoder": encoder_facts(codec)["encoder"], "times": time_options}
    facts = {name: value for name, value in facts.items() if not name.startswith("_")}
    state = state_to_resume(args.output, args.resume, facts, options, args.allow_changes, accelerator.print)
    first_step = state["step"] if state else 0
    if state and bool(state.get("options", {}).get("alignment_weight")) != bool(args.alignment_weight):
        told = "cannot be switched on or off in a training that is begun: take another --output"
        raise ValueError(f"--alignment_weight {told}, and --transformer to begin with what was trained.")

    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    alignment = None
    if args.alignment_weight:
        alignment = BlockAlignment(transformer.inner_dim, cache.feature_statistics())
    model = VelocityTraining(transformer, alignment, args.alignment_weight, block).train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    training = TrainingState(transformer, [(model, optimizer)], args.ema, "transformer")
    if state:
        training.restore(state)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=args.time_shift)
    progress = state["report"] if state else None
    report = TrainingReport(accelerator, args.output, first_step, args.steps, args.log_every, progress)
    accelerator.init_trackers("dit", {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)})

    def averaged() -> HieraTokDiTPipeline:
        copy = training.load_average(DiTTransformer2DModel.from_config(transformer.config))
        return HieraTokDiTPipeline(codec.model, copy, scheduler, dict(enumerate(names)))

    def export(pipe: HieraTokDiTPipeline, folder: Path) -> None:
        # Its own `to` warns of parts to be kept in float32, of which there are none.
        torch.nn.Module.to(pipe.transformer, getattr(torch, args.export_dtype))
        pipe.save_pretrained(folder)
        source = (args.data, images) if args.data else ([args.latents], cache)
        record_training(folder, "train-dit", args, accelerator, report, *source)

    draws = partial(flow_draws, args.seed, mean=args.time_mean, std=args.time_std, shift=args.time_shift)
    for batch in batches(plan, first_step):
        step, last_part = batch["step"], batch["part"] + 1 == args.accumulate
        rate = args.lr * learning_rate_factor(step, args.steps, args.warmup_steps, args.decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        latents = batch["latents"].to(device)
        drawn = {"count": batch["count"], "rows": batch["rows"], "shape": latents.shape[1:]}
        noise, times, dropping = (x.to(device) for x in draws(step, **drawn))
        classes = torch.where(dropping < args.class_dropout, num_classes, batch["labels"].to(device))
        with accelerator.accumulate(model):
            losses = model(latents, noise, times, classes, *(x.to(device) for x in batch["features"]))
            accelerator.backward(losses["loss"])
            norm = accelerator.clip_grad_norm_(model.parameters(), args.clip) if last_part else None
            optimizer.step()
            optimizer.zero_grad()
        report.add(losses, batch["skipped"])
        if not last_part:
            continue
        training.average.step(transformer.parameters())
        report.end_step(step, norm, batch["count"], rate)
        done = step + 1
        if done % args.sample_every == 0 or done == args.steps:
            pipe = averaged()
            if is_main:
                pipe.transformer.to(device)
                report.sampled(done, class_grid(pipe, args.sample_steps, args.guidance_scale, args.seed))
            del pipe
        if args.export_every and done % args.export_every == 0:
            pipe = averaged()
            if is_main:
                export(pipe, args.output / f"pipeline-{done:09d}")
            del pipe
        if done % args.save_every == 0 or done == args.steps:
            report.check()
            more = {"config": facts, "options": options, "report": report.progress()}
            training.save(args.output, done, args.keep, is_main, **more)
    report.close()

    pipe = averaged()
    if is_main:
        export(pipe, args.output)
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    return run_training(train, parse("train-dit", argv), "hieratok generate --model {}")
