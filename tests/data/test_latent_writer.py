"""Tests of `latent_writer`: shards equal encoding directly, runs that go on, streams, and what is refused."""

import copy
import json
import shutil
from itertools import islice
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from helpers import random_core, temporary_of, tree
from latent_data import (
    BROKEN,
    make_images,
    make_mixed_images,
    shards_in,
    tiny_kl,
    tiny_vision_features,
    tiny_without_posterior,
)
from transformers import ViTConfig, ViTModel

pytest.importorskip("datasets", reason="images are read through it")

import datasets

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.data import latent_writer as module
from hieratok_hf.data.image_dataset import Images, image_of, load_images
from hieratok_hf.data.latent_cache import read_settings
from hieratok_hf.data.latent_writer import write_latents
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.images import centre_crop, from_uint8

SMALL = {"size": 32, "shard_size": 4, "batch_size": 3, "dtype": torch.float32}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_images(folder / "images")
    return folder


@pytest.fixture
def images(space, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", space / "cache")
    return lambda **options: load_images(str(space / "images"), **options)


@pytest.fixture(scope="module")
def core():
    return random_core()


@pytest.fixture
def vision():
    return tiny_vision_features()


def directly(codec, data, kind):
    """Latents or moments of every image and of its mirror image, encoded at once."""
    (batch,) = EvaluationBatches(data, 32, 100)
    found = []
    with torch.no_grad():
        for pixel_values in (batch["pixel_values"], batch["pixel_values"].flip(-1)):
            if kind == "mode":
                found.append(codec.encode(pixel_values))
            elif codec.core is not None:
                found.append(codec.core.encode_moments(pixel_values)[0])
            else:
                found.append(codec.model.encode(pixel_values).latent_dist.parameters)
    return found, batch["rows"], batch["labels"]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (random_core, "moments"),
        (tiny_kl, "moments"),
        (tiny_kl, "mode"),
        (tiny_without_posterior, "mode"),
        (lambda: AutoencoderHieraTok.from_core(random_core()), "mode"),
    ],
)
def test_shards_hold_what_encoding_gives(model, kind, images, tmp_path):
    codec = Codec(model())
    summary = write_latents(codec, images(), tmp_path, kind=kind, **SMALL)
    shards = shards_in(tmp_path)
    assert list(shards) == [f"shard-0000{i}.safetensors" for i in range(4)]
    (plain, flipped), rows, labels = directly(codec, images(), kind)
    name = "moments" if kind == "moments" else "latents"
    expected = {name: plain, f"{name}_flipped": flipped, "rows": torch.tensor(rows), "labels": torch.tensor(labels)}
    found = {key: torch.cat([x[key] for x in shards.values()]) for key in next(iter(shards.values()))}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert rows == [row for row in range(14) if row != BROKEN] and set(labels) == {0, 1}
    assert [len(x["rows"]) for x in shards.values()] == [4, 3, 4, 2]
    reason = summary.pop("skipped").pop(BROKEN)
    assert "005.png" in reason and "cannot be decoded" in reason and summary.pop("seconds") > 0
    assert summary == {"rows": 14, "images": 13, "shards": 4, "encoded": 13, "written": 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_flips_and_limit(dtype, core, images, tmp_path):
    write_latents(core, images(), tmp_path, **{**SMALL, "dtype": dtype}, flips=False, limit=7)
    shards = shards_in(tmp_path)
    assert [set(x) for x in shards.values()] == [{"moments", "labels", "rows"}] * 2
    assert [x["rows"].tolist() for x in shards.values()] == [[0, 1, 2, 3], [4, 6]]
    (plain, _), *_ = directly(Codec(core), images(), "moments")
    found = torch.cat([x["moments"] for x in shards.values()])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), plain[:6], rtol=2**-7, atol=1e-3)


