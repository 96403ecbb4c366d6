"""Images by row from folders, tar shards and data sets of the Hub, through Hugging Face `datasets`."""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import count
from pathlib import Path
from tarfile import TarError
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.images import ImageError, centre_square, decode_image, open_image

__all__ = ["Images", "Row", "decode_ahead", "load_images", "image_of"]

Row = dict[str, Any]
"""An image of a data set, not decoded, as `Images` gives it."""

_FILES = (".tar", ".parquet", ".zip", ".png", ".jpg", ".jpeg", ".webp")  # what no data set of the Hub is called
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_LABELS = ("label", "labels", "cls", "class", "fine_label")


class Images(Dataset):
    """
    Rows `{"image": {"bytes", "path"}, "name", "label"}` of a data set, its images not decoded; `label` is an integer
    or `None`. A stream has no length and is iterated.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Has a column of images.
        source (`str`): What messages call it.

    Raises:
        ValueError: It has no column of images, or no rows.
    """

    def __init__(self, dataset: Any, source: str):
        import datasets

        features = dataset.features or {}
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise ValueError(f"No images found in {source}: no column of them in {sorted(features)}.")
        self.streaming = isinstance(dataset, datasets.IterableDataset)
        if not self.streaming and not len(dataset):
            raise ValueError(f"No images found in {source}: it has no rows.")
        self.source, self.column = source, columns[0]
        self.label = next((name for name in _LABELS if name in features), None)
        self.dataset = dataset.cast_column(self.column, datasets.Image(decode=False))

    @property
    def class_names(self) -> list[str]:
        """Name the labels, where the data does."""
        return list(getattr((self.dataset.features or {}).get(self.label), "names", None) or [])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return self._row(self.dataset[int(index)], index)

    def __iter__(self) -> Iterator[Row]:
        return (self._row(example, index) for index, example in enumerate(self.dataset))

    def shuffled(self, seed: int, buffer_size: int = 1000) -> Iterator[Row]:
        """The rows of a stream in an order that the seed decides, epoch after epoch; `ValueError` without rows."""
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
        if "__url__" in example:
            name = f"{example['__url__']}:{name}"
        label = example[self.label] if self.label else None
        return {"image": image, "name": name, "label": label if isinstance(label, int) else None}


def load_images(source: str | Sequence[str], *, split: str = "train", streaming: bool = False) -> Images:
    """
    Images from a folder, webdataset tar shards (`"shards/train-*.tar"`), or a data set of the Hub.

    Args:
        source (`str` or a sequence of them): A folder of images, or one that `datasets.load_dataset` understands
            (shards, parquet); folders in it named `train`, `validation` or `test` are its splits. A path or pattern of
            tar shards. The id of a data set, with a configuration after a colon. Several are read as one, and must
            then be of one kind and hold the same columns.
        split (`str`, defaults to `"train"`): Split of a folder or data set.
        streaming (`bool`, defaults to `False`): Read while training instead of first making a copy in the cache.

    Raises:
        ImportError: The package `datasets` is not installed.
        ValueError: There is nothing at a source, it holds no images, or sources do not go together.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError('Reading images needs datasets: pip install "hieratok_hf[train]"') from error
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise ValueError("No images found: no source was given.")
    parts: list[Images] = []
    for name in sources:
        is_folder = Path(name).is_dir()
        files = [] if is_folder else sorted(glob(name))
        if wrong := [file for file in files if not file.endswith(".tar")]:
            raise ValueError(f"{wrong[0]!r} must be a folder, a data set or a tar shard in webdataset style.")
        local = name.startswith((".", "/")) or name.endswith(_FILES) or "*" in name or name.count("/") > 1
        if not is_folder and not files and local:
            raise ValueError(f"No images found in {name!r}: there is no such file, folder or pattern.")
        repository, _, config = name.partition(":")
        path = (name, None) if is_folder else (repository, config or None)
        try:
            if files:
                found = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=streaming)
            elif is_folder and _holds_one_split(Path(name)):
                # Left to itself, datasets takes words in the names of images for splits, as in bullet_train.jpg.
                one = {split: ["**"]}
                found = datasets.load_dataset(
                    "imagefolder", data_dir=name, data_files=one, split=split, streaming=streaming
                )
            else:
                found = datasets.load_dataset(*path, split=split, streaming=streaming)
        except (OSError, ValueError, RuntimeError, TarError, DatasetsError) as error:
            # That a data set could not be made is said by one error, why by its cause.
            reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
            raise ValueError(f"No images found in {name!r}: {' '.join(str(reason).split())}") from error
        parts.append(Images(found, repr(name)))
    if len(parts) == 1:
        return parts[0]
    label = ", ".join(part.source for part in parts)
    columns, labels = ({getattr(part, name) for part in parts} - {None} for name in ("column", "label"))
    if len(columns) > 1 or len(labels) > 1:
        # Joined, the images of one would be missing in the column of the other.
        names = f"{sorted(columns)} and {sorted(labels)}"
        raise ValueError(f"{label} must have their images and labels in the same columns, got {names}.")
    try:
        return Images(datasets.concatenate_datasets([part.dataset for part in parts]), label)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{label} do not go together: {' '.join(str(error).split())}") from error


def _holds_one_split(folder: Path) -> bool:
    """Whether a folder holds images and no folders that are named as splits."""
    if any(path.is_dir() and path.name.lower() in _SPLITS for path in folder.iterdir()):
        return False
    return any(path.suffix.lower() in _IMAGES for path in folder.rglob("*"))


def image_of(row: Row) -> Image.Image:
    """The upright RGB image of a row of `Images`; `ImageError` where it cannot be decoded."""
    image = row["image"]
    if image["bytes"] is None and image["path"] is not None:
        return open_image(image["path"])
    return decode_image(image["bytes"] or b"", row["name"])


def decode_ahead(batches: Iterable[Sequence[tuple[int, Row]]], size: int, threads: int) -> Iterator[dict[str, Any]]:
    """
    Decode batches of numbered rows in threads, one batch ahead.

    Args:
        batches (iterable of sequences of `(int, Row)`): The rows of `Images` with their numbers.
        size (`int`): Side `S` that images are brought to by `centre_square`.
        threads (`int`): Decode this many images at a time.

    Returns:
        Iterator of dictionaries: `levels` `(B, S, S, 3)`, uint8, of the images that can be decoded, their `rows` and
        `labels`, a list each; and `skipped`, of every other one its number, its name and the reason.
    """

    def decode(entry: tuple[int, Row]) -> Tensor | ImageError:
        try:
            return torch.tensor(np.asarray(centre_square(image_of(entry[1]), size)))
        except ImageError as error:
            return error

    def collate(batch: Sequence[tuple[int, Row]], decoded: Iterable[Tensor | ImageError]) -> dict[str, Any]:
        levels, rows, labels, skipped = [], [], [], []
        for (index, row), image in zip(batch, decoded):
            if isinstance(image, ImageError):
                skipped.append((index, row["name"], str(image)))
            else:
                levels.append(image)
                rows.append(index)
                labels.append(row["label"])
        stacked = torch.stack(levels) if levels else torch.empty(0, size, size, 3, dtype=torch.uint8)
        return {"levels": stacked, "rows": rows, "labels": labels, "skipped": skipped}

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[Sequence[tuple[int, Row]], Iterator[Tensor | ImageError]]] = deque()
        for batch in batches:
            ahead.append((batch, pool.map(decode, batch)))
            if len(ahead) > 1:
                yield collate(*ahead.popleft())
        for pair in ahead:
            yield collate(*pair)
