"""Archives, models and names that no careful program makes: one line of error, and nothing written or lost."""

import io
import json
import os
import shutil
import sys

import pytest
from helpers import images, random_core
from image_files import noise
from latent_data import tiny_kl
from PIL import Image
from scripts import error_of

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.cli import decode, encode, info, main, preview
from hieratok_hf.cli.decode import MARK, name_files
from hieratok_hf.data.manifests import write_manifest

COMMANDS = {"encode": encode, "decode": decode, "preview": preview, "info": info}


def tree(folder):
    """Everything below a folder, with the content of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def run(name, *given):
    return COMMANDS[name].main([str(x) for x in given])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, models, and an archive by each."""
    folder = tmp_path_factory.mktemp("made")
    model = AutoencoderHieraTok.from_core(random_core())
    model.fit_quantizer([images(1, 3, 48, 48)])
    model.save_pretrained(folder / "model")
    tiny_kl().save_pretrained(folder / "kl")
    (folder / "in").mkdir()
    for name, (width, height) in {"a.png": (40, 24), "b.png": (9, 30)}.items():
        Image.fromarray(noise(height, width)).save(folder / "in" / name)
    for model, archive in (("model", "archive"), ("kl", "archive of kl")):
        assert run("encode", folder / "in", folder / archive, "--model", folder / model, "--device", "cpu") == 0
    given = [folder / "in", folder / "tokens", "--model", folder / "model", "--device", "cpu", "--bits", "6"]
    assert run("encode", *given) == 0
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy to spoil, the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(**changes):
    """Change the first record of an archive, with the right checksum."""

    def change(folder):
        path = folder / "archive" / "shard-00000.json"
        facts = json.loads(path.read_text())
        del facts["checksum"]
        facts["records"][0].update(changes)
        write_manifest(path, facts)

    return change


def file(name, content):
    def make(folder):
        path = folder / "m" / name
        path.parent.mkdir()
        content(path) if callable(content) else path.write_text(content)

    return make


def tokens(path, **changes):
    """Change the facts of an archive of integers, with the right checksum, or spoil one of its files."""

    def change(folder):
        if not changes:
            (folder / "tokens" / path).write_bytes(b"levels")
            return
        facts = json.loads((folder / "tokens" / path).read_text())
        del facts["checksum"]
        write_manifest(folder / "tokens" / path, {**facts, **changes})

    return change


def loop(folder):
    (folder / "loop").symlink_to("loop")


LONG = "x" * 300
DEEP = '{"a": ' + "[" * 900 + "]" * 900 + "}"
ENTRIES = '{{"rows": {}, "shard_size": 1}}'.format
PIPELINE = '{{"_class_name": "X", "vae": {}}}'.format
ROWS = {
    "a hidden name": (record(name=".ssh/a.png"), "decode archive out", "'records'"),
    "a name for the mark": (record(name=f"{MARK}/a.png"), "decode archive out", "'records'"),
    "a name that is no text": (record(name="\ud800.png"), "decode archive out", "'records'"),
    "a long name": (record(name=f"{LONG}.png"), "decode archive out", "'records'"),
    "no levels": (tokens("quantizer.safetensors"), "decode tokens out", "is no file of levels"),
    "other levels": (tokens("archive.json", quantizer="0"), "decode tokens out", "quantizer.safetensors"),
    "other bits": (tokens("archive.json", bits=99), "decode tokens out", "'bits'"),
    "bits that are text": (tokens("archive.json", bits="6"), "preview tokens sheet.png", "'bits'"),
    "another dtype": (tokens("archive.json", dtype="float16"), "decode tokens out", "'dtype'"),
    "another format": (tokens("archive.json", file_format="safetensors"), "decode tokens out", "damaged"),
    "an input that loops": (loop, "encode loop out", "FOLDER 'loop'"),
    "an output that loops": (loop, "encode in loop", "ARCHIVE 'loop'"),
    "an archive that loops": (loop, "decode loop out", "ARCHIVE 'loop'"),
    "a folder that loops": (loop, "decode archive loop", "FOLDER 'loop'"),
    "a folder in one that loops": (loop, "decode archive loop/out", "FOLDER 'loop/out'"),
    "a long folder": (None, f"decode archive {LONG}", "FOLDER"),
    "a long sheet": (None, f"preview archive {LONG}.png", "SHEET"),
    "the second scale of one": (None, "decode archive\xa0of\xa0kl out --num_scales 2", "--num_scales must be 1"),
    "infinite rows": (file("archive.json", ENTRIES("1e999")), "info m", "damaged"),
    "rows that no float holds": (file("cache.json", ENTRIES("9" * 400)), "info m", "damaged"),
    "a deep manifest": (file("export.json", DEEP), "info m", "cannot be shown"),
    "a deep record": (file("losses.jsonl", DEEP), "info m", "cannot be shown"),
    "a part that is a number": (file("model_index.json", PIPELINE('["diffusers", 5]')), "info m", "'vae'"),
    "a part without library": (file("model_index.json", PIPELINE('[null, "Y"]')), "info m", "'vae'"),
    "a part that is an object": (file("model_index.json", PIPELINE('["diffusers", {}]')), "info m", "'vae'"),
    "a pipe for weights": (file("model.safetensors", os.mkfifo), "info m", "is no file"),
    "a pipe for a file": (file("model.safetensors", os.mkfifo), "info m/model.safetensors", "is no file"),
    "a report over its model": (None, "info model --json model/config.json --overwrite", "an input"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_what_cannot_be_is_told_in_one_line(case, place, capsys):
    spoil, command, named = ROWS[case]
    if spoil:
        spoil(place)
    before = tree(place)
    assert run(*(word.replace("\xa0", " ") for word in command.split(" "))) == 2
    error = error_of(capsys)
    assert named in error and len(error) < 1000 + len(command)
    assert tree(place) == before


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.png", "a.png.webp"],
        ["a.png.webp", "a.png", "a.jpg"],
        ["b.jpg", "b.png", "b.png.webp/x.png"],
        ["a.png", "a.jpg", "a.png.gif", "a.webp"],
        ["a.PNG", "a.png", "A.png", "a.webp/b.gif", "a.webp/b.png"],
    ],
)
@pytest.mark.parametrize("kind", ["keep", "png", "jpeg", "webp"])
def test_no_two_images_become_one_file(kind, names):
    files = name_files(names, kind)
    folders = {name.rpartition("/")[0] for name in names} - {""}
    assert len({*files}) == len(names) and not folders & {*files}


