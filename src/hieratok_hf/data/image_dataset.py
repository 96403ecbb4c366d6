"""Images by row from folders, tar shards and data sets of the Hub, through Hugging Face `datasets`."""

import contextlib
import functools
import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.extras import missing_extra
from ..utils.images import ImageError, centre_crop, decode_image, encode_image, open_image, read_size
from ..utils.npz import read_npz
from .local_images import LABELS, Listing, common_names, list_folder, list_shards

__all__ = ["Images", "Row", "SampleSet", "decode_ahead", "load_images", "image_of"]

Row = dict[str, Any]
"""An image of a data set that is not decoded, an item of `Images`."""

_FILES = (".tar", ".parquet", ".zip", ".png", ".jpg", ".jpeg", ".webp")  # what no data set of the Hub is called
_SHARDS_OF_A_STREAM = 64  # parts of local data whose order a stream shuffles
_SAMPLED, _SAMPLED_OF_A_STREAM = 1000, 16  # rows whose content tells one data set from another
_HEADERS_AT_A_TIME = 64  # of tar shards and parquet all of each file is read


class Images(Dataset):
    """
    Give the rows `{"image": {"bytes", "path"}, "name", "label"}` of a data set, with images that are not decoded and
    a `label` that is an integer or `None`. A stream has no length and is iterated.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): A data set with a column of images.
        source (`str`): The name of the data in messages.
        parts (sequence of `Listing` or `None`, *optional*): Local data that `dataset` is joined of, `None` for other.

    Raises:
        ValueError: It has no column of images, or no rows.
    """

    def __init__(self, dataset: Any, source: str, parts: Sequence[Listing | None] = (None,)):
        import datasets

        features = dataset.features or {}
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise ValueError(f"No images found in {source}: no column of them in {sorted(features)}.")
        self.streaming = isinstance(dataset, datasets.IterableDataset)
        if not self.streaming and not len(dataset):
            raise ValueError(f"No images found in {source}: it has no rows.")
        self.source, self.column, self.parts = source, columns[0], parts
        self.label = next((name for name in LABELS if name in features), None)
        self.dataset = dataset.cast_column(self.column, datasets.Image(decode=False))

    @property
    def class_names(self) -> list[str]:
        """Name the labels, where the data or a `meta.json` beside its tar shards does."""
        first, *others = (list(part.classes) if part else [] for part in self.parts)
        return self._feature_names or (first if all(names == first for names in others) else [])

    @property
    def _feature_names(self) -> list[str]:
        return list(getattr((self.dataset.features or {}).get(self.label), "names", None) or [])

    @functools.cached_property
    def fingerprint(self) -> str:
        """
        Tell the data from other data: a SHA-256 of the number, names, sizes and labels of its local images, and of the
        content of 1000 rows spread over all, of a stream from elsewhere of its first 16. Where the data lies and when
        its files were written does not count.
        """
        digest = hashlib.sha256(repr(self._feature_names).encode())  # a `meta.json` is none of the data
        for part in self.parts:
            images = self if part is None else Images(part.dataset, self.source)
            digest.update(f"{part and part.digest} {None if images.streaming else len(images)}".encode())
            if images.streaming:
                rows: Iterable[Row] = islice(images, _SAMPLED_OF_A_STREAM)
            else:
                last, sampled = len(images) - 1, min(len(images), _SAMPLED)
                rows = (images[int(i)] for i in np.linspace(0, last, sampled).round())
            for row in rows:
                digest.update(f"{row['label']}".encode() + _digest_of(row))
        return digest.hexdigest()

    def read_sizes(self, limit: int | None = None) -> np.ndarray:
        """
        Read the height and width in pixels that each image, or each of the first `limit`, has upright, `(n, 2)`,
        int64, from the files' headers; an image whose header cannot be read counts as a square of 1 pixel.

        Raises:
            ValueError: The data is a stream, whose images are not known beforehand.
        """
        if self.streaming:
            raise ValueError(f"The sizes of all images must be known, and {self.source} is a stream: read a copy.")
        numbers = range(len(self))[:limit]
        with ThreadPoolExecutor(8) as pool:
            starts = range(0, len(numbers), _HEADERS_AT_A_TIME)
            parts = ([self[i] for i in numbers[start : start + _HEADERS_AT_A_TIME]] for start in starts)
            return np.array([size for part in parts for size in pool.map(_size_of, part)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return self._row(self.dataset[int(index)], index)

    def __iter__(self) -> Iterator[Row]:
        return (self._row(example, index) for index, example in enumerate(self.dataset))

    def shuffled(self, seed: int, buffer_size: int = 1000) -> Iterator[Row]:
        """Iterate over a stream in an order that the seed decides, epoch after epoch; `ValueError` without rows."""
        fsspec.asyn.reset_lock()  # a worker inherits the lock, and nobody who would open it
        for epoch in count():
            order, rows = random.Random(f"{seed}:{epoch}").getrandbits(32), 0
            # Not iterated itself: in a worker of a DataLoader it would then shuffle otherwise.
            for batch in self.dataset.shuffle(seed=order, buffer_size=buffer_size).iter(batch_size=1):
                yield self._row({name: values[0] for name, values in batch.items()}, rows)
                rows += 1
            if not rows:
                raise ValueError(f"No images found in {self.source}: it has no rows.")

    def _row(self, example: Row, index: int) -> Row:
        image = example[self.column] or {"bytes": None, "path": None}
        name = image.get("path") or f"row {index}"
        if example.get("__url__"):
            name = f"{example['__url__']}:{name}"
        if example.get("__offset__") is not None:
            image = {"bytes": None, "path": name}
            # What cannot be read is told of where the image is decoded.
            with contextlib.suppress(OSError), open(example["__url__"], "rb") as file:
                file.seek(example["__offset__"])
                image["bytes"] = file.read(example["__size__"])
        label = example[self.label] if self.label else None
        return {"image": image, "name": name, "label": label if isinstance(label, int) else None}


class SampleSet(Images):
    """
    Give the rows of an `.npz` file of images, as evaluations exchange them: `arr_0` `(N, H, W, 3)` in uint8 and, where
    the images have labels, `arr_1` `(N,)` of integers. All of it lies in memory.

    Args:
        path (`str`): The file.

    Raises:
        ValueError: There is no such file, or it holds no such arrays; the message names it.
    """

    def __init__(self, path: str):
        import datasets

        arrays = read_npz(path, ("arr_0", "arr_1"))
        levels, labels = (arrays.get(name) for name in ("arr_0", "arr_1"))
        if levels is None or levels.dtype != np.uint8 or levels.ndim != 4 or levels.shape[3] != 3 or 0 in levels.shape:
            found = "none" if levels is None else f"{levels.dtype} {levels.shape}"
            raise ValueError(f"{path!r} must hold images as `arr_0` (N, H, W, 3) in uint8, got {found}.")
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != levels.shape[:1]):
            found = f"{labels.dtype} {labels.shape}"
            raise ValueError(f"{path!r} must hold an integer for each image as `arr_1`, got {found}.")
        self.levels, self.labels = levels, labels
        self.source, self.streaming, self.parts = repr(path), False, (None,)
        self.label = None if labels is None else "arr_1"
        self.dataset = datasets.Dataset.from_dict({"row": range(len(levels))})  # which can be shuffled as any other

    def _row(self, example: Row, index: int) -> Row:
        row = example["row"]
        image = {"bytes": encode_image(Image.fromarray(self.levels[row]), "image.bmp"), "path": None}
        label = None if self.labels is None else int(self.labels[row])
        return {"image": image, "name": f"{self.source}:{row}", "label": label}


def load_images(source: str | Sequence[str], *, split: str = "train", streaming: bool = False) -> Images:
    """
    Load images from a folder, webdataset tar shards (`"shards/train-*.tar"`), a data set of the Hub, or an `.npz` file
    of images (see `SampleSet`), which has one split, `"train"`, and goes alone.

    Local images and shards are read where they lie. Of a folder only the images are looked at, not a `metadata.jsonl`
    or so beside them: their labels are the names of the folders that they lie in, where there are several. If only
    folders named `train`, `validation`, `test` or alike hold images, they are its splits; beside others they are
    classes. In shards, a member's key is its name up to the first dot: `000.png` has its label in `000.cls`. Where no
    image is named by its key alone, as `000.left.png`, each is one of its own.

    Args:
        source (`str` or a sequence of them): A folder of images or shards, or one that `datasets.load_dataset`
            understands (parquet). A path or pattern of tar shards; brackets in it may be part of a name. The id of a
            data set, with a configuration after a colon. Several are read as one, and must then be of one kind and
            hold the same columns.
        split (`str`, defaults to `"train"`): Split of a folder or data set, or slices of them (`"train[:10%]"`); data
            without splits is `"train"`.
        streaming (`bool`, defaults to `False`): Read while training instead of first making a copy in the cache, of
            data of the Hub; local images need no copy.

    Raises:
        ImportError: The package `datasets` is not installed.
        ValueError: There is nothing at a source, it holds no images or not this split, a shard is damaged, a label of
            one is no integer of 64 bits, or sources do not go together or name a label differently.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise missing_extra("Reading images", "datasets") from error
    sources = [os.fspath(name) for name in ([source] if isinstance(source, str | os.PathLike) else source)]
    if not sources:
        raise ValueError("No images found: no source was given.")
    if sources[0].endswith(".npz"):
        if len(sources) > 1 or split != "train":
            raise ValueError(
                f"{sources[0]!r} must be the only source, and its split train, got {sources} and {split!r}."
            )
        return SampleSet(sources[0])
    parts: list[Images] = []
    for name in sources:
        try:
            listing = _list_local(name, split)
            if listing is not None:
                found = listing.dataset
                if streaming and len(found):
                    found = found.to_iterable_dataset(num_shards=min(len(found), _SHARDS_OF_A_STREAM))
            else:
                path, _, config = (name, "", "") if os.path.isdir(name) else name.partition(":")
                found = datasets.load_dataset(path=path, name=config or None, split=split, streaming=streaming)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            # That a data set could not be made is said by one error, why by its cause.
            reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
            raise ValueError(f"No images found in {name!r}: {' '.join(str(reason).split())}") from error
        parts.append(Images(found, repr(name), [listing]))
    if len(parts) == 1:
        return parts[0]
    label = ", ".join(part.source for part in parts)
    columns, labels = ({getattr(part, name) for part in parts} - {None} for name in ("column", "label"))
    if len(columns) > 1 or len(labels) > 1:
        # Joined, the images of one would be missing in the column of the other.
        names = f"{sorted(columns)} and {sorted(labels)}"
        raise ValueError(f"{label} must have their images and labels in the same columns, got {names}.")
    try:
        joined = datasets.concatenate_datasets([part.dataset for part in parts])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{label} do not go together: {' '.join(str(error).split())}") from error
    images = Images(joined, label, [part.parts[0] for part in parts])
    if not images._feature_names:
        common_names({part.source: part.class_names for part in parts})
    return images


def _list_local(name: str, split: str) -> Listing | None:
    """List what is at a path, `None` for what is left to `datasets`; `ValueError` for a path to nothing."""
    if os.path.isdir(name):
        listing = list_folder(name, split)
        if listing is None and ("::" in name or set(name) & set("*?[]")):
            raise ValueError("without images or shards in it, its path must not hold '::' or any of '*?[]'")
        return listing
    # Brackets may be part of a name.
    files = [name] if os.path.exists(name) else sorted(glob(name)) or sorted(glob(name.replace("[", "[[]")))
    if wrong := [file for file in files if not file.endswith(".tar")]:
        raise ValueError(f"{wrong[0]!r} must be a folder, a data set or a tar shard in webdataset style")
    local = name.startswith((".", "/")) or name.endswith(_FILES) or "*" in name or name.count("/") > 1
    if not files and (local or not name.partition(":")[0].strip()):
        raise ValueError("there is no such file, folder or pattern")
    return list_shards(files, split) if files else None


def _source_of(row: Row) -> str | bytes:
    """Give the path of an image's file, or its content; a missing one has none."""
    image = row["image"]
    return image["path"] if image["bytes"] is None and image["path"] is not None else image["bytes"] or b""


def _digest_of(row: Row) -> bytes:
    """Take a SHA-256 of an image's content; one that cannot be read has that of no content."""
    source = _source_of(row)
    content = b"" if isinstance(source, str) else source
    with contextlib.suppress(OSError):
        if isinstance(source, str) and os.path.isfile(source):
            content = Path(source).read_bytes()
    return hashlib.sha256(content).digest()


def image_of(row: Row) -> Image.Image:
    """Decode a row of `Images` to an upright RGB image; `ImageError` where it cannot be decoded."""
    source = _source_of(row)
    return open_image(source) if isinstance(source, str) else decode_image(source, row["name"])


def _size_of(row: Row) -> tuple[int, int]:
    try:
        return read_size(_source_of(row), row["name"])
    except ImageError:
        return 1, 1


def decode_ahead(
    batches: Iterable[Sequence[tuple[int, Row]]], shape: tuple[int, int], threads: int
) -> Iterator[dict[str, Any]]:
    """
    Decode batches of numbered rows in threads, one batch ahead.

    Args:
        batches (iterable of sequences of `(int, Row)`): The rows of `Images` with their numbers.
        shape (`tuple[int, int]`): Height `H` and width `W` that images are brought to by `centre_crop`.
        threads (`int`): Decode this many images at a time.

    Returns:
        Iterator of dictionaries: `levels` `(B, H, W, 3)`, uint8, of the images that can be decoded, their `rows` and
        `labels`, a list each; and `skipped`, of every other one its number, its name and the reason.
    """

    def decode(entry: tuple[int, Row]) -> Tensor | ImageError:
        try:
            return torch.tensor(np.asarray(centre_crop(image_of(entry[1]), shape)))
        except ImageError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        started: Iterator[Iterable[Any]] = (zip(batch, pool.map(decode, batch)) for batch in batches)
        # Pairs, because to get the second of two starts it while the first is collected.
        for decoded, _ in pairwise(chain(started, [()])):
            levels, rows, labels, skipped = [], [], [], []
            for (index, row), image in decoded:
                if isinstance(image, ImageError):
                    skipped.append((index, row["name"], str(image)))
                else:
                    levels.append(image)
                    rows.append(index)
                    labels.append(row["label"])
            stacked = torch.stack(levels) if levels else torch.empty(0, *shape, 3, dtype=torch.uint8)
            yield {"levels": stacked, "rows": rows, "labels": labels, "skipped": skipped}
