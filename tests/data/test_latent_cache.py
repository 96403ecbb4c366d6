"""Tests of `latent_cache`: rows, batches and draws, and caches and shards that are refused."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import noise, random_core
from latent_data import BROKEN, make_images, make_mixed_images, shards_in, tiny_kl, tiny_vision_features
from safetensors.torch import save_file

pytest.importorskip("datasets", reason="images are read through it")

import datasets
from torch.utils.data import DataLoader

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_cache import LatentCache, read_header, read_settings
from hieratok_hf.data.latent_writer import write_latents
from hieratok_hf.data.manifests import write_manifest
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.models.core import posterior_of

SMALL = {"size": 32, "shard_size": 4, "batch_size": 3}
ROWS = [row for row in range(14) if row != BROKEN]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """Caches of the same images: `moments`, `sample` without flips, and `kl` of a model that is not normalised."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        images = load_images(str(make_images(folder / "images")))
        write_latents(random_core(), images, folder / "moments", **SMALL)
        write_latents(random_core(), images, folder / "sample", kind="sample", flips=False, **SMALL)
        vision = tiny_vision_features()
        write_latents(random_core(), images, folder / "features", vision=vision, vision_layers=[2, 0], **SMALL)
        kl = tiny_kl(scaling_factor=0.5, shift_factor=0.25)
        write_latents(kl, images, folder / "kl", dtype=torch.bfloat16, **SMALL)
        write_latents(random_core(), load_images(str(folder / "images" / "hat")), folder / "unlabelled", **SMALL)
        mixed = load_images(str(make_mixed_images(folder / "mixed images")))
        write_latents(random_core(), mixed, folder / "mixed", max_aspect=2.0, multiple=8, **SMALL)
        yield folder


@pytest.fixture
def stored(space):
    def read(name, key):
        return torch.cat([shard[key] for shard in shards_in(space / name).values()]).float()

    return read


