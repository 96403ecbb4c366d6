"""The files of a cache of latents: `cache.json`, which says what they hold, and the shards, each written at once."""

import functools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..models.core import posterior_of
from ..utils.files import write_whole
from ..utils.images import ImageError, centre_square
from .image_dataset import Images, Row, image_of

__all__ = [
    "DTYPES",
    "FORMAT",
    "KINDS",
    "ShardBatches",
    "read_header",
    "read_settings",
    "settle",
    "shard_path",
    "shards_of",
    "stored_name",
    "stored_shape",
    "write_settings",
    "write_shard",
]

# Shape letters: B batch, N images of a shard, S side of a square image in pixels, C latent channels, h w its grid.

FORMAT = 1
"""Of `cache.json` and the shards; a cache of another one is refused."""

KINDS = ("moments", "sample", "mode")
"""What a cache may hold of each posterior."""

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""What a cache may be stored in, and what safetensors calls it."""

_SETTINGS = "cache.json"

Settings = dict[str, Any]


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard by its number, from 0."""
    return folder / f"shard-{shard:05d}.safetensors"


def shards_of(settings: Settings) -> range:
    """The numbers of all shards of a cache whose rows are known."""
    return range(math.ceil(settings["rows"] / settings["shard_size"]))


def rows_of(settings: Settings, shard: int) -> range:
    first = shard * settings["shard_size"]
    return range(first, min(first + settings["shard_size"], settings["rows"]))


def stored_name(settings: Settings) -> str:
    """What the latents are called in a shard: `"moments"` or `"latents"`."""
    return "moments" if settings["kind"] == "moments" else "latents"


def stored_shape(settings: Settings) -> tuple[int, ...]:
    """`(2C, h, w)` of moments or `(C, h, w)` of latents."""
    channels, *grid = settings["latent_shape"]
    return (2 * channels if settings["kind"] == "moments" else channels, *grid)


def read_settings(folder: Path) -> Settings:
    """
    The content of `cache.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or of another format.
    """
    try:
        settings = json.loads((folder / _SETTINGS).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{str(folder)!r} is no cache of latents: it has no {_SETTINGS}.") from None
    except ValueError as error:
        raise ValueError(f"{str(folder / _SETTINGS)!r} is damaged: {error}") from error
    got = settings.get("format") if isinstance(settings, dict) else type(settings).__name__
    if got != FORMAT:
        raise ValueError(f"{str(folder / _SETTINGS)!r} must have the format {FORMAT}, got {got!r}.")
    return settings


def write_settings(folder: Path, settings: Settings) -> None:
    """Write `cache.json`, whole or not at all."""
    with write_whole(folder / _SETTINGS) as file:
        file.write((json.dumps(settings, indent=1) + "\n").encode())


def settle(folder: Path, settings: Settings) -> tuple[Settings, str]:
    """The settings to go on with, once `cache.json` holds them; or why the folder cannot be written, in one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _SETTINGS).exists():
            old, new = read_settings(folder), dict(settings)
            if old.get("rows") is None or new["rows"] is None:  # of a stream they are known once it has ended
                old["rows"] = new["rows"] = old.get("rows") or new["rows"]
            differing = [f"{name} {old.get(name)!r}, not {new[name]!r}" for name in new if old.get(name) != new[name]]
            if differing:
                return {}, f"{str(folder)!r} holds another cache: {'; '.join(differing)}."
            settings = new
        elif any(folder.glob("shard-*.safetensors")):
            return {}, f"{str(folder)!r} holds shards, but no {_SETTINGS} that says what they are."
        write_settings(folder, settings)
    except (OSError, ValueError) as error:
        return {}, f"{str(folder)!r} cannot be written: {' '.join(str(error).split())}"
    return settings, ""


def read_header(path: Path, settings: Settings) -> tuple[int, dict[int, str]]:
    """
    How many images a shard holds, and why which rows were left out.

    Raises:
        ValueError: It is damaged, or holds something else than the settings say; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            skipped = {int(row): reason for row, reason in json.loads(file.metadata()["skipped"]).items()}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
        count = found["rows"][0][0]
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"The shard {str(path)!r} is damaged: {' '.join(str(error).split())}") from error
    names = [stored_name(settings), *([f"{stored_name(settings)}_flipped"] if settings["flips"] else [])]
    expected = {name: ((count, *stored_shape(settings)), DTYPES[settings["dtype"]]) for name in names}
    expected |= dict.fromkeys(("labels", "rows"), ((count,), "I64"))
    if found != expected:
        raise ValueError(f"The shard {str(path)!r} is damaged: it must hold {expected}, got {found}.")
    if settings["rows"] is not None:
        rows = len(rows_of(settings, int(path.stem.partition("-")[2])))
        if count + len(skipped) != rows:
            raise ValueError(
                f"The shard {str(path)!r} is damaged: it must have {rows} rows, got {count + len(skipped)}."
            )
    return count, skipped


