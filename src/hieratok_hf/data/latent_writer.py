"""Encoding a data set into shards of latents, over one process or several, and going on after a kill."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..models.autoencoder_adapter import Codec
from ..models.core import posterior_of
from ..utils.choices import LATENT_DTYPES, LATENT_KINDS
from ..utils.distributed import gather, process_place
from ..utils.files import write_whole
from ..utils.images import from_uint8
from .aspect_buckets import Shape, buckets_of_sizes
from .image_dataset import Images, Row, decode_ahead
from .latent_cache import (
    FEATURE_DTYPE,
    FORMAT,
    SETTINGS_FILE,
    bucket_of,
    checksum,
    digest_of,
    encoder_facts,
    feature_names,
    identity,
    number_of,
    read_header,
    read_settings,
    read_tensor,
    rows_of,
    shard_path,
    shards_of,
    stored_kinds,
    stored_name,
)
from .manifests import Settings, settle, write_manifest

__all__ = ["write_latents"]

# Shape letters: B batch, N images of a shard, S side of a square image in pixels, C latent channels, h w its grid.


def write_latents(
    codec_or_vae: Codec | nn.Module,
    images: Images,
    folder: str | Path,
    *,
    size: int,
    kind: str = "moments",
    flips: bool = True,
    dtype: torch.dtype = torch.float16,
    shard_size: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    limit: int | None = None,
    max_aspect: float | None = None,
    multiple: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    threads: int = 4,
    vision: Any = None,
    vision_layers: Sequence[int] = (-1,),
) -> dict[str, Any]:
    """
    Encode a data set into `folder`, for `LatentCache`; called again after a kill, it goes on with the missing shards.

    Shard `k` holds the rows from `k * shard_size` on, as `moments` `(N, 2C, h, w)`, mean before log-variance, or
    `latents` `(N, C, h, w)`; `moments_flipped` or `latents_flipped`, those of the mirrored images; `labels` and
    `rows` `(N,)`, int64, -1 for no label; and a checksum of each. A damaged shard is written anew; a cache of images
    that have changed since is refused. Of several processes of torch.distributed each writes its own shards, and all
    must call this. The model runs in its own dtype, or in that of an autocast around the call.

    With `max_aspect`, images are brought to the nearest of the shapes of `aspect_buckets` instead of a square. Each
    shard then holds rows of one shape, in their order, the shards of a shape follow each other, and `cache.json` lists
    the shapes with the number of their rows and a checksum of these.

    With a vision model, a shard also holds its feature maps of each image, `features_L` and `features_L_flipped`
    `(N, D, h', w')`, float16, of each layer `L` at its own grid.

    Args:
        codec_or_vae (`Codec` or `torch.nn.Module`): The autoencoder, or what `Codec` takes.
        images (`Images`): The data; a stream is gone through by every process.
        folder (`str` or `Path`): The folder for shards and `cache.json`; made if it is not there.
        size (`int`): Side of the square that images are brought to by `centre_crop`.
        kind (`str`, defaults to `"moments"`): `"moments"`, or of each posterior one `"sample"` or the `"mode"`.
        flips (`bool`, defaults to `True`): Whether to encode the mirrored images too.
        dtype (`torch.dtype`, defaults to `torch.float16`): What is stored; also bfloat16 or float32.
        shard_size (`int`, defaults to 1024): Rows of a shard.
        batch_size (`int`, defaults to 32): Most images encoded at a time; no batch spans two shards.
        seed (`int`, defaults to 0): With its row decides the noise of a sample.
        limit (`int`, *optional*): Take only the first rows of the data.
        max_aspect (`float`, *optional*): Largest ratio of sides of the shapes; squares alone unless given.
        multiple (`int`, *optional*): What the sides of the shapes are multiples of; the pixels of a latent's cell
            unless given.
        progress (callable, *optional*): Called after each batch with how many rows this process has done in this
            call and how many it has to do, `None` in a stream.
        threads (`int`, defaults to 4): Decode this many images at a time, a batch or two ahead.
        vision (`VisionFeatures`, *optional*): A vision model whose feature maps are kept too; it sees the images as
            they are encoded.
        vision_layers (sequence of `int`, defaults to the last): Indices of the maps that `vision` gives; a negative
            one counts from the end.

    Returns:
        `rows`, `images` and `shards` of the whole cache; `skipped`, the reason for each row whose image cannot be
        decoded; of this call the images `encoded`, the shards `written` and the `seconds` they took.

    Raises:
        ValueError: An argument is out of its range, the model cannot take images of that size or has no posterior,
            the data has no rows, or with `max_aspect` is a stream, the latents are not finite in `dtype`, the feature
            maps not in float16, `vision` has no such layers, or `folder` holds something else.
        OSError: The folder cannot be written.
    """
    codec = codec_or_vae if isinstance(codec_or_vae, Codec) else Codec(codec_or_vae)
    counts = {"size": size, "shard_size": shard_size, "batch_size": batch_size, "limit": limit, "threads": threads}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    stored_dtype = str(dtype).removeprefix("torch.")
    for name, choice, choices in (("kind", kind, LATENT_KINDS), ("dtype", stored_dtype, tuple(LATENT_DTYPES))):
        if choice not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {choice!r}.")
    settings: dict[str, Any] = {
        "format": FORMAT, "kind": kind, "flips": flips, "dtype": stored_dtype, "size": size,
        "shard_size": shard_size, "seed": seed, "limit": limit, "source": images.source, "data": images.fingerprint,
        "rows": None if images.streaming else min(len(images), limit or len(images)),
        "classes": images.class_names,
        "latent_shape": list(codec.latent_shape(size)), **encoder_facts(codec),
    }  # fmt: skip
    shapes: list[Shape] = [(size, size)]
    groups: list[np.ndarray] = []
    if max_aspect is not None:
        unit = multiple or size // settings["latent_shape"][1]
        (buckets,) = buckets_of_sizes(images.read_sizes(limit), [size], unit, max_aspect)
        shapes, groups = list(buckets), list(buckets.values())
        settings["buckets"] = [
            {
                "shape": list(shape),
                "latent_shape": list(codec.latent_shape(shape)),
                "rows": len(rows),
                "checksum": checksum(torch.from_numpy(rows)),
            }
            for shape, rows in buckets.items()
        ]
    if vision is not None:
        settings["vision"] = _vision_facts(vision, vision_layers, size)
        for bucket, shape in [(settings, (size, size)), *zip(settings.get("buckets", []), shapes)]:
            maps = _see_blank(vision.feature_maps, vision, shape, settings["vision"]["layers"])
            bucket["feature_shapes"] = [list(x.shape[1:]) for x in maps]
    encode, folder, (rank, world) = _encoder(codec, vision, settings), Path(folder), process_place()
    # One process looks, so that none sees a folder half way.
    settings, problem = gather(_settle(folder, settings) if rank == 0 else ({}, ""))[0]
    if problem:
        raise ValueError(problem)
    started = time.perf_counter()
    is_missing, layout = _missing_shards(folder, settings, rank, world), _Layout(settings, groups)
    batches = chain.from_iterable(
        decode_ahead(_missing_rows(images, layout, is_missing, batch_size, index), shape, threads)
        for index, shape in enumerate(shapes)
    )
    todo = None
    if settings["rows"] is not None:
        todo = sum(len(rows_of(settings, shard)) for shard in filter(is_missing, shards_of(settings)))
    encoded, written = _write_shards(batches, encode, next(codec.model.parameters()), folder, layout, progress, todo)
    seconds = time.perf_counter() - started
    if not settings["rows"]:
        raise ValueError(f"No images found in {images.source}: it has no rows.")
    mine = [read_header(shard_path(folder, shard), settings) for shard in shards_of(settings)[rank::world]]
    headers, encoded_by, written_by, times = zip(*gather((mine, encoded, written, seconds)))
    # A stream gets its number of rows, which says that it has come to its end, once all shards are there.
    if rank == 0:
        write_manifest(folder / SETTINGS_FILE, settings)
    image_counts, skipped, _ = zip(*chain(*headers))
    return {
        "rows": settings["rows"],
        "images": sum(image_counts),
        "shards": len(image_counts),
        "skipped": dict(sorted(chain(*(rows.items() for rows in skipped)))),
        "encoded": sum(encoded_by),
        "written": sum(written_by),
        "seconds": max(times),
    }


@torch.inference_mode()
def _see_blank(function: Callable[..., Any], vision: Any, shape: Shape, *more: Any) -> Any:
    """Call a function of a vision model with a blank image; `ValueError` where it cannot take one of that shape."""
    try:
        return function(vision.mean.new_zeros(1, 3, *shape), *more)
    except (RuntimeError, ValueError) as error:
        what = f"{vision.name} cannot take images of {shape[0]} x {shape[1]} pixels"
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def _vision_facts(vision: Any, layers: Sequence[int], size: int) -> dict[str, Any]:
    """Tell what decides the feature maps; `ValueError` for layers that the model does not have."""
    count = len(_see_blank(vision, vision, (size, size))[1])
    if not layers or not all(-count <= layer < count for layer in layers):
        wanted = f"from {-count} to {count - 1}, or {vision.name} has none"
        raise ValueError(f"`vision_layers` must be {wanted}, got {list(layers)}.")
    positive = [layer % count for layer in layers]
    if len({*positive}) < len(positive):
        raise ValueError(f"`vision_layers` must differ from each other, got {list(layers)}.")
    weights = {**vision.state_dict(), "mean": vision.mean, "std": vision.std}
    return {"model": vision.name, "weights": digest_of(weights.items()), "layers": positive}


class _Layout:
    """
    Say which rows of the data lie in which shard of a cache.

    Args:
        settings (`dict`): The content of `cache.json`.
        groups (list of `np.ndarray`): The rows of each bucket, empty for a cache without.
    """

    def __init__(self, settings: Settings, groups: list[np.ndarray]):
        self.settings, self.groups = settings, groups
        self._shards = np.empty(sum(map(len, groups)), dtype=np.int64)
        for shard in shards_of(settings) if groups else ():
            self._shards[self.rows_of(shard)] = shard

    def rows_of(self, shard: int) -> Sequence[int] | np.ndarray:
        places = rows_of(self.settings, shard)
        return self.groups[bucket_of(self.settings, shard)[0]][places] if self.groups else places

    def shard_of(self, row: int) -> int:
        return int(self._shards[row]) if self.groups else row // self.settings["shard_size"]


def _settle(folder: Path, settings: Settings) -> tuple[Settings, str]:
    """Write `cache.json`, and give the settings to go on with, or the reason why the folder cannot be written."""
    path = folder / SETTINGS_FILE
    try:
        old = read_settings(folder) if path.exists() else None
        if old is not None and None in (old["rows"], settings["rows"]):  # of a stream known once it has ended
            old["rows"] = settings["rows"] = old["rows"] or settings["rows"]
        if old is not None and [] in (old["classes"], settings["classes"]):  # shards were written with those of then
            settings["classes"] = old["classes"]
        settle(path, "cache", old, settings)
        return settings, ""
    except ValueError as error:
        return {}, str(error)
    except OSError as error:
        return {}, f"{str(folder)!r} cannot be written: {' '.join(str(error).split())}"


def _write_shard(path: Path, batches: list[dict[str, Any]], settings: Settings) -> None:
    """Write the batches of a shard, with what the encoder gave of them by name and, with flips, as `*_flipped`."""
    rows = [row for batch in batches for row in batch["rows"]]
    labels = [-1 if label is None else label for batch in batches for label in batch["labels"]]
    tensors = {"labels": torch.tensor(labels, dtype=torch.int64), "rows": torch.tensor(rows, dtype=torch.int64)}
    # By row, so that neither batches nor processes nor what was left out change an image's noise.
    noise = [np.random.default_rng((settings["seed"], row)) for row in rows] if settings["kind"] == "sample" else []
    kinds = stored_kinds(settings, number_of(path))
    for suffix, (name, (shape, dtype)) in product(("", "_flipped")[: 1 + settings["flips"]], kinds.items()):
        parts = [batch["values"][name + suffix] for batch in batches if batch["rows"]]
        values = torch.cat(parts).float().cpu() if parts else torch.empty(0, *shape)
        is_latent = name == stored_name(settings)
        if noise and is_latent:
            posterior = posterior_of(values)
            drawn = [source.standard_normal(posterior.mean.shape[1:], np.float32) for source in noise]
            values = posterior.mean + posterior.std * torch.from_numpy(np.stack(drawn))
        values = values.to(getattr(torch, dtype)).contiguous()
        if not (finite := torch.isfinite(values).flatten(1).all(1)).all():
            what, advice = ("latents", "another `dtype`") if is_latent else (name, "other `vision_layers`")
            row = rows[int(finite.int().argmin())]
            raise ValueError(f"The {what} of row {row} are not finite in {dtype}; try {advice}.")
        tensors[name + suffix] = values
    skipped = {row: reason for batch in batches for row, _, reason in batch["skipped"]}
    with write_whole(path) as file:
        sums = {name: checksum(values) for name, values in tensors.items()}
        facts = {"skipped": skipped, "checksums": sums, "identity": identity(settings, path)}
        file.write(save(tensors, {"facts": json.dumps(facts)}))  # of several entries the order would be any


def _missing_shards(folder: Path, settings: Settings, rank: int, world: int) -> Callable[[int], bool]:
    """Make a function that tells of the number of a shard whether process `rank` of `world` has yet to write it."""

    @functools.cache
    def is_missing(shard: int) -> bool:
        if shard % world != rank:
            return False
        path = shard_path(folder, shard)
        try:
            checksums = read_header(path, settings).checksums
            for name in checksums:
                read_tensor(path, name, checksums)
        except ValueError:
            return True
        return False

    return is_missing


def _missing_rows(
    images: Images, layout: _Layout, is_missing: Callable[[int], bool], batch_size: int, bucket: int = 0
) -> Iterator[list[tuple[int, Row]]]:
    """
    Iterate over batches of the rows of a bucket's missing shards, none of two, and note how many rows a stream has.
    """
    settings = layout.settings
    known = settings["rows"]

    def numbered() -> Iterator[tuple[int, Row]]:
        if not images.streaming:
            for shard in filter(is_missing, shards_of(settings)):
                if bucket_of(settings, shard)[0] == bucket:
                    yield from ((int(row), images[row]) for row in layout.rows_of(shard))
        elif known is None or any(map(is_missing, shards_of(settings))):
            count = 0
            for row, entry in enumerate(islice(images, settings["limit"])):
                count = row + 1
                if is_missing(layout.shard_of(row)):
                    yield row, entry
            if known not in (None, count):
                raise ValueError(f"{images.source} must have {known} rows as before, got {count}.")
            settings["rows"] = count

    for _, entries in groupby(numbered(), lambda entry: layout.shard_of(entry[0])):
        while batch := list(islice(entries, batch_size)):
            yield batch


def _encoder(codec: Codec, vision: Any, settings: Settings) -> Callable[[Tensor], dict[str, Tensor]]:
    """Make the function from images in float32 to what is stored of them, by name."""
    encode, dtype = _latent_encoder(codec, settings), next(codec.model.parameters()).dtype
    names, layers = feature_names(settings), settings.get("vision", {}).get("layers", [])

    def encode_all(pixel_values: Tensor) -> dict[str, Tensor]:
        maps = vision.feature_maps(pixel_values, layers) if layers else []
        halves = {name: x.to(getattr(torch, FEATURE_DTYPE)) for name, x in zip(names, maps)}
        return {stored_name(settings): encode(pixel_values.to(dtype)), **halves}

    return encode_all


def _latent_encoder(codec: Codec, settings: Settings) -> Callable[[Tensor], Tensor]:
    """Choose the function from images to moments or to modes; `ValueError` for a model without the former."""
    core, model = codec.core, codec.model
    if settings["kind"] == "mode":
        return codec.encode
    if core is not None:
        return lambda pixel_values: core.encode_moments(pixel_values)[0]
    weight, side = next(model.parameters()), settings["size"]
    with torch.inference_mode():
        output = model.encode(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
    if not hasattr(getattr(output, "latent_dist", None), "parameters"):
        raise ValueError(f"{type(model).__name__} has no posterior: `kind` must be 'mode', got {settings['kind']!r}.")
    return lambda pixel_values: model.encode(pixel_values).latent_dist.parameters


def _write_shards(
    batches: Iterator[dict[str, Any]],
    encode: Callable[[Tensor], dict[str, Tensor]],
    weight: Tensor,
    folder: Path,
    layout: _Layout,
    progress: Callable[[int, int | None], None] | None,
    todo: int | None,
) -> tuple[int, int]:
    """Encode in this thread while others decode and write, and count the images encoded and the shards written."""

    def shard_of(batch: dict[str, Any]) -> int:
        return layout.shard_of(batch["rows"][0] if batch["rows"] else batch["skipped"][0][0])

    settings = layout.settings
    encoded = done = 0
    written: list[Future[None]] = []
    with ThreadPoolExecutor(1) as writer, torch.inference_mode():
        for shard, parts in groupby(batches, shard_of):
            whole = []
            for batch in parts:
                if batch["rows"]:
                    levels = batch.pop("levels")
                    levels = levels.pin_memory() if weight.is_cuda else levels  # copied without waiting
                    levels = levels.to(weight.device, non_blocking=True)
                    pixel_values = from_uint8(levels.permute(0, 3, 1, 2))
                    # Left on the device: the writer fetches a whole shard, and this thread waits for nothing.
                    batch["values"] = encode(pixel_values)
                    if settings["flips"]:
                        mirrored = encode(pixel_values.flip(-1))
                        batch["values"] |= {f"{name}_flipped": values for name, values in mirrored.items()}
                whole.append(batch)
                encoded, done = encoded + len(batch["rows"]), done + len(batch["rows"]) + len(batch["skipped"])
                if progress is not None:
                    progress(done, todo)
            if written:
                written[-1].result()
            written.append(writer.submit(_write_shard, shard_path(folder, shard), whole, settings))
    if written:
        written[-1].result()
    return encoded, len(written)
