"""An archive of the images in a folder: latents of any sizes, with what it takes to make files of them again."""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.autoencoder_adapter import Codec
from ..models.quantizing import LatentQuantizer
from ..utils.choices import ARCHIVE_FITS, ARCHIVE_FORMATS, LATENT_DTYPES, QUANTIZER_FILE, TOKEN_BITS
from ..utils.files import write_whole
from ..utils.images import ImageError, from_uint8, open_image, to_uint8
from .archive_shards import FILE_FORMATS, TOKENS_FORMAT, ImageRecord
from .latent_cache import check_encoder, encoder_facts, rows_of, shards_of
from .local_images import is_image, list_images
from .manifests import Settings, checksum_of, is_count, is_number, is_text, read_manifest, settle, write_manifest

__all__ = ["LatentArchive", "cell_of", "decode_record", "read_records", "write_archive"]

# Shape letters: C latent channels, h w the latent's grid.

FORMAT = 1  # of `archive.json` and what lies beside the shards; an archive of another one is refused
SETTINGS_FILE = "archive.json"

_PROBE = 64  # pixels a side of the image that tells the size of a cell
_SAMPLED = 1000  # images whose content tells one folder from another
_LONGEST_NAME = 255  # bytes of a file's name that every system takes

_SCHEMA = {
    "file_format": lambda value: value in tuple(FILE_FORMATS),
    "dtype": lambda value: value in (*LATENT_DTYPES, "uint8"),
    "fit": lambda value: value in ARCHIVE_FITS,
    "cell": is_count(1),
    "channels": is_count(1),
    "rows": is_count(1),
    "shard_size": is_count(1),
    "images": is_text,
    "model": is_text,
    "encoder": is_text,
    "precision": is_text,
    "tiling": lambda value: isinstance(value, bool),
    "scaling_factor": is_number,
    "shift_factor": is_number,
}

# Of an archive of integers, beside the others.
_TOKENS_SCHEMA = {
    "dtype": lambda value: value == "uint8",
    "bits": lambda value: type(value) is int and value in TOKEN_BITS,
    "quantizer": is_text,
}

Given = TypeVar("Given")
Made = TypeVar("Made")


def _is_name(value: Any) -> bool:
    """Tell whether a value is the name of an image below a folder, on any system, that is not hidden."""
    if not isinstance(value, str) or "\0" in value or not is_image(value):
        return False
    parts = value.replace(os.sep, "/").split("/")
    is_utf8 = value.encode(errors="ignore").decode() == value
    if not is_utf8 or os.path.splitdrive(value)[0]:
        return False
    return all(part and part[0] != "." and len(part.encode()) <= _LONGEST_NAME for part in parts)


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != set(ImageRecord._fields):
        return False
    width, height, box = value["width"], value["height"], value["box"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_count(0), (width, height, *box))):
        return False
    return _is_name(value["name"]) and box[0] < box[2] <= width and box[1] < box[3] <= height


def _to_records(rows: list[Any]) -> list[ImageRecord]:
    return [ImageRecord(**{**row, "box": tuple(row["box"])}) for row in rows]


def _check_names(records: list[ImageRecord], source: str | Path) -> None:
    names = {record.name for record in records}
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if len(names) < len(records) or names & folders:
        raise ValueError(f"{str(source)!r} is damaged: two of its images would be one file, or a file and a folder.")


def read_records(rows: Any, source: str | Path) -> list[ImageRecord]:
    """
    Make records of what the JSON in a file `source` holds.

    Raises:
        ValueError: It is no list of records, a name leads out of a folder, or two images would be one file.
    """
    if not isinstance(rows, list) or not all(map(_is_record, rows)):
        raise ValueError(f"{str(source)!r} is no file of latents, or is damaged: it has no valid 'records'.")
    records = _to_records(rows)
    _check_names(records, source)
    return records


_SHARD_SCHEMA = {
    "identity": is_text,
    "content": is_text,
    "records": lambda value: isinstance(value, list) and all(map(_is_record, value)),
    "skipped": lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
}


def cell_of(codec: Codec) -> int:
    """Find the side in pixels of a latent's cell; `ValueError` for a model that is no image autoencoder."""
    return codec.core.config.patch_size if codec.core else _PROBE // codec.latent_shape(_PROBE)[1]


