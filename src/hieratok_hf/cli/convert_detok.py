"""Turn weights of l-DeTok (arXiv 2507.15856) into a folder of the single-scale twin, for both libraries."""

import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor

from .. import AutoencoderHieraTok, HieraTokConfig, HieraTokCore, HieraTokImageProcessorPil, HieraTokModel
from ..data.image_dataset import load_images
from ..evaluation.reconstruction import EvaluationBatches
from ..models.autoencoder_adapter import Codec
from ..models.saving import stage_folder
from ..training.pca_init import latent_statistics
from .command_line import find_device, load_or_explain
from .key_map import KeyMap, KeyMapError, Rule
from .main import parse
from .raw_checkpoint import find_weights, read_checkpoint, without_wrappers
from .terminal import Problem, one_line, run_script

# Shape letters: D width of a side, n side of the grid of patches, p patch size, C latent channels.

HEAD_DIM = 64
# How far rounding may take the folder's latents and images from the checkpoint's, as a share of them.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def to_grid(positions: Tensor) -> Tensor:
    """Reshape learned positions `(1, n * n, D)` to `(1, D, n, n)`."""
    side = math.isqrt(positions.shape[1])
    return positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def detok_key_map() -> KeyMap:
    """Map the names of l-DeTok's tensors to those of `HieraTokModel`."""
    linears = {
        "encoder.patch_embed.0": "encoder.patch_embed",
        "encoder.latent_head": "encoder.head",
        "decoder.decoder_embed": "decoder.embed",
        "decoder.conv_out": "decoder.output_conv",
    }
    norms: dict[str, str] = {}
    rules = []
    for side in ("encoder", "decoder"):
        raw, own = f"{side}.transformer.{{}}", f"{side}.blocks.{{}}"
        linears |= {f"{raw}.attn.proj": f"{own}.attn.to_out.0"}
        linears |= {f"{raw}.mlp.w12": f"{own}.mlp.linear_in", f"{raw}.mlp.w3": f"{own}.mlp.linear_out"}
        norms |= {f"{raw}.{norm}": f"{own}.{norm}" for norm in ("norm1", "norm2")}
        norms |= {f"{side}.ln_pre": f"{side}.norm_before", f"{side}.ln_post": f"{side}.norm_after"}
        grid = (f"core.{side}.positions.grid",)
        rules.append(Rule(f"{side}.positional_embedding", grid, to_grid, lambda x: x.flatten(2).transpose(1, 2)))
        for kind in ("weight", "bias"):
            parts = tuple(f"core.{own}.attn.to_{part}.{kind}" for part in "qkv")
            rules.append(Rule(f"{raw}.attn.qkv.{kind}", parts))
    # A 1x1 convolution; its channels are in the order (row, column, colour), as those of the head.
    head = ("core.decoder.head.weight",)
    rules.append(Rule("decoder.ffn.1.weight", head, lambda x: x.squeeze((2, 3)), lambda x: x[..., None, None]))
    rules.append(Rule("decoder.ffn.1.bias", ("core.decoder.head.bias",)))
    rules += [Rule(f"{raw}.weight", (f"core.{own}.weight",)) for raw, own in (linears | norms).items()]
    rules += [Rule(f"{raw}.bias", (f"core.{own}.bias",)) for raw, own in linears.items()]
    # The mask token stands for patches that the training hides.
    return KeyMap(rules, ignored=("decoder.mask_token",))


def fetch(checkpoint: str, revision: str | None) -> Path:
    """Find the local file of a checkpoint, from the Hub where there is no such file."""
    if (path := Path(checkpoint)).is_file():
        if revision is not None:
            raise ValueError("it is a file, which has no --revision")
        return path
    owner, _, rest = checkpoint.partition("/")
    name, _, file = rest.partition("/")
    if path.is_dir() or checkpoint.startswith((".", "/")) or not file:
        raise FileNotFoundError("it is neither a file nor owner/name/file on the Hub")
    return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))


