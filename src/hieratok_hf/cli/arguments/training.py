"""Name the arguments of the commands that train, and of the one that prepares latents for it."""

import math
from argparse import Namespace
from pathlib import Path

from ...utils.choices import (
    DEFAULT_VISION_MODEL,
    DIT_SIZES,
    DOWNSAMPLING,
    LATENT_DTYPES,
    LATENT_KINDS,
    PIXEL_LOSSES,
    SIZES,
)
from ..parsing import (
    DTYPES,
    Parser,
    add_buckets,
    add_data,
    add_device,
    add_training,
    json_object,
    own_loss,
    positive,
    real,
    seed,
    whole,
)
from .images import TOKENIZER

AUTOCAST = {"fp16": "float16", "bf16": "bfloat16"}


def add_train(parser: Parser) -> None:
    optim, report = add_training(parser, steps=10_000, lr=1e-3, ema=0.999, sample_every=1000)
    model = parser.add_argument_group("model").add_argument
    model("--model", help="weights to start from: a name that ships, a folder, or a Hub id")
    model("--size", choices=SIZES, help="a named size, from scratch; hieratok-tiny unless --model is given")
    model("--config", type=json_object, default={}, help="JSON of configuration values of --size")
    model("--scale_factors", type=positive, nargs="+", help="scales, as 8 4 2 1; the model's own unless given")
    model("--downsampling", choices=DOWNSAMPLING, help="way to coarser scales; the model's own unless given")
    model("--teacher", help="autoencoder whose latents to learn: a folder or Hub id, also of a pipeline")
    model("--teacher_images", action="store_true", help="learn to decode as the teacher does, also latents with noise")
    model("--freeze_encoder", "--decoder_only", action="store_true", help="train the decoder alone")
    model("--linear_steps", type=whole(0), default=600, help="steps of the linear path alone, from scratch")
    data = parser.add_argument_group("data").add_argument
    add_data(data, "training", required=True)
    data("--crop_sizes", type=positive, nargs="+", default=[128], help="sides of crops; a step draws one")
    add_buckets(parser, data, "--crop_sizes")
    parser.add_range(data, "--crop_scale", (0.5, 1.0), "range of crops, in shorter sides; 0 0: as is")
    data("--batch_size", type=positive, default=16, help="images of the first size a step, of all processes")
    data("--num_workers", type=whole(0, 1024), default=0, help="processes that read images")
    loss = parser.add_argument_group("losses (a weight of 0 switches one off)").add_argument
    loss("--pixel_loss", choices=PIXEL_LOSSES, default="l1", help="loss of the pixels")
    loss("--kl_weight", type=real(), help="weight of the KL loss; that of the configuration unless given")
    loss("--coarse_weight", type=real(), help="weight of the coarser scales; that of the configuration unless given")
    loss("--coarse_start", type=whole(0), default=0, help="step from which the coarser scales count")
    loss("--border_weight", type=real(), default=0.0, help="weight of the loss of seams between patches")
    loss("--perceptual_weight", type=real(), default=0.0, help="weight of the perceptual loss")
    loss("--lpips_weight", type=real(), default=0.0, help="weight of LPIPS; needs the package lpips")
    own = "loss of your own with its weight, mine:edges=0.5 for the function edges in mine.py; may be given again"
    loss("--loss", type=own_loss, action="append", default=[], metavar="MODULE:FUNCTION=WEIGHT", help=own)
    loss("--alignment_weight", type=real(), default=0.0, help="weight of the alignment with a vision model")
    loss("--adversarial_weight", type=real(), default=0.0, help="factor of the adaptive adversarial weight")
    loss("--adversarial_start", type=whole(0), default=0, help="step from which the discriminator counts")
    loss("--latent_noise", type=real(), default=0.0, help="largest std of noise mixed into the latents")
    loss("--latent_jitter", type=real(), default=0.0, help="largest std of noise added to the latents")
    loss("--vision_model", default=DEFAULT_VISION_MODEL, help="model of the perceptual loss and the alignment")
    optim("--linear_lr_factor", type=real(), default=0.1, help="factor of --lr for the linear path")
    optim("--discriminator_lr", type=real(), default=2e-4, help="learning rate of the discriminator")
    optim("--decay_steps", type=whole(0), help="steps of the cosine at the end; all unless given")
    statistics = "batches for the start and for the statistics of the latents"
    report("--statistics_batches", type=positive, default=64, help=statistics)
    report("--validation_data", nargs="+", help="images to measure on while training")
    report("--validation_split", help="split of --validation_data; validation where it has one, train elsewhere")
    report("--validation_size", type=positive, help="side of the middle squares; the model's own unless given")
    report("--validation_fid", action="store_true", help="measure a Fréchet distance over --vision_model too")
    report("--fid_size", type=positive, help="side that images get for the vision model; its own unless given")
    report("--validation_every", type=positive, default=1000, help="steps between measurements")
    validation = ("validation_every", "validation_fid", "validation_size", "validation_split")
    parser.needs(**dict.fromkeys(validation, "validation_data"), fid_size="validation_fid")
    parser.needs(teacher_images="teacher")
    parser.needs(adversarial_start="adversarial_weight", discriminator_lr="adversarial_weight")

    def check(args: Namespace) -> None:
        names = [text.partition("=")[0] for text in args.loss]
        if twice := [name for name in names if names.count(name) > 1]:
            parser.error(f"--loss must name each function once, got {twice[0]} {len(twice)} times")
        if args.model and (args.size or args.config or args.linear_steps != parser.get_default("linear_steps")):
            parser.error("--size, --config and --linear_steps are for a training from scratch, without --model")
        if args.vision_model != DEFAULT_VISION_MODEL and not needs_vision_model(args):
            parser.error("--vision_model needs --perceptual_weight, --alignment_weight or --validation_fid")
        if args.teacher and (args.kl_weight is not None or args.alignment_weight):
            parser.error("--kl_weight and --alignment_weight are for latents of its own, without --teacher")
        args.decay_steps = args.steps if args.decay_steps is None else args.decay_steps

    parser.checks.append(check)