def test_rows_are_as_they_are_stored(space, stored):
    for name, key in (("moments", "moments"), ("sample", "latents"), ("kl", "moments")):
        cache = LatentCache(space / name)
        assert len(cache) == 13 and cache.rows.tolist() == ROWS and cache.labels.tolist() == [r // 7 for r in ROWS]
        assert cache.class_names == ["hat", "jacket"] and cache.flips is (name != "sample")
        for i in (0, 4, 12, -1):
            entry = cache[i]
            assert entry["row"] == ROWS[i] and entry["label"] == ROWS[i] // 7 and set(entry) == {key, "row", "label"}
            assert entry[key].dtype == torch.float32 and torch.equal(entry[key], stored(name, key)[i])
        for i in (13, -14):
            with pytest.raises(IndexError, match=str(i)):
                cache[i]
    cache = LatentCache(space / "unlabelled")
    assert cache.class_names == [] and cache.labels.tolist() == [-1] * 6 and cache[0]["label"] == -1


def test_batches_take_modes_of_any_rows_and_sides(space, stored):
    cache = LatentCache(space / "moments")
    indices, flipped = torch.tensor([12, 3, 3, -1, 0, 7]), torch.tensor([True, False, True, False, True, False])
    latents, labels = cache.batch(indices, flipped)
    plain, mirrored = stored("moments", "moments")[:, :4], stored("moments", "moments_flipped")[:, :4]
    expected = torch.where(flipped[:, None, None, None], mirrored[indices], plain[indices])
    assert torch.equal(latents, expected) and latents.dtype == torch.float32
    assert torch.equal(labels, cache.labels[indices])
    assert torch.equal(cache.batch([1, 2])[0], plain[1:3])
    empty, labels = cache.batch([])
    assert empty.shape == (0, *cache.latent_shape) and labels.shape == (0,)
    # As pipelines do with the latents of other models.
    kl = LatentCache(space / "kl")
    assert torch.equal(kl.batch([3, 9])[0], (stored("kl", "moments")[[3, 9], :4] - 0.25) * 0.5)


def test_draws_come_from_the_noise(space, stored):
    cache = LatentCache(space / "moments")
    eps = noise(13, 4, 8, 8)
    posterior = posterior_of(stored("moments", "moments"))
    drawn = cache.batch(range(13), [False] * 13, eps)[0]
    assert torch.equal(drawn, posterior.mean + posterior.std * eps)
    assert torch.equal(cache.batch(range(13), None, torch.zeros_like(eps))[0], cache.batch(range(13))[0])
    # What was drawn when it was written stays.
    samples = LatentCache(space / "sample")
    assert torch.equal(samples.batch([2], None, eps[:1])[0], stored("sample", "latents")[2:3])


def test_feature_maps_are_read_beside_the_latents(space, stored):
    cache = LatentCache(space / "features")
    assert cache.has_features and not LatentCache(space / "moments").has_features
    indices, flipped = [12, 3, 3, -1, 0], torch.tensor([True, False, True, False, True])
    for name, found in zip(("features_2", "features_0"), cache.features(indices, flipped), strict=True):
        sides = [stored("features", name)[indices], stored("features", f"{name}_flipped")[indices]]
        assert torch.equal(found, torch.where(flipped[:, None, None, None], *reversed(sides)))
        assert not torch.equal(*sides) and found.dtype == torch.float32
    assert LatentCache(space / "moments").features([0]) == []
    with pytest.raises(IndexError, match="13"):
        cache.features([13])
    with pytest.raises(ValueError, match="`flipped`"):
        cache.features([0, 1], [True])


def test_statistics_of_feature_maps_are_those_of_their_channels(space, stored):
    found = LatentCache(space / "features").feature_statistics()
    for name, (mean, std) in zip(("features_2", "features_0"), found, strict=True):
        values = torch.cat([stored("features", name), stored("features", f"{name}_flipped")]).double()
        expected = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
        torch.testing.assert_close((mean.double(), std.double()), expected, rtol=1e-5, atol=1e-6)


def test_statistics_of_latents_are_those_that_a_generator_sees(space):
    cache = LatentCache(space / "kl")
    values = torch.cat([cache.batch(range(13), [side] * 13)[0] for side in (False, True)])
    expected = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
    torch.testing.assert_close(cache.latent_statistics(), expected, rtol=1e-4, atol=1e-5)


def test_a_cache_knows_its_encoder(space):
    cache, kl = LatentCache(space / "kl"), tiny_kl()
    with torch.no_grad():
        kl.decoder.conv_out.bias += 1
        cache.check_encoder(Codec(kl))
        kl.encoder.conv_in.bias[0] += 1
    with pytest.raises(ValueError, match=r"kl' was written with the encoder \w{12}, not with \w{12}\."):
        cache.check_encoder(Codec(kl))


def test_bad_batches_are_refused(space):
    cache = LatentCache(space / "sample")
    for flipped in ([False, True], [False]):
        with pytest.raises(ValueError, match="`flipped`"):
            cache.batch([0, 1], flipped)
    with pytest.raises(IndexError, match="13"):
        cache.batch([0, 13])


def test_workers_and_copies_read_the_same(space):
    cache = LatentCache(space / "moments")
    first = cache[0]["moments"]
    assert len(pickle.dumps(cache)) < 10_000
    batches = list(DataLoader(cache, batch_size=5, num_workers=1))
    assert torch.equal(torch.cat([x["row"] for x in batches]), cache.rows)
    assert torch.equal(batches[0]["moments"][0], first)


def test_unfinished_damaged_and_other_folders_are_refused(space, tmp_path):
    shutil.copytree(space / "moments", tmp_path, dirs_exist_ok=True)
    settings = read_settings(tmp_path)
    (tmp_path / "shard-00002.safetensors").write_bytes(b"x" * 400)
    with pytest.raises(ValueError, match=r"shard '.*shard-00002\.safetensors' is damaged"):
        LatentCache(tmp_path)
    for shard in (1, 2):
        (tmp_path / f"shard-0000{shard}.safetensors").unlink()
    with pytest.raises(ValueError, match="of 4 shards the first to miss is 1"):
        LatentCache(tmp_path)
    for change, message in (({"format": 1}, "the format 2, got 1; write it anew"), ({"rows": None}, "is unfinished")):
        write_manifest(tmp_path / "cache.json", settings | change)
        with pytest.raises(ValueError, match=message):
            LatentCache(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cache\.json"):
        LatentCache(space / "images")


def test_shards_that_are_not_what_they_should_be_are_named(space, tmp_path):
    settings = read_settings(space / "sample")
    path = tmp_path / "shard-00001.safetensors"
    whole = (space / "sample" / path.name).read_bytes()
    path.write_bytes(whole)
    ((row, reason),) = read_header(path, settings)[1].items()
    assert row == BROKEN and "005.png" in reason and read_header(path, settings | {"rows": None})[0] == 3
    changes = ({"kind": "moments"}, {"flips": True}, {"dtype": "float32"}, {"latent_shape": [4, 8, 9]}, {"rows": 7})
    for change in changes:
        with pytest.raises(ValueError, match=r"shard '.*shard-00001\.safetensors' is damaged: it must h"):
            read_header(path, settings | change)
    for content in (b"", whole[:7], whole[:100], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard '.*shard-00001\.safetensors' is damaged: .+"):
            read_header(path, settings)
    for metadata in (
        None,
        {},
        *({"facts": x} for x in ("no JSON", "[]", "{}", '{"skipped": {"x": ""}}', "[" * 10**5)),
    ):
        save_file({"rows": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors' is damaged: .+"):
            read_header(path, settings)


def test_buckets_have_shapes_of_their_own(space):
    cache = LatentCache(space / "mixed")
    assert cache.latent_shape == (4, 8, 8) and len(cache) == 18
    assert cache.latent_shapes == {(24, 40): (4, 6, 10), (32, 32): (4, 8, 8), (40, 24): (4, 10, 6)}
    assert torch.cat([torch.from_numpy(x) for x in cache.buckets.values()]).tolist() == list(range(18))
    for shape, indices in cache.buckets.items():
        latents, labels = cache.batch(indices)
        assert latents.shape == (len(indices), *cache.latent_shapes[shape])
        assert torch.equal(labels, cache.labels[indices])
        for i, latent in zip(indices, latents):
            assert torch.equal(cache[i]["moments"][:4], latent)
    with pytest.raises(ValueError, match="`indices` must be those of images of one shape"):
        cache.batch(range(18))
    assert LatentCache(space / "moments").buckets == {}


def test_damaged_buckets_are_refused(space, tmp_path):
    shutil.copytree(space / "mixed", tmp_path, dirs_exist_ok=True)
    settings = read_settings(tmp_path)
    first, *others = settings["buckets"]
    for buckets in ([], {}, 5, [1], [{**first, "shape": [24]}], [{**first, "rows": 0}], [{**first, "checksum": 1}]):
        write_manifest(tmp_path / "cache.json", {**settings, "buckets": buckets})
        with pytest.raises(ValueError, match=r"cache\.json' is damaged: it has no valid 'buckets'"):
            LatentCache(tmp_path)
    write_manifest(tmp_path / "cache.json", {**settings, "buckets": [*others, first]})
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors' is damaged"):
        LatentCache(tmp_path)


@pytest.mark.parametrize("kind", ["moments", "sample", "kl", "mixed"])
def test_no_flipped_byte_goes_unnoticed(space, tmp_path, kind):
    shutil.copytree(space / kind, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "shard-00001.safetensors"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    data = 8 + int.from_bytes(whole[:8], "little")

    def read():
        cache = LatentCache(tmp_path)
        parts = list(cache.buckets.values()) or [range(13)]
        sides = (False, True) if cache.flips else (False,)
        return [cache.batch(part, [side] * len(part)) for part in parts for side in sides]

    before = read()
    for place in [*range(0, data, 7), *range(data, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.integers(8))]) + whole[place + 1 :])
        try:
            found = read()
        except ValueError as error:
            assert "shard-00001.safetensors' is damaged" in str(error) and "\n" not in str(error)
        else:
            assert place < data  # a header's reason for a row that was left out, say
            torch.testing.assert_close(found, before, rtol=0, atol=0)
    path.write_bytes(whole)
    settings = (tmp_path / "cache.json").read_bytes()
    for place in range(0, len(settings), 5):
        changed = bytes([settings[place] ^ 1])
        (tmp_path / "cache.json").write_bytes(settings[:place] + changed + settings[place + 1 :])
        with pytest.raises(ValueError, match=r"cache\.json"):
            LatentCache(tmp_path)
