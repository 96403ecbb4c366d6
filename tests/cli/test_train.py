"""The training example: it resumes bit for bit, runs on several processes, fine-tunes, and says what is wrong."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from full_disk import full_disk
from helpers import TINY
from latent_data import make_mixed_images
from PIL import Image
from processes import FSDP, kill_and_go_on
from scripts import (
    ROOT,
    assert_close,
    error_of,
    forget_processes,
    interrupted,
    load_script,
    names_in,
    records,
    run_training,
    save_vision_model,
    usage_error,
)

from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.training_batches import BatchPlan, to_pixel_values, training_loader
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.training.pca_init import latent_statistics
from hieratok_hf.training.state import hold_folder, latest_state, states_in

train_tokenizer = load_script("cli", "train")
IMAGES = str(ROOT / "src" / "hieratok_hf" / "example_images")
CONFIG = {**TINY, "scale_factors": [4, 2, 1]}

pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    return save_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture
def first(tmp_path_factory):
    """A tokenizer that was trained once, to begin with."""
    folder = tmp_path_factory.getbasetemp() / "first"
    if not folder.exists():
        run(folder)
    return folder


def arguments(output, *more):
    settings = "--crop_sizes 32 64 --batch_size 8 --steps 6 --warmup_steps 2 --decay_steps 2"
    schedule = "--log_every 1 --save_every 3 --statistics_batches 4 --ema 0.5"
    scratch = [] if "--model" in more else ["--config", json.dumps(CONFIG), "--linear_steps", 4]
    given = ["--data", IMAGES, "--output", output, *scratch]
    return list(map(str, [*given, *settings.split(), *schedule.split(), *more]))


def run(output, *more):
    return run_training(train_tokenizer, arguments(output, *more))


def train(output, *more):
    run(output, *more)
    return AutoencoderHieraTok.from_pretrained(output)


def failure(capsys, output, *more):
    assert train_tokenizer.main(arguments(output, *more)) == 2
    return error_of(capsys)


def weights_of(folder):
    return AutoencoderHieraTok.from_pretrained(folder).state_dict()


def all_losses(vision_model):
    """Every part that needs no further package."""
    weights = "--perceptual_weight 0.1 --alignment_weight 0.1 --adversarial_weight 0.5 --adversarial_start 4"
    noise = "--latent_noise 1.0 --coarse_weight 0.1 --coarse_start 3"
    return [*weights.split(), *noise.split(), "--vision_model", str(vision_model)]


def test_training_ends_in_a_folder_for_both_libraries(first):
    assert [record["step"] for record in records(first)] == [1, 2, 3, 4, 5, 6]
    vae, model = AutoencoderHieraTok.from_pretrained(first), HieraTokModel.from_pretrained(first)
    assert vae.config.scale_factors == (4, 2, 1)
    plan = BatchPlan(8, (32, 64), 4, seed=1)
    batches = list(map(to_pixel_values, training_loader(load_images(IMAGES), plan)))
    mean, std = latent_statistics(Codec(vae), batches)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=1e-4)
    assert torch.equal(vae(batches[0]).sample, model(batches[0]).reconstruction)
    assert (vae(batches[0]).sample - batches[0]).square().mean() < 0.02
    sheet = Image.open(first / "samples" / "step-000000006.png")
    # The image and three scales side by side; the two images of the data below each other, and text around them.
    assert sheet.width > 4 * 64 + 6 and sheet.height > 2 * 64 + 2 and np.asarray(sheet).std() > 10


def test_checkpointing_and_exports_on_the_way_change_nothing(first, tmp_path, monkeypatch):
    seen, forward = set(), train_tokenizer.TokenizerTraining.forward

    def watched(self, *inputs):
        seen.update(block.gradient_checkpointing for block in (*self.core.encoder.blocks, *self.core.decoder.blocks))
        return forward(self, *inputs)

    monkeypatch.setattr(train_tokenizer.TokenizerTraining, "forward", watched)
    assert_close(run(tmp_path, "--gradient_checkpointing", "--export_every", 3), records(first), rel=1e-5)
    assert seen == {True}
    torch.testing.assert_close(weights_of(tmp_path), weights_of(first), rtol=1e-5, atol=1e-6)
    early, late = (tmp_path / f"model-00000000{step}" for step in (3, 6))
    torch.testing.assert_close(weights_of(late), weights_of(tmp_path), rtol=0, atol=0)
    assert not torch.equal(weights_of(early)["core.encoder.head.weight"], weights_of(late)["core.encoder.head.weight"])
    assert HieraTokModel.from_pretrained(early).config.scale_factors == (4, 2, 1)
    told = [json.loads((folder / "training.json").read_text())["steps"] for folder in (early, late, tmp_path)]
    assert told == [3, 6, 6]


def test_sheets_show_the_same_images_every_time(tmp_path):
    held_out = tmp_path / "held out"
    held_out.mkdir()
    for level in (50, 200):
        Image.new("RGB", (40, 48), (level,) * 3).save(held_out / f"{level:03d}.png")
    for more, side in (([], 64), (["--validation_data", held_out, "--validation_size", 32], 32)):
        run(tmp_path / str(side), *more, "--steps", 2, "--sample_every", 1)
        sheets = [np.asarray(Image.open(path)) for path in sorted((tmp_path / str(side) / "samples").iterdir())]
        left, top = 4 * side + 6, 2 * side + 2
        first, second = (sheet[-top:, -left : side - left] for sheet in sheets)
        assert (first == second).all()
        if more:
            assert (first[:side] == 50).all() and (first[-side:] == 200).all()


def test_held_out_images_are_the_split_validation_where_there_is_one(tmp_path, capsys):
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        image.save(tmp_path / "data" / split / f"{split}.png")

    def told(name, *given):
        given = ["--steps", 2, "--warmup_steps", 9, "--validation_data", *given]
        run(tmp_path / name, "--data", tmp_path / "data", *given, "--validation_size", 32)
        return capsys.readouterr().out

    names, load = [], train_tokenizer.load_images

    def watched(*given, **options):
        images = load(*given, **options)
        names.append([row["name"] for row in images])
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "load_images", watched)
        printed = [told("split", tmp_path / "data"), told("named", tmp_path / "data", "--validation_split", "test")]
        printed.append(told("same", tmp_path / "data" / "train", "--data", tmp_path / "data" / "train"))
    found = [held_out for (held_out,) in names]
    train, validation, test = (f"{split}.png" for split in ("train", "validation", "test"))
    assert [Path(name).name for name in found] == [train, validation, train, test, train, train]
    assert [("the very images" in text) for text in printed] == [False, False, True]
    assert all("note: --warmup_steps 9" in text for text in printed)


def test_what_the_training_was_lies_beside_the_model(first, tmp_path):
    images = shutil.copytree(IMAGES, tmp_path / "images")
    more = ["--model", first, "--data", images, "--crop_sizes", 32, "--steps"]
    run(tmp_path / "mine", *more, 4, "--decay_steps", 0)
    text = (tmp_path / "mine" / "training.json").read_text()
    record = json.loads(text)
    assert str(tmp_path) not in text and str(first) not in text
    fingerprint = load_images(IMAGES).fingerprint
    assert record["data"] == {"names": ["images"], "images": 2, "fingerprint": fingerprint}
    assert (record["parents"], record["steps"], record["seed"]) == ({"model": "first"}, 4, 0)
    state = latest_state(tmp_path / "mine")
    assert 0 < state["report"]["seconds"] <= record["hours"] * 3600 + 0.2
    other = shutil.copytree(tmp_path / "mine", tmp_path / "other")
    AutoencoderHieraTok.from_pretrained(first).save_pretrained(other)
    assert not (other / "training.json").exists()  # it is another's now
    run(tmp_path / "mine", *more, 5, "--decay_steps", 0, "--resume")
    assert latest_state(tmp_path / "mine")["report"]["seconds"] > state["report"]["seconds"]


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(tmp_path, vision_model):
    more = [*all_losses(vision_model), "--border_weight", 1, "--latent_jitter", 0.2]
    more += ["--steps", "14", "--save_every", "2", "--crop_sizes", "32"]
    whole = run(tmp_path / "whole", *more)
    assert {"discriminator", "adversarial", "alignment", "perceptual", "coarse", "border"} <= set(whole[-1])
    go_on = {"arguments": arguments(tmp_path / "parts", *more, "--resume")}
    runs = [{**go_on, "kill": 0.2}, {**go_on, "kill": 0.2}, {**go_on, "cut": 3}, go_on]
    told = kill_and_go_on(train_tokenizer, "losses.jsonl", runs, tmp_path / "cache")
    assert [ended["ended"] for ended in told] == [False, False, False, True], told
    assert records(tmp_path / "parts") == whole
    assert names_in(tmp_path / "parts") == names_in(tmp_path / "whole")
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"), rtol=0, atol=0)


def test_with_buckets_it_goes_on_as_if_nothing_had_happened(tmp_path, vision_model):
    data, shapes = make_mixed_images(tmp_path / "data"), set()
    more = [*all_losses(vision_model), "--border_weight", 1, "--data", data, "--aspect_buckets", "--bucket_step", 8]
    more += ["--crop_sizes", 32, "--steps", 12, "--save_every", 2, "--log_every", 3]  # of which a state cuts some
    objective = train_tokenizer.TrainingLoss.__call__

    def watched(self, config, outputs, step):
        shapes.add(tuple(outputs[-1].shape[2:]))
        return objective(self, config, outputs, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer.TrainingLoss, "__call__", watched)
        whole = run(tmp_path / "whole", *more)
    assert shapes == {(24, 40), (32, 32), (40, 24)}
    with interrupted(train_tokenizer.TrainingLoss, "__call__", 6):
        forget_processes()
        assert train_tokenizer.main(arguments(tmp_path / "parts", *more)) == 130
    assert run(tmp_path / "parts", *more, "--resume") == whole
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"), rtol=0, atol=0)


def test_buckets_that_cannot_be_are_named(tmp_path, capsys):
    for more, message in (
        (["--bucket_step", 6], "--bucket_step must be a multiple of the patch size 4, got 6"),
        (["--bucket_step", 12], "--crop_sizes must be multiples of --bucket_step 12, got 32"),
    ):
        assert message in failure(capsys, tmp_path / "new", "--aspect_buckets", 1.5, *more)
        assert not (tmp_path / "new").exists()


def test_another_training_and_other_data_are_refused_in_a_folder_that_is_begun(tmp_path, capsys):
    images = shutil.copytree(IMAGES, tmp_path / "images")
    more = ["--data", images, "--steps", 2, "--save_every", 1, "--crop_sizes", 32]
    run(tmp_path / "runs", *more)
    before = names_in(tmp_path / "runs")
    # Where the images lie is of no concern, what they are is.
    moved = ["--data", images.rename(tmp_path / "moved"), *more[2:], "--overwrite", "--resume"]
    capsys.readouterr()
    assert run(tmp_path / "runs", *moved) == run(tmp_path / "runs", *moved)
    told = f"The model is in {str(tmp_path / 'runs')!r}: hieratok reconstruct photo.jpg --model {tmp_path / 'runs'}\n"
    assert capsys.readouterr().out.count(told) == 2
    shutil.copy(tmp_path / "moved" / "hat.webp", tmp_path / "moved" / "jacket.webp")
    assert "--data changed" in failure(capsys, tmp_path / "runs", *moved)
    assert run(tmp_path / "runs", *moved, "--allow_changes", "--steps", 3)[-1]["step"] == 3
    with hold_folder(tmp_path / "runs"):
        if (other := os.fork()) == 0:  # a lock is that of a process
            os._exit(10 + train_tokenizer.main(arguments(tmp_path / "runs", *moved)))
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 12
    assert len(names_in(tmp_path / "runs")) == len(before) + 1  # a sheet of samples


def test_two_processes_train_as_one_also_where_the_weights_are_sharded(tmp_path, vision_model):
    more = [*all_losses(vision_model), "--validation_data", IMAGES, "--validation_every", "3"]
    more += ["--validation_fid", "--validation_size", "64", "--linear_steps", 20]
    sharded = ["--steps", 3, "--crop_sizes", 32]
    runs = [{"arguments": arguments(tmp_path / "two", *more), "world": 2}]
    runs += [{"arguments": arguments(tmp_path / "sharded", *sharded), "world": 2, "environment": FSDP}]
    told = kill_and_go_on(train_tokenizer, "losses.jsonl", runs, tmp_path / "cache")
    assert [ended["ended"] for ended in told] == [True, True]
    one, two = run(tmp_path / "one", *more), records(tmp_path / "two")
    # A norm of gradients has the jumps of L1 and ReLU in it, and Adam's first step of the discriminator is a sign,
    # also of gradients that are all rounding.
    assert_close(two, one, rel=1e-3, abs=1e-3)
    for ours, theirs in zip(two[:5], one[:5]):
        assert_close([ours], [theirs], *(theirs.keys() - {"norm", "adaptive_weight"}), rel=1e-5, abs=1e-5)
    ours, theirs = (records(tmp_path / name, "validation.jsonl") for name in ("two", "one"))
    assert [(record["images"], record["size"]) for record in ours] == [(2, 64), (2, 64)]
    assert_close(ours, theirs, "psnr", "FD-MobileNetV2", rel=1e-3)
    torch.testing.assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), rtol=0, atol=1e-4)
    assert_close(records(tmp_path / "sharded"), run(tmp_path / "whole", *sharded), rel=1e-4, abs=1e-5)
    # What sharded processes saved, a single one goes on from.
    assert run(tmp_path / "sharded", *sharded, "--steps", 4, "--resume", "--allow_changes")[-1]["step"] == 4


def test_accumulated_parts_are_one_step(tmp_path):
    more = ["--steps", 3, "--border_weight", 1, "--latent_jitter", 0.2]
    whole, parts = run(tmp_path / "whole", *more), run(tmp_path / "parts", *more, "--accumulate", 2)
    assert [record["step"] for record in parts] == [record["step"] for record in whole]
    assert_close(parts[:1], whole[:1], "loss", "border", rel=1e-5)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A working directory with a module of losses, `pulls`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "pulls", raising=False)
    lines = ["no_function = 3", "def black(images, targets): return (images + 1).abs().mean()"]
    lines += ["def each(images, targets): return (images - targets).mean((1, 2, 3))"]
    lines += ["def leaves(images, targets): raise SystemExit('bye')"]
    lines += ["def free(images, targets): return (images - targets).detach().mean()"]
    lines += ["def small(images, targets): return (images - targets.add_(1))[:, :, 63].mean()"]
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    (tmp_path / "pulls.py").write_text("\n".join(lines))


@pytest.mark.usefixtures("in_folder")
def test_a_loss_of_ones_own_acts_and_belongs_to_the_training(first, tmp_path, capsys):
    loss = "pulls:black=10"
    steps = run(tmp_path / "dark", "--loss", loss)
    for record in steps:
        assert 0 < record["pulls:black"] < record["loss"] / 10
    (batch,) = training_loader(load_images(IMAGES), BatchPlan(8, (32,), 1))
    light, dark = (
        AutoencoderHieraTok.from_pretrained(folder)(to_pixel_values(batch)).sample.mean().item()
        for folder in (first, tmp_path / "dark")
    )
    assert dark < light - 0.02
    assert json.loads((tmp_path / "dark" / "training.json").read_text())["arguments"]["loss"] == [loss]
    for more in ([], ["--loss", "pulls:black=5"]):
        assert "--loss changed" in failure(capsys, tmp_path / "dark", "--resume", *more)


@pytest.mark.usefixtures("in_folder")
def test_losses_that_cannot_be_are_named(tmp_path, capsys):
    for name, message in (
        ("missing.module:black", "No module named 'missing'"),
        ("pulls:white", "no attribute 'white'"),
        ("pulls:no_function", "not callable"),
        ("pulls:each", "must give a scalar tensor of real numbers, got torch.float32 of shape (2,)"),
        ("pulls:leaves", "bye"),
        ("pulls:free", "must give a tensor with a gradient"),
        ("ends:ends", "SystemExit(3)"),
    ):
        told = failure(capsys, tmp_path / "new", "--loss", f"{name}=1")
        assert f"--loss '{name}'" in told and message in told and not (tmp_path / "new").exists()
    told = failure(capsys, tmp_path / "new", "--loss", "pulls:small=1", "--crop_sizes", 32)
    assert "--loss 'pulls:small' failed on images of shape (8, 3, 32, 32)" in told
    given = arguments(tmp_path / "new", "--loss", "a:b=1", "--loss", "a:b=2")
    assert "--loss must name each function once" in usage_error(capsys, train_tokenizer.main, *given)


def test_a_frozen_encoder_stays_as_it_is(first, tmp_path):
    core = train(tmp_path, "--model", first, "--freeze_encoder", "--lr", 0.01).core
    before = AutoencoderHieraTok.from_pretrained(first).core
    changed = {name for name, x in core.named_parameters() if not torch.equal(x, before.get_parameter(name))}
    # Not even by the statistics of the new images: what generates its latents must fit the new decoder.
    assert not {name for name in changed if name.startswith("encoder.")}
    assert "decoder.blocks.0.mlp.linear_in.weight" in changed


def test_fine_tuning_starts_from_the_weights_it_is_given(first, tmp_path, capsys):
    pixel_values = torch.rand(1, 3, 32, 32) * 2 - 1
    again = train(tmp_path / "again", "--model", first, "--steps", 1, "--lr", 0)
    expected = AutoencoderHieraTok.from_pretrained(first)
    torch.testing.assert_close(again(pixel_values).sample, expected(pixel_values).sample, rtol=0, atol=1e-4)

    mean = train(tmp_path / "mean", "--downsampling", "mean", "--steps", 2, "--save_every", 1)
    assert mean.config.downsampling == "mean" and not len(mean.core.decoder.coarse_embed)
    more = ["--model", tmp_path / "mean", "--steps", 1, "--lr", 0, "--freeze_encoder"]
    fewer = train(tmp_path / "fewer", *more, "--scale_factors", 2, 1)
    assert (fewer.config.downsampling, fewer.config.scale_factors) == ("mean", (2, 1))
    learned = train(tmp_path / "learned", *more, "--downsampling", "learned")
    assert (learned.config.downsampling, learned.config.scale_factors) == ("learned", (4, 2, 1))
    torch.testing.assert_close(learned(pixel_values).sample, mean(pixel_values).sample, rtol=0, atol=1e-4)
    message = failure(capsys, tmp_path / "back", "--model", tmp_path / "learned", "--downsampling", "mean")
    assert "`downsampling` must be one of ['learned']" in message


def make_teacher(**options):
    """An autoencoder of diffusers with random weights and statistics of its latents."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    torch.manual_seed(0)
    statistics = {"scaling_factor": 0.5, "shift_factor": 0.1}
    return AutoencoderKL(**{**blocks, **sizes, **statistics, **options})


