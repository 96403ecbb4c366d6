"""Convert a checkpoint of a training into a folder that transformers and diffusers load, and back."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedConfig

from .. import (
    SIZES,
    AutoencoderHieraTok,
    HieraTokConfig,
    HieraTokCore,
    HieraTokImageProcessorPil,
    HieraTokModel,
)
from ..models.configuration_hieratok import DOWNSAMPLING, complete_saved
from ..models.saving import stage_folder
from ..utils.files import read_json, write_whole
from .command_line import check_config
from .key_map import KeyMapError, core_key_map
from .main import parse
from .raw_checkpoint import TRAINING_STATE, find_weights, read_checkpoint, without_wrappers
from .terminal import Problem, one_line, run_script

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def read_config(path: Path) -> dict[str, Any]:
    """Read the values of a config.json that describe the model; a `Problem` for one that the model does not know."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise Problem(f"{str(path)!r} cannot be read: {one_line(error)}") from error
    if values is None or values.get("model_type", "hieratok") != "hieratok":
        raise Problem(f"{str(path)!r} is not that of a HieraTok tokenizer")
    libraries = {*PreTrainedConfig().to_dict(), *HieraTokConfig().to_dict(), *HieraTokConfig().pipeline_facts}
    own = HieraTokConfig.__annotations__
    if unknown := sorted(key for key in values.keys() - libraries - own.keys() if not key.startswith("_")):
        raise Problem(f"{str(path)!r} has {unknown[0]!r}, which is no value of the configuration")
    return {key: value for key, value in complete_saved(values).items() if key in own}


def configuration(values: dict[str, Any], size: str = "hieratok-b") -> HieraTokConfig:
    """Make the configuration of a named size with other values; a `Problem` where they contradict each other."""
    try:
        config = HieraTokConfig.from_size(size, **values)
    except Exception as error:  # huggingface_hub's own types for a value of another type
        raise Problem(f"the configuration is wrong: {one_line(error)}") from error
    check_config("the configuration", config)
    return config


def check_output(args: Namespace) -> None:
    """Raise a `Problem` where something is in the way, before any work: no checkpoint beside it is overwritten."""
    if args.to_raw and not args.checkpoint.is_dir():
        raise Problem(f"--to_raw needs a folder of this package, got {str(args.checkpoint)!r}")
    if args.to_raw and args.output.suffix != ".safetensors":
        raise Problem(f"--to_raw writes a .safetensors, got {str(args.output)!r}")
    if args.output.exists() and (args.to_raw or not args.output.is_dir() or any(args.output.iterdir())):
        raise Problem(f"{str(args.output)!r} is there already, take a new {'file' if args.to_raw else 'folder'}")


def fit(args: Namespace, raw: dict[str, Tensor], values: dict[str, Any] | None) -> tuple[Any, Any, str]:
    """Find the configuration, the model's weights, and where the configuration comes from."""
    overrides = {**args.override, **({"scale_factors": tuple(args.scale_factors)} if args.scale_factors else {})}
    given = {**(values or {}), **overrides}
    sizes = [""] if values is not None else [args.size] if args.size else list(SIZES)
    misfits = []
    # What does not say how it makes coarse scales says it by the weights that it has.
    choices = [given["downsampling"]] if "downsampling" in given else DOWNSAMPLING
    for size, downsampling in itertools.product(sizes, choices):
        config = configuration({**given, "downsampling": downsampling}, size or "hieratok-b")
        try:
            weights = core_key_map().to_model(raw, shapes_of(config))
            told = "the training's own" if values is not None else f"{size}, the size that fits"
            return config, weights, str(args.size or args.config or told)
        except KeyMapError as error:
            misfits.append((error.count, size or "the configuration", error))
    _, nearest, misfit = min(misfits, key=lambda entry: entry[0])
    no_size = "fits no named size; give --config, or correct what is wrong for the nearest, "
    said = f"{'does not suit ' if len(sizes) == 1 else no_size}{nearest}"
    raise Problem(f"{str(args.checkpoint)!r} {said}:\n{misfit}")


def shapes_of(config: HieraTokConfig) -> dict[str, tuple[int, ...]]:
    """Give name and shape of every tensor of a model, without its memory."""
    with torch.device("meta"):
        return {f"core.{name}": tuple(x.shape) for name, x in HieraTokCore(config).state_dict().items()}


def core_of(config: HieraTokConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> HieraTokCore:
    """Make a core with these weights, named as those of the model."""
    with torch.device("meta"):
        core = HieraTokCore(config)
    own = {name.removeprefix("core."): x.to(dtype) for name, x in weights.items()}
    core.load_state_dict(own, assign=True)
    return core.eval().requires_grad_(False)


def figures(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor, int], Tensor], config: Any) -> list[Tensor]:
    """Compute the moments of an image of noise, and the images of every number of scales that can be decoded alone."""
    side, count = config.patch_size * config.scale_factors[0], len(config.scale_factors)
    generator = torch.Generator().manual_seed(0)
    # Twice as wide as high: rows and columns that changed places would show.
    moments = encode(torch.rand(1, config.in_channels, side, 2 * side, generator=generator) * 2 - 1)
    latents = moments[:, : config.latent_channels]
    return [moments, *(decode(latents, k) for k in range(1 if config.scale_causal else count, count + 1))]