def test_a_decoding_over_other_files_does_not_take_them_for_its_own(place, monkeypatch, capsys):
    assert run("decode", "archive", "right") == 0
    (place / "out").mkdir()
    Image.new("RGB", (7, 7)).save(place / "out" / "b.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def write(option, path, content, true=decode.write_or_explain):
            if path.name == "b.png":
                raise KeyboardInterrupt
            true(option, path, content)

        patch.setattr(decode, "write_or_explain", write)
        run("decode", "archive", "out", "--overwrite")
    assert run("decode", "archive", "out") == 2 and "--overwrite" in error_of(capsys)
    assert run("decode", "archive", "out", "--overwrite") == 0
    assert {p.name: p.read_bytes() for p in (place / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (place / "right").iterdir()
    }


def test_two_decodings_at_a_time_both_end_well(place, monkeypatch):
    def other_first(*given, true=decode.tqdm, **options):
        monkeypatch.setattr(decode, "tqdm", true)
        assert run("decode", "archive", "out") == 0  # all of it while the first waits
        return true(*given, **options)

    monkeypatch.setattr(decode, "tqdm", other_first)
    assert run("decode", "archive", "out") == 0
    assert sorted(path.name for path in (place / "out").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("command", ["decode", "preview"])
def test_the_only_scale_of_another_autoencoder_may_be_named(command, place):
    assert run(command, "archive of kl", "out.png", "--num_scales", 1) == 0


def test_narrow_panels_have_no_names(place):
    assert run("preview", "archive", "sheet.png", "--side", 8) == 0


def test_a_sheet_that_its_format_cannot_hold_is_an_error(place, capsys):
    for index in range(16):
        shutil.copy(place / "in" / "b.png", place / "in" / f"{index}.png")
    run("encode", "in", "wide", "--model", "model")
    assert run("preview", "wide", "sheet.webp", "--side", 1024, "--columns", 18, "--num_scales", 1) == 2
    assert "sheet.webp" in error_of(capsys) and not (place / "sheet.webp").exists()


def test_an_image_that_the_system_cannot_read_is_left_out(place, capsys):
    (place / "in" / "c.png").symlink_to("/proc/self/mem")  # whose first byte is an input error
    assert run("encode", "in", "out", "--model", "model") == 1
    assert ", 1 failed; 2 encoded now" in capsys.readouterr().out


def test_a_pipe_that_is_named_as_what_a_killed_save_leaves_is_passed_over(place):
    os.mkfifo(place / "model" / ".hieratok-saving-x")
    AutoencoderHieraTok.from_pretrained(place / "model").save_pretrained(place / "model")


@pytest.mark.parametrize("given", [["--help"], ["convert"], ["é"], ["--version"]])
@pytest.mark.parametrize("is_closed", [False, True], ids=["ascii", "closed"])
def test_the_list_suits_any_terminal(given, is_closed, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if is_closed else io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert main.main(given) in (0, 2)