def psnr(images, targets):
    return -10 * torch.log10((images.clamp(-1, 1) - targets).square().mean() / 4).item()


def test_it_learns_a_teachers_latents_and_speaks_them(tmp_path):
    theirs, teacher = make_teacher(), tmp_path / "teacher"
    optimizer = torch.optim.Adam(theirs.parameters(), 3e-3)
    batches = list(map(to_pixel_values, training_loader(load_images(IMAGES), BatchPlan(4, (32,), 30))))
    for pixel_values in 4 * batches:
        (theirs(pixel_values).sample - pixel_values).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval().save_pretrained(teacher)
    more = ["--teacher", teacher, "--steps", 100, "--decay_steps", 100, "--lr", 3e-3, "--ema", 0.9, "--log_every", 25]
    more += ["--crop_sizes", 32, "--linear_lr_factor", 1, "--statistics_batches", 16, "--latent_jitter", 0.2]
    more += ["--validation_data", IMAGES, "--save_every", 100]
    vae = train(tmp_path, *more)
    assert (vae.config.patch_size, vae.config.latent_channels) == (4, 4)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.5, 0.1)
    assert records(tmp_path)[-1]["latents"] < records(tmp_path)[0]["latents"]
    assert records(tmp_path, "validation.jsonl")[-1]["latents_r2"] > 0.9
    (batch,) = training_loader(load_images(IMAGES), BatchPlan(32, (32,), 1, seed=5))
    pixel_values = to_pixel_values(batch)
    with torch.no_grad():
        latents, own = theirs.encode(pixel_values).latent_dist.mode(), vae.encode(pixel_values).latent_dist.mode()
        centred = latents - latents.mean((0, 2, 3), keepdim=True)
        explained = 1 - ((own - latents).square().mean((0, 2, 3)) / centred.square().mean((0, 2, 3)))
        assert explained.mean() > 0.9
        for given in (latents, own):
            assert psnr(vae.decode(given).sample, pixel_values) > psnr(theirs.decode(latents).sample, pixel_values) - 1
    # It goes on, with its decoder alone, from what it has learned.
    further = train(tmp_path / "further", "--model", tmp_path, *more[:2], "--decoder_only", "--steps", 1, "--lr", 0)
    torch.testing.assert_close(further.encode(pixel_values).latent_dist.mode(), own, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(further.decode(latents).sample, vae.decode(latents).sample, atol=1e-3, rtol=1e-3)
    assert "latents" not in records(tmp_path / "further")[0]


def test_with_a_teacher_it_goes_on_as_if_nothing_had_happened(first, tmp_path, capsys):
    make_teacher(latent_channels=6).save_pretrained(tmp_path / "wider")
    more = ["--teacher", tmp_path / "wider", "--model", first, "--crop_sizes", 32, "--latent_noise", 0.5]
    more += ["--teacher_images"]
    whole = run(tmp_path / "whole", *more, "--export_every", 2)
    with interrupted(train_tokenizer.TrainingLoss, "__call__", 5):
        forget_processes()
        assert train_tokenizer.main(arguments(tmp_path / "parts", *more)) == 130
    assert run(tmp_path / "parts", *more, "--resume") == whole
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"), rtol=0, atol=0)
    make_teacher(latent_channels=6, scaling_factor=0.9).save_pretrained(tmp_path / "wider")  # another at its place
    assert "--teacher changed" in failure(capsys, tmp_path / "parts", *more, "--resume")
    for exported in ("parts", "whole/model-000000002"):
        config = AutoencoderHieraTok.from_pretrained(tmp_path / exported).config
        assert (config.latent_channels, config.scaling_factor) == (6, 0.5)


def test_a_teacher_that_does_not_suit_is_named(first, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    make_teacher().save_pretrained(teacher)
    coarse = tmp_path / "coarse"
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4).save_pretrained(coarse)
    for more, message in (
        (["--teacher", tmp_path / "missing"], "--teacher"),
        (["--teacher", teacher, "--crop_sizes", 34], "--teacher"),
        (["--teacher", coarse, "--model", first], "`patch_size` must be 1"),
        (["--teacher", coarse, "--config", '{"latent_channels": 3}'], "`latent_channels` must be 4"),
    ):
        assert message in failure(capsys, tmp_path / "new", *more)
    with pytest.raises(SystemExit):
        failure(capsys, tmp_path / "new", "--teacher", teacher, "--kl_weight", 1)
    assert "--kl_weight" in capsys.readouterr().err
    given = arguments(tmp_path / "new", "--teacher_images")
    assert "--teacher" in usage_error(capsys, train_tokenizer.main, *given)


def test_the_tracker_gets_losses_and_samples(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "--report_to", "tensorboard", "--steps", 2)
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2] and events.Tags()["images"] == ["samples"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, capsys, monkeypatch):
    objective, factors = train_tokenizer.TrainingLoss.__call__, iter([1, 1, 1, 1, float("nan")])

    def poisoned(*args):
        losses = objective(*args)
        return {**losses, "loss": losses["loss"] * next(factors, 1)}

    monkeypatch.setattr(train_tokenizer.TrainingLoss, "__call__", poisoned)
    assert "not finite at step 5" in failure(capsys, tmp_path, "--log_every", 10)
    assert [path.name for path in states_in(tmp_path)] == ["state-000000003.pt"]
    assert all(torch.isfinite(x).all() for x in latest_state(tmp_path)["average"].values())