def write_shard(path: Path, batches: list[dict[str, Any]], settings: Settings) -> None:
    """
    Write the batches of `ShardBatches` that make up a shard, with what the encoder gave of them as `plain` and, with
    flips, `flipped`.

    Raises:
        ValueError: What was encoded is not finite in the dtype of the cache.
    """
    rows, labels = ([value for batch in batches for value in batch[name]] for name in ("rows", "labels"))
    tensors = {"labels": torch.tensor(labels, dtype=torch.int64), "rows": torch.tensor(rows, dtype=torch.int64)}
    # By row, so that neither batches nor processes nor what was left out change an image's noise.
    noise = [np.random.default_rng((settings["seed"], row)) for row in rows] if settings["kind"] == "sample" else []
    for side, suffix in (("plain", ""), ("flipped", "_flipped"))[: 1 + settings["flips"]]:
        parts = [batch[side] for batch in batches if batch["rows"]]
        values = torch.cat(parts).float().cpu() if parts else torch.empty(0, *stored_shape(settings))
        if noise:
            posterior = posterior_of(values)
            drawn = [source.standard_normal(posterior.mean.shape[1:], np.float32) for source in noise]
            values = posterior.mean + posterior.std * torch.from_numpy(np.stack(drawn))
        values = values.to(getattr(torch, settings["dtype"])).contiguous()
        if not (finite := torch.isfinite(values).flatten(1).all(1)).all():
            row = rows[int(finite.int().argmin())]
            raise ValueError(f"The latents of row {row} are not finite in {settings['dtype']}; try another `dtype`.")
        tensors[stored_name(settings) + suffix] = values
    skipped = {row: reason for batch in batches for row, reason in batch["skipped"].items()}
    with write_whole(path) as file:
        file.write(save(tensors, {"skipped": json.dumps(skipped)}))


class ShardBatches:
    """
    The images of those shards that one of several processes has yet to write, decoded a batch ahead; no batch spans
    two shards.

    Iterating gives dictionaries: `shard`; `levels` `(B, S, S, 3)`, uint8, absent where no image could be decoded;
    `rows` and `labels`, a list each; and `skipped`, the reasons by row.

    Args:
        images (`Images`): The data.
        folder (`Path`): With the shards that are there already.
        settings (`dict`): Those of `cache.json`.
        batch_size, threads (`int`): Most rows in a batch, and decoded at a time.
        rank, world (`int`): Which process this is, and of how many.
        pin (`bool`): Whether to put batches into memory that a GPU copies from without waiting.

    Attributes:
        rows (`int` or `None`): Of the data, of a stream once it has ended.
        todo (`int` or `None`): Rows to go through, of a stream unknown.

    Raises:
        ValueError: While iterating: a stream has another number of rows than before.
    """

    def __init__(
        self,
        images: Images,
        folder: Path,
        settings: Settings,
        *,
        batch_size: int,
        threads: int,
        rank: int,
        world: int,
        pin: bool = False,
    ):
        self.images, self.folder, self.settings = images, folder, settings
        self.batch_size, self.threads, self.rank, self.world, self.pin = batch_size, threads, rank, world, pin
        self.rows: int | None = settings["rows"]
        self.todo: int | None = None
        if self.rows is not None:
            self.shards = [shard for shard in shards_of(settings) if self._lacks(shard)]
            self.todo = sum(len(rows_of(settings, shard)) for shard in self.shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(self.threads) as pool:
            ahead: list[tuple[int, list[Any]]] = []
            for shard, entries in groupby(self._numbered(), lambda entry: entry[0] // self.settings["shard_size"]):
                while chunk := list(islice(entries, self.batch_size)):
                    ahead.append((shard, [pool.submit(self._sample, *entry) for entry in chunk]))
                    if len(ahead) > 1:
                        yield self._batch(*ahead.pop(0))
            for entry in ahead:
                yield self._batch(*entry)

    def _lacks(self, shard: int) -> bool:
        if shard % self.world != self.rank:
            return False
        try:
            read_header(shard_path(self.folder, shard), self.settings)
        except ValueError:
            return True
        return False

    def _numbered(self) -> Iterator[tuple[int, Row]]:
        if not self.images.streaming:
            for row in chain.from_iterable(rows_of(self.settings, shard) for shard in self.shards):
                yield row, self.images[row]
        elif self.todo != 0:
            lacks, count = functools.cache(self._lacks), 0
            for row, entry in enumerate(islice(self.images, self.settings["limit"])):
                count = row + 1
                if lacks(row // self.settings["shard_size"]):
                    yield row, entry
            if self.rows not in (None, count):
                raise ValueError(f"{self.images.source} must have {self.rows} rows as before, got {count}.")
            self.rows = count

    def _sample(self, index: int, row: Row) -> tuple[int, int, np.ndarray | str]:
        label = -1 if row["label"] is None else int(row["label"])
        try:
            return index, label, np.asarray(centre_square(image_of(row), self.settings["size"]))
        except ImageError as error:
            return index, label, str(error)

    def _batch(self, shard: int, futures: list[Any]) -> dict[str, Any]:
        samples = [future.result() for future in futures]
        good = [sample for sample in samples if not isinstance(sample[2], str)]
        batch: dict[str, Any] = {"shard": shard, "rows": [x[0] for x in good], "labels": [x[1] for x in good]}
        batch["skipped"] = {row: reason for row, _, reason in samples if isinstance(reason, str)}
        if good:
            levels: Tensor = torch.from_numpy(np.stack([sample[2] for sample in good]))
            batch["levels"] = levels.pin_memory() if self.pin else levels
        return batch