def needs_vision_model(args: Namespace) -> bool:
    """Tell whether a training of a tokenizer looks at anything through `--vision_model`."""
    return bool(args.perceptual_weight or args.alignment_weight or args.validation_fid)


def add_train_dit(parser: Parser) -> None:
    optim, report = add_training(parser, steps=100_000, lr=2e-4, ema=0.9999, sample_every=5000)
    model = parser.add_argument_group("model").add_argument
    model("--vae", default="hieratok-tiny", help=TOKENIZER)
    size = "size of the transformer, from scratch; dit-s unless --transformer is given"
    model("--size", choices=DIT_SIZES, help=size)
    model("--config", type=json_object, default={}, help="JSON of configuration values of --size")
    model("--patch_size", type=positive, default=1, help="side of a token in cells of the latent")
    model("--transformer", help="weights to start from instead: a folder, Hub id or shipped name, also of a pipeline")
    data = parser.add_argument_group("data, encoded every time, or --latents instead").add_argument
    data("--latents", type=Path, help="a folder of `hieratok cache`")
    add_data(data, "training")
    data("--image_size", type=positive, default=256, help="side of the images in pixels, with --data")
    add_buckets(parser, data, "--image_size")
    parser.add_range(data, "--crop_scale", (1.0, 1.0), "range of crops, in shorter sides")
    names = "names of the classes, one for each, or a JSON file; those of the data unless given"
    data("--class_names", nargs="+", help=names)
    data("--batch_size", type=positive, default=64, help="images a step, of all processes")
    data("--num_workers", type=whole(0, 1024), default=0, help="processes that read images, with --data")
    flow = parser.add_argument_group("flow matching").add_argument
    flow("--class_dropout", type=real(below=1), default=0.1, help="share of labels left out, for guidance")
    flow("--time_mean", type=real(-math.inf), default=0.0, help="mean of the logit of the timesteps")
    flow("--time_std", type=real(), default=1.0, help="std of the logit of the timesteps")
    flow("--time_shift", type=real(above=0), default=1.0, help="shift of all timesteps; above 1 for more noise")
    aligned = "weight of the alignment with the vision model of `hieratok cache --vision_model`; 0 switches it off"
    flow("--alignment_weight", type=real(), default=0.0, help=aligned)
    flow("--alignment_block", type=positive, help="block whose output is aligned, counted from 1; the middle one")
    optim("--decay_steps", type=whole(0), default=0, help="steps of the cosine at the end")
    report("--sample_steps", type=positive, default=25, help="steps of the scheduler, for the samples")
    report("--guidance_scale", type=real(1), default=4.0, help="strength of the guidance of the samples")
    report("--export_dtype", choices=DTYPES, default="float32", help="dtype of the pipeline")
    encoded = ("split", "streaming", "image_size", "crop_scale", "num_workers", "aspect_buckets")
    parser.needs(**dict.fromkeys(encoded, "data"), alignment_block="alignment_weight")

    def check(args: Namespace) -> None:
        if (args.latents is None) == (args.data is None):
            parser.error("one of --latents and --data is needed")
        if args.alignment_weight and args.data:
            parser.error("--alignment_weight needs --latents, of `hieratok cache --vision_model`")
        if args.transformer and (args.size or args.config or args.patch_size != parser.get_default("patch_size")):
            parser.error("--size, --config and --patch_size are for a training from scratch, without --transformer")

    parser.checks.insert(0, check)


def add_cache(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="hieratok-tiny", help=TOKENIZER)
    add_data(add, "encoding", required=True)
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the shards go; one that is begun goes on")
    add("--max_images", type=positive, help="take only the first images of the data")
    add("--size", type=positive, help="side of the middle square; the model's own unless given")
    add_buckets(parser, add, "--size")
    kinds = "what is kept of a posterior: mean and log-variance, one sample, or the mode"
    add("--kind", choices=LATENT_KINDS, default="moments", help=kinds)
    add("--no_flips", action="store_true", help="leave the mirrored images out")
    add("--dtype", choices=LATENT_DTYPES, default="float16", help="dtype of what is stored")
    add("--shard_size", type=positive, default=1024, help="rows of a file")
    add("--batch_size", type=positive, default=32, help="images of a batch in each process")
    add("--threads", type=whole(1, 1024), default=4, help="images that each process decodes at a time")
    add("--seed", type=seed, default=0, help="seed of the samples")
    add("--mixed_precision", choices=("no", *AUTOCAST), default="no", help="encode under torch.autocast")
    vision = "vision model whose feature maps are kept too, for `train-dit --alignment_weight`: a folder or Hub id"
    add("--vision_model", help=vision)
    layers = "feature maps that are kept, counted from 0, or from the end by -1, -2 and so on"
    add("--vision_layers", type=int, nargs="+", default=[-1], help=layers)
    parser.needs(vision_layers="vision_model")
    add_device(parser)
