"""A file of latents alone: a shard of an archive in safetensors, or what the page of `web/` writes."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..models.autoencoder_adapter import Codec
from ..utils.choices import LATENT_DTYPES
from .archive_shards import ImageRecord
from .latent_archive import LatentArchive, cell_of, read_records

__all__ = ["LatentFile"]


class LatentFile(LatentArchive):
    """
    Read a safetensors file with a tensor `(C, h, w)` under the name of each image and, as JSON in its metadata, the
    `records` that say of which part of an image each is; `model` may name the autoencoder beside them. It serves as a
    `LatentArchive` of these images, but does not know its encoder's weights.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such file, is damaged, or a name leads out of a folder.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        content = self.folder.read_bytes()
        self._digest = hashlib.sha256(content).hexdigest()
        try:
            latents = load(content)
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
            rows = json.loads(metadata.get("records", "null"))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is no file of latents: {' '.join(str(error).split())}") from error
        self.records = read_records(rows, path)
        self.skipped = {}
        self.settings: dict[str, Any] = {"model": metadata.get("model", ""), "tiling": False}
        self._latents = []
        for record in self.records:
            latent = latents.get(record.name)
            if latent is None or latent.ndim != 3 or str(latent.dtype).removeprefix("torch.") not in LATENT_DTYPES:
                raise ValueError(f"{str(path)!r} is damaged: it has no latent of {record.name!r}.")
            self._latents.append(latent)

    @property
    def fingerprint(self) -> str:
        """Tell the file from other files: a SHA-256 of its content."""
        return self._digest

    def iterate_stored(self) -> Iterator[tuple[ImageRecord, Tensor]]:
        """Iterate over the images and their latents `(C, h, w)`, in the dtype of the file."""
        yield from zip(self.records, self._latents)

    def __iter__(self) -> Iterator[tuple[ImageRecord, Tensor]]:
        return self.iterate_stored()

    def check_encoder(self, codec: Codec) -> None:
        """Raise `ValueError` unless the latents have the channels, rows and columns that this encoder gives them."""
        cell, channels = cell_of(codec), codec.latent_shape(64)[0]
        for record, latent in zip(self.records, self._latents):
            left, top, right, bottom = record.box
            expected = channels, math.ceil((bottom - top) / cell), math.ceil((right - left) / cell)
            if (got := tuple(latent.shape)) != expected:
                name = f"the latent of {record.name!r}"
                raise ValueError(f"{str(self.folder)!r}: {name} must have the shape {expected}, got {got}.")