def figures_of_core(config: HieraTokConfig, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """`figures` by `HieraTokCore` alone, in float32."""
    core = core_of(config, weights, torch.float32)
    made = figures(lambda x: core.encode_moments(x)[0], core.decode, config)
    if not all(x.isfinite().all() for x in made):
        raise Problem("the weights give moments or images that are not finite")
    return made


def check_folder(folder: Path, weights: Mapping[str, Tensor], expected: list[Tensor]) -> None:
    """Raise a `Problem` unless both libraries load these weights and make what the core makes, to the bit."""
    model = HieraTokModel.from_pretrained(folder, dtype=torch.float32)
    vae = AutoencoderHieraTok.from_pretrained(folder, torch_dtype=torch.float32)
    ways = (model, lambda x: model.encode(x).moments), (vae, lambda x: vae.encode(x).latent_dist.parameters)
    for loaded, encode in ways:
        # As the core's: PyTorch multiplies matrices that want gradients in another order.
        name, state = type(loaded).__name__, loaded.eval().requires_grad_(False).state_dict()
        if state.keys() != weights.keys() or any(not torch.equal(state[k], x.float()) for k, x in weights.items()):
            raise Problem(f"{name} loads other weights than were saved")

        def decode(latents: Tensor, count: int, loaded: Any = loaded) -> Tensor:
            return loaded.decode(latents, num_scales=count)[0]

        made = figures(encode, decode, model.config)
        for what, x, y in zip(["moments", *["image"] * len(made)], made, expected):
            if not torch.equal(x, y):
                off = float((x - y).abs().max())
                raise Problem(f"{name} gives another {what} than the weights alone, by up to {off:.3g}")


@torch.no_grad()
def to_folder(args: Namespace) -> list[str]:
    """Convert a checkpoint, check what was made, and return the lines to print."""
    tree = read_checkpoint(args.checkpoint)
    try:
        found, trail = find_weights(tree, args.ema)
        raw = without_wrappers(found)
    except Problem as problem:
        raise Problem(f"{str(args.checkpoint)!r}: {problem}") from problem
    values = read_config(args.config) if args.config else None
    if values is None and not args.size and isinstance(tree, Mapping) and tree.keys() >= TRAINING_STATE:
        values = tree.get("config")
        if values is not None and not isinstance(values, dict):
            raise Problem(f"{str(args.checkpoint)!r}: its configuration is a {type(values).__name__}, expected a dict")
    config, weights, origin = fit(args, raw, values)
    dtypes = {x.dtype for x in weights.values()}
    own = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = _DTYPES[args.dtype] if args.dtype else own if own in _DTYPES.values() else torch.float32
    rounded = {name: x.to(dtype) for name, x in weights.items()}
    if overflown := [name for name, x in rounded.items() if not x.isfinite().all()]:
        raise Problem(f"{overflown[0]!r} is beyond the range of {dtype}: take another --dtype")
    expected = figures_of_core(config, rounded)
    numbers, at = sum(x.numel() for x in weights.values()), f", under {'.'.join(trail)!r}" if trail else ""
    lines = [
        f"read {str(args.checkpoint)!r}: {len(raw)} tensors, {numbers / 1e6:.2f} M numbers{at}",
        f"configuration: {origin}; scale_factors {config.scale_factors}, {str(dtype).removeprefix('torch.')}",
    ]
    if any(not torch.equal(x.to(rounded[name].dtype).to(x.dtype), x) for name, x in weights.items()):
        exact = figures_of_core(config, weights)
        moments, *images = [float((x - y).abs().max()) for x, y in zip(expected, exact)]
        lines.append(f"rounding changes moments by up to {moments:.3g}, images by up to {max(images):.3g}")
    if args.dry_run:
        return [*lines, "everything fits; nothing was written"]
    with stage_folder(args.output) as stage:
        vae = AutoencoderHieraTok.from_core(core_of(config, rounded, dtype))
        vae.save_pretrained(stage, max_shard_size=args.shard_size)
        HieraTokImageProcessorPil(size_divisor=config.patch_size).save_pretrained(stage)
        check_folder(stage, rounded, expected)
    return [*lines, f"done: both libraries load {str(args.output)!r} and give what the weights give, to the bit"]


def to_raw(args: Namespace) -> list[str]:
    """Convert the way back, and return the lines to print."""
    state = read_checkpoint(args.checkpoint)
    config = configuration(read_config(args.checkpoint / "config.json"))
    try:
        raw = core_key_map(args.fused).to_raw(state)
        back = core_key_map().to_model(raw, shapes_of(config))
    except KeyMapError as misfit:
        raise Problem(f"{str(args.checkpoint)!r} does not suit its config.json:\n{misfit}") from misfit
    if any(not torch.equal(back[name], x) for name, x in state.items()):
        raise Problem("the names do not lead back to the same weights")
    if not args.dry_run:
        with write_whole(args.output) as file:
            file.write(save(raw))
    made = "everything fits; nothing was written" if args.dry_run else f"done: {str(args.output)!r}"
    return [f"read {str(args.checkpoint)!r}: {len(state)} tensors", f"{made}, {len(raw)} tensors"]


def run(args: Namespace) -> list[str]:
    """Convert one way or the other, and return the lines to print."""
    try:
        check_output(args)
        return (to_raw if args.to_raw else to_folder)(args)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:  # torch and safetensors on a full disk
        places = f"{str(args.checkpoint)!r} cannot be converted to {str(args.output)!r}"
        raise Problem(f"{places}: {one_line(error)}") from error


def main(argv: list[str] | None = None) -> int:
    args = parse("convert checkpoint", argv)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    return run_script(run, args)
