"""What of a saved folder goes to the Hub, and the test that it must pass before."""

import json
import os
from unittest.mock import Mock

import pytest
import torch
from helpers import random_core, tree
from safetensors.torch import load_file, save_file
from tiny_pipelines import make_pipeline

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline, HieraTokImageProcessorPil, HieraTokModel
from hieratok_hf.hub.folder import add_card, prepare_folder, select_files
from hieratok_hf.hub.remote_code import add_remote_code

WEIGHTS = "diffusion_pytorch_model.safetensors"
CODE = "modeling_hieratok.py"
TOKENIZER = {"config.json", "preprocessor_config.json", WEIGHTS, "model.safetensors.index.json", CODE}


@pytest.mark.parametrize("saved_by", [AutoencoderHieraTok, HieraTokModel])
def test_the_weights_go_once_for_both_libraries(saved_by, tmp_path):
    saved_by.from_core(random_core()).save_pretrained(tmp_path)
    HieraTokImageProcessorPil(size_divisor=4).save_pretrained(tmp_path)
    before = tree(tmp_path)
    with prepare_folder(tmp_path) as stage:
        add_card(stage, "org/name")
        files = tree(stage)
        assert files.keys() == {*TOKENIZER, "README.md"}
        assert files[WEIGHTS] == before[WEIGHTS]
    assert tree(tmp_path) == before and not stage.exists()


STAYS = ["state-000000100.pt", "log.jsonl", "samples/1.png", ".hidden.json", "train.safetensors.tmp", ".env"]
STAYS += ["LICENSE_KEY.txt", "LICENCE.secret", "LICENSE.pem", "license", ".hidden.png", "mine.png", "README.md.orig"]
STAYS += [
    "config.json.bak",
    "optimizer.safetensors",
    "model-secret.safetensors",
    f".{WEIGHTS}",
    "diffusion_pytorch_model.bin",
]


def test_only_what_belongs_to_a_model_goes(saved, tmp_path):
    for name in STAYS:
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (saved / "linked").symlink_to(tmp_path / "elsewhere")
    (saved / "preview.webp").symlink_to(tmp_path / "none")
    (saved / "LICENSE").write_text("free")
    (saved / "shown.png").symlink_to("samples/1.png")  # within the folder
    (saved / "README.md").write_text("![](./shown.png) <img src='.hidden.png'> ![](samples/1.png) ![](preview.webp)")
    with prepare_folder(saved) as stage:
        assert tree(stage).keys() == {*TOKENIZER, "LICENSE", "README.md", "shown.png"}
        assert not [path for path in stage.rglob("*") if path.is_symlink()]
    taken, left = select_files(saved)
    assert left == sorted([*STAYS, "linked", "preview.webp"])
    assert taken.keys() >= {"LICENSE", "README.md", "shown.png", WEIGHTS}


def test_shards_and_variants_go_whole(saved, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError))  # files are copied where the file system has no links
    vae = AutoencoderHieraTok.from_pretrained(saved)
    vae.save_pretrained(saved, variant="fp16")
    vae.save_pretrained(saved, max_shard_size="40KB")
    with prepare_folder(saved) as stage:
        files = tree(stage)
    shards = {name for name in files if "-of-" in name}
    assert len(shards) > 2 and "diffusion_pytorch_model.fp16.safetensors" in files
    assert "diffusion_pytorch_model.safetensors.index.json" in files
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == shards


def test_a_pipeline_goes_with_its_parts(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with prepare_folder(tmp_path) as stage:
        assert select_files(tmp_path)[1] == ["other/config.json"]
        names = tree(stage).keys()
    assert {"vae/autoencoder_hieratok.py", "pipeline_hieratok_dit.py", f"vae/{WEIGHTS}"} <= names
    assert "transformer/model.safetensors.index.json" not in names
    assert not list(tmp_path.rglob("*.py"))


def test_code_that_stays_behind_is_not_named(saved, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    for path, names in ((saved, ("config.json",)), (tmp_path / "pipe", ("model_index.json", "vae/config.json"))):
        plain = {name: json.loads((path / name).read_text()) for name in names}
        add_remote_code(path)
        with prepare_folder(path, remote_code=False) as stage:
            assert not list(stage.rglob("*.py"))
            assert {name: json.loads((stage / name).read_text()) for name in names} == plain


@pytest.mark.parametrize(("part", "variant"), [("transformer", "fp16"), ("vae", None)])
def test_a_broken_part_of_a_pipeline_is_found(part, variant, tmp_path):
    make_pipeline().save_pretrained(tmp_path, variant=variant)
    path = tmp_path / part / WEIGHTS.replace(".", f".{variant}.", 1 if variant else 0)
    with prepare_folder(tmp_path) as stage:
        assert (stage / part / path.name).exists()
    change(path, lambda weights: {name: x * float("nan") for name, x in weights.items()})
    with pytest.raises(ValueError, match="finite"), prepare_folder(tmp_path):
        pass


def test_where_a_pipeline_once_lay_is_nobody_s_concern(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "first")
    HieraTokDiTPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert str(tmp_path) in (tmp_path / "second" / "model_index.json").read_text()
    with prepare_folder(tmp_path / "second") as stage:
        assert not [path for path in stage.rglob("*.json") if str(tmp_path) in path.read_text()]


def change(path, make):
    weights = make(load_file(path))
    path.unlink()  # it may have another name
    save_file(weights, path)


KEY = "core.decoder.head.weight"
BROKEN = {
    "nan": (lambda f: change(f / WEIGHTS, lambda x: {**x, KEY: x[KEY] * float("nan")}), "finite"),
    "a tensor is missing": (lambda f: change(f / WEIGHTS, lambda x: {k: v for k, v in x.items() if k != KEY}), KEY),
    "another shape": (lambda f: change(f / WEIGHTS, lambda x: {**x, KEY: torch.zeros(3, 3)}), KEY),
    "half a file": (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size // 2), "."),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken configuration": (lambda f: (f / "config.json").write_text("{"), "JSON"),
}


@pytest.mark.parametrize(("spoil", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_load_does_not_go(spoil, reason, saved):
    spoil(saved)
    with pytest.raises(ValueError, match=reason) as caught, prepare_folder(saved):
        pass
    text = str(caught.value)
    assert repr(str(saved)) in text and "does not pass its load test" in text and "\n" not in text


def test_a_folder_that_the_libraries_load_differently_does_not_go(saved, monkeypatch):
    other = HieraTokModel.from_core(random_core(seed=1))
    monkeypatch.setattr(HieraTokModel, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(ValueError, match="different weights"), prepare_folder(saved):
        pass


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="`folder`"), prepare_folder(tmp_path / "none"):
        pass