def test_a_full_disk_at_the_last_export_is_one_line_and_costs_no_state(tmp_path, capsys, monkeypatch):
    more = [tmp_path, "--steps", 2, "--resume"]
    export = AutoencoderHieraTok.save_pretrained

    def full(*args, **options):
        with full_disk(30_000):
            export(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderHieraTok, "save_pretrained", full)
        message = failure(capsys, *more)
    assert "disk may be full" in message and str(tmp_path) in message
    assert [path.name for path in states_in(tmp_path)] == ["state-000000002.pt"]
    assert not list(tmp_path.glob("*.safetensors*")) and not list(tmp_path.glob(".*"))
    run(*more)
    assert AutoencoderHieraTok.from_pretrained(tmp_path)


def test_a_model_that_is_there_is_replaced_only_if_that_is_asked_for(first, tmp_path, capsys):
    shutil.copy(first / "config.json", tmp_path)
    assert "add --overwrite" in failure(capsys, tmp_path, "--steps", 1)
    run(tmp_path, "--steps", 1, "--overwrite")
    assert AutoencoderHieraTok.from_pretrained(tmp_path)


def test_validation_has_a_size_of_its_own_and_needs_no_vision_model(tmp_path):
    more = ["--steps", 1, "--crop_sizes", 16, "--validation_data", IMAGES]
    sizes = []
    for output, size in (("own", []), ("given", ["--validation_size", 64])):
        run(tmp_path / output, *more, *size)
        (record,) = records(tmp_path / output, "validation.jsonl")
        assert record["psnr"] > 0 and not any(name.startswith("FD-") for name in record)
        sizes.append(record["size"])
    assert sizes == [TINY["sample_size"], 64]