def configuration(weights: Mapping[str, Tensor]) -> HieraTokConfig:
    """Read the twin's configuration off the shapes of l-DeTok's tensors; a `Problem` where one cannot be theirs."""

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in weights:
            raise Problem(f"these are no weights of l-DeTok: {key!r} is missing among {sorted(weights)[:4]} and so on")
        found = tuple(weights[key].shape)
        if len(found) != rank or 0 in found:
            raise Problem(f"{key!r} must have {rank} dimensions, none of them empty, got the shape {found}")
        return found

    encoder_width, colours, patch_size, _ = shape("encoder.patch_embed.0.weight", 4)
    moments, _ = shape("encoder.latent_head.weight", 2)
    decoder_width, channels = shape("decoder.decoder_embed.weight", 2)
    if moments != 2 * channels:
        raise Problem(f"'encoder.latent_head.weight' must have two rows for {channels} channels each, got {moments}")
    _, positions, _ = shape("encoder.positional_embedding", 3)
    side = math.isqrt(positions)
    if side**2 != positions:
        raise Problem(f"'encoder.positional_embedding' must hold a square of positions, got {positions}")
    sizes: dict[str, int] = {}
    for part, width in (("encoder", encoder_width), ("decoder", decoder_width)):
        if width % HEAD_DIM:
            raise Problem(f"the width of the {part} must be a multiple of {HEAD_DIM}, that of a head, got {width}")
        blocks = {key.split(".")[2] for key in weights if key.startswith(f"{part}.transformer.")}
        sizes |= {f"{part}_hidden_size": width, f"{part}_num_heads": width // HEAD_DIM}
        sizes[f"{part}_num_layers"] = len(blocks)
    try:
        return HieraTokConfig(
            **sizes,
            in_channels=colours,
            patch_size=patch_size,
            latent_channels=channels,
            sample_size=side * patch_size,
            learned_positions=side,
            scale_factors=(1,),
            norm_before_blocks=True,
            output_conv=True,
            rotary_coordinates="fraction",
            rotary_pairing="detok",
            rotary_scale=7 * 2 * math.pi,
            rotary_base=10000.0,
        )
    except ValueError as error:
        raise Problem(f"the sizes of these weights make no model: {one_line(error)}") from error


def convert(weights: Mapping[str, Tensor]) -> HieraTokModel:
    """
    Make the single-scale twin in float32 from l-DeTok's weights, in any floating dtype.

    Raises:
        Problem: A tensor is missing, left over, of another shape or not finite.
    """
    with torch.device("meta"):
        model = HieraTokModel(configuration(weights)).eval()
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    embedding = shapes.pop("core.decoder.scale_embedding")
    try:
        state = detok_key_map().to_model(weights, shapes)
    except KeyMapError as error:
        raise Problem(f"the checkpoint does not fit:\n{error}") from error
    state["core.decoder.scale_embedding"] = torch.zeros(embedding)  # l-DeTok has one scale and none of these
    model.to_empty(device="cpu").load_state_dict(state)
    return model


@torch.no_grad()
def fold(core: HieraTokCore, args: Namespace) -> tuple[Tensor, Tensor, list[str]]:
    """Normalise the latents over the images of `--data`: mean and deviation `(C,)`, and lines to print."""
    device = find_device(args)
    try:
        images = load_images(args.data, split=args.split)
        # Data sets are often in the order of their classes.
        images.dataset = images.dataset.shuffle(seed=0)
        batches = EvaluationBatches(images, core.config.sample_size, limit=args.max_images)
        core.to(device)
        mean, std = latent_statistics(Codec(core), (batch["pixel_values"].to(device) for batch in batches))
        core.cpu().fold_latent_statistics(mean, std)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise Problem(f"--data {args.data}: {one_line(error)}") from error
    count = min(args.max_images, len(images)) - len(batches.skipped)
    before = f"means from {mean.min():.3f} to {mean.max():.3f}, deviations from {std.min():.3f} to {std.max():.3f}"
    lines = [f"left out: {reason}" for reason in batches.skipped.values()]
    return mean, std, [*lines, f"latents of {count} images had {before}; that is folded into the weights"]


@torch.no_grad()
def compute(core: HieraTokCore, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean and log-variance `(B, C, n, n)` of the latents of images, and the images made of that mean."""
    mean, logvar = core.encode_moments(pixel_values)[0].chunk(2, dim=1)
    return mean, logvar, core.decode(mean)


def distance(folder: Path, pixel_values: Tensor, expected: tuple[Tensor, ...]) -> float:
    """Measure how far, as a share, what both classes compute with a folder is from what is expected, at most."""
    distances = []
    for loader in (HieraTokModel, AutoencoderHieraTok):
        core = load_or_explain(loader.from_pretrained, "the folder just written", str(folder)).core
        found = compute(core, pixel_values.to(core.decoder.head.weight.dtype))
        distances += [(x.float() - y).norm() / y.norm() for x, y in zip(found, expected)]
    return torch.stack(distances).max().item()  # NaN where one is


def save(model: HieraTokModel, args: Namespace, pixel_values: Tensor, expected: tuple[Tensor, ...]) -> float:
    """Write the folder, whole or not at all, and give its distance from the checkpoint."""
    try:
        with stage_folder(args.output) as stage:
            model.to(getattr(torch, args.dtype)).save_pretrained(stage)
            HieraTokImageProcessorPil(size_divisor=model.config.patch_size).save_pretrained(stage)
            found = distance(stage, pixel_values, expected)
            if not found <= TOLERANCES[args.dtype]:
                advice = "" if args.dtype == "float32" else "; try --dtype float32"
                raise Problem(f"{args.dtype} differs from the checkpoint by {found:.2g} of its values{advice}")
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:  # torch and safetensors on a full disk
        raise Problem(f"OUTPUT {str(args.output)!r} cannot be written: {one_line(error)}") from error
    return found


def run(args: Namespace) -> list[str]:
    """Convert, check, write, and return the lines to print."""
    path = load_or_explain(fetch, "--weights", args.weights, args.revision)
    tree = read_checkpoint(path)
    try:
        model = convert(without_wrappers(find_weights(tree, args.ema)[0]))
    except Problem as problem:
        raise Problem(f"{str(path)!r}: {problem}") from problem
    config, core = model.config, model.core
    lines = [
        f"l-DeTok of {sum(x.numel() for x in core.parameters()) / 1e6:.1f} M parameters: encoder "
        f"{config.encoder_num_layers} x {config.encoder_hidden_size}, decoder {config.decoder_num_layers} x "
        f"{config.decoder_hidden_size}, patch {config.patch_size}, {config.latent_channels} channels, images of "
        f"{config.sample_size} x {config.sample_size} pixels"
    ]
    if args.dry_run:
        return [*lines, "every tensor has its place; nothing was written"]
    size = config.sample_size
    pixel_values = torch.rand(1, config.in_channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar, images = compute(core, pixel_values)
    if args.data:
        shift, scale, more = fold(core, args)
        shift, scale = shift[:, None, None], scale[:, None, None]
        mean, logvar = (mean - shift) / scale, logvar - 2 * scale.log()
        lines += more
    else:
        lines.append("the latents are left as they are; --data brings them to mean 0 and deviation 1")
    found = save(model, args, pixel_values, (mean, logvar, images))
    return [
        *lines,
        f"{str(args.output)!r} in {args.dtype} agrees with the checkpoint within {found:.1e} of its values",
    ]


def main(argv: list[str] | None = None) -> int:
    return run_script(run, parse("convert detok", argv))
