"""Tests of `hieratok decode`: names, sizes and figures are those of the images, kills at any moment, bad input."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from archive_files import SIZES, write_images
from helpers import images, random_core, tree
from image_files import noise
from latent_data import make_images, tiny_kl
from PIL import Image
from processes import kill_and_go_on
from scripts import error_of, usage_error

from hieratok_hf import AutoencoderHieraTok, open_image
from hieratok_hf.cli import decode as script
from hieratok_hf.cli import reconstruct
from hieratok_hf.data.latent_archive import LatentArchive, decode_record, write_archive
from hieratok_hf.evaluation.metrics import psnr
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.choices import ARCHIVE_FORMATS
from hieratok_hf.utils.images import from_uint8, to_uint8


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models, images, and archives of them."""
    folder = tmp_path_factory.mktemp("decoding")
    core, kl = random_core(), tiny_kl()
    AutoencoderHieraTok.from_core(core).save_pretrained(folder / "hieratok")
    AutoencoderHieraTok.from_core(random_core(seed=1)).save_pretrained(folder / "other")
    dense = random_core(scale_causal=False)
    AutoencoderHieraTok.from_core(dense).save_pretrained(folder / "dense")
    kl.save_pretrained(folder / "kl")
    records = write_images(folder / "in")
    for name, model in (("archive", core), ("archive of dense", dense), ("archive of kl", kl)):
        model_name = str(folder / name.removeprefix("archive of ").replace("archive", "hieratok"))
        write_archive(model, records, folder / name, model=model_name, dtype=torch.float32)
    return folder


@pytest.fixture
def run(space):
    """Call `main` with a folder and further arguments; gives the exit status."""

    def call(folder, *given, archive="archive"):
        return script.main([str(x) for x in (space / archive, folder, "--device", "cpu", *given)])

    return call


