"""Encoding a data set into shards of latents, over one process or several, and going on after a kill."""

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.autoencoder_adapter import Codec
from ..utils.distributed import gather, process_place
from ..utils.images import from_uint8
from .image_dataset import Images
from .latent_shards import (
    DTYPES,
    FORMAT,
    KINDS,
    ShardBatches,
    read_header,
    settle,
    shard_path,
    shards_of,
    write_settings,
    write_shard,
)

__all__ = ["encoder_facts", "write_latents"]

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
    progress: Callable[[int, int | None], None] | None = None,
    threads: int = 4,
) -> dict[str, Any]:
    """
    Encode a data set into `folder`, for `LatentCache`; called again after a kill, it goes on with the missing shards.

    Shard `k` holds the rows from `k * shard_size` on, as `moments` `(N, 2C, h, w)`, mean before log-variance, or
    `latents` `(N, C, h, w)`; `moments_flipped` or `latents_flipped`, those of the mirrored images; `labels` and
    `rows` `(N,)`, int64, -1 for no label. Of several processes of torch.distributed each writes its own shards, and
    all must call this. The model runs in its own dtype, or in that of an autocast around the call.

    Args:
        codec_or_vae (`Codec` or `torch.nn.Module`): The autoencoder, or what `Codec` takes.
        images (`Images`): The data; a stream is gone through by every process.
        folder (`str` or `Path`): Where shards and `cache.json` go; made if it is not there.
        size (`int`): Side `S` that images are brought to by `centre_square`.
        kind (`str`, defaults to `"moments"`): `"moments"`, or of each posterior one `"sample"` or the `"mode"`.
        flips (`bool`, defaults to `True`): Whether to encode the mirrored images too.
        dtype (`torch.dtype`, defaults to `torch.float16`): What is stored; also bfloat16 or float32.
        shard_size (`int`, defaults to 1024): Rows of a shard.
        batch_size (`int`, defaults to 32): Most images encoded at a time; no batch spans two shards.
        seed (`int`, defaults to 0): With its row decides the noise of a sample.
        limit (`int`, *optional*): Take only the first rows of the data.
        progress (callable, *optional*): Told after each batch how many rows this process has done in this call, and
            how many it has to do, `None` in a stream.
        threads (`int`, defaults to 4): Decode this many images at a time, a batch or two ahead.

    Returns:
        `rows`, `images` and `shards` of the whole cache; `skipped`, the reason for each row whose image cannot be
        decoded; of this call the images `encoded`, the shards `written` and the `seconds` they took.

    Raises:
        ValueError: An argument is out of its range, the model cannot take images of that size or has no posterior,
            the data has no rows, the latents are not finite in `dtype`, or `folder` holds something else: another
            cache, or shards without their `cache.json`.
        OSError: The folder cannot be written.
    """
    codec = codec_or_vae if isinstance(codec_or_vae, Codec) else Codec(codec_or_vae)
    counts = {"size": size, "shard_size": shard_size, "batch_size": batch_size, "limit": limit, "threads": threads}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}.")
    stored_dtype = str(dtype).removeprefix("torch.")
    for name, choice, choices in (("kind", kind, KINDS), ("dtype", stored_dtype, tuple(DTYPES))):
        if choice not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {choice!r}.")
    settings: dict[str, Any] = {
        "format": FORMAT, "kind": kind, "flips": flips, "dtype": stored_dtype, "size": size,
        "shard_size": shard_size, "seed": seed, "limit": limit, "source": images.source,
        "rows": None if images.streaming else min(len(images), limit or len(images)),
        "classes": images.class_names,
        "latent_shape": list(codec.latent_shape(size)), **encoder_facts(codec),
    }  # fmt: skip
    encode, folder, (rank, world) = _encoder(codec, settings), Path(folder), process_place()
    # One process looks, so that none sees a folder half way.
    settings, problem = gather(settle(folder, settings) if rank == 0 else ({}, ""))[0]
    if problem:
        raise ValueError(problem)
    started = time.perf_counter()
    weight = next(codec.model.parameters())
    pin = weight.device.type == "cuda"
    options = {"batch_size": batch_size, "threads": threads, "rank": rank, "world": world}
    batches = ShardBatches(images, folder, settings, **options, pin=pin)
    encoded, written = _write_shards(batches, encode, weight, progress)
    seconds = time.perf_counter() - started
    if not batches.rows:
        raise ValueError(f"No images found in {images.source}: it has no rows.")
    settings["rows"] = batches.rows
    mine = [read_header(shard_path(folder, shard), settings) for shard in shards_of(settings)[rank::world]]
    told = gather((mine, encoded, written, seconds))
    # A stream gets its number of rows, which says that it has come to its end, once all shards are there.
    if rank == 0:
        write_settings(folder, settings)
    headers = [header for part in told for header in part[0]]
    return {
        "rows": settings["rows"],
        "images": sum(count for count, _ in headers),
        "shards": len(headers),
        "skipped": dict(sorted(entry for _, skipped in headers for entry in skipped.items())),
        "encoded": sum(part[1] for part in told),
        "written": sum(part[2] for part in told),
        "seconds": max(part[3] for part in told),
    }