def write_archive(
    codec_or_vae: Codec | nn.Module,
    source: str | Path,
    folder: str | Path,
    *,
    model: str = "",
    file_format: str = "safetensors",
    dtype: torch.dtype = torch.float16,
    bits: int | None = None,
    fit: str = "pad",
    shard_size: int = 128,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """
    Encode the images in the folder `source`, and in those below it, into `folder`, for `LatentArchive`.

    Called again after a kill, it goes on with the missing shards; the files are then the same as without. Latents are
    modes of the posterior, in the units of the model. Images are encoded one by one, in the model's own dtype or
    that of an autocast around the call, so a latent does not depend on the images beside it. Of a model with tiling
    switched on, large images are encoded in tiles, in time that grows with their pixels instead of the square.

    Args:
        codec_or_vae (`Codec` or `torch.nn.Module`): The autoencoder, or what `Codec` takes.
        source (`str` or `Path`): The folder of images. Hidden files, and files of other kinds, are passed over.
        folder (`str` or `Path`): The folder of the archive; made if it is not there.
        model (`str`, defaults to `""`): A name to record, from which readers can load the autoencoder.
        file_format (`str`, defaults to `"safetensors"`): One of `ARCHIVE_FORMATS` for latents.
        dtype (`torch.dtype`, defaults to `torch.float16`): What is stored; also float32, and bfloat16 in safetensors.
        bits (`int`, *optional*): Bits of the integers to store in the place of latents, 1 to 8, compressed and with
            the model's levels beside them; `file_format` and `dtype` are those of latents alone.
        fit (`str`, defaults to `"pad"`): What to do where sides are no multiples of a cell: `"pad"` continues the
            right and lower border, and what is decoded is cut to the size of the image; `"crop"` takes the middle.
        shard_size (`int`, defaults to 128): Images of a shard.
        threads (`int`, defaults to 4): Number of images to read at a time, ahead.
        progress (callable, *optional*): Called after each image with how many are done in this call, and how many
            it has to do.

    Returns:
        `images` and `shards` of the whole archive, `skipped`, the reason for each name that cannot be read or is too
        small to be cropped, and how many images were `encoded` in this call.

    Raises:
        ImportError: Parquet needs pyarrow.
        ValueError: An argument is out of its range, the folder has no images, the latents are not finite in `dtype`,
            the model has no levels or cannot take an image, or `folder` holds something else.
        OSError: `source` cannot be read, or `folder` cannot be written.
    """
    codec = codec_or_vae if isinstance(codec_or_vae, Codec) else Codec(codec_or_vae)
    source, folder, stored = Path(source), Path(folder), str(dtype).removeprefix("torch.")
    for name, value in (("shard_size", shard_size), ("threads", threads)):
        if value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    for name, choice, choices in (("file_format", file_format, tuple(ARCHIVE_FORMATS)), ("fit", fit, ARCHIVE_FITS)):
        if choice not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {choice!r}.")
    if stored not in (dtypes := ARCHIVE_FORMATS[file_format]):
        raise ValueError(f"`dtype` must be one of {dtypes} in {file_format}, got {stored!r}.")
    quantizer = None
    if bits is not None:
        bits, quantizer = LatentQuantizer.check_bits(bits), codec.quantizer
        if quantizer is None:
            kind = type(codec.model).__name__
            what = (
                f"levels of the {kind}, which `hieratok fit-quantizer` puts into {QUANTIZER_FILE} beside its weights"
            )
            raise ValueError(f"`bits` needs {what}.")
        file_format, stored = TOKENS_FORMAT, "uint8"
    _check_packages(file_format)
    names = list_images(source)
    if not names:
        raise ValueError(f"No images found in {str(source)!r}.")
    with torch.inference_mode():
        probe = codec.encode(torch.zeros(1, 3, *[cell_of(codec)] * 2))
    if quantizer is not None:
        quantizer.quantize(probe, 1)  # which refuses latents of other channels
    settings: Settings = {
        "format": FORMAT, "file_format": file_format, "dtype": stored, "fit": fit, "cell": cell_of(codec),
        "channels": probe.shape[1], "rows": len(names), "shard_size": shard_size,
        "images": _digest_of(source, names), "model": model, "tiling": codec.is_tiled, **encoder_facts(codec),
    }  # fmt: skip
    if quantizer is not None:
        settings |= {"bits": bits, "quantizer": _digest_levels(quantizer)}
    old = _read_settings(folder) if (folder / SETTINGS_FILE).exists() else None
    if old is not None:
        settings["model"] = old["model"]  # one folder has many names
    settle(folder / SETTINGS_FILE, "archive", old, settings)
    if quantizer is not None:
        quantizer.write(folder / QUANTIZER_FILE)
    missing = [shard for shard in shards_of(settings) if not _is_whole(folder, settings, shard)]
    wanted = [[names[row] for row in rows_of(settings, shard)] for shard in missing]
    todo, done, encoded = sum(map(len, wanted)), 0, 0

    def read(name: str) -> Image.Image | ImageError:
        path = source / name
        try:
            return open_image(path)
        except ImageError as error:
            return ImageError(str(error).removeprefix(f"{str(path)!r}: "))  # the same wherever the folder lies

    with ThreadPoolExecutor(threads) as pool, torch.inference_mode():
        images = _map_ahead(pool, read, (name for part in wanted for name in part), threads)
        for shard, part in zip(missing, wanted):
            records, latents, skipped = [], [], {}
            for name, image in zip(part, images):
                try:
                    record = _fit(name, image, settings)
                except ImageError as error:
                    skipped[name] = str(error)
                else:
                    records.append(record)
                    latents.append(_encode(codec, image, record, settings, quantizer))
                done += 1
                if progress is not None:
                    progress(done, todo)
            encoded += len(records)
            _write_shard(folder, settings, shard, records, latents, skipped)
    archive = LatentArchive(folder)
    return {
        "records": len(archive),
        "shards": len(shards_of(settings)),
        "skipped": archive.skipped,
        "encoded": encoded,
    }


def _check_packages(file_format: str) -> None:
    if file_format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError('Parquet needs pyarrow: pip install "hieratok_hf[eval]"')


def _digest_levels(quantizer: LatentQuantizer) -> str:
    return hashlib.sha256(quantizer.to_bytes()).hexdigest()


def _digest_of(source: Path, names: Sequence[str]) -> str:
    """Take a SHA-256 of the names and sizes of all images, and of the content of some spread over them."""
    sampled = {*np.linspace(0, len(names) - 1, min(len(names), _SAMPLED)).round().astype(int).tolist()}
    digest = hashlib.sha256()
    for index, name in enumerate(names):
        path = source / name
        is_there = path.is_file()  # a link to nothing is told of where it is read
        digest.update(repr((name, path.stat().st_size if is_there else -1)).encode())
        if index in sampled and is_there:
            with contextlib.suppress(OSError):  # so is what cannot be read
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read_settings(folder: Path) -> Settings:
    settings = read_manifest(folder / SETTINGS_FILE, "archive of latents", FORMAT, _SCHEMA)
    if settings["file_format"] == TOKENS_FORMAT:
        settings = read_manifest(folder / SETTINGS_FILE, "archive of latents", FORMAT, _SCHEMA | _TOKENS_SCHEMA)
    return settings


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Given], Made], given: Iterable[Given], ahead: int
) -> Iterator[Made]:
    """Map a function in threads, only so many results ahead of the one that is asked for."""
    started = (pool.submit(function, item) for item in given)
    waiting: deque[Future[Made]] = deque(islice(started, ahead))
    while waiting:
        made = waiting.popleft().result()
        waiting.extend(islice(started, 1))
        yield made


