"""Tests of `archive_shards`: what other programs read in the files, and that equal latents make equal files."""

import io
import json
import lzma
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import noise
from safetensors import safe_open

from hieratok_hf.data.archive_shards import FILE_FORMATS, TOKENS_FORMAT, ImageRecord
from hieratok_hf.utils.choices import ARCHIVE_FORMATS

PICTURES = [ImageRecord("a.png", 12, 8, (0, 0, 12, 8)), ImageRecord("b/c.d.jpg", 21, 9, (0, 0, 20, 8))]
LATENTS = [noise(4, 2, 3), noise(4, 2, 5, seed=1).half().float()]
TEXTS = [record._asdict() | {"box": [*record.box]} for record in PICTURES]


@pytest.fixture(params=ARCHIVE_FORMATS)
def packed(request, tmp_path):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


def test_latents_come_back_and_files_are_equal(packed):
    dtypes, packed = ARCHIVE_FORMATS[packed], FILE_FORMATS[packed]
    for dtype in dtypes:
        latents = [latent.to(getattr(torch, dtype)) for latent in LATENTS]
        content = packed.pack(PICTURES, latents)
        assert content == packed.pack(PICTURES, latents)
        for found, latent in zip(packed.unpack(content, PICTURES), latents, strict=True):
            assert found.dtype == latent.dtype and torch.equal(found, latent)
    assert packed.unpack(packed.pack([], []), []) == []


def test_safetensors_have_names_of_images(tmp_path):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(FILE_FORMATS["safetensors"].pack(PICTURES, LATENTS))
    with safe_open(path, "pt") as file:
        assert {*file.keys()} == {"a.png", "b/c.d.jpg"} and torch.equal(file.get_tensor("b/c.d.jpg"), LATENTS[1])
        assert json.loads(file.metadata()["records"]) == TEXTS


def test_tar_files_have_a_key_a_image():
    with tarfile.open(fileobj=io.BytesIO(FILE_FORMATS["webdataset"].pack(PICTURES, LATENTS))) as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive}
    assert [*contents] == ["000000.json", "000000.npy", "000001.json", "000001.npy"]
    assert [json.loads(contents[f"00000{i}.json"]) for i in range(2)] == TEXTS
    assert np.array_equal(np.load(io.BytesIO(contents["000001.npy"])), LATENTS[1])


def test_datasets_reads_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "shard.parquet").write_bytes(FILE_FORMATS["parquet"].pack(PICTURES, LATENTS))
    rows = datasets.Dataset.from_parquet(str(tmp_path / "shard.parquet"), cache_dir=str(tmp_path / "cache"))
    assert [{name: row[name] for name in ImageRecord._fields} for row in rows] == TEXTS
    for row, latent in zip(rows, LATENTS):
        assert np.array_equal(np.float32(row["latents"]).reshape(row["shape"]), latent)


def test_integers_take_about_their_entropy_and_other_programs_read_them():
    generator = torch.Generator().manual_seed(0)
    # As likely as 1/2, 1/4, ..., so that an integer takes about 2 bits.
    tokens = torch.empty(16, 64, 64).geometric_(0.5, generator=generator).clamp(max=64).to(torch.uint8)
    record = ImageRecord("a.png", 512, 512, (0, 0, 512, 512))
    content = FILE_FORMATS[TOKENS_FORMAT].pack([record], [tokens])
    assert 2.0 < 8 * len(content) / tokens.numel() < 2.5  # LZMA takes a fifth more for so few different ones
    (found,) = FILE_FORMATS[TOKENS_FORMAT].unpack(content, [record])
    assert found.dtype == torch.uint8 and torch.equal(found, tokens)
    assert lzma.decompress(content) == FILE_FORMATS["safetensors"].pack([record], [tokens])


HOSTILE = {
    "more than its images": lzma.compress(bytes(10**8)),
    "a large dictionary": lzma.compress(b"x", preset=9),
    "no compression": b"levels",
    "cut": lzma.compress(bytes(range(256)) * 9)[:-9],
    "nothing": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_integers_are_an_error_and_fill_no_memory(content):
    tracemalloc.start()
    with pytest.raises(Exception):  # noqa: B017 (any, which the archive tells as damage)
        FILE_FORMATS[TOKENS_FORMAT].unpack(content, PICTURES)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