def encoder_facts(codec: Codec) -> dict[str, Any]:
    """
    What of a model decides its latents, and what pipelines do to them.

    Returns:
        `encoder`, a SHA-256 of all its weights but the decoder's; `precision`, the dtype that it runs in; its
        `scaling_factor` and `shift_factor`.
    """
    digest, weight = hashlib.sha256(), next(codec.model.parameters())
    for name, value in sorted((codec.core or codec.model).state_dict().items()):
        if name.partition(".")[0] not in ("decoder", "post_quant_conv"):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    kind = weight.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return {
        "encoder": digest.hexdigest(),
        "precision": str(precision).removeprefix("torch."),
        **codec.statistics,
    }


def _encoder(codec: Codec, settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """From images to moments, or to modes."""
    core, model = codec.core, codec.model
    if settings["kind"] == "mode":
        return codec.encode
    if core is not None:
        return lambda pixel_values: core.encode_moments(pixel_values)[0]

    def moments(pixel_values: Tensor) -> Tensor:
        posterior = getattr(model.encode(pixel_values), "latent_dist", None)
        if not hasattr(posterior, "parameters"):
            name = type(model).__name__
            raise ValueError(f"{name} has no posterior: `kind` must be 'mode', got {settings['kind']!r}.")
        return posterior.parameters

    weight, side = next(model.parameters()), settings["size"]
    with torch.inference_mode():
        moments(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))  # refused before any work
    return moments


def _write_shards(
    batches: ShardBatches,
    encode: Callable[[Tensor], Tensor],
    weight: Tensor,
    progress: Callable[[int, int | None], None] | None,
) -> tuple[int, int]:
    """Encode in this thread while others decode and write; gives the images encoded and the shards written."""
    encoded = done = written = 0
    pending: Future | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, torch.inference_mode():
        for shard, parts in groupby(_ahead(iter(batches), reader), lambda batch: batch["shard"]):
            whole = []
            for batch in parts:
                if pending is not None and pending.done():
                    pending.result()
                if batch["rows"]:
                    levels = batch.pop("levels").to(weight.device, non_blocking=True)
                    pixel_values = from_uint8(levels.permute(0, 3, 1, 2)).to(weight.dtype)
                    # Left on the device: the writer fetches a whole shard, and this thread waits for nothing.
                    batch["plain"] = encode(pixel_values)
                    if batches.settings["flips"]:
                        batch["flipped"] = encode(pixel_values.flip(-1))
                whole.append(batch)
                encoded, done = encoded + len(batch["rows"]), done + len(batch["rows"]) + len(batch["skipped"])
                if progress is not None:
                    progress(done, batches.todo)
            if pending is not None:
                pending.result()
            pending = writer.submit(write_shard, shard_path(batches.folder, shard), whole, batches.settings)
            written += 1
        if pending is not None:
            pending.result()
    return encoded, written


def _ahead(items: Iterator[Any], pool: ThreadPoolExecutor) -> Iterator[Any]:
    """The same items, the next one being made in a thread."""
    future = pool.submit(next, items, None)
    while (item := future.result()) is not None:
        future = pool.submit(next, items, None)
        yield item
