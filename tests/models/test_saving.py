"""One folder for both libraries: loading, re-saving by either class, shards, variants, dtypes, interrupted saves."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import images, noise, random_core, tiny, tree
from safetensors.torch import load_file
from transformers import AutoModel, Trainer, TrainingArguments

from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.models.saving import WEIGHTS_STEM
from hieratok_hf.utils.files import read_json

# Saved by the package before there was `downsampling`, with the images that it made.
MEAN_MODEL = Path(__file__).parents[1] / "data" / "mean_model"
CLASSES = {"transformers": HieraTokModel, "diffusers": AutoencoderHieraTok}


def from_pretrained(library, folder, **kwargs):
    return (AutoModel if library == "transformers" else AutoencoderHieraTok).from_pretrained(folder, **kwargs)


def assert_same_weights(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("first", CLASSES)
def test_a_folder_survives_both_libraries(first, max_shard_size, tmp_path):
    core, latents = random_core(), noise(2, 4, 7, 5)
    image = core.decode(latents)
    model = CLASSES[first].from_core(core)
    (other,) = CLASSES.keys() - {first}
    for library, following in pairwise([first, other, first, first]):
        folder = tmp_path / f"{library} to {following}"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for reader in CLASSES:
            loaded = from_pretrained(reader, folder)
            assert_same_weights(loaded.core, core)
            assert torch.equal(loaded.decode(latents)[0], image)
        model = from_pretrained(following, folder)
        assert type(model) is CLASSES[following]
        num_files = len(list(folder.glob(f"{WEIGHTS_STEM}*.safetensors")))
        assert num_files == 1 if max_shard_size == "1GB" else num_files > 1
        # transformers' own name, where its class has saved one file, else the index that leads to diffusers' names.
        own = library == "transformers" and num_files == 1
        names = [path.name for path in folder.glob("model*")]
        assert names == ["model.safetensors" if own else "model.safetensors.index.json"]


def test_both_classes_write_the_same_configuration_with_the_keys_of_both(tmp_path):
    configs = []
    for library, cls in CLASSES.items():
        cls.from_core(random_core()).save_pretrained(tmp_path / library)
        configs.append(read_json(tmp_path / library / "config.json"))
    values, others = configs
    assert values.pop("dtype") == "float32" and values == others
    assert values["model_type"] == "hieratok" and values["architectures"] == ["HieraTokModel"]
    assert values["_class_name"] == "AutoencoderHieraTok" and values["_diffusers_version"] == diffusers.__version__
    assert values["latents_std"] is None and len(values["block_out_channels"]) == 3
    for library, cls in CLASSES.items():
        assert cls.from_pretrained(tmp_path / library, subfolder=None).core.config.model_fields == tiny().model_fields


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("saver", CLASSES)
def test_variants_live_beside_each_other_each_in_its_dtype(saver, max_shard_size, tmp_path):
    plain, half = random_core(), random_core(seed=1).half()
    CLASSES[saver].from_core(plain).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    CLASSES[saver].from_core(half).save_pretrained(tmp_path, variant="fp16", max_shard_size=max_shard_size)
    for library in CLASSES:
        assert_same_weights(from_pretrained(library, tmp_path).core, plain)
        for dtype in (torch.float16, torch.bfloat16):
            loaded = from_pretrained(library, tmp_path, variant="fp16", dtype=dtype)
            assert_same_weights(loaded.core, copy.deepcopy(half).to(dtype))
    assert HieraTokModel.from_pretrained(tmp_path, variant="fp16").dtype == torch.float16


@pytest.mark.parametrize("links", [True, False])
def test_weights_have_both_names_and_one_content(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links here")))
    model = HieraTokModel.from_core(random_core())
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="ema")
    for variant in ("", ".ema"):
        names = [tmp_path / f"{stem}{variant}.safetensors" for stem in (WEIGHTS_STEM, "model")]
        assert names[0].read_bytes() == names[1].read_bytes() and names[0].samefile(names[1]) == links


@pytest.mark.parametrize("first", CLASSES)
def test_saving_again_with_fewer_shards_leaves_none_behind(first, tmp_path):
    model = CLASSES[first].from_core(random_core())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / f"{WEIGHTS_STEM}.safetensors.index.json").exists()
    (tmp_path / "notes.txt").write_text("mine")
    for library in CLASSES:
        CLASSES[library].from_core(model.core).save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "config.json",
            f"{WEIGHTS_STEM}.safetensors",
            "model.safetensors" if library == "transformers" else "model.safetensors.index.json",
            "notes.txt",
        ]


REGISTERED = {
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
    "force_upcast": True,
    "sample_size": 64,
    "latents_mean": [0.0, 1.0, 2.0, 3.0],
    "latents_std": [1.0] * 4,
}


def test_what_is_registered_for_pipelines_is_saved_by_both_classes(tmp_path):
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.register_to_config(**REGISTERED)
    vae.save_pretrained(tmp_path / "diffusers")
    HieraTokModel.from_pretrained(tmp_path / "diffusers").save_pretrained(tmp_path / "transformers")
    for library in CLASSES:
        assert REGISTERED.items() <= read_json(tmp_path / library / "config.json").items()
        loaded = AutoencoderHieraTok.from_pretrained(tmp_path / library)
        assert REGISTERED.items() <= dict(loaded.config).items()
        assert_same_weights(loaded, vae)
    assert REGISTERED.items() <= HieraTokModel.from_core(vae.core).config.to_dict().items()


@pytest.mark.parametrize("library", CLASSES)
def test_what_is_registered_follows_the_core(library, tmp_path):
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.register_to_config(**REGISTERED)
    vae.save_pretrained(tmp_path)
    core = CLASSES[library].from_pretrained(tmp_path).core
    assert REGISTERED.items() <= dict(AutoencoderHieraTok.from_core(core).config).items()
    core.fold_latent_statistics(torch.zeros(4), torch.ones(4))  # these latents are normalised
    config = AutoencoderHieraTok.from_core(core).config
    assert (config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std) == (1, 0, None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("patch_size", 8), ("rotary_base", 5.0), ("block_out_channels", [8, 8]), ("scaling_factor", 0.0)],
)
def test_what_the_model_does_not_compute_is_not_saved(name, value, tmp_path):
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.register_to_config(**{name: value})
    with pytest.raises(ValueError, match=f"`{name}`"):
        vae.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_trainer_resumes(tmp_path):
    def trainer(steps):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
            per_device_train_batch_size=2, logging_strategy="no",
        )  # fmt: skip
        torch.manual_seed(0)
        data = [{"pixel_values": image} for image in images(8, 3, 8, 8)]
        return Trainer(HieraTokModel.from_core(random_core()), arguments, train_dataset=data, eval_dataset=data)

    whole = trainer(4)
    whole.train()
    assert "eval_loss" in whole.evaluate()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_save_changes_nothing(existed, tmp_path, monkeypatch):
    if existed:
        HieraTokModel.from_core(random_core()).save_pretrained(tmp_path / "model")
    before = tree(tmp_path)
    monkeypatch.setattr("hieratok_hf.models.modeling_hieratok.share_between_libraries", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HieraTokModel.from_core(random_core(seed=1)).save_pretrained(tmp_path / "model")
    assert tree(tmp_path) == before
    assert (tmp_path / "model").exists() == existed


def test_weights_of_either_format_take_the_place_of_the_other(tmp_path):
    shards = {"max_shard_size": "40KB"}
    for seed, (is_safe, options) in enumerate([(True, {}), (False, {}), (True, shards), (False, {})]):
        vae = AutoencoderHieraTok.from_core(random_core(seed=seed))
        vae.save_pretrained(tmp_path, safe_serialization=is_safe, **options)
        loaded = AutoencoderHieraTok.from_pretrained(tmp_path)
        assert all(torch.equal(*pair) for pair in zip(vae.parameters(), loaded.parameters()))


def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).parents[1] / "kill_saves.py"), str(tmp_path)]
    ended = json.loads(subprocess.run(program, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(ended) > 15
    for save in ended:
        assert save["found"] in ((0, 1) if save["had"] else (1, 3)), save
        assert save["seen"] in (0, 1, 3) and save["left"] == [], save


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("cls", CLASSES.values())
def test_only_the_main_process_touches_the_folder(cls, main, tmp_path):
    HieraTokModel.from_core(random_core()).save_pretrained(tmp_path / "old", max_shard_size="40KB")
    before = tree(tmp_path)
    for name in ("old", "new"):
        cls.from_core(random_core(seed=1)).save_pretrained(tmp_path / name, is_main_process=main)
    assert (tree(tmp_path) == before) is not main
    assert (tmp_path / "new").exists() is main


def test_saves_and_loads_at_the_same_time_see_whole_models(tmp_path):
    cores = [random_core(seed=seed, rotary_base=10.0 + seed) for seed in range(2)]
    models = [cls.from_core(core) for cls, core in zip(CLASSES.values(), cores)]

    def save(model):
        for _ in range(6):
            model.save_pretrained(tmp_path, max_shard_size="150KB")

    models[0].save_pretrained(tmp_path)
    with ThreadPoolExecutor(2) as threads:  # no library can load in two threads at a time
        saves = [threads.submit(save, model) for model in models]
        while not all(done.done() for done in saves):
            loaded = AutoencoderHieraTok.from_pretrained(tmp_path)
            assert_same_weights(loaded.core, cores[int(loaded.config.rotary_base - 10)])
        assert [done.result() for done in saves] == [None, None]
    assert not list(tmp_path.glob(".*"))


def test_a_link_in_a_killed_save_is_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    folder = tmp_path / "model"
    (folder / ".hieratok-saved" / "vae").mkdir(parents=True)
    (folder / ".hieratok-saved" / "vae" / "config.json").write_text("bad")
    (folder / "vae").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="symbolic link"):
        AutoencoderHieraTok.from_pretrained(folder)
    assert (tmp_path / "outside" / "config.json").read_text() == "{}"


def test_a_folder_that_cannot_be_made_whole_is_not_loaded(tmp_path, monkeypatch):
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path)
    with monkeypatch.context() as patch:  # another save ends whenever one looks
        patch.setattr("hieratok_hf.models.saving._stamps", lambda folder: object())
        with pytest.raises(OSError, match=f"{tmp_path.name}.* changed"):
            AutoencoderHieraTok.from_pretrained(tmp_path)
    (tmp_path / ".hieratok-saved").mkdir()
    (tmp_path / ".hieratok-saved" / "config.json").write_text("{}")
    with monkeypatch.context() as patch:  # as where one may only read
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(PermissionError("read only")))
        with pytest.raises(OSError, match=f"{tmp_path.name}.* killed .*read only"):
            AutoencoderHieraTok.from_pretrained(tmp_path)


def test_a_link_in_the_place_of_a_killed_save_is_left_alone(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "notes.txt").write_text("mine")
    model = AutoencoderHieraTok.from_core(random_core())
    model.save_pretrained(tmp_path / "model")
    for name in (".hieratok-saved", ".hieratok-moving", ".hieratok-saving-1"):
        (tmp_path / "model" / name).symlink_to(outside)
    assert_same_weights(AutoencoderHieraTok.from_pretrained(tmp_path / "model"), model)
    with pytest.raises(OSError, match=r"\.hieratok-saved"):
        model.save_pretrained(tmp_path / "model")
    assert (outside / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("cls", CLASSES.values())
def test_permissions_are_those_of_the_files_that_are_replaced_else_the_usual_ones(cls, tmp_path):
    model = cls.from_core(random_core())
    model.save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {usual}
    (tmp_path / f"{WEIGHTS_STEM}.safetensors").chmod(0o600)
    model.save_pretrained(tmp_path)
    assert (tmp_path / f"{WEIGHTS_STEM}.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cls", [*CLASSES.values(), AutoModel], ids=[*CLASSES, "auto"])
def test_a_folder_from_before_there_was_learned_downsampling_gives_its_images(cls, tmp_path):
    assert "downsampling" not in read_json(MEAN_MODEL / "config.json")
    recorded = load_file(MEAN_MODEL / "images.safetensors")
    latents, model = recorded.pop("latents"), cls.from_pretrained(MEAN_MODEL)
    model.save_pretrained(tmp_path)
    for loaded in (model, cls.from_pretrained(tmp_path)):
        assert loaded.config.downsampling == "mean"
        with torch.no_grad():
            scales = {f"scale_{i}": image for i, image in enumerate(loaded.core.decode_scales(latents))}
        torch.testing.assert_close(scales, recorded, rtol=0, atol=1e-6)
