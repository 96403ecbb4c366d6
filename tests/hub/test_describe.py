"""What is said of models, latents and files is what their own classes make of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_core
from latent_data import make_images, make_mixed_images, tiny_kl
from safetensors.torch import save_file
from tiny_pipelines import make_pipeline

import hieratok_hf
from hieratok_hf import (
    SHIPPED,
    SIZES,
    AutoencoderHieraTok,
    HieraTokConfig,
    HieraTokImageProcessor,
    HieraTokModel,
)
from hieratok_hf.data.latent_archive import write_archive
from hieratok_hf.hub.describe import describe
from hieratok_hf.hub.remote_code import add_remote_code
from hieratok_hf.models.quantizing import LatentQuantizer
from hieratok_hf.utils.choices import QUANTIZER_FILE, TOKEN_BITS


@pytest.fixture
def saved(tmp_path):
    """A tokenizer as transformers saves it, with all that a folder may have."""
    folder = tmp_path / "saved"
    model = HieraTokModel.from_core(random_core())
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    HieraTokImageProcessor(size_divisor=4).save_pretrained(folder)
    add_remote_code(folder)
    (folder / "README.md").write_text("A card")
    return folder


def numbers_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_tokenizer_is_what_its_class_loads(saved):
    model, facts = HieraTokModel.from_pretrained(saved), describe(str(saved), 32)
    core = model.core
    assert facts["kind"] == "HieraTok tokenizer" and facts["place"] == str(saved)
    parts = {"encoder": numbers_of(core.encoder), "decoder": numbers_of(core.decoder), "total": numbers_of(core)}
    assert facts["parameters"] == parts
    for weights in facts["weights"].values():
        assert weights["numbers"] == numbers_of(core) and weights["dtypes"] == {"bfloat16": numbers_of(core)}
        assert weights["files"] == {name: (saved / name).stat().st_size for name in weights["files"]} != {}
    latents = model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).latents
    scales = core.decode_scales(latents)
    assert facts["image"]["latent"] == [*latents.shape[1:]]
    assert [tuple(scale["image"]) for scale in facts["image"]["scales"]] == [image.shape[2:] for image in scales]
    assert facts["statistics"]["scaling_factor"] == 1.0
    assert json.loads(json.dumps(facts)) == facts


REMOVALS = {
    "preprocessor_config.json": {"transformers": ["preprocessor_config.json"]},
    "README.md": {"model card": ["README.md"]},
    "modeling_hieratok.py": {"without hieratok_hf": ["modeling_hieratok.py"]},
    "model*.safetensors*": {"transformers": ["model.safetensors"]},
    "diffusion_pytorch_model*": {"diffusers": ["diffusion_pytorch_model.safetensors"]},
}


@pytest.mark.parametrize("pattern", REMOVALS)
def test_what_is_taken_away_is_what_a_folder_lacks(saved, pattern):
    def lacking():
        return {library: x["lacks"] for library, x in describe(str(saved))["libraries"].items() if x["lacks"]}

    assert lacking() == {}
    for path in saved.glob(pattern):
        path.unlink()
    assert lacking() == REMOVALS[pattern]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_lacks_only_what_concerns_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = describe(name)
    assert facts["place"] == hieratok_hf.pretrained(name)
    lacks = {library for library, files in facts["libraries"].items() if files["lacks"]}
    assert lacks == {"without hieratok_hf", "model card"}


def test_sizes_have_a_note_instead_of_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in SIZES.keys() - {*SHIPPED}:
        facts = describe(name)
        assert facts["place"] is None and "hieratok convert detok" in facts["note"] and "weights" not in facts
        assert facts["configuration"]["encoder_hidden_size"] == HieraTokConfig.from_size(name).encoder_hidden_size
    (tmp_path / "hieratok-b").mkdir()
    with pytest.raises(ValueError, match=r"'hieratok-b' must hold a model"):
        describe("hieratok-b")


def test_a_pipeline_is_told_by_its_parts(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    facts = describe(str(tmp_path), 8)
    assert facts["kind"] == "pipeline HieraTokDiTPipeline" and facts["classes"] == [*pipe.id2label.values()]
    for name in ("vae", "transformer"):
        (weights,) = facts["parts"][name]["weights"].values()
        assert weights["numbers"] == numbers_of(getattr(pipe, name))
    assert facts["parts"]["vae"]["image"]["size"] == [8, 8]
    assert not facts["libraries"]["diffusers"]["lacks"]
    add_remote_code(tmp_path)
    assert not describe(str(tmp_path), 8)["libraries"]["without hieratok_hf"]["lacks"]
    shutil.rmtree(tmp_path / "scheduler")
    next((tmp_path / "transformer").glob("*.safetensors")).unlink()
    assert describe(str(tmp_path), 8)["libraries"]["diffusers"]["lacks"] == ["scheduler", "transformer"]


def test_other_models_of_diffusers_are_told_without_sizes(tmp_path):
    vae = tiny_kl(scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    facts = describe(str(tmp_path))
    assert facts["kind"] == "AutoencoderKL" and facts["statistics"]["scaling_factor"] == 0.5
    assert [x["numbers"] for x in facts["weights"].values()] == [numbers_of(vae)] and "image" not in facts
    assert facts["libraries"].keys() == {"diffusers", "model card"}


def test_latents_whole_and_unfinished(tmp_path):
    pytest.importorskip("datasets", reason="images are read through it")
    from hieratok_hf.data.image_dataset import load_images
    from hieratok_hf.data.latent_writer import write_latents

    images = load_images(str(make_images(tmp_path / "images", count=5, broken=None)))
    write_latents(random_core(), images, tmp_path / "latents", size=16, shard_size=2)
    facts = describe(str(tmp_path / "latents"))
    assert facts["kind"] == "cache of latents" and facts["manifest"]["latent_shape"] == [4, 4, 4]
    assert facts["shards"]["there"] == facts["shards"]["wanted"] == 3
    (tmp_path / "latents" / "shard-00001.safetensors").unlink()
    assert describe(str(tmp_path / "latents" / "cache.json"))["shards"]["there"] == 2
    mixed = load_images(str(make_mixed_images(tmp_path / "mixed", broken=None)))
    write_latents(random_core(), mixed, tmp_path / "buckets", size=32, shard_size=4, max_aspect=2.0, multiple=8)
    shards = describe(str(tmp_path / "buckets"))["shards"]
    assert shards["there"] == shards["wanted"] == 2 + 3 + 1  # 6, 9 and 4 images


def levels(channels=4):
    return LatentQuantizer({bits: torch.arange(2.0**bits).repeat(channels, 1) for bits in TOKEN_BITS})


@pytest.mark.parametrize("place", [".", "vae"])
def test_levels_are_told_with_their_channels_and_bits(place, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path) if place == "vae" else pipe.vae.save_pretrained(tmp_path)

    def told():
        facts = describe(str(tmp_path), 8)
        return (facts["parts"]["vae"] if place == "vae" else facts).get("levels")

    assert told() is None
    path = tmp_path / place / QUANTIZER_FILE
    levels().write(path)
    assert told() == {"channels": 4, "bits": [1, 2, 3, 4, 5, 6, 7, 8]}
    for tensors in ({}, {"levels_1": torch.zeros(4, 2)}, {"levels_1": torch.tensor(1.0)}):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"{QUANTIZER_FILE}' is no file of levels: .* bits"):
            told()
    path.write_bytes(b"levels")
    with pytest.raises(ValueError, match=f"{QUANTIZER_FILE}' is no file of levels"):
        told()


def test_an_archive_is_told_by_settings_that_are_whole(tmp_path):
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.quantizer = levels()
    images = make_images(tmp_path / "images", count=3, broken=None)
    write_archive(vae, images, tmp_path / "tokens", bits=6, shard_size=2)
    facts = describe(str(tmp_path / "tokens"))
    assert facts["kind"] == "archive of latents" and facts["manifest"]["bits"] == 6
    assert facts["levels"]["channels"] == 4 and facts["shards"]["there"] == facts["shards"]["wanted"] == 2
    (tmp_path / "tokens" / QUANTIZER_FILE).unlink()
    with pytest.raises(ValueError, match=f"damaged: it lacks the {QUANTIZER_FILE}"):
        describe(str(tmp_path / "tokens"))
    path = tmp_path / "tokens" / "archive.json"
    for old, new in (('"bits": 6', '"bits": 5'), ('"checksum"', '"checks"')):
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
        with pytest.raises(ValueError, match=r"archive\.json' is damaged: its checksum is another"):
            describe(str(tmp_path / "tokens"))
        path.write_text(content)


def test_a_training_is_told_by_its_states_and_last_records(saved, tmp_path):
    for folder in (saved, tmp_path / "new"):
        folder.mkdir(exist_ok=True)
        (folder / "losses.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
        (folder / "state-000000002.pt").write_bytes(b"never opened")
        facts = describe(str(folder))
        assert facts["training"] == {"losses": {"step": 2, "loss": 2.0}, "states": {"state-000000002.pt": 12}}
    assert facts["kind"] == "training that has saved no model yet"


def test_files_are_told_by_what_they_hold(saved, tmp_path):
    save_file({"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros(4)}, tmp_path / "x.safetensors")
    facts = describe(str(tmp_path / "x.safetensors"))
    tensors = {"a": {"shape": [2, 3], "dtype": "float16"}, "b": {"shape": [4], "dtype": "float32"}}
    assert facts["tensors"] == tensors and facts["weights"]["x.safetensors"]["dtypes"] == {"float16": 6, "float32": 4}
    assert describe(str(saved / "config.json"))["parameters"] == describe(str(saved))["parameters"]


def test_a_configuration_with_less_than_all_values_has_the_defaults_of_its_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hieratok", "patch_size": 32, "mlp_ratio": 3}))
    facts = describe(str(tmp_path))
    assert facts["configuration"]["encoder_hidden_size"] == 768 and facts["image"]["size"] == [256, 256]
    assert facts["libraries"]["transformers"]["lacks"] == ["model.safetensors", "preprocessor_config.json"]


def test_a_repository_in_the_cache_of_the_hub(saved, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(saved, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert describe("org/name")["place"] == str(snapshot)
    with pytest.raises(OSError, match="'org/other'"):
        describe("org/other")


@pytest.mark.parametrize("name", ["", "no such name", "a/b/c", "x" * 5000, "zero\0byte", "README.md"])
def test_what_is_not_there_is_an_error_that_names_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises((OSError, ValueError), match=r"README\.md|no file or folder, none of hiera|too long"):
        describe(name)


DAMAGED = {
    "no JSON": "{",
    "no object": "[]",
    "no kind": "{}",
    "words for sizes": json.dumps({"model_type": "hieratok", "patch_size": "many"}),
    "scales of words": json.dumps({"model_type": "hieratok", "scale_factors": ["a", 1]}),
    "a negative patch": json.dumps({"model_type": "hieratok", "patch_size": -4}),
    "a deep hole": "[" * 100_000,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_configurations_are_value_errors(kind, tmp_path):
    (tmp_path / "config.json").write_text(DAMAGED[kind])
    with pytest.raises(ValueError):
        describe(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cache.json", '{"shard_size": 2}'),
        ("cache.json", '{"shard_size": "two", "rows": 3}'),
        ("model_index.json", '{"_class_name": "X", "vae": ["a"]}'),
        ("model_index.json", '{"vae": ["a", "b"]}'),
        ("model.safetensors", "no tensors"),
    ],
)
def test_other_damaged_files_are_value_errors(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="damaged"):
        describe(str(tmp_path))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="`size` must be a multiple of the patch size 8, got 100"):
        describe(str(Path(hieratok_hf.pretrained("hieratok-tiny"))), 100)


def test_neither_torch_nor_a_library_of_models_is_imported():
    code = """
import sys
for name in ("torch", "transformers", "diffusers"):
    sys.modules[name] = None
from hieratok_command import main
sys.argv[1:] = ["info", "hieratok-dit-tiny"]
sys.exit(main())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "DiTTransformer2DModel" in told and "decode 4 of 4 scales" in told
