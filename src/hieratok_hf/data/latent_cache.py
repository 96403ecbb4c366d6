"""A cache of latents on disk: `cache.json`, which says what the shards hold, and the data set that is read of them."""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..models.autoencoder_adapter import Codec
from ..models.core import posterior_of
from ..utils.channel_statistics import add_sums, channel_statistics, channel_sums
from ..utils.choices import LATENT_DTYPES, LATENT_KINDS
from .aspect_buckets import Buckets, Shape
from .manifests import Settings, checksum_of, is_count, is_number, is_text, read_manifest

__all__ = ["LatentCache", "digest_of", "encoder_facts"]

# Shape letters: B batch, C channels of a latent or of a feature map, h w its grid.

FORMAT = 2  # of `cache.json` and the shards; a cache of another one is refused
SETTINGS_FILE = "cache.json"
FEATURE_DTYPE = "float16"

_SAMPLED_SHARDS, _SAMPLED_IMAGES = 8, 1024  # for statistics


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def buckets_of(settings: Settings) -> list[dict[str, Any]]:
    """List the buckets of a cache; one without is a bucket itself."""
    return settings.get("buckets", [settings])


def shards_of(settings: Settings) -> range:
    """Number all shards of a cache whose rows are known."""
    return range(sum(math.ceil(bucket["rows"] / settings["shard_size"]) for bucket in buckets_of(settings)))


def bucket_of(settings: Settings, shard: int) -> tuple[int, int]:
    """Find the bucket that a shard is of, and which of its shards it is."""
    if "buckets" not in settings:
        return 0, shard
    index = 0
    for bucket in settings["buckets"]:
        if shard < (shards := math.ceil(bucket["rows"] / settings["shard_size"])):
            break
        index, shard = index + 1, shard - shards
    return index, shard


def rows_of(settings: Settings, shard: int) -> range:
    """Number the rows of a shard, with buckets among those of its own."""
    index, shard = bucket_of(settings, shard)
    first = shard * settings["shard_size"]
    return range(first, min(first + settings["shard_size"], buckets_of(settings)[index]["rows"]))


def stored_name(settings: Settings) -> str:
    return "moments" if settings["kind"] == "moments" else "latents"


def feature_names(settings: Settings) -> list[str]:
    """Name the feature maps of each image, none of a cache without a vision model."""
    return [f"features_{layer}" for layer in settings["vision"]["layers"]] if "vision" in settings else []


