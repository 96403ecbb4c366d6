"""Tests of `hieratok encode`: kills at any moment, what it prints and writes, bad input."""

import re

import pytest
import torch
from archive_files import BROKEN, SIZES, write_images
from diffusers import VQModel
from helpers import images, random_core, tree
from latent_data import make_images
from processes import kill_and_go_on
from scripts import error_of, usage_error, with_defaults

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.cli import encode as script
from hieratok_hf.data.latent_archive import LatentArchive


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models and images."""
    folder = tmp_path_factory.mktemp("encoding")
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder / "hieratok")
    fitted = AutoencoderHieraTok.from_core(random_core())
    fitted.fit_quantizer([images(2, 3, 48, 48)])
    fitted.save_pretrained(folder / "fitted")
    channels = {"block_out_channels": (8,), "norm_num_groups": 4, "num_vq_embeddings": 4}
    VQModel(**channels).save_pretrained(folder / "no tiles")
    write_images(folder / "in")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(space):
    """Call `main` with the folder of the archive and further arguments; gives the exit status."""

    def call(archive, *given, folder=None):
        defaults = {"--model": space / "hieratok", "--device": "cpu"}
        return script.main([str(folder or space / "in"), str(archive), *with_defaults(list(given), defaults)])

    return call


def test_killed_at_any_moment_the_archive_is_the_same(space, tmp_path):
    images = make_images(tmp_path / "images", 60, broken=None)

    def run(name, **options):
        given = [str(images), str(tmp_path / name), "--model", str(space / "hieratok"), "--shard_size", "2"]
        return {"arguments": [*given, "--device", "cpu"], "output": str(tmp_path / name), **options}

    kills = [run("parts", kill=0.03), run("parts", kill=0.03), run("parts", cut=4)]
    told = kill_and_go_on(script, "shard-*.safetensors", [run("whole"), *kills, run("parts")], tmp_path / "cache")
    assert [ended["ended"] for ended in told] == [True, False, False, False, True], told
    assert 0 < told[1]["files"] < told[3]["files"] < 30, told
    whole = tree(tmp_path / "whole")
    assert len(whole) == 61 and tree(tmp_path / "parts") == whole


def test_what_it_prints_and_writes(run, space, tmp_path, capsys):
    options = ["--tiling", "--format", "webdataset", "--shard_size", 4, "--dtype", "float32", "--fit", "crop"]
    assert run(tmp_path / "new" / "archive", *options) == 1
    out, err = capsys.readouterr()
    assert out == f"6 images in {str(tmp_path / 'new' / 'archive')!r}, 3 failed; 6 encoded now\n"
    names = re.findall(r"[\r\n]failed: '(.*?)': ", err)
    assert sorted(names) == sorted([*BROKEN, "c 1/dot.png"])
    archive = LatentArchive(tmp_path / "new" / "archive")
    stored = [archive.settings[name] for name in ("tiling", "file_format", "shard_size", "dtype", "fit", "model")]
    assert stored == [True, "webdataset", 4, "float32", "crop", str(space / "hieratok")]
    assert [record.name for record in archive.records] == [name for name in SIZES if name != "c 1/dot.png"]
    assert run(tmp_path / "new" / "archive", *options) == 1
    assert capsys.readouterr().out.endswith("; 0 encoded now\n")


def test_bits_make_integers_of_the_latents(run, space, tmp_path):
    sizes = {}
    for bits in (2, 6):
        assert run(tmp_path / str(bits), "--bits", bits, "--model", space / "fitted") == 1
        archive = LatentArchive(tmp_path / str(bits))
        assert {record.name for record in archive.records} == {*SIZES} and archive.settings["bits"] == bits
        largest = max(int(tokens.max()) for _, tokens in archive.iterate_stored())
        assert 2 ** (bits - 1) <= largest < 2**bits
        sizes[bits] = (tmp_path / str(bits) / "shard-00000.xz").stat().st_size
    assert run(tmp_path / "latents") == 1
    whole = (tmp_path / "latents" / "shard-00000.safetensors").stat().st_size
    assert sizes[2] < sizes[6] < 0.6 * whole


def test_mixed_precision_is_recorded_and_close(run, space, tmp_path):
    for name, options in (("plain", []), ("mixed", ["--mixed_precision", "bf16"])):
        assert run(tmp_path / name, *options) == 1
    plain, mixed = (LatentArchive(tmp_path / name) for name in ("plain", "mixed"))
    assert (plain.settings["precision"], mixed.settings["precision"]) == ("float32", "bfloat16")
    a, b = (torch.cat([latent.flatten() for _, latent in x]).float() for x in (plain, mixed))
    assert 0 < (a - b).norm() < 0.03 * a.norm()


BAD = {
    "a missing model": ({"--model": "missing/model"}, "--model 'missing/model' cannot be loaded"),
    "a model without tiles": ({"--model": "{space}/no tiles", "--tiling": None}, "--tiling needs .* got VQModel"),
    "no levels": ({"--bits": "6"}, "`bits` needs .*quantizer.safetensors"),
    "a missing folder": ({"folder": "missing"}, "FOLDER .*missing' to ARCHIVE .*No such file"),
    "a file for a folder": ({"folder": "in/a.png"}, "FOLDER .*Not a directory"),
    "a folder without images": ({"folder": "empty"}, "FOLDER .*No images found in .*empty"),
    "an archive in the folder": ({"archive": "in/b/archive"}, "must not lie in"),
    "the folder itself": ({"archive": "in"}, "must not lie in"),
    "a file for the archive": ({"archive": "hieratok/config.json"}, "ARCHIVE .*config.json"),
    "a folder of a model": ({"archive": "strange"}, r"holds shards, but no archive\.json"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, run, space, tmp_path, capsys):
    (space / "strange").mkdir(exist_ok=True)
    (space / "strange" / "shard-00000.safetensors").write_bytes(b"")
    before = sorted(space.rglob("*"))
    archive = space / given["archive"] if "archive" in given else tmp_path / "new"
    options = [text for pair in given.items() if pair[0].startswith("--") for text in pair if text]
    options = [text.format(space=space) for text in options]
    folder = space / given["folder"] if "folder" in given else None
    assert run(archive, *options, folder=folder) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert sorted(space.rglob("*")) == before and not list(tmp_path.iterdir())


def test_a_link_into_the_folder_is_seen_through(run, space, tmp_path, capsys):
    (tmp_path / "link").symlink_to(space / "in")
    assert run(tmp_path / "link" / "archive") == 2 and "must not lie in" in error_of(capsys)


def test_bits_are_from_1_to_8_and_stand_alone(tmp_path, capsys):
    for given, message in (
        (["--bits", "9"], "--bits: must be a whole number from 1 to 8, got '9'"),
        (["--bits", "6", "--format", "parquet"], "--bits and --format contradict"),
        (["--bits", "6", "--dtype", "float32"], "--bits and --dtype contradict"),
    ):
        assert message in usage_error(capsys, script.main, "in", tmp_path / "new", *given)
    assert not list(tmp_path.iterdir())


def test_dtypes_that_a_format_has_not_are_refused(tmp_path, capsys):
    for name in ("webdataset", "parquet"):
        text = usage_error(capsys, script.main, "in", tmp_path / "new", "--format", name, "--dtype", "bfloat16")
        assert f"--dtype must be one of float16, float32 with --format {name}, got bfloat16" in text
    assert not list(tmp_path.iterdir())
