"""Tests of `latent_cache`: rows, batches and draws, what `datasets` makes of them, and caches that are refused."""

import json
import pickle
import sys

import pytest
import torch
from helpers import noise, random_core
from latent_data import BROKEN, make_images, shards_in, tiny_kl

pytest.importorskip("datasets", reason="images are read through it")

import datasets
from torch.utils.data import DataLoader

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_cache import LatentCache, write_latents
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
        kl = tiny_kl(scaling_factor=0.5, shift_factor=0.25)
        write_latents(kl, images, folder / "kl", dtype=torch.bfloat16, **SMALL)
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
        for i in (0, 4, 12, -1):
            entry = cache[i]
            assert entry["row"] == ROWS[i] and entry["label"] == ROWS[i] // 7 and set(entry) == {key, "row", "label"}
            assert entry[key].dtype == torch.float32 and torch.equal(entry[key], stored(name, key)[i])
        for i in (13, -14):
            with pytest.raises(IndexError, match=f"There are 13 images in '.*{name}', got index {i}"):
                cache[i]


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
    assert empty.shape == (0, 4, 8, 8) and labels.shape == (0,)


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


def test_other_models_are_normalised_as_pipelines_do(space, stored):
    cache = LatentCache(space / "kl")
    assert torch.equal(cache.batch([3, 9])[0], (stored("kl", "moments")[[3, 9], :4] - 0.25) * 0.5)


def test_a_cache_knows_its_encoder_and_shapes(space):
    cache = LatentCache(space / "kl")
    assert cache.flips and cache.latent_shape == (4, 16, 16) and cache.class_names == ["hat", "jacket"]
    kl = tiny_kl()
    cache.check_encoder(Codec(kl))
    with torch.no_grad():
        kl.decoder.conv_out.bias += 1
    cache.check_encoder(Codec(kl))
    with torch.no_grad():
        kl.encoder.conv_in.bias[0] += 1
    with pytest.raises(ValueError, match=r"kl' was written with the encoder \w{12}, not with \w{12}\."):
        cache.check_encoder(Codec(kl))


def test_bad_batches_are_refused(space):
    cache = LatentCache(space / "sample")
    with pytest.raises(ValueError, match=r"`flipped` must be false throughout: .* written without flips"):
        cache.batch([0, 1], [False, True])
    with pytest.raises(ValueError, match="`flipped` must have the length of `indices`, 2, got 1"):
        cache.batch([0, 1], [False])
    with pytest.raises(IndexError, match=r"There are 13 images in .*, got index 13"):
        cache.batch([0, 13])


def test_workers_and_copies_read_the_same(space):
    cache = LatentCache(space / "moments")
    first = cache[0]["moments"]
    assert len(pickle.dumps(cache)) < 10_000
    assert torch.equal(pickle.loads(pickle.dumps(cache))[0]["moments"], first)
    batches = list(DataLoader(cache, batch_size=5, num_workers=1))
    assert torch.equal(torch.cat([x["row"] for x in batches]), cache.rows)
    assert torch.equal(batches[0]["moments"][0], first)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_hold_the_same(streaming, space, stored, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for name, key in (("moments", "moments"), ("sample", "latents")):
        cache = LatentCache(space / name)
        data = cache.to_iterable_dataset() if streaming else cache.to_dataset()
        assert isinstance(data, datasets.IterableDataset if streaming else datasets.Dataset)
        assert data.features["label"].names == ["hat", "jacket"]
        assert data.features[key] == datasets.Array3D(tuple(stored(name, key).shape[1:]), "float32")
        if streaming:
            assert data.num_shards == 4
        rows = list(data.with_format("torch"))
        assert [int(row["row"]) for row in rows] == ROWS and [int(row["label"]) for row in rows] == [
            row // 7 for row in ROWS
        ]
        assert torch.equal(torch.stack([row[key] for row in rows]), stored(name, key))


def test_a_stream_divides_its_files_over_workers(space):
    data = LatentCache(space / "moments").to_iterable_dataset().with_format("torch")
    rows = [int(row) for batch in DataLoader(data, batch_size=4, num_workers=2) for row in batch["row"]]
    assert sorted(rows) == ROWS


def test_a_changed_cache_is_not_mistaken_for_the_old_one(space, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = load_images(str(space / "images" / "hat"))
    found = []
    for seed in (0, 1):
        for path in (tmp_path / "latents").glob("*"):
            path.unlink()
        write_latents(random_core(seed=seed), images, tmp_path / "latents", kind="mode", **SMALL)
        found.append(LatentCache(tmp_path / "latents").to_dataset().with_format("torch")[0]["latents"])
        assert torch.equal(found[-1], LatentCache(tmp_path / "latents")[0]["latents"])
    assert not torch.equal(*found)


def test_images_without_labels_have_minus_one(space, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_latents(random_core(), load_images(str(space / "images" / "hat")), tmp_path / "latents", **SMALL)
    cache = LatentCache(tmp_path / "latents")
    assert cache.class_names == [] and cache.labels.tolist() == [-1] * 6 and cache[0]["label"] == -1
    data = cache.to_dataset()
    assert data["label"][:] == [-1] * 6 and data.features["label"] == datasets.Value("int64")


def test_the_missing_package_is_named(space, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("to_dataset", "to_iterable_dataset"):
        with pytest.raises(ImportError, match=r'pip install "hieratok_hf\[eval\]"'):
            getattr(LatentCache(space / "moments"), name)()


def test_unfinished_damaged_and_other_folders_are_refused(space, tmp_path):
    for path in (space / "moments").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "shard-00002.safetensors").write_bytes(b"x" * 400)
    with pytest.raises(ValueError, match=r"shard '.*shard-00002\.safetensors' is damaged"):
        LatentCache(tmp_path)
    for shard in (1, 2):
        (tmp_path / f"shard-0000{shard}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is unfinished: 2 of 4 shards are missing: 1, 2\."):
        LatentCache(tmp_path)
    for change, message in (({"format": 7}, "the format 1, got 7"), ({"rows": None}, "its stream has not come to an")):
        (tmp_path / "cache.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            LatentCache(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"images' is no cache of latents: it has no cache\.json"):
        LatentCache(space / "images")