def sizes_in(folder):
    """The width and height of every file in a folder, by name."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): Image.open(path).size for path in files}


def values_of(image):
    return from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1)[None]


@pytest.mark.parametrize("archive", ["archive", "archive of kl", "archive of dense"])
def test_files_have_the_names_sizes_and_formats_of_the_images(archive, run, space, tmp_path, capsys):
    assert run(tmp_path / "new" / "out", archive=archive) == 0
    out = tmp_path / "new" / "out"
    assert sizes_in(out) == SIZES
    assert capsys.readouterr().out == f"7 images written to {str(out)!r}, 0 were there, 0 failed\n"
    for name, kind in (("a.png", "PNG"), ("b/upright.jpg", "JPEG"), ("z.gif", "GIF"), ("c 1/é.bmp", "BMP")):
        assert Image.open(out / name).format == kind


@pytest.mark.parametrize("file_format", ARCHIVE_FORMATS)
def test_the_figures_are_those_of_reconstruct(file_format, space, tmp_path):
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    pytest.importorskip("torchmetrics")
    for i, (height, width) in enumerate([(32, 48), (33, 47), (20, 12)]):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(noise(height, width, seed=i)).save(tmp_path / "in" / f"{i}.png")
    model = str(space / "hieratok")
    given = [str(tmp_path / "in"), "--output", str(tmp_path / "sheets"), "--json", str(tmp_path / "f.json")]
    assert reconstruct.main([*given, "--model", model, "--device", "cpu"]) == 0
    figures = {x["image"]: x["psnr_db"] for x in json.loads((tmp_path / "f.json").read_text())["images"]}
    core = random_core()
    options = {"dtype": torch.float32, "fit": "crop", "model": model, "file_format": file_format}
    write_archive(core, tmp_path / "in", tmp_path / "archive", **options)
    assert script.main([str(tmp_path / "archive"), str(tmp_path / "out"), "--device", "cpu"]) == 0
    for record in LatentArchive(tmp_path / "archive").records:
        original = open_image(tmp_path / "in" / record.name).crop(record.box)
        decoded = open_image(tmp_path / "out" / record.name)
        value = psnr(values_of(decoded), values_of(original)).item()
        assert value == pytest.approx(figures[str(tmp_path / "in" / record.name)], abs=1e-3)


def test_what_was_encoded_in_tiles_is_decoded_in_tiles(space, tmp_path):
    Image.fromarray(noise(320, 280)).save(tmp_path / "a.png")
    vae = AutoencoderHieraTok.from_pretrained(space / "hieratok")
    vae.enable_tiling()
    write_archive(vae, tmp_path, tmp_path / "archive", model=str(space / "hieratok"), dtype=torch.float32)
    assert script.main([str(tmp_path / "archive"), str(tmp_path / "out"), "--device", "cpu"]) == 0
    ((record, latent),) = LatentArchive(tmp_path / "archive")
    found = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(found, np.asarray(decode_record(Codec(vae), record, latent)))
    assert not np.array_equal(found, np.asarray(decode_record(Codec(vae.core), record, latent)))


def test_integers_become_what_their_levels_stand_for(space, tmp_path):
    model = AutoencoderHieraTok.from_core(random_core())
    model.fit_quantizer([images(2, 3, 48, 48)])
    # The levels of the archive count, which a model may have lost since.
    write_archive(model, space / "in", tmp_path / "archive", bits=3, model=str(space / "hieratok"))
    assert script.main([str(tmp_path / "archive"), str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert sizes_in(tmp_path / "out") == SIZES
    (record, tokens), *_ = LatentArchive(tmp_path / "archive").iterate_stored()
    with torch.no_grad():
        decoded = model.detokenize(tokens[None], 3).sample[:, :, : record.height, : record.width]
    found = values_of(Image.open(tmp_path / "out" / record.name))
    assert torch.equal(found, from_uint8(to_uint8(decoded)))


@pytest.mark.parametrize("scales", [1, 3])
def test_scales_make_smaller_images_of_what_the_model_shows(scales, run, space, tmp_path):
    assert run(tmp_path / "out", "--num_scales", scales, "--format", "png") == 0
    codec = Codec(random_core())
    factor = codec.core.config.scale_factors[scales - 1]
    sizes = {name.rpartition(".")[0] + ".png": size for name, size in SIZES.items()}
    expected = {name: tuple(math.ceil(side / factor) for side in size) for name, size in sizes.items()}
    assert sizes_in(tmp_path / "out") == expected
    record, latent = next(iter(LatentArchive(space / "archive")))
    made = np.asarray(Image.open(tmp_path / "out" / record.name))
    assert np.array_equal(made, np.asarray(decode_record(codec, record, latent, scales)))


def test_a_format_changes_the_suffix_and_keeps_names_apart():
    names = ["a.JPG", "a.webp", "b.png", "c.d.tiff", "e.tif", "e.png/f.png"]
    assert script.name_files(names, "keep") == names
    png = ["a.JPG.png", "a.webp.png", "b.png", "c.d.png", "e.tif.png", "e.png/f.png"]
    assert script.name_files(names, "png") == png
    jpeg = ["a.JPG", "a.webp.jpg", "b.jpg", "c.d.jpg", "e.jpg", "e.png/f.jpg"]
    assert script.name_files(["a.jpg", *names[1:]], "jpeg") == ["a.jpg", *jpeg[1:]]


def test_quality_is_that_of_jpeg_and_webp(run, space, tmp_path):
    for name in ("jpeg", "webp"):
        for quality in (10, 95):
            assert run(tmp_path / f"{name}{quality}", "--format", name, "--quality", quality) == 0
        small, large = (sum(x.stat().st_size for x in (tmp_path / f"{name}{q}").rglob("*.*")) for q in (10, 95))
        assert small < 0.7 * large


def test_killed_at_any_moment_the_files_are_the_same(space, tmp_path):
    images = make_images(tmp_path / "images", 60, broken=None)
    write_archive(random_core(), images, tmp_path / "archive", model=str(space / "hieratok"), shard_size=7)

    def run(name, **options):
        given = [str(tmp_path / "archive"), str(tmp_path / name), "--device", "cpu"]
        return {"arguments": given, "output": str(tmp_path / name), **options}

    kills = [run("parts", kill=0.03), run("parts", kill=0.03), run("parts", cut=4)]
    told = kill_and_go_on(script, "*/*.png", [run("whole"), *kills, run("parts")], tmp_path / "cache")
    assert [ended["ended"] for ended in told] == [True, False, False, False, True], told
    assert 0 < told[1]["files"] < told[3]["files"] < 60 == told[4]["files"], told
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_files_that_are_there_are_replaced_only_if_that_is_asked_for(run, space, tmp_path, capsys):
    assert run(tmp_path) == 0
    whole = tree(tmp_path)
    (tmp_path / "a.png").write_bytes(b"mine")
    (tmp_path / "z.gif").unlink()
    assert run(tmp_path) == 2 and "a.png' is there already: add --overwrite" in error_of(capsys)
    assert (tmp_path / "a.png").read_bytes() == b"mine" and not (tmp_path / "z.gif").exists()
    assert run(tmp_path, "--overwrite") == 0 and tree(tmp_path) == whole


def test_only_the_same_decoding_goes_on(run, space, tmp_path, capsys, monkeypatch):
    def die(*given, **options):
        raise KeyboardInterrupt

    assert run(tmp_path / "whole") == 0
    out, plain = tmp_path / "out", script.decode_record
    for made, others in ((1, ["--num_scales", 2]), (2, ["--format", "png"]), (3, ["--overwrite"])):
        calls = iter([plain] * made)
        monkeypatch.setattr(script, "decode_record", lambda *given: next(calls, die)(*given))  # noqa: B023
        with pytest.raises(KeyboardInterrupt):
            run(out, *(others if others == ["--overwrite"] else []))
        monkeypatch.setattr(script, "decode_record", plain)
        if others != ["--overwrite"]:
            assert run(out, *others) == 2 and "is there already" in error_of(capsys)
    capsys.readouterr()
    assert run(out) == 0 and "were there, 0 failed" in capsys.readouterr().out
    assert tree(out) == tree(tmp_path / "whole")


def test_a_image_that_fails_is_named_and_the_others_go_on(run, space, tmp_path, capsys, monkeypatch):
    plain = script.decode_record

    def fail(codec, record, *given):
        if record.name == "z.gif":
            raise RuntimeError("not enough\nmemory")
        return plain(codec, record, *given)

    monkeypatch.setattr(script, "decode_record", fail)
    assert run(tmp_path) == 1
    out, err = capsys.readouterr()
    assert "failed: 'z.gif': not enough memory" in err and out.endswith("0 were there, 1 failed\n")
    monkeypatch.setattr(script, "decode_record", plain)
    assert run(tmp_path) == 0 and "1 images written" in capsys.readouterr().out
    assert sizes_in(tmp_path) == SIZES


BAD = {
    "another tokenizer": (["--model", "{space}/other"], "--model .*other' is not that of the latents: .*encoder"),
    "a missing model": (["--model", "missing/model"], "--model 'missing/model' cannot be loaded"),
    "too many scales": (["--num_scales", "5"], "--num_scales must be from 1 to 4, got 5"),
    "no archive": ({"archive": "in"}, r"ARCHIVE .*no archive of latents: it has no archive\.json"),
    "no folder": ({"archive": "missing"}, r"ARCHIVE .*archive\.json"),
    "into the archive": ({"folder": "{space}/archive/out"}, "must not lie in ARCHIVE"),
    "a file for a folder": ({"folder": "{space}/in/a.png"}, "FOLDER .*a.png' cannot be written"),
    "one scale of another model": ({"archive": "archive of kl", "scales": 2}, "--num_scales must be 1, all that"),
    "few scales of a dense model": ({"archive": "archive of dense", "scales": 2}, "--num_scales must be 4, all that"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, run, space, tmp_path, capsys):
    before, options = tree(space), {}
    if isinstance(given, dict):
        options = {"archive": given.get("archive", "archive")}
        folder = given.get("folder", str(tmp_path / "new")).format(space=space)
        given = ["--num_scales", given["scales"]] if "scales" in given else []
    else:
        folder, given = tmp_path / "new", [text.format(space=space) for text in given]
    assert run(folder, *given, **options) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert tree(space) == before and not list(tmp_path.iterdir())


def test_archives_that_name_no_model_or_are_damaged(space, tmp_path, capsys):
    write_archive(random_core(), space / "in", tmp_path / "archive")
    given = [str(tmp_path / "archive"), str(tmp_path / "out"), "--device", "cpu"]
    assert script.main(given) == 2 and "--model is needed" in error_of(capsys)
    shard = tmp_path / "archive" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert script.main([*given, "--model", str(space / "hieratok")]) == 2
    assert re.search(r"ARCHIVE .* cannot be read: .*shard-00000\.safetensors' is damaged", error_of(capsys))
    (tmp_path / "archive" / "shard-00000.json").unlink()
    assert script.main(given) == 2 and "is unfinished" in error_of(capsys)


def test_a_damaged_archive_writes_nothing_and_changes_nothing(space, tmp_path, capsys, monkeypatch):
    archive, out = tmp_path / "archive", tmp_path / "out"
    write_archive(random_core(), space / "in", archive, shard_size=2, model=str(space / "hieratok"))
    given = [str(archive), str(out), "--device", "cpu"]
    shard = archive / "shard-00002.safetensors"  # others come before it
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert script.main(given) == 2 and "shard-00002.safetensors' is damaged" in error_of(capsys)
    assert not out.exists()
    shard.write_bytes(whole)
    plain, calls = script.decode_record, iter(range(3))
    monkeypatch.setattr(script, "decode_record", lambda *x: plain(*x) if next(calls) < 2 else sys.exit(9))
    with pytest.raises(SystemExit):
        script.main(given)
    monkeypatch.setattr(script, "decode_record", plain)
    begun = tree(out)
    assert script.MARK in begun and len([content for content in begun.values() if content]) == 3
    shard.write_bytes(whole[:-1])
    assert script.main(given) == 2 and "is damaged" in error_of(capsys)
    assert tree(out) == begun
    shard.write_bytes(whole)
    assert script.main(given) == 0 and sizes_in(out) == SIZES


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_links_that_lead_out_of_the_folder_are_refused(option, run, tmp_path, capsys):
    out, away = tmp_path / "out", tmp_path / "away"
    for link, target in (("b", away), ("a.png", away / "mine.png"), (script.MARK, away / "mine.png")):
        out.mkdir()
        away.mkdir()
        (away / "mine.png").write_bytes(b"mine")
        (out / link).symlink_to(target)
        assert run(out, *option) == 2 and "leads out of it by a link" in error_of(capsys)
        assert [*tree(away).values()] == [b"mine"]
        assert [path.name for path in out.iterdir()] == [link]
        shutil.rmtree(out), shutil.rmtree(away)


def test_a_folder_in_the_place_of_a_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "z.gif").mkdir()
    assert run(tmp_path, "--overwrite") == 2 and "z.gif' cannot be written" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["z.gif"]


def test_numbers_out_of_range_are_refused(tmp_path, capsys):
    for option, value in (("--num_scales", 0), ("--quality", 101), ("--format", "gif")):
        assert option in usage_error(capsys, script.main, tmp_path / "archive", tmp_path / "out", option, value)


def test_a_shard_alone_gives_the_same_files(space, run, tmp_path):
    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "alone", "--model", space / "hieratok", archive="archive/shard-00000.safetensors") == 0
    assert tree(tmp_path / "alone") == tree(tmp_path / "whole")