def test_what_does_not_fit_is_named(first, tmp_path, capsys):
    assert "holds a training state" in failure(capsys, first)
    assert "--seed, --lr changed" in failure(capsys, first, "--resume", "--lr", 0.5, "--seed", 1)
    assert "of another configuration" in failure(capsys, first, "--resume", "--scale_factors", 2, 1)
    for more, message in (
        (["--data", tmp_path / "missing" / "train-*.tar"], "no such file"),
        (["--crop_sizes", 30], "--crop_sizes must be multiples of the patch size 4, got 30"),
        (["--validation_data", IMAGES, "--validation_size", 30], "--validation_size must be a multiple of 4, got 30"),
        (["--accumulate", 3], "`batch_size` must be a multiple"),
        (["--config", '{"patches": 4}'], "no argument 'patches'"),
    ):
        assert message in failure(capsys, tmp_path, *more)


def test_lower_precision_and_streaming_train_as_well(tmp_path):
    exact = run(tmp_path / "exact", "--steps", 3, "--streaming")
    rounded = run(tmp_path / "rounded", "--steps", 3, "--streaming", "--mixed_precision", "bf16")
    assert exact != rounded
    assert_close(rounded, exact, "loss", rel=0.05)
    assert all(x.dtype == torch.float32 for x in weights_of(tmp_path / "rounded").values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_trains_compiled_and_in_bfloat16(tmp_path, vision_model):
    plain = run(tmp_path / "plain", *all_losses(vision_model))
    fast = run(tmp_path / "fast", *all_losses(vision_model), "--mixed_precision", "bf16", "--compile")
    assert_close(fast, plain, "l1", rel=0.1)
