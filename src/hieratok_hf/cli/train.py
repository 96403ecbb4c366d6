"""Train a HieraTok tokenizer, from scratch or from weights that exist; alone, or under `accelerate launch`."""

import copy
import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import AutoencoderHieraTok, HieraTokConfig, HieraTokCore, HieraTokImageProcessorPil
from ..data.aspect_buckets import buckets_of_sizes
from ..data.image_dataset import Images, load_images
from ..data.training_batches import BatchPlan, to_pixel_values, training_loader
from ..evaluation.image_sets import FrechetDistance
from ..evaluation.perceptual import PerceptualDistance, load_lpips
from ..evaluation.reconstruction import EvaluationBatches, ReconstructionMetrics, evaluate
from ..evaluation.vision_features import VisionFeatures
from ..models.autoencoder_adapter import Codec, load_codec
from ..training.alignment import LatentAlignment
from ..training.discriminator import PatchDiscriminator, discriminator_hinge_loss
from ..training.pca_init import fit_linear_path, latent_statistics, start_from_principal_components
from ..training.report import TrainingReport
from ..training.sample_sheets import images_for_sheet, sample_grid
from ..training.state import TrainingState, learning_rate_factor, options_of, state_to_resume
from ..training.teacher import LatentTeacher, TaughtCodec, agreement, start_from_teacher, teacher_fields
from ..training.tokenizer_loss import LossWeights, TokenizerTraining, TrainingLoss, step_noise
from .arguments.training import needs_vision_model
from .command_line import (
    begin_training,
    check_batch,
    check_config,
    check_steps,
    load_or_explain,
    record_training,
    run_training,
)
from .main import parse
from .terminal import Problem, one_line


def load_core(args: Namespace, taught: dict[str, int]) -> HieraTokCore:
    """The tokenizer to begin with, random or pretrained, with the fields that a teacher asks for."""
    weights = {name: getattr(args, name) for name in ("kl_weight", "coarse_weight")}
    given = {name: value for name, value in weights.items() if value is not None}
    scales = {"scale_factors": tuple(args.scale_factors)} if args.scale_factors else {}
    if args.downsampling is not None:
        scales["downsampling"] = args.downsampling
    if args.model is None:
        fields = {**taught, **args.config, **given, **scales}
        try:
            config = HieraTokConfig.from_size(args.size or "hieratok-tiny", **fields)
        except Exception as error:  # huggingface_hub's own types for a value of another type
            raise ValueError(f"--config makes no model: {one_line(error)}") from error
        check_config("--config and --scale_factors", config)
        return HieraTokCore(config).init_weights()
    core = load_or_explain(AutoencoderHieraTok.from_pretrained, "--model", args.model).core.train()
    if scales:
        own = {name: getattr(core.config, name) for name in ("scale_factors", "downsampling")}
        config = HieraTokConfig(**{**core.config.model_fields, **scales})
        check_config("--scale_factors", config)
        core = core.with_scale_factors(**{**own, **scales})
    for name, value in given.items():
        setattr(core.config, name, value)
    return core


def load_teacher(name: str, size: int) -> tuple[Codec, dict[str, int]]:
    """The autoencoder, and the fields that images of `size` show it to ask for."""
    codec = load_codec(name, load_quantizer=False)
    return codec, teacher_fields(codec, size)


def load_held_out(args: Namespace) -> Images:
    """The images of `--validation_data`, of the split `validation` where it has one and no other is asked for."""
    split = args.validation_split or "validation"
    try:
        return load_images(args.validation_data, split=split)
    except ValueError:
        if args.validation_split:
            raise
    return load_images(args.validation_data)


