"""A data set of latents, read by row from the shards that `write_latents` wrote."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..models.autoencoder_adapter import Codec
from ..models.core import posterior_of
from .latent_shards import read_header, read_settings, shard_path, shards_of, stored_name, stored_shape
from .latent_writer import encoder_facts, write_latents

__all__ = ["LatentCache", "write_latents"]

# Shape letters: B batch, C latent channels, h w the latent's grid.


class LatentCache(Dataset):
    """
    Read what `write_latents` wrote; index `i` runs over images in the order of their rows. Shards are mapped into
    memory when they are first used, in each worker for itself.

    Args:
        folder (`str` or `Path`): The folder.

    Attributes:
        settings (`dict`): The content of `cache.json`.
        flips (`bool`), latent_shape (`tuple` `(C, h, w)`), class_names (`list`, empty where unknown): Of those.
        labels, rows (`torch.Tensor` of shape `(len(self),)`): int64; a label is -1 where there is none.

    Raises:
        FileNotFoundError: There is no `cache.json`.
        ValueError: The cache is unfinished or of another format, or a shard is damaged; the message names it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = settings = read_settings(self.folder)
        if settings["rows"] is None:
            raise ValueError(f"{str(folder)!r} is unfinished: its stream has not come to an end. Go on writing it.")
        paths = [shard_path(self.folder, shard) for shard in shards_of(settings)]
        if missing := [shard for shard, path in enumerate(paths) if not path.exists()]:
            numbers = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
            raise ValueError(
                f"{str(folder)!r} is unfinished: {len(missing)} of {len(paths)} shards are missing: {numbers}."
            )
        self.flips, self.latent_shape = settings["flips"], tuple(settings["latent_shape"])
        self.class_names: list[str] = settings["classes"]
        columns = []
        for path in paths:
            read_header(path, settings)
            with safe_open(path, "pt") as file:
                columns.append([file.get_tensor(name) for name in ("labels", "rows")])
        self.labels, self.rows = (torch.cat(column) for column in zip(*columns))
        self._starts = np.cumsum([0] + [len(labels) for labels, _ in columns])
        self._paths, self._name = paths, stored_name(settings)
        self._mapped: dict[tuple[int, bool], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        `latents` `(C, h, w)` or `moments` `(2C, h, w)` as they are stored, float32; `label` and `row`. `IndexError`
        for an index beyond.
        """
        values = self._read([index], [False])[0].float()
        return {self._name: values, "label": int(self.labels[index]), "row": int(self.rows[index])}

    def batch(
        self,
        indices: Sequence[int] | Tensor,
        flipped: Sequence[bool] | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Many images at once, as a generator of diffusers is fed them: `(x - shift_factor) * scaling_factor`, which
        changes nothing for HieraTok, whose latents arrive normalised.

        Args:
            indices (sequence of `int` or `torch.Tensor` of shape `(B,)`): Which images.
            flipped (sequence of `bool` or `torch.Tensor` of shape `(B,)`, *optional*): Which of them mirrored.
            noise (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): Standard normal, to draw from moments, whose
                mode is given without. Samples and modes are as they were written, with or without it.

        Returns:
            The latents `(B, C, h, w)`, float32, and the labels `(B,)`, int64.

        Raises:
            IndexError: An index is not one of an image.
            ValueError: `flipped` has another length, or asks for what was not written.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64).tolist()
        sides = [False] * len(chosen) if flipped is None else torch.as_tensor(flipped, dtype=torch.bool).tolist()
        if len(sides) != len(chosen):
            raise ValueError(f"`flipped` must have the length of `indices`, {len(chosen)}, got {len(sides)}.")
        if any(sides) and not self.settings["flips"]:
            raise ValueError(f"`flipped` must be false throughout: {str(self.folder)!r} was written without flips.")
        values = self._read(chosen, sides)
        if self._name == "moments":
            if noise is None:
                values = values[:, : self.settings["latent_shape"][0]]
            else:
                posterior = posterior_of(values.float())
                values = posterior.mean + posterior.std * noise
        return (values.float() - self.settings["shift_factor"]) * self.settings["scaling_factor"], self.labels[chosen]

    def _read(self, indices: list[int], flipped: list[bool]) -> Tensor:
        if wrong := [index for index in indices if not -len(self) <= index < len(self)]:
            raise IndexError(f"There are {len(self)} images in {str(self.folder)!r}, got index {wrong[0]}.")
        numbers = np.asarray(indices, dtype=np.int64) % max(len(self), 1)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        places = numbers - self._starts[shards]
        dtype = getattr(torch, self.settings["dtype"])
        values = torch.empty(len(indices), *stored_shape(self.settings), dtype=dtype)
        # As bytes, which NumPy has for every dtype: to copy row by row, torch takes four times as long.
        levels = values.view(torch.uint8).numpy()
        for i, (shard, place, side) in enumerate(zip(shards.tolist(), places.tolist(), flipped)):
            if (shard, side) not in self._mapped:
                with safe_open(self._paths[shard], "pt") as file:
                    stored = file.get_tensor(self._name + "_flipped" * side)
                self._mapped[shard, side] = stored.view(torch.uint8).numpy()
            levels[i] = self._mapped[shard, side][place]
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # a worker maps the shards itself

    def check_encoder(self, codec: Codec) -> None:
        """`ValueError` unless the latents were written with the encoder of this autoencoder, tensor for tensor."""
        if (got := encoder_facts(codec)["encoder"]) != self.settings["encoder"]:
            wanted = self.settings["encoder"]
            raise ValueError(f"{str(self.folder)!r} was written with the encoder {wanted[:12]}, not with {got[:12]}.")

    def to_dataset(self) -> Any:
        """
        A `datasets.Dataset` of `latents` or `moments` as they are stored, `label` and `row`, in the cache of datasets.

        Raises:
            ImportError: The package `datasets` is not installed.
        """
        return self._as_datasets("Dataset")

    def to_iterable_dataset(self) -> Any:
        """
        The same as a `datasets.IterableDataset` that copies nothing, with as many shards as there are files.

        Raises:
            ImportError: The package `datasets` is not installed.
        """
        return self._as_datasets("IterableDataset")

    def _as_datasets(self, kind: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError('Turning a cache to datasets needs it: pip install "hieratok_hf[eval]"') from error
        classes = self.settings["classes"]
        features = {
            self._name: datasets.Array3D(stored_shape(self.settings), "float32"),
            "label": datasets.ClassLabel(names=classes) if classes else datasets.Value("int64"),
            "row": datasets.Value("int64"),
        }
        # `datasets` knows its own copies by these arguments, so they must change with the files.
        stamp = json.dumps([self.settings, [path.stat().st_mtime_ns for path in self._paths]])
        arguments = {"name": self._name, "shards": list(map(str, self._paths)), "stamp": stamp}
        make = getattr(datasets, kind).from_generator
        return make(_examples, features=datasets.Features(features), gen_kwargs=arguments)


def _examples(name: str, shards: list[str], stamp: str) -> Iterator[dict[str, Any]]:
    for path in shards:
        with safe_open(path, "pt") as file:
            stored, labels, rows = (file.get_tensor(key) for key in (name, "labels", "rows"))
        for values, label, row in zip(stored, labels.tolist(), rows.tolist()):
            yield {name: values.float().numpy(), "label": label, "row": row}
