"""Tests of `latent_batches`: the same images however they are divided, from a cache or encoded on the way."""

import functools
from functools import partial

import pytest
import torch
from helpers import random_core
from latent_data import make_images, make_mixed_images, tiny_kl, tiny_vision_features

from hieratok_hf.data import training_batches
from hieratok_hf.data.aspect_buckets import aspect_buckets, group_by_aspect
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_batches import iterate_cached, iterate_encoded
from hieratok_hf.data.latent_cache import LatentCache
from hieratok_hf.data.latent_writer import write_latents
from hieratok_hf.data.training_batches import BatchPlan
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.images import centre_crop

pytestmark = pytest.mark.usefixtures("script_surroundings")
COUNT, SIZE = 10, 32
PLAN = partial(BatchPlan, 4, (SIZE,), 7, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"), COUNT, broken=None)


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    @functools.cache
    def make(kind="moments"):
        folder = tmp_path_factory.mktemp(kind)
        settings = {"size": SIZE, "kind": kind, "dtype": torch.float32, "shard_size": 4}
        settings |= {"vision": tiny_vision_features(), "vision_layers": [1, 2]}
        write_latents(random_core(), load_images(str(data)), folder, **settings)
        return LatentCache(folder)

    return make


@pytest.fixture
def encoded(data):
    return partial(iterate_encoded, Codec(random_core()), (4, 8, 8), load_images(str(data)))


@pytest.fixture(params=["cached", "encoded"])
def batches(request, cache, encoded):
    return partial(iterate_cached, cache()) if request.param == "cached" else partial(encoded, 2)


def test_every_image_comes_once_in_an_epoch_and_half_are_mirrored(cache):
    data = cache("mode")
    plain, mirrored = data.batch(range(COUNT))[0], data.batch(range(COUNT), [True] * COUNT)[0]
    rows, sides = [], []
    for batch in iterate_cached(data, BatchPlan(4, (SIZE,), 60)):
        for latent, label in zip(batch["latents"], batch["labels"]):
            is_plain = (plain == latent).flatten(1).all(1)
            row = (is_plain | (mirrored == latent).flatten(1).all(1)).nonzero().item()
            assert label == data.labels[row]
            rows.append(row)
            sides.append(bool(is_plain[row]))
    for start in range(0, len(rows), COUNT):
        assert sorted(rows[start : start + COUNT]) == list(range(COUNT))
    assert 0.4 < sum(sides) / len(sides) < 0.6


def test_features_are_those_of_the_images_beside_them(cache):
    data = cache("mode")
    latents = torch.cat([data.batch(range(COUNT), [side] * COUNT)[0] for side in (False, True)])
    maps = zip(data.features(range(COUNT)), data.features(range(COUNT), [True] * COUNT))
    maps = [torch.cat(sides) for sides in maps]
    for batch in iterate_cached(data, PLAN(), with_features=True):
        images = [(latents == latent).flatten(1).all(1).nonzero().item() for latent in batch["latents"]]
        assert all(torch.equal(found, every[images]) for found, every in zip(batch["features"], maps, strict=True))
    assert all(batch["features"] == [] for batch in iterate_cached(data, PLAN()))


def test_processes_and_parts_divide_the_same_images(batches):
    whole = list(batches(PLAN()))
    shares = [list(batches(PLAN(world_size=2, rank=rank))) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([part["rows"] for part in parts]), torch.arange(4))
        assert batch["count"] == parts[0]["count"] == 4
        assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])
        torch.testing.assert_close(torch.cat([part["latents"] for part in parts]), batch["latents"])
    accumulated = list(batches(PLAN(parts=2)))
    assert [(batch["step"], batch["part"]) for batch in accumulated[:3]] == [(0, 0), (0, 1), (1, 0)]
    torch.testing.assert_close(torch.cat([batch["latents"] for batch in accumulated[:2]]), whole[0]["latents"])


def test_moments_are_drawn_anew_each_time(cache):
    data, noise = cache(), []
    modes = torch.cat([data.batch(range(COUNT), [side] * COUNT)[0] for side in (False, True)])
    for batch in iterate_cached(data, BatchPlan(COUNT, (SIZE,), 2)):
        differences = batch["latents"][:, None] - modes
        nearest = differences.flatten(2).norm(dim=2).argmin(1)
        noise.append(dict(zip(nearest.tolist(), differences[range(COUNT), nearest])))
    both = noise[0].keys() & noise[1].keys()
    assert both and all(noise[0][i].std() > 0 and not torch.equal(noise[0][i], noise[1][i]) for i in both)


def middle(image, shape, rng, scale):
    crop = centre_crop(image, shape)
    return crop.transpose(0) if rng.random() < 0.5 else crop  # Image.Transpose.FLIP_LEFT_RIGHT is 0


@pytest.mark.parametrize("make", [random_core, partial(tiny_kl, scaling_factor=0.5, shift_factor=0.25)])
def test_a_cache_gives_what_encoding_on_the_way_gives(make, data, tmp_path, monkeypatch):
    """The images of 32 x 40 pixels are cut otherwise, so both read those cut to the middle."""
    monkeypatch.setattr(training_batches, "random_crop", middle)
    codec, images = Codec(make()), load_images(str(data))
    write_latents(codec, images, tmp_path, size=SIZE, dtype=torch.float32)
    encoded = iterate_encoded(codec, codec.latent_shape(SIZE), images, 2, PLAN())
    for ours, theirs in zip(iterate_cached(LatentCache(tmp_path), PLAN()), encoded, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["latents"], theirs["latents"], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    images = load_images(str(make_mixed_images(folder / "images", broken=None)))
    write_latents(
        random_core(), images, folder / "latents", size=SIZE, max_aspect=2.0, multiple=8, dtype=torch.float32
    )
    return images, LatentCache(folder / "latents")


def test_with_buckets_a_cache_gives_what_encoding_on_the_way_gives(mixed, monkeypatch):
    images, cache = mixed
    monkeypatch.setattr(training_batches, "random_crop", middle)
    codec = Codec(random_core())
    buckets = group_by_aspect(images.read_sizes(), aspect_buckets(SIZE, 8))
    # The cache's indices of the rows, so that both plans mean the same images.
    indices = {shape: cache.rows[found].numpy() for shape, found in cache.buckets.items()}
    assert {shape: rows.tolist() for shape, rows in buckets.items()} == {k: v.tolist() for k, v in indices.items()}
    encoded = iterate_encoded(codec, codec.latent_shape(SIZE), images, 2, PLAN(buckets=(buckets,)))
    shapes = set()
    for ours, theirs in zip(iterate_cached(cache, PLAN(buckets=(cache.buckets,))), encoded, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["latents"], theirs["latents"], atol=1e-4, rtol=1e-4)
        shapes.add(tuple(ours["latents"].shape[1:]))
    assert len(shapes) > 1


def test_with_buckets_processes_divide_the_same_latents_and_resume(mixed):
    plan = partial(PLAN, buckets=(mixed[1].buckets,))
    whole = list(iterate_cached(mixed[1], plan()))
    shares = [list(iterate_cached(mixed[1], plan(world_size=2, rank=rank))) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part["latents"] for part in parts]), batch["latents"])
    for ours, theirs in zip(iterate_cached(mixed[1], plan(), 4), whole[4:], strict=True):
        assert torch.equal(ours["latents"], theirs["latents"]) and ours["step"] == theirs["step"]


def test_a_label_that_is_no_class_is_refused(encoded):
    with pytest.raises(ValueError, match="labels must be from 0 to 0, one is 1"):
        list(encoded(1, PLAN()))
