"""A full disk at every write of a save, a push, a cache, a conversion and a training: nothing lost, nothing left."""

import json
import os
import re
import shutil
import tempfile
from functools import partial

import pytest
from full_disk import full_after, full_disk
from helpers import TINY, random_core, tree
from scripts import ROOT, error_of, forget_processes, load_script
from tiny_pipelines import make_pipeline

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessor, HieraTokModel
from hieratok_hf.hub.push import HubError

FAILURES = (HubError, OSError, ValueError)
IMAGES = ROOT / "src" / "hieratok_hf" / "example_images"
pytestmark = pytest.mark.usefixtures("script_surroundings")


def faults(run, folder, old=None, most=1000):
    """
    Run something once with room, and then, each time from `old`, on a disk that is full for large files alone, and on
    one that is full from one step on, for `most` of its steps. Gives the tree of the former run, and of each of the
    latter the error and the tree.
    """

    def begin_anew():
        shutil.rmtree(folder, ignore_errors=True)
        if old:
            shutil.copytree(old, folder)

    begin_anew()
    with full_after(-1, folder) as count:
        run(folder)
    whole = tree(folder)
    rooms = [full_after(n, folder) for n in range(1, count[0] + 1, -(-count[0] // most))]
    for room in [full_disk(3000), full_disk(20_000), *rooms]:
        begin_anew()
        error = None
        try:
            with room:
                run(folder)
        except FAILURES as found:
            error = found
        yield whole, error, tree(folder) if folder.exists() else {}


VAE = AutoencoderHieraTok.from_core(random_core())
SAVES = {
    "one file": VAE.save_pretrained,
    "shards": partial(VAE.save_pretrained, max_shard_size="40KB"),
    "pickle": partial(VAE.save_pretrained, safe_serialization=False),
    "transformers": HieraTokModel.from_core(random_core()).save_pretrained,
    "pipeline": make_pipeline().save_pretrained,
    "configuration": VAE.core.config.save_pretrained,
    "processor": HieraTokImageProcessor(size_divisor=4).save_pretrained,
}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("kind", SAVES)
def test_a_save_is_whole_or_has_not_begun(kind, there, tmp_path):
    old = tmp_path / "old" if there else None
    if there:
        AutoencoderHieraTok.from_core(random_core(seed=1)).save_pretrained(old, max_shard_size="60KB")
        HieraTokImageProcessor(size_divisor=8).save_pretrained(old)
        (old / "mine.txt").write_text("mine")
    before, failed = tree(old) if there else {}, 0
    for whole, error, after in faults(SAVES[kind], tmp_path / "model", old):
        assert after == (before if error else whole)
        assert error is None or "/model" in str(error)
        failed += error is not None
    assert failed > 2
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "old"}


SCRIPTS = {
    "convert": ("cli", "convert_checkpoint", ["{vae}/diffusion_pytorch_model.safetensors", "{folder}"]),
    "convert back": ("cli", "convert_checkpoint", ["{vae}", "{folder}/raw.safetensors", "--to_raw"]),
    "reconstruct": (
        "cli",
        "reconstruct",
        ["{images}/hat.webp", "--output={folder}", "--json={folder}/a.json"],
    ),
    "cache": ("cli", "cache", ["--data={images}", "--output={folder}", "--shard_size=4"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_one_line_and_leaves_whole_files_alone(name, tmp_path, capsys):
    where, script, given = SCRIPTS[name]
    module, vae = load_script(where, script), tmp_path / "vae"
    VAE.save_pretrained(vae)
    more = {"convert": ["--config={vae}/config.json"], "convert back": []}
    given = [*given, *more.get(name, ["--model={vae}", "--size=32", "--device=cpu"])]

    def run(folder):
        folder.mkdir(exist_ok=True)
        told = module.main([text.format(vae=vae, folder=folder, images=IMAGES) for text in given])
        if told == 1:  # as of an image among others
            raise OSError(re.search("^failed: .*", capsys.readouterr().err, re.M)[0])
        if told:
            raise OSError(error_of(capsys))

    failed = 0
    for whole, error, after in faults(run, tmp_path / "made", most=8):
        assert after.keys() <= whole.keys() and (error is not None or after.keys() == whole.keys())
        if name != "cache":  # which says in cache.json what is to come
            assert all(whole[path] == content for path, content in after.items() if not path.endswith(".json"))
        assert error is None or "/made" in str(error)
        failed += error is not None
    assert failed > 2


def test_a_push_leaves_the_hub_and_the_temporary_folder_as_they_were(hub_here, tmp_path, monkeypatch):
    def state():
        return [commit.oid for commit in hub_here.commits("org/name")]

    def push(folder):
        folder.mkdir(exist_ok=True)
        before.append(state())
        VAE.push_to_hub("org/name")

    VAE.push_to_hub("org/name")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    before, failed = [], 0
    for _, error, after in faults(push, tmp_path / "tmp", most=12):
        assert not after
        if error:
            failed += 1
            assert state() == before[-1]
    assert failed > 2


def test_a_training_goes_on_from_what_was_there(tmp_path, capsys):
    script = load_script("cli", "train")
    settings = (
        "--crop_sizes 16 --batch_size 2 --steps 3 --warmup_steps 1 --decay_steps 1 --linear_steps 1 --num_workers 0"
    )
    settings += " --log_every 1 --save_every 1 --sample_every 2 --statistics_batches 1 --ema 0.5 --keep 2 --resume"
    config = json.dumps({**TINY, "scale_factors": [2, 1]})

    def run(folder):
        forget_processes()
        if script.main(["--data", str(IMAGES), "--output", str(folder), "--config", config, *settings.split()]):
            raise OSError(error_of(capsys))

    failed = 0
    for whole, error, after in faults(run, tmp_path / "trained", most=4):
        assert after.keys() <= whole.keys() | {"state-000000001.pt"}
        if error:
            failed += 1
            assert "/trained" in str(error)
            run(tmp_path / "trained")
            after = tree(tmp_path / "trained")
        assert after.keys() >= whole.keys()
        told_of_time = (".pt", "training.json")
        assert all(after[name] == whole[name] for name in whole if not name.endswith(told_of_time))
    assert failed > 2
