"""Tests of `hieratok cache`: kills at any moment, several processes, what it prints, bad input."""

import re

import pytest
import torch
from helpers import tree
from latent_data import BROKEN, make_images, make_mixed_images, save_autoencoders, shards_in
from local_data import write_shard
from processes import kill_and_go_on
from scripts import error_of, load_script, save_vision_model, usage_error, with_defaults

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf.data.latent_cache import LatentCache

script = load_script("cli", "cache")
pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models and images, a broken one among them."""
    folder = tmp_path_factory.mktemp("caching")
    save_autoencoders(folder)
    save_vision_model(folder / "vision")
    make_images(folder / "images")
    return folder


@pytest.fixture
def run(space):
    """Call `main` with the folder of the cache and further arguments; gives the exit status."""

    def call(output, *given):
        defaults = {"--model": space / "hieratok", "--data": space / "images", "--output": output, "--device": "cpu"}
        return script.main(with_defaults(list(given), defaults))

    return call


def test_killed_at_any_moment_every_row_is_there_once(space, tmp_path):
    images = make_images(tmp_path / "images", 60)
    vision = save_vision_model(tmp_path / "vision")
    squares = ["--data", images, "--kind", "sample", "--vision_model", vision, "--vision_layers", "3", "-1"]
    buckets = ["--data", make_mixed_images(tmp_path / "mixed"), "--size", "32"]
    buckets += ["--aspect_buckets", "--bucket_step", "8"]

    def run(name, given, *more, **options):
        defaults = {"--model": space / "hieratok", "--device": "cpu", "--output": tmp_path / name}
        given = with_defaults([*given, *more, "--shard_size", "2", "--batch_size", "1"], defaults)
        return {"arguments": given, "output": str(tmp_path / name), **options}

    stream, two, kill = "--streaming", {"world": 2}, {"kill": 0.02}
    runs = [run("whole", squares), run("stream", squares, stream), run("two", squares, **two)]
    runs += [run("parts", squares, stream, **kill), run("parts", squares, **two, **kill)]
    runs += [run("parts", squares, stream, cut=4), run("parts", squares, **two)]
    runs += [run("bucket whole", buckets), run("bucket parts", buckets, cut=3), run("bucket parts", buckets, **two)]
    told = kill_and_go_on(script, "shard-*", runs, tmp_path / "cache")
    assert all(told[i]["ended"] for i in (0, 1, 2, 6, 7, 9)) and not told[5]["ended"] and not told[8]["ended"], told
    assert not told[3]["ended"] and 0 < told[3]["files"] < told[5]["files"] < 30, told
    whole = tree(tmp_path / "whole")
    assert len(whole) == 31
    for name in ("stream", "two", "parts"):
        assert tree(tmp_path / name) == whole, name
    assert LatentCache(tmp_path / "parts").rows.tolist() == [row for row in range(60) if row != BROKEN]
    assert tree(tmp_path / "bucket parts") == tree(tmp_path / "bucket whole")
    cache = LatentCache(tmp_path / "bucket parts")
    assert sorted(cache.rows.tolist()) == [row for row in range(19) if row != BROKEN]
    assert cache.latent_shapes == {(24, 40): (4, 6, 10), (32, 32): (4, 8, 8), (40, 24): (4, 10, 6)}


def test_what_it_prints_and_writes(run, tmp_path, capsys):
    options = ["--shard_size", 5, "--dtype", "bfloat16", "--no_flips", "--max_images", 12, "--size", 16]
    assert run(tmp_path / "new" / "latents", *options) == 0
    left_out, summary, latents = capsys.readouterr().out.strip().splitlines()
    assert re.match(r"left out: '.*005\.png': cannot be decoded", left_out)
    assert re.fullmatch(r"11 images in '.*latents', 1 left out; 11 encoded now at \d+\.\d images/s", summary)
    between = r"(-?\d+\.\d\d) to (-?\d+\.\d\d)"
    what = "11 latents of 4 x 4 x 4 in bfloat16, their channels"
    told = re.fullmatch(f"{what} of mean {between} and std {between}", latents)
    values, _ = LatentCache(tmp_path / "new" / "latents").batch(range(11))
    figures = [f(x) for x in (values.mean((0, 2, 3)), values.std((0, 2, 3))) for f in (min, max)]
    assert list(map(float, told.groups())) == pytest.approx(list(map(float, figures)), abs=0.01)
    shards = shards_in(tmp_path / "new" / "latents").values()
    assert {(x["moments"].dtype, tuple(x["moments"].shape[1:]), len(x)) for x in shards} == {
        (torch.bfloat16, (8, 4, 4), 3)
    }
    assert run(tmp_path / "new" / "latents", *options) == 0
    assert "0 encoded now at 0.0 images/s\n" in capsys.readouterr().out


def test_a_cache_has_the_names_beside_the_shards_and_one_from_before_goes_on_without(run, tmp_path):
    shard = write_shard(tmp_path / "a.tar", [0, 1, 3, 4])
    for name in ("before", "after"):
        assert run(tmp_path / name, "--data", shard, "--shard_size", 2, "--size", 16) == 0
        (tmp_path / "meta.json").write_text('{"classes": ["hat", "jacket"]}')
    before = tree(tmp_path / "before")
    (tmp_path / "before" / "shard-00001.safetensors").unlink()
    assert run(tmp_path / "before", "--data", shard, "--shard_size", 2, "--size", 16) == 0
    assert tree(tmp_path / "before") == before
    assert LatentCache(tmp_path / "before").class_names == []
    assert LatentCache(tmp_path / "after").class_names == ["hat", "jacket"]


def test_mixed_precision_is_recorded_and_close(run, space, tmp_path):
    for name, options in (("plain", []), ("mixed", ["--mixed_precision", "bf16"])):
        assert run(tmp_path / name, "--kind", "mode", "--model", space / "kl", *options) == 0
    plain, mixed = (LatentCache(tmp_path / name) for name in ("plain", "mixed"))
    assert (plain.settings["precision"], mixed.settings["precision"]) == ("float32", "bfloat16")
    a, b = (cache.batch(range(13))[0] for cache in (plain, mixed))
    assert 0 < (a - b).norm() < 0.03 * a.norm()


BAD = {
    "a missing model": (["--model", "missing/model"], "--model 'missing/model' cannot be loaded: .*no folder or repo"),
    "a size that does not fit": (["--size", "30"], "cannot take images of 30 x 30 pixels: .*patch size 4"),
    "no posterior": (["--model", "{space}/tiny", "--size", "32"], "AutoencoderTiny has no posterior: `kind` must be"),
    "a missing vision model": (["--vision_model", "missing/model"], "--vision_model 'missing/model' cannot be loaded"),
    "a layer that is not there": (["--vision_model", "{space}/vision", "--vision_layers", "17"], "`vision_layers`"),
    "a step of buckets": (
        ["--aspect_buckets", "2", "--bucket_step", "24", "--size", "32"],
        "--bucket_step 24, got 32",
    ),
    "a file for a folder": (["--output", "{space}/kl/config.json"], "--output .*config.json' cannot be written: "),
    "shards without settings": (["--output", "{space}/strange"], r"holds shards, but no cache\.json"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, run, space, tmp_path, capsys):
    (space / "strange").mkdir(exist_ok=True)
    (space / "strange" / "shard-00000.safetensors").write_bytes(b"")
    assert run(tmp_path / "new", *[text.format(space=space) for text in given]) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert not list(tmp_path.iterdir())


def test_layers_without_a_vision_model_are_refused(capsys, tmp_path):
    given = ["--data", "x", "--output", tmp_path / "new", "--vision_layers", 3]
    assert "--vision_layers needs --vision_model" in usage_error(capsys, script.main, *given)