def _fit(name: str, image: Image.Image | ImageError, settings: Settings) -> ImageRecord:
    """Choose the part of an image to encode; `ImageError` where it could not be read or is too small."""
    if isinstance(image, ImageError):
        raise image
    (width, height), cell = image.size, settings["cell"]
    if settings["fit"] == "pad":
        return ImageRecord(name, width, height, (0, 0, width, height))
    if min(width, height) < cell:
        raise ImageError(f"must have sides of {cell} pixels or more to be cropped, got {width} x {height}")
    left, top = width % cell // 2, height % cell // 2
    return ImageRecord(name, width, height, (left, top, left + width - width % cell, top + height - height % cell))


def _encode(
    codec: Codec, image: Any, record: ImageRecord, settings: Settings, quantizer: LatentQuantizer | None
) -> Tensor:
    """Encode the part of an image that was chosen to a latent `(C, h, w)` of the stored dtype, or to integers."""
    part = image.crop(record.box)
    pixel_values = from_uint8(torch.from_numpy(np.array(part)).permute(2, 0, 1)[None])
    right, bottom = (-side % settings["cell"] for side in part.size)
    pixel_values = F.pad(pixel_values, (0, right, 0, bottom), mode="replicate")
    try:
        latent = codec.encode(pixel_values)[0]
    except (RuntimeError, ValueError, MemoryError) as error:  # torch lacks memory with a RuntimeError
        raise ValueError(f"{record.name!r} cannot be encoded: {' '.join(str(error).split())}") from error
    if (got := tuple(latent.shape)) != (expected := _latent_shape(record, settings)):
        raise ValueError(f"{record.name!r} cannot be encoded: its latent must have the shape {expected}, got {got}.")
    latent = latent.to("cpu", torch.float32 if quantizer else getattr(torch, settings["dtype"])).contiguous()
    if not latent.isfinite().all():
        raise ValueError(f"The latent of {record.name!r} is not finite in {settings['dtype']}: try another `dtype`.")
    return latent if quantizer is None else quantizer.quantize(latent[None], settings["bits"])[0].to(torch.uint8)