def load_loss(name: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Import a function of a module in this folder or the environment, and see that it gives a scalar of images."""
    sys.path.insert(0, os.getcwd())
    module, _, function = name.partition(":")
    try:
        loss: Callable[[Tensor, Tensor], Tensor] = getattr(importlib.import_module(module), function)
    except (SystemExit, KeyboardInterrupt) as error:
        raise ValueError(f"its module ends with {error!r}") from error

    def checked(image: Tensor, target: Tensor) -> Tensor:
        try:
            found = loss(image, target.clone())  # which others look at too
        except (Exception, SystemExit) as error:
            raise Problem(
                f"--loss {name!r} failed on images of shape {tuple(image.shape)}: {one_line(error)}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim or not found.is_floating_point():
            kind = (
                f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            )
            raise Problem(f"--loss {name!r} must give a scalar tensor of real numbers, got {kind}")
        return found

    image = torch.zeros(2, 3, 64, 64, device=device, requires_grad=True)
    if not checked(image, torch.ones_like(image)).requires_grad:
        raise Problem(f"--loss {name!r} must give a tensor with a gradient of the image, got one without")
    return checked


def parameter_groups(model: TokenizerTraining, linear_factor: float) -> list[dict]:
    """The trained parameters, those of the linear path with a learning rate of their own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = {"params": [p for name, p in named if "linear_path" not in name], "factor": 1.0}
    slow = {"params": [p for name, p in named if "linear_path" in name], "factor": linear_factor}
    return [group for group in (fast, slow) if group["params"]]


def train(args: Namespace) -> None:
    options = options_of(vars(args))
    largest = max(args.crop_sizes)
    images_of_step = max(1, args.batch_size * args.crop_sizes[0] ** 2 // largest**2)
    check_batch("--crop_sizes and --batch_size", -(-images_of_step // args.accumulate), largest)
    weights = LossWeights(
        pixel=args.pixel_loss,
        border=args.border_weight,
        perceptual=args.perceptual_weight,
        lpips=args.lpips_weight,
        alignment=args.alignment_weight,
        adversarial=args.adversarial_weight,
        adversarial_start=args.adversarial_start,
        coarse_start=args.coarse_start,
    )
    # A graph for each of the few crop sizes: of one for all, torch 2.11's compiler fails on a GPU.
    accelerator = begin_training(args, dynamic=False)
    device, is_main = accelerator.device, accelerator.is_main_process
    world = {"world_size": accelerator.num_processes, "rank": accelerator.process_index}

    own: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {}
    for text in args.loss:
        name, _, weight = text.partition("=")
        own[name] = load_or_explain(load_loss, "--loss", name, device), float(weight)

    teacher: LatentTeacher | None = None
    taught: dict[str, int] = {}
    if args.teacher is not None:
        # The smallest crop says as much of it as the largest, which may be slow on a CPU.
        codec, taught = load_or_explain(load_teacher, "--teacher", args.teacher, min(args.crop_sizes))
        codec.model.to(device)
        teacher = LatentTeacher(codec, taught["latent_channels"])
        options["teacher"] = teacher.fingerprint  # wherever it lies
    core = load_core(args, taught)
    for name, value in taught.items():
        # Other channels than those of trained weights are what these are translated to.
        if (found := getattr(core.config, name)) != value and (args.model is None or name == "patch_size"):
            raise ValueError(f"`{name}` must be {value}, as --teacher has it, got {found}.")
    fields = {**core.config.model_fields, **taught}
    multiple = check_steps("--crop_sizes", args.crop_sizes, core.config.patch_size, args.bucket_step)
    # The plan says what each step sees, however many processes share it.
    images = load_images(args.data, split=args.split, streaming=args.streaming)
    batches = partial(training_loader, images, crop_scale=tuple(args.crop_scale), num_workers=args.num_workers)
    plan = partial(BatchPlan, args.batch_size, tuple(args.crop_sizes))
    if args.aspect_buckets:
        buckets = buckets_of_sizes(images.read_sizes(), args.crop_sizes, multiple, args.aspect_buckets)
        plan = partial(plan, buckets=buckets)
        if args.compile:  # as many graphs
            graphs = sum(map(len, buckets))
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * graphs)
    steps = plan(args.steps, seed=args.seed, parts=args.accumulate, **world)

    options["data"] = images.fingerprint  # wherever it lies
    given = (options, args.allow_changes, accelerator.print)
    state = state_to_resume(args.output, args.resume, fields, *given)

    def first_batches() -> Iterator[Tensor]:
        first = batches(plan(args.statistics_batches, seed=args.seed + 1))
        return map(to_pixel_values, first)

    if teacher is not None:
        if state is None:
            core = start_from_teacher(core, teacher, first_batches, pretrained=args.model is not None)
        elif core.config.latent_channels != fields["latent_channels"]:
            core = HieraTokCore(HieraTokConfig(**fields)).train()
    elif state is None and args.model is None and core.config.linear_path:
        start_from_principal_components(core, first_batches())
        fitting = batches(plan(args.linear_steps, seed=args.seed))
        fit_linear_path(core, map(to_pixel_values, fitting), args.linear_steps, args.lr)
    core.encoder.requires_grad_(not args.freeze_encoder)
    if args.gradient_checkpointing:
        AutoencoderHieraTok.from_core(core).enable_gradient_checkpointing()
    first_step = state["step"] if state else 0

    vision: Any = None
    if needs_vision_model(args):
        vision = load_or_explain(VisionFeatures.from_pretrained, "--vision_model", args.vision_model).to(device)
    alignment = LatentAlignment(core.config.latent_channels, vision) if args.alignment_weight else None
    model = TokenizerTraining(core, alignment, args.latent_noise, args.latent_jitter, teacher, args.teacher_images)
    groups = parameter_groups(model, args.linear_lr_factor)
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    discriminator = PatchDiscriminator() if args.adversarial_weight else None
    objective = TrainingLoss(
        weights,
        perceptual=PerceptualDistance(vision) if args.perceptual_weight else None,
        lpips=load_lpips().to(device) if args.lpips_weight else None,
        discriminator=discriminator,
        total=partial(accelerator.reduce, reduction="sum"),
        own=own,
    )
    trained = [(model, optimizer)]
    if discriminator is not None:
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), args.discriminator_lr, betas=(0.5, 0.9))
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        trained.append((discriminator, discriminator_optimizer))
    training = TrainingState(core, trained, args.ema)

    def averaged() -> HieraTokCore:
        return training.load_average(HieraTokCore(copy.deepcopy(core.config))).to(device)

    def export(folder: Path) -> None:
        student = averaged()
        if not is_main:
            return
        if teacher is not None:
            teacher.hand_over(student)
        elif not args.freeze_encoder:  # a generator of its latents must still fit the decoder
            student.fold_latent_statistics(*latent_statistics(Codec(student), first_batches()))
        AutoencoderHieraTok.from_core(student).save_pretrained(folder)
        HieraTokImageProcessorPil(size_divisor=student.config.patch_size).save_pretrained(folder)
        record_training(folder, "train", args, accelerator, report, args.data, images)

    if state:
        training.restore(state)
    save = partial(training.save, args.output, keep=args.keep, write=is_main)
    save = partial(save, config=fields, options=options)

    progress = state["report"] if state else None
    report = TrainingReport(accelerator, args.output, first_step, args.steps, args.log_every, progress)
    accelerator.init_trackers("tokenizer", {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)})
    if args.validation_data:
        held_out = load_held_out(args)
        if held_out.fingerprint == images.fingerprint:
            accelerator.print("note: --validation_data has the very images that --data has, so it shows nothing new")
        size = args.validation_size or core.config.sample_size
        check_batch("--validation_size", args.batch_size, size)
        if size % core.config.patch_size:
            raise ValueError(f"--validation_size must be a multiple of {core.config.patch_size}, got {size}.")
        validation = EvaluationBatches(held_out, size, args.batch_size)
        shown = images_for_sheet(held_out, size)
        frechet = None
        if args.validation_fid:
            frechet = FrechetDistance(vision, size=args.fid_size, same_targets=True, device=device)
        measured = ReconstructionMetrics(ssim=False, frechet=frechet, device=device)
    else:
        shown = images_for_sheet(images, largest)

    for batch in batches(steps, first_step=first_step):
        step, last_part = batch["step"], batch["part"] + 1 == args.accumulate
        for group in optimizer.param_groups:
            rate = args.lr * learning_rate_factor(step, args.steps, args.warmup_steps, args.decay_steps)
            group["lr"] = rate * group["factor"]
        pixel_values = to_pixel_values(batch).to(device, non_blocking=True)
        noise, mix = step_noise(batch, core.config, args.seed)
        with accelerator.accumulate(*(module for module, _ in trained)):
            outputs = model(pixel_values, noise.to(device), mix.to(device))
            losses = objective(core.config, outputs, step)
            accelerator.backward(losses["loss"])
            norm = accelerator.clip_grad_norm_(model.parameters(), args.clip) if last_part else None
            optimizer.step()
            optimizer.zero_grad()
            if discriminator is not None and objective.is_adversarial(step):
                scores = discriminator(torch.cat([outputs[-1], outputs[0][-1].detach()]))
                losses["discriminator"] = discriminator_hinge_loss(*scores.chunk(2))
                accelerator.backward(losses["discriminator"])
                discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()
        report.add(losses, batch["skipped"])
        if not last_part:
            continue
        training.average.step(core.parameters())
        height, width = pixel_values.shape[2:]
        report.end_step(step, norm, batch["count"], rate, (height, width))

        done = step + 1
        if args.validation_data and (done % args.validation_every == 0 or done == args.steps):
            student = averaged()
            codec = Codec(student) if teacher is None else TaughtCodec(student, teacher)
            figures = evaluate(codec, validation, measured)
            if teacher is not None:
                seen = (batch["pixel_values"].to(device) for batch in validation)
                figures["latents_r2"] = agreement(student, teacher, seen)
            report.validated(done, {"size": validation.size, **figures})
        if done % args.sample_every == 0 or done == args.steps:
            report.check()
            sample = averaged()
            if is_main:
                originals = shown.to(device)
                latents = None if teacher is None else teacher(originals)
                report.sampled(done, sample_grid(sample, originals, done, latents))
        if args.export_every and done % args.export_every == 0:
            report.check()
            export(args.output / f"model-{done:09d}")
        if done % args.save_every == 0 or done == args.steps:
            report.check()
            save(done, report=report.progress())
    report.close()

    export(args.output)
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    return run_training(train, parse("train", argv), "hieratok reconstruct photo.jpg --model {}")