def stored_kinds(settings: Settings, shard: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Give the shape and the dtype of what a shard holds of each image and, with flips, of the mirrored one."""
    bucket = buckets_of(settings)[bucket_of(settings, shard)[0]]
    channels, *grid = bucket["latent_shape"]
    shape = (2 * channels if settings["kind"] == "moments" else channels, *grid)
    features = zip(feature_names(settings), bucket.get("feature_shapes", []))
    return {
        stored_name(settings): (shape, settings["dtype"]),
        **{name: (tuple(shape), FEATURE_DTYPE) for name, shape in features},
    }


def number_of(path: Path) -> int:
    """Read the number of a shard in its file's name."""
    return int(path.stem.partition("-")[2])


def _is_shape(sides: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == sides and all(map(is_count(1), value))


_BUCKET = {"shape": _is_shape(2), "latent_shape": _is_shape(3), "rows": is_count(1), "checksum": is_text}
_SCHEMA = {
    "kind": lambda value: value in LATENT_KINDS,
    "flips": lambda value: isinstance(value, bool),
    "dtype": lambda value: value in tuple(LATENT_DTYPES),
    "size": is_count(1),
    "shard_size": is_count(1),
    "seed": lambda value: type(value) is int,
    "limit": lambda value: value is None or is_count(1)(value),
    "source": is_text,
    "data": is_text,
    "rows": lambda value: value is None or is_count(0)(value),
    "classes": lambda value: isinstance(value, list) and all(map(is_text, value)),
    "latent_shape": _is_shape(3),
    "encoder": is_text,
    "precision": is_text,
    "scaling_factor": is_number,
    "shift_factor": is_number,
}


def _has_features(settings: Settings) -> bool:
    """Tell whether a vision model is described, with the shapes of its maps in every bucket."""
    vision = settings.get("vision")
    if not isinstance(vision, dict) or not all(is_text(vision.get(name)) for name in ("model", "weights")):
        return False
    layers, shapes = vision.get("layers"), [bucket.get("feature_shapes") for bucket in buckets_of(settings)]
    if not isinstance(layers, list) or not all(map(is_count(0), layers)) or len({*layers}) != len(layers):
        return False
    return all(isinstance(x, list) and len(x) == len(layers) > 0 and all(map(_is_shape(3), x)) for x in shapes)


def _are_buckets(value: Any) -> bool:
    are_objects = isinstance(value, list) and len(value) > 0 and all(isinstance(bucket, dict) for bucket in value)
    return are_objects and all(is_valid(bucket.get(name)) for bucket in value for name, is_valid in _BUCKET.items())


def identity(settings: Settings, path: Path) -> str:
    """Tell a shard of a cache by its file's name from those of other caches, and from its other shards."""
    return checksum_of({**settings, "rows": None, "shard": path.stem})


def checksum(values: Tensor) -> str:
    """Compute the CRC-32 of a contiguous tensor's bytes on the CPU."""
    return f"{zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data):08x}"


def read_settings(folder: Path) -> Settings:
    """
    Read `cache.json`: `FileNotFoundError` where there is none, `ValueError` where it is of another format, damaged, or
    changed by hand.
    """
    settings = read_manifest(folder / SETTINGS_FILE, "cache of latents", FORMAT, _SCHEMA)
    if "buckets" in settings and not _are_buckets(settings["buckets"]):
        raise ValueError(f"{str(folder / SETTINGS_FILE)!r} is damaged: it has no valid 'buckets'.")
    if "vision" in settings and not _has_features(settings):
        raise ValueError(f"{str(folder / SETTINGS_FILE)!r} is damaged: it has no valid 'vision'.")
    return settings


class Header(NamedTuple):
    """Hold the number of a shard's images, why rows were left out, and the CRC-32 of each tensor by name."""

    images: int
    skipped: dict[int, str]
    checksums: dict[str, str]


def read_header(path: Path, settings: Settings) -> Header:
    """Read what a shard holds but not its tensors; `ValueError` where it is not what it should be."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            skipped = {int(row): str(reason) for row, reason in facts["skipped"].items()}
            checksums = {name: facts["checksums"][name] for name in file.keys()}  # noqa: SIM118
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
        count = found["rows"][0][0]
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"The shard {str(path)!r} is damaged: {' '.join(str(error).split())}") from error
    expected = {
        name + suffix: ((count, *shape), LATENT_DTYPES[dtype])
        for name, (shape, dtype) in stored_kinds(settings, number_of(path)).items()
        for suffix in ("", "_flipped")[: 1 + settings["flips"]]
    }
    expected |= dict.fromkeys(("labels", "rows"), ((count,), "I64"))
    if found != expected:
        raise ValueError(f"The shard {str(path)!r} is damaged: it must hold {expected}, got {found}.")
    if facts.get("identity") != identity(settings, path):
        raise ValueError(f"The shard {str(path)!r} is damaged: it is that of another place or cache.")
    if settings["rows"] is not None:
        rows, got = len(rows_of(settings, number_of(path))), count + len(skipped)
        if got != rows:
            raise ValueError(f"The shard {str(path)!r} is damaged: it must have {rows} rows, got {got}.")
    return Header(count, skipped, checksums)


def read_tensor(path: Path, name: str, checksums: dict[str, str]) -> Tensor:
    """Map a tensor of a shard into memory; `ValueError` where it has another checksum."""
    with safe_open(path, "pt") as file:
        values: Tensor = file.get_tensor(name)
    if checksum(values) != checksums.get(name):
        raise ValueError(f"The shard {str(path)!r} is damaged: {name!r} has another checksum.")
    return values


def digest_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Take a SHA-256 of names, dtypes, shapes and values, as of a model's weights whatever files they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(weights, key=lambda pair: pair[0]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encoder_facts(codec: Codec) -> dict[str, Any]:
    """
    Collect the facts of a model that decide its latents and what pipelines do to them: `encoder`, a SHA-256 of all its
    weights but the decoder's; `precision`, the dtype that it runs in; `scaling_factor` and `shift_factor`.
    """
    weight, weights = next(codec.model.parameters()), (codec.core or codec.model).state_dict().items()
    encoder = digest_of(x for x in weights if x[0].partition(".")[0] not in ("decoder", "post_quant_conv"))
    kind = weight.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return {"encoder": encoder, "precision": str(precision).removeprefix("torch."), **codec.statistics}


def check_encoder(folder: Path, settings: Settings, codec: Codec) -> None:
    """Raise `ValueError` unless the latents in a folder were written with this encoder, tensor for tensor."""
    if (got := encoder_facts(codec)["encoder"]) != (wanted := settings["encoder"]):
        raise ValueError(f"{str(folder)!r} was written with the encoder {wanted[:12]}, not with {got[:12]}.")


class LatentCache(Dataset):
    """
    Read what `write_latents` wrote to `folder`; index `i` runs over images in the order of their rows, with buckets in
    that of each bucket after the other. Shards are mapped into memory and compared with their checksums when they are
    first used, in each worker for itself.

    Attributes:
        settings (`dict`): The content of `cache.json`.
        flips (`bool`): Whether mirrored images were encoded too.
        latent_shape (`tuple[int, ...]`): The shape `(C, h, w)` of a latent, with buckets of the square's.
        buckets (`Buckets`): The indices of the images of each shape in pixels, for a `BatchPlan`; empty without.
        latent_shapes (`dict[tuple[int, int], tuple[int, ...]]`): The shape of a latent of each of `buckets`.
        class_names (`list[str]`): Names of the labels, empty where unknown.
        labels, rows (`torch.Tensor` of shape `(len(self),)`): int64; a label is -1 where there is none.

    Raises:
        FileNotFoundError: There is no `cache.json`.
        ValueError: The cache is unfinished or of another format, or `cache.json` or a shard is damaged, which of a
            shard's latents is seen when they are read; the message names it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = settings = read_settings(self.folder)
        if settings["rows"] is None:
            raise ValueError(f"{str(folder)!r} is unfinished: its stream has not come to an end. Go on writing it.")
        shards, there = shards_of(settings), {path.name for path in self.folder.glob("shard-*") if path.is_file()}
        missing = next((shard for shard in shards if shard_path(self.folder, shard).name not in there), None)
        if missing is not None:
            raise ValueError(f"{str(folder)!r} is unfinished: of {len(shards)} shards the first to miss is {missing}.")
        paths = [shard_path(self.folder, shard) for shard in shards]
        self.flips, self.latent_shape = settings["flips"], tuple(settings["latent_shape"])
        self.class_names: list[str] = settings["classes"]
        headers = [read_header(path, settings) for path in paths]
        self._checksums = [header.checksums for header in headers]
        self.labels, self.rows = (
            torch.cat([read_tensor(path, name, header.checksums) for path, header in zip(paths, headers)])
            for name in ("labels", "rows")
        )
        self._starts = np.cumsum([0] + [header.images for header in headers])
        self._paths, self._name = paths, stored_name(settings)
        self._kinds = [stored_kinds(settings, shard) for shard in shards]
        numbers = np.repeat([bucket_of(settings, shard)[0] for shard in shards], [header.images for header in headers])
        self.buckets: Buckets = {}
        self.latent_shapes: dict[Shape, tuple[int, ...]] = {}
        for number, bucket in enumerate(settings.get("buckets", [])):
            if len(found := np.flatnonzero(numbers == number)):
                height, width = bucket["shape"]
                self.buckets[height, width] = found
                self.latent_shapes[height, width] = tuple(bucket["latent_shape"])
        self._mapped: dict[tuple[int, str], np.ndarray] = {}

    @property
    def has_features(self) -> bool:
        """Tell whether the feature maps of a vision model were kept too."""
        return "vision" in self.settings

    @property
    def fingerprint(self) -> str:
        """Tell the cache from other caches: a SHA-256 of its settings and of its shards' checksums."""
        return hashlib.sha256(json.dumps([self.settings, self._checksums], sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read `latents` `(C, h, w)` or `moments` `(2C, h, w)` as they are stored, float32; `label` and `row`."""
        label, row = int(self.labels[index]), int(self.rows[index])
        return {self._name: self._read(self._name, [index])[0].float(), "label": label, "row": row}

    def batch(
        self,
        indices: Sequence[int] | Tensor,
        flipped: Sequence[bool] | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Read many images at once, as a generator of diffusers is fed them: `(x - shift_factor) * scaling_factor`,
        which changes nothing for HieraTok, whose latents arrive normalised.

        Args:
            indices (sequence of `int` or `torch.Tensor` of shape `(B,)`): The images to read.
            flipped (sequence of `bool` or `torch.Tensor` of shape `(B,)`, *optional*): Which of them are mirrored.
            noise (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): Standard normal, to draw from moments, whose
                mode is given without. Samples and modes are as they were written, with or without it.

        Returns:
            The latents `(B, C, h, w)`, float32, and the labels `(B,)`, int64.

        Raises:
            IndexError: An index is not one of an image.
            ValueError: The images are of several shapes, `flipped` has another length, or asks for what was not
                written, or a shard is damaged.
        """
        values = self._read(self._name, indices, flipped)
        labels = self.labels[torch.as_tensor(indices, dtype=torch.int64)]
        if self._name == "moments" and noise is None:
            values = values[:, : self.latent_shape[0]]
        elif self._name == "moments":
            posterior = posterior_of(values.float())
            values = posterior.mean + posterior.std * noise
        return (values.float() - self.settings["shift_factor"]) * self.settings["scaling_factor"], labels

    def features(
        self, indices: Sequence[int] | Tensor, flipped: Sequence[bool] | Tensor | None = None
    ) -> list[Tensor]:
        """
        Read the feature maps of many images at once, as the vision model gave them; none of a cache without.

        Args:
            indices, flipped: What `batch` takes.

        Returns:
            A map `(B, C, h, w)`, float32, of each layer in the order of `settings["vision"]["layers"]`.

        Raises:
            IndexError, ValueError: As `batch`.
        """
        return [self._read(name, indices, flipped).float() for name in feature_names(self.settings)]

    def feature_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """
        Compute mean and standard deviation `(C,)`, float32, of the channels of each layer's maps, over about a
        thousand images of at most eight shards, with the mirrored ones.
        """
        return self._statistics(self.features)

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Compute those of `feature_statistics` of the latents that `batch` gives; `ValueError` without images."""
        if not len(self):
            raise ValueError(f"{str(self.folder)!r} holds no images.")
        return self._statistics(lambda indices, flipped: [self.batch(indices, flipped)[0]])[0]

    def _statistics(self, read: Callable[[list[int], list[bool]], list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        sums: list[dict[str, Tensor]] = []
        filled = np.flatnonzero(np.diff(self._starts))
        shards = {*np.linspace(0, len(filled) - 1, _SAMPLED_SHARDS).astype(int).tolist()}
        for shard in filled[sorted(shards)].tolist():
            first, last = self._starts[shard], self._starts[shard + 1] - 1
            indices = {*np.linspace(first, last, _SAMPLED_IMAGES // len(shards)).astype(int).tolist()}
            for side in (False, True)[: 1 + self.flips]:
                maps = read(sorted(indices), [side] * len(indices))
                sums = sums or [{} for _ in maps]
                for layer, values in zip(sums, maps):
                    add_sums(layer, channel_sums(values))
        pairs = (channel_statistics(layer, correction=0) for layer in sums)
        return [(mean.float(), std.float()) for mean, std in pairs]

    def _read(
        self, name: str, indices: Sequence[int] | Tensor, flipped: Sequence[bool] | Tensor | None = None
    ) -> Tensor:
        """Read the values of that name, of one shape, in the dtype that they are stored in."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        sides = [False] * len(chosen) if flipped is None else torch.as_tensor(flipped, dtype=torch.bool).tolist()
        if len(sides) != len(chosen):
            raise ValueError(f"`flipped` must have the length of `indices`, {len(chosen)}, got {len(sides)}.")
        if any(sides) and not self.flips:
            raise ValueError(f"`flipped` must be false throughout: {str(self.folder)!r} was written without flips.")
        numbers = torch.arange(len(self))[chosen].numpy()
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        places = numbers - self._starts[shards]
        kinds = {self._kinds[shard][name] for shard in {*shards.tolist()}} or {self._kinds[0][name]}
        if len(kinds) > 1:
            raise ValueError(f"`indices` must be those of images of one shape, got {len(kinds)}.")
        shape, dtype = kinds.pop()
        values = torch.empty(len(chosen), *shape, dtype=getattr(torch, dtype))
        # As bytes, which NumPy has for every dtype: to copy row by row, torch takes four times as long.
        levels = values.view(torch.uint8).numpy()
        for i, (shard, place, side) in enumerate(zip(shards.tolist(), places.tolist(), sides)):
            stored = name + "_flipped" * side
            if (shard, stored) not in self._mapped:
                tensor = read_tensor(self._paths[shard], stored, self._checksums[shard])
                self._mapped[shard, stored] = tensor.view(torch.uint8).numpy()
            levels[i] = self._mapped[shard, stored][place]
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # a worker maps the shards itself

    def check_encoder(self, codec: Codec) -> None:
        """Raise `ValueError` unless the latents were written with this encoder, tensor for tensor."""
        check_encoder(self.folder, self.settings, codec)
