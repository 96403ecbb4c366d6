"""Tests of `latent_file`: a shard alone reads as its archive, and what is damaged or of another model is refused."""

import json

import pytest
import torch
from archive_files import write_images
from helpers import random_core
from safetensors.torch import save

from hieratok_hf.data.latent_archive import LatentArchive, write_archive
from hieratok_hf.data.latent_file import LatentFile
from hieratok_hf.models.autoencoder_adapter import Codec

RECORD = {"name": "a.png", "width": 8, "height": 12, "box": [0, 0, 8, 12]}
LATENT = torch.randn(4, 3, 2)


@pytest.fixture(scope="module")
def codec():
    return Codec(random_core())


def write(folder, tensors, rows, **metadata):
    path = folder / "latents.safetensors"
    path.write_bytes(save(tensors, {"records": json.dumps(rows), **metadata}))
    return path


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_a_shard_alone_reads_as_its_archive(codec, tmp_path, dtype):
    write_images(tmp_path / "in")
    write_archive(codec, tmp_path / "in", tmp_path / "out", model="mine", dtype=dtype)
    archive, alone = LatentArchive(tmp_path / "out"), LatentFile(tmp_path / "out" / "shard-00000.safetensors")
    alone.check_encoder(codec)
    assert alone.records == archive.records and len(alone) == len(archive) > 3
    for (record, latent), (expected, other) in zip(alone, archive, strict=True):
        assert record == expected and latent.dtype == dtype and torch.equal(latent, other)


def test_a_file_tells_its_model_and_itself_from_others(tmp_path):
    one = LatentFile(write(tmp_path, {"a.png": LATENT}, [RECORD], model="mine"))
    other = LatentFile(write(tmp_path, {"a.png": LATENT + 1}, [RECORD]))
    assert (one.settings["model"], other.settings["model"]) == ("mine", "")
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "rows",
    (None, {}, [1], [{**RECORD, "name": "../a.png"}], [{**RECORD, "box": [0, 0, 9, 12]}], [RECORD, RECORD]),
)
def test_records_that_are_none_or_lead_elsewhere_are_refused(tmp_path, rows):
    path = write(tmp_path, {"a.png": LATENT, "../a.png": LATENT + 1}, rows)
    with pytest.raises(ValueError, match=r"latents.safetensors.* damaged"):
        LatentFile(path)


@pytest.mark.parametrize("latent", (LATENT[0], LATENT.long(), None))
def test_what_is_no_latent_is_refused(tmp_path, latent):
    path = write(tmp_path, {"b.png": LATENT} if latent is None else {"a.png": latent}, [RECORD])
    with pytest.raises(ValueError, match=r"no latent of 'a.png'"):
        LatentFile(path)


def test_damage_is_told_in_one_line(tmp_path):
    path = write(tmp_path, {"a.png": LATENT}, [RECORD])
    whole = path.read_bytes()
    for content in (b"", b"no latents", whole[:-1], whole[:40], save({"a.png": LATENT})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"latents.safetensors' is no file of latents") as caught:
            LatentFile(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("latent", (LATENT[:3], LATENT[:, :2], torch.randn(4, 3, 3)))
def test_latents_of_another_shape_are_refused_by_the_encoder(codec, tmp_path, latent):
    LatentFile(write(tmp_path, {"a.png": LATENT}, [RECORD])).check_encoder(codec)
    with pytest.raises(ValueError, match=r"'a.png' must have the shape .4, 3, 2."):
        LatentFile(write(tmp_path, {"a.png": latent.contiguous()}, [RECORD])).check_encoder(codec)