def _latent_shape(record: ImageRecord, settings: Settings) -> tuple[int, int, int]:
    """Give the shape `(C, h, w)` of an image's latent."""
    left, top, right, bottom = record.box
    height, width = (math.ceil(side / settings["cell"]) for side in (bottom - top, right - left))
    return settings["channels"], height, width


def _shard_path(folder: Path, settings: Settings, shard: int) -> Path:
    return folder / f"shard-{shard:05d}{FILE_FORMATS[settings['file_format']].suffix}"


def _write_shard(
    folder: Path,
    settings: Settings,
    shard: int,
    records: list[ImageRecord],
    latents: list[Tensor],
    skipped: dict[str, str],
) -> None:
    """Write a shard, and then what it holds, which says that it is whole."""
    path, content = _shard_path(folder, settings, shard), FILE_FORMATS[settings["file_format"]].pack(records, latents)
    with write_whole(path) as file:
        file.write(content)
    facts = {
        "format": FORMAT,
        "identity": _identity(settings, shard),
        "content": f"{zlib.crc32(content):08x}",
        "records": [record._asdict() for record in records],
        "skipped": skipped,
    }
    write_manifest(path.with_suffix(".json"), facts)


def _identity(settings: Settings, shard: int) -> str:
    """Tell the facts of a shard from those of other shards and archives."""
    return checksum_of({**settings, "shard": shard})


def _read_facts(folder: Path, settings: Settings, shard: int) -> Settings:
    """Read what a shard holds; `FileNotFoundError` where it is not whole, `ValueError` where that is damaged."""
    path = _shard_path(folder, settings, shard).with_suffix(".json")
    facts = read_manifest(path, "whole archive of latents", FORMAT, _SHARD_SCHEMA)
    if facts["identity"] != _identity(settings, shard):
        raise ValueError(f"{str(path)!r} is damaged: it is that of another place or archive.")
    rows, got = len(rows_of(settings, shard)), len(facts["records"]) + len(facts["skipped"])
    if got != rows:
        raise ValueError(f"{str(path)!r} is damaged: it must have {rows} rows, got {got}.")
    facts["records"] = _to_records(facts["records"])
    return facts


def _read_content(folder: Path, settings: Settings, shard: int, facts: Settings) -> bytes:
    path = _shard_path(folder, settings, shard)
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"The shard {str(path)!r} is damaged: it is no file.")
    content = path.read_bytes()
    if f"{zlib.crc32(content):08x}" != facts["content"]:
        raise ValueError(f"The shard {str(path)!r} is damaged: it has another checksum.")
    return content


def _is_whole(folder: Path, settings: Settings, shard: int) -> bool:
    try:
        _read_content(folder, settings, shard, _read_facts(folder, settings, shard))
    except (FileNotFoundError, ValueError):
        return False
    return True