def test_a_sample_is_decided_by_seed_and_row(core, images, tmp_path):
    def write(name, **options):
        write_latents(core, images(), tmp_path / name, kind="sample", **{**SMALL, **options})
        shards = shards_in(tmp_path / name).values()
        return {key: torch.cat([x[key] for x in shards]) for key in ("latents", "latents_flipped", "rows")}

    one, other = write("one"), write("other", batch_size=2, shard_size=5)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    moments = torch.cat(directly(Codec(core), images(), "moments")[0])
    mean, logvar = moments.chunk(2, 1)
    drawn = torch.cat([one["latents"], one["latents_flipped"]])
    # Every image, and its mirror image, has noise of its own, and that is normal.
    noise = ((drawn - mean) / (0.5 * logvar.clamp(-30, 20)).exp()).flatten(1)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 0.3
    assert not torch.allclose(write("seed", seed=1)["latents"], one["latents"], atol=0.1)


def test_the_settings_tell_what_was_encoded(images, tmp_path):
    vae = tiny_kl(scaling_factor=0.5, shift_factor=0.25)
    write_latents(vae, images(), tmp_path, **SMALL, limit=3)
    settings = json.loads((tmp_path / "cache.json").read_text())
    assert len(settings.pop("encoder")) == 64 and settings.pop("source") == images().source
    assert settings.pop("data") == images().fingerprint and len(settings.pop("checksum")) == 8
    assert settings == {
        "format": 2, "kind": "moments", "flips": True, "dtype": "float32", "size": 32, "shard_size": 4, "seed": 0,
        "limit": 3, "rows": 3, "classes": ["hat", "jacket"], "latent_shape": [4, 16, 16], "precision": "float32",
        "scaling_factor": 0.5, "shift_factor": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_there_is_not_made_again(streaming, core, images, tmp_path, monkeypatch):
    write_latents(core, images(), tmp_path, **SMALL)
    whole = tree(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "shard-00003.safetensors").write_bytes(whole["shard-00003.safetensors"][:-1] + b"\x00")
    temporary_of(tmp_path / "shard-00009.safetensors").write_bytes(b"half")
    watched, told = Mock(wraps=core.encode_moments), []
    monkeypatch.setattr(core, "encode_moments", watched)
    data = images(streaming=streaming)
    summary = write_latents(core, data, tmp_path, **SMALL, progress=lambda *x: told.append(x))
    assert tree(tmp_path) == whole
    assert (summary["encoded"], summary["written"], summary["images"]) == (5, 2, 13)
    assert list(summary["skipped"]) == [BROKEN]  # although its shard may not have been made in this call
    _, *seen = (len(call.args[0]) for call in watched.call_args_list)  # the first is a blank image
    assert seen == [2, 2, 1, 1, 2, 2]  # an image is left out of the first batch
    assert told == [(3, 6), (4, 6), (6, 6)]
    summary = write_latents(core, data, tmp_path, **SMALL)
    assert (summary["encoded"], summary["written"]) == (0, 0) and tree(tmp_path) == whole


def test_a_stream_gives_the_same_files(core, images, tmp_path):
    told = []
    for streaming in (False, True):
        data, folder = images(streaming=streaming), tmp_path / str(streaming)
        write_latents(core, data, folder, **SMALL, limit=8, progress=lambda *x: told.append(x))
    assert tree(tmp_path / "False") == tree(tmp_path / "True")
    assert (8, 8) in told and (8, None) in told


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_that_breaks_off_goes_on(streaming, core, images, tmp_path):
    write_latents(core, images(), tmp_path / "whole", **SMALL)
    data, folder = images(streaming=True), tmp_path / "parts"

    def breaking():
        yield from islice(whole, 10)
        raise ConnectionError("reset by peer")

    whole, data.dataset = data.dataset, MagicMock(features=data.dataset.features)
    data.dataset.__iter__ = lambda self: breaking()
    with pytest.raises(ConnectionError, match="reset by peer"):
        write_latents(core, data, folder, **SMALL)
    assert json.loads((folder / "cache.json").read_text())["rows"] is None
    assert 1 <= len(shards_in(folder)) <= 2
    write_latents(core, images(streaming=streaming), folder, **SMALL)
    assert tree(folder) == tree(tmp_path / "whole")


def test_a_stream_with_other_rows_than_before_is_refused(core, images, tmp_path):
    write_latents(core, images(), tmp_path, **SMALL)
    (tmp_path / "shard-00000.safetensors").unlink()
    data = images(streaming=True)
    data.dataset = data.dataset.take(9)
    with pytest.raises(ValueError, match="must have 14 rows as before, got 9"):
        write_latents(core, data, tmp_path, **SMALL)


def test_images_that_changed_since_are_refused(core, tmp_path):
    folder = make_images(tmp_path / "images")
    write_latents(core, load_images(str(folder)), tmp_path / "cache", **SMALL)
    before = tree(tmp_path / "cache")
    shutil.copy(folder / "hat" / "001.png", folder / "hat" / "002.png")
    with pytest.raises(ValueError, match="holds another cache: data "):
        write_latents(core, load_images(str(folder)), tmp_path / "cache", **SMALL)
    assert tree(tmp_path / "cache") == before


def test_an_error_of_the_writer_surfaces(core, images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_write_shard", Mock(side_effect=OSError(28, "No space left on device")))
    for shard_size in (4, 100):
        with pytest.raises(OSError, match="No space left"):
            write_latents(core, images(), tmp_path / str(shard_size), **{**SMALL, "shard_size": shard_size})


def test_another_cache_in_the_folder_is_refused(core, images, tmp_path):
    write_latents(core, images(), tmp_path, **SMALL)
    before = tree(tmp_path)
    changes = {"kind": "mode", "flips": False, "dtype": torch.float16, "size": 16, "shard_size": 5, "seed": 1}
    for name, value in {**changes, "limit": 3}.items():
        with pytest.raises(ValueError, match=f"holds another cache: (.*; )?{name} "):
            write_latents(core, images(), tmp_path, **{**SMALL, name: value})
    with pytest.raises(ValueError, match="another cache: encoder"):
        write_latents(random_core(seed=1), images(), tmp_path, **SMALL)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="another cache: precision"):
        write_latents(core, images(), tmp_path, **SMALL)
    assert tree(tmp_path) == before
    other = copy.deepcopy(core)
    with torch.no_grad():
        other.decoder.head.bias += 1  # of no concern to latents
    assert write_latents(other, images(), tmp_path, **SMALL)["encoded"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0), ("size", 30), ("shard_size", 0), ("batch_size", -1), ("limit", 0), ("threads", 0),
        ("kind", "mean"), ("dtype", torch.int8),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_any_file(name, value, core, images, tmp_path):
    with pytest.raises(ValueError, match="30 x 30" if value == 30 else f"`{name}`"):
        write_latents(core, images(), tmp_path / "new", **{**SMALL, name: value})
    assert not (tmp_path / "new").exists()


def test_latents_that_overflow_are_refused(core, images, tmp_path):
    loud = random_core()
    with torch.no_grad():
        loud.encoder.head.bias[0] = 1e5
    with pytest.raises(ValueError, match="row 0 are not finite in float16; try another `dtype`"):
        write_latents(loud, images(), tmp_path, **{**SMALL, "dtype": torch.float16})
    assert not shards_in(tmp_path)


def test_only_broken_images_make_an_empty_shard_and_no_rows_are_refused(core, images, tmp_path):
    row = {"bytes": b"no image", "path": None}
    kinds = datasets.Features({"image": datasets.Image()})
    data = Images(datasets.Dataset.from_dict({"image": [row] * 3}, features=kinds), "here")
    for kind in ("moments", "sample"):
        summary = write_latents(core, data, tmp_path / kind, kind=kind, **SMALL)
        assert (summary["images"], summary["shards"], list(summary["skipped"])) == (0, 1, [0, 1, 2])
        assert shards_in(tmp_path / kind)["shard-00000.safetensors"]["labels"].shape == (0,)
    stream = Images(datasets.IterableDataset.from_generator(lambda: iter(()), features=kinds), "here")
    with pytest.raises(ValueError, match="No images found in here: it has no rows"):
        write_latents(core, stream, tmp_path / "stream", **SMALL)


def test_feature_maps_are_those_of_each_image_and_of_the_mirrored_one(core, vision, images, tmp_path):
    write_latents(core, images(), tmp_path / "with", **SMALL, vision=vision, vision_layers=(3, -2))
    write_latents(core, images(), tmp_path / "without", **SMALL)
    shards, plain = shards_in(tmp_path / "with").values(), shards_in(tmp_path / "without").values()
    found = {name: torch.cat([x[name] for x in shards]) for name in next(iter(shards))}
    (batch,) = EvaluationBatches(images(), 32, 100)
    for suffix, pixel_values in (("", batch["pixel_values"]), ("_flipped", batch["pixel_values"].flip(-1))):
        for name, expected in zip(("features_3", "features_15"), vision.feature_maps(pixel_values, [3, 15])):
            stored = found.pop(name + suffix)
            assert stored.dtype == torch.float16 and expected.std(0).mean() > 1e-3  # or all images were alike
            torch.testing.assert_close(stored, expected.half(), rtol=2**-9, atol=1e-3)
    for name, values in found.items():  # the latents are those of a cache without
        assert torch.equal(values, torch.cat([x[name] for x in plain])), name
    settings = read_settings(tmp_path / "with")
    assert settings["vision"].pop("weights") and settings["vision"] == {"model": "MobileNetV2", "layers": [3, 15]}
    write_latents(core, images(), tmp_path / "one side", **SMALL, flips=False, vision=vision)
    for shard in shards_in(tmp_path / "one side").values():
        assert set(shard) == {"moments", "features_16", "rows", "labels"}


def test_feature_maps_that_are_missing_or_damaged_are_made_again_by_the_same_model(core, vision, images, tmp_path):
    given = {**SMALL, "vision": vision, "vision_layers": [3]}
    write_latents(core, images(), tmp_path, **given)
    whole = tree(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    content = bytearray(whole["shard-00002.safetensors"])
    content[-1] ^= 1  # of the mirrored maps, the last of the tensors
    (tmp_path / "shard-00002.safetensors").write_bytes(content)
    assert write_latents(core, images(), tmp_path, **given)["written"] == 2 and tree(tmp_path) == whole
    other = tiny_vision_features(1)
    brighter = tiny_vision_features(mean=0.4)
    for change in ({"vision": other}, {"vision": brighter}, {"vision": None}, {"vision_layers": [4]}):
        with pytest.raises(ValueError, match=r"holds another cache: .*vision"):
            write_latents(core, images(), tmp_path, **{**given, **change})
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("layers", [[], [17], [-18], [3, 3], [16, -1]])
def test_layers_that_cannot_be_are_refused_before_any_file(layers, core, vision, images, tmp_path):
    with pytest.raises(ValueError, match="`vision_layers`"):
        write_latents(core, images(), tmp_path / "new", **SMALL, vision=vision, vision_layers=layers)
    assert not (tmp_path / "new").exists()


def test_images_that_the_vision_model_cannot_take_are_refused_before_any_file(core, images, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTModel(ViTConfig(**sizes, image_size=64, patch_size=64))
    with pytest.raises(ValueError, match="ViT cannot take images of 32 x 32 pixels"):
        write_latents(core, images(), tmp_path / "new", **SMALL, vision=VisionFeatures(vit, [0.5] * 3, [0.5] * 3))
    assert not (tmp_path / "new").exists()


def test_feature_maps_that_overflow_are_refused(core, vision, images, tmp_path):
    vision.model.layer[3].reduce_1x1.normalization.bias.data[0] = 1e5
    with pytest.raises(ValueError, match="features_3 of row 0 are not finite in float16; try other `vision_layers`"):
        write_latents(core, images(), tmp_path, **SMALL, vision=vision, vision_layers=[3])
    assert not shards_in(tmp_path)


MIXED = {**SMALL, "max_aspect": 2.0, "multiple": 8}
SHAPES = {(24, 40): 6, (32, 32): 9, (40, 24): 4}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return load_images(str(make_mixed_images(tmp_path_factory.mktemp("mixed"))))


@pytest.mark.parametrize("make", [random_core, tiny_kl])
def test_with_buckets_each_shard_is_of_one_shape(make, mixed, tmp_path):
    codec = Codec(make())
    summary = write_latents(codec, mixed, tmp_path, **MIXED)
    assert (summary["rows"], summary["images"], list(summary["skipped"])) == (19, 18, [BROKEN])
    buckets = read_settings(tmp_path)["buckets"]
    assert {tuple(bucket["shape"]): bucket["rows"] for bucket in buckets} == SHAPES
    shards, seen = list(shards_in(tmp_path).values()), []
    assert len(shards) == summary["shards"] == 2 + 3 + 1
    for shape, count in SHAPES.items():
        mine = [shards.pop(0) for _ in range(-(-count // 4))]
        rows = torch.cat([shard["rows"] for shard in mine]).tolist()
        seen += rows
        images = [centre_crop(image_of(mixed[row]), shape) for row in rows]
        levels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        for side, name in enumerate(("moments", "moments_flipped")):
            pixel_values = from_uint8(levels.flip(-1) if side else levels)
            with torch.no_grad():
                if codec.core is not None:
                    expected = codec.core.encode_moments(pixel_values)[0]
                else:
                    expected = codec.model.encode(pixel_values).latent_dist.parameters
            torch.testing.assert_close(torch.cat([x[name] for x in mine]), expected, atol=1e-4, rtol=1e-4)
        assert torch.cat([x["labels"] for x in mine]).tolist() == [mixed[row]["label"] for row in rows]
    assert sorted(seen) == [row for row in range(19) if row != BROKEN]


def test_with_buckets_feature_maps_are_of_the_shape_of_their_images(core, vision, mixed, tmp_path):
    write_latents(core, mixed, tmp_path, **MIXED, vision=vision, vision_layers=[2])
    for shard in shards_in(tmp_path).values():
        for row, found in zip(shard["rows"].tolist(), shard["features_2"]):
            height, width = (4 * side for side in shard["moments"].shape[2:])
            levels = torch.tensor(np.asarray(centre_crop(image_of(mixed[row]), (height, width))))
            (expected,) = vision.feature_maps(from_uint8(levels.permute(2, 0, 1)[None]), [2])
            torch.testing.assert_close(found, expected[0].half(), rtol=2**-9, atol=1e-3)


def test_with_buckets_what_is_missing_or_damaged_is_written_anew(core, mixed, tmp_path):
    write_latents(core, mixed, tmp_path, **MIXED)
    whole = tree(tmp_path)
    (tmp_path / "shard-00002.safetensors").unlink()
    shutil.copy(tmp_path / "shard-00000.safetensors", tmp_path / "shard-00001.safetensors")
    (tmp_path / "shard-00005.safetensors").write_bytes(whole["shard-00005.safetensors"][:-9])
    assert write_latents(core, mixed, tmp_path, **MIXED)["written"] == 3
    assert tree(tmp_path) == whole
    assert write_latents(core, mixed, tmp_path, **MIXED)["written"] == 0


def test_another_layout_of_buckets_and_squares_are_other_caches(core, mixed, tmp_path):
    write_latents(core, mixed, tmp_path, **MIXED)
    before = tree(tmp_path)
    for settings in ({**MIXED, "max_aspect": 1.0}, {**MIXED, "limit": 18}, SMALL):
        with pytest.raises(ValueError, match=r"holds another cache: (.*; )?other buckets\.$"):
            write_latents(core, mixed, tmp_path, **settings)
    assert tree(tmp_path) == before
    write_latents(core, mixed, tmp_path / "squares", **SMALL)
    with pytest.raises(ValueError, match=r"holds another cache: other buckets\.$"):
        write_latents(core, mixed, tmp_path / "squares", **MIXED)


def test_buckets_that_cannot_be_are_refused_before_any_file(core, mixed, images, tmp_path):
    for change in ({"max_aspect": 0.5}, {"multiple": 20}):
        with pytest.raises(ValueError, match=f"`{next(iter(change))}`|multiple of 20"):
            write_latents(core, mixed, tmp_path / "new", **{**MIXED, **change})
    with pytest.raises(ValueError, match="30 x"):
        write_latents(core, mixed, tmp_path / "new", **{**MIXED, "size": 30, "multiple": 30})
    with pytest.raises(ValueError, match="is a stream"):
        write_latents(core, images(streaming=True), tmp_path / "new", **MIXED)
    assert not (tmp_path / "new").exists()
