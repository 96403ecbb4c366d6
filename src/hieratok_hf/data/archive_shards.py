"""The files that an archive of latents is made of, in each of three formats: packed from images, and unpacked."""

import io
import json
import lzma
import tarfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

__all__ = ["FILE_FORMATS", "TOKENS_FORMAT", "FileFormat", "ImageRecord"]

# Shape letters: C latent channels, h w the latent's grid.

TOKENS_FORMAT = "tokens"
"""The one format of integers."""

# More than any shard that was packed here needs; a hostile one would fill the memory.
_XZ_MEMORY = 2**26
_BYTES_A_RECORD, _BYTES_A_PIXEL = 2**15, 64


class ImageRecord(NamedTuple):
    """
    Tell which image a latent is of.

    Attributes:
        name (`str`): The path of its file below the folder that was encoded, with `/` between its parts.
        width, height (`int`): Its sides in pixels, upright.
        box (`tuple[int, int, int, int]`): Left, top, right and bottom of the part that was encoded.
    """

    name: str
    width: int
    height: int
    box: tuple[int, int, int, int]


class FileFormat(NamedTuple):
    """
    Hold what turns images and their latents, tensors `(C, h, w)` of a dtype of the format, or integers of quantised
    ones, into a file and back.

    Attributes:
        suffix (`str`): How names of such files end.
        pack (callable): Makes the content of a file, the same for the same images and latents.
        unpack (callable): Reads the latents of a content, in the order of the images; any error where it is damaged.
    """

    suffix: str
    pack: Callable[[Sequence[ImageRecord], Sequence[Tensor]], bytes]
    unpack: Callable[[bytes, Sequence[ImageRecord]], list[Tensor]]


def _pack_safetensors(records: Sequence[ImageRecord], latents: Sequence[Tensor]) -> bytes:
    facts = json.dumps([record._asdict() for record in records])
    return save({record.name: latent for record, latent in zip(records, latents)}, {"records": facts})


def _unpack_safetensors(content: bytes, records: Sequence[ImageRecord]) -> list[Tensor]:
    tensors = load(content)
    return [tensors[record.name] for record in records]


def _pack_tar(records: Sequence[ImageRecord], latents: Sequence[Tensor]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for index, (record, latent) in enumerate(zip(records, latents)):
            array = io.BytesIO()
            np.save(array, latent.numpy())
            # webdataset takes a name up to its first dot for the key, which names of images are not made for.
            for kind, value in (("json", json.dumps(record._asdict()).encode()), ("npy", array.getvalue())):
                member = tarfile.TarInfo(f"{index:06d}.{kind}")  # without the time, which no two files would share
                member.size = len(value)
                archive.addfile(member, io.BytesIO(value))
    return packed.getvalue()


def _unpack_tar(content: bytes, records: Sequence[ImageRecord]) -> list[Tensor]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        members: list[Any] = [archive.extractfile(f"{index:06d}.npy") for index in range(len(records))]
        return [torch.from_numpy(np.load(io.BytesIO(member.read()), allow_pickle=False)) for member in members]


def _pack_parquet(records: Sequence[ImageRecord], latents: Sequence[Tensor]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    arrays = [latent.numpy() for latent in latents]
    starts = np.cumsum([0, *(array.size for array in arrays)])
    numbers = pyarrow.array(np.concatenate([array.ravel() for array in arrays] or [np.empty(0, np.float32)]))
    columns: dict[str, Any] = {
        "name": pyarrow.array([record.name for record in records], pyarrow.string()),
        "width": pyarrow.array([record.width for record in records], pyarrow.int32()),
        "height": pyarrow.array([record.height for record in records], pyarrow.int32()),
        "box": pyarrow.array([record.box for record in records], pyarrow.list_(pyarrow.int32())),
        "shape": pyarrow.array([array.shape for array in arrays], pyarrow.list_(pyarrow.int32())),
        "latents": pyarrow.ListArray.from_arrays(pyarrow.array(starts, pyarrow.int32()), numbers),
    }
    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), packed, use_dictionary=False)
    return packed.getvalue()


def _unpack_parquet(content: bytes, records: Sequence[ImageRecord]) -> list[Tensor]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content), columns=["shape", "latents"])
    rows = zip(table["latents"], table["shape"].to_pylist(), strict=True)
    # Copied, because Arrow's memory is not to be written to.
    return [torch.tensor(values.values.to_numpy()).reshape(shape) for values, shape in rows]


def _pack_tokens(records: Sequence[ImageRecord], tokens: Sequence[Tensor]) -> bytes:
    return lzma.compress(_pack_safetensors(records, tokens))


def _unpack_tokens(content: bytes, records: Sequence[ImageRecord]) -> list[Tensor]:
    pixels = sum((right - left) * (bottom - top) for left, top, right, bottom in (record.box for record in records))
    most = _BYTES_A_RECORD * (1 + len(records)) + _BYTES_A_PIXEL * pixels
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    unpacked = decompressor.decompress(content, max_length=most)
    if not decompressor.eof:
        raise ValueError("it is cut, or holds more than its images")
    return _unpack_safetensors(unpacked, records)


FILE_FORMATS = {
    "safetensors": FileFormat(".safetensors", _pack_safetensors, _unpack_safetensors),
    "webdataset": FileFormat(".tar", _pack_tar, _unpack_tar),
    "parquet": FileFormat(".parquet", _pack_parquet, _unpack_parquet),
    TOKENS_FORMAT: FileFormat(".xz", _pack_tokens, _unpack_tokens),
}
"""
The formats by name: tensors under the images' names; tar files of `000000.json` and `000000.npy`; rows of columns
`name`, `width`, `height`, `box`, `shape` and `latents`; and, of integers, the file of tensors compressed by LZMA.
"""