class LatentArchive:
    """
    Read what `write_archive` wrote to `folder`. Iterating gives each image with its latent, `ImageRecord` and a tensor
    `(C, h, w)` of the stored dtype, or in float32 by the levels of the stored integers, shard by shard; nothing is
    unpickled.

    Attributes:
        settings (`dict`): The content of `archive.json`; `model`, the name recorded, is what the writer said.
        records (`list[ImageRecord]`): The images in their order; a name is a path below a folder, and is there once.
        skipped (`dict[str, str]`): Names of images that were left out, and why.

    Raises:
        FileNotFoundError: There is no `archive.json`.
        ImportError: Parquet needs pyarrow.
        ValueError: The archive is unfinished, of another format or damaged, or a name leads out of a folder. What is
            wrong with the content of a shard is told when it is read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = settings = _read_settings(self.folder)
        _check_packages(settings["file_format"])
        self._quantizer = self._read_quantizer() if settings["file_format"] == TOKENS_FORMAT else None
        self._facts: list[Settings] = []
        for shard in shards_of(settings):
            try:
                self._facts.append(_read_facts(self.folder, settings, shard))
            except FileNotFoundError as error:
                first = f"of {len(shards_of(settings))} shards the first to miss is {shard}"
                raise ValueError(f"{str(folder)!r} is unfinished: {first}. Go on encoding.") from error
        self.records: list[ImageRecord] = [record for facts in self._facts for record in facts["records"]]
        self.skipped: dict[str, str] = {
            name: reason for facts in self._facts for name, reason in facts["skipped"].items()
        }
        _check_names(self.records, folder)

    @property
    def fingerprint(self) -> str:
        """Tell the archive from other archives: a SHA-256 of its settings and of its shards' contents."""
        contents = [facts["content"] for facts in self._facts]
        return hashlib.sha256(json.dumps([self.settings, contents], sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def _read_quantizer(self) -> LatentQuantizer:
        path = self.folder / QUANTIZER_FILE
        try:
            quantizer = LatentQuantizer.read(path)
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
        sizes = {len(values) for values in quantizer.levels.values()}
        if _digest_levels(quantizer) != self.settings["quantizer"] or sizes != {self.settings["channels"]}:
            raise ValueError(f"{str(path)!r} is damaged, or the levels of another archive.")
        return quantizer

    def __iter__(self) -> Iterator[tuple[ImageRecord, Tensor]]:
        for record, stored in self.iterate_stored():
            if self._quantizer is None:
                yield record, stored
            else:
                yield record, self._quantizer.dequantize(stored[None], self.settings["bits"])[0]

    def iterate_stored(self) -> Iterator[tuple[ImageRecord, Tensor]]:
        """Iterate over what is stored, of an archive of integers these: `(C, h, w)` in uint8."""
        settings, unpack = self.settings, FILE_FORMATS[self.settings["file_format"]].unpack
        for shard, facts in enumerate(self._facts):
            path, records = _shard_path(self.folder, settings, shard), facts["records"]
            content = _read_content(self.folder, settings, shard, facts)
            try:
                latents = unpack(content, records)
            except Exception as error:  # tarfile, numpy, safetensors and pyarrow raise many types on what is damaged
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"The shard {str(path)!r} is damaged: {reason}") from error
            for record, latent in zip(records, latents):
                expected = _latent_shape(record, settings), getattr(torch, settings["dtype"])
                if (tuple(latent.shape), latent.dtype) != expected:
                    got = f"got {(tuple(latent.shape), latent.dtype)}"
                    raise ValueError(f"The shard {str(path)!r} is damaged: {record.name!r} must be {expected}, {got}.")
                if self._quantizer is not None and (largest := int(latent.max())) >= 2 ** settings["bits"]:
                    what = f"{record.name!r} must be integers of {settings['bits']} bits, got {largest}"
                    raise ValueError(f"The shard {str(path)!r} is damaged: {what}.")
                yield record, latent

    def check_encoder(self, codec: Codec) -> None:
        """Raise `ValueError` unless the latents were written with this encoder, tensor for tensor."""
        check_encoder(self.folder, self.settings, codec)


@torch.inference_mode()
def decode_record(codec: Codec, record: ImageRecord, latent: Tensor, num_scales: int | None = None) -> Image.Image:
    """
    Decode the latent of an image to the part of it that was encoded.

    Args:
        codec (`Codec`): The autoencoder, of the encoder that made the latent.
        image (`ImageRecord`): What the latent is of.
        latent (`torch.Tensor` of shape `(C, h, w)`): A latent in the units of the model.
        num_scales (`int`, *optional*): Number of scales of a HieraTok model to run; the sides are then those of the
            part divided by the factor of the last one, rounded up.

    Raises:
        ValueError: The model refuses the latent or the number of scales.
    """
    weight = next(codec.model.parameters())
    latents, factor = latent[None].to(weight.device, weight.dtype), 1
    if num_scales is not None:
        if codec.core is None:
            raise ValueError(f"{type(codec.model).__name__} has one scale, got `num_scales={num_scales}`.")
        factor = codec.core.config.scale_factors[num_scales - 1]
    images = codec.decode(latents, num_scales)
    left, top, right, bottom = record.box
    height, width = (math.ceil(side / factor) for side in (bottom - top, right - left))
    levels = to_uint8(images[0, :, :height, :width]).permute(1, 2, 0)
    return Image.fromarray(levels.cpu().contiguous().numpy())
