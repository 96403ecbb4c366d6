"""The training example: it learns, resumes bit for bit, runs on several processes, and says what is wrong."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image
from scripts import forget_processes, records
from transformers import MobileNetV2Config, MobileNetV2Model

from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.training_batches import BatchPlan, to_pixel_values, training_loader
from hieratok_hf.training.pca_init import latent_statistics
from hieratok_hf.training.state import latest_state, states_in

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_tokenizer.py"
SPEC = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
train_tokenizer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(train_tokenizer)
IMAGES = str(ROOT / "examples" / "images")
CONFIG = {**TINY, "scale_factors": [4, 2, 1]}


pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, min_depth=4, image_size=32))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # the model's own would leave next to nothing of an image
    model.save_pretrained(folder)
    return folder


def arguments(output, *more):
    settings = "--crop_sizes 32 64 --batch_size 8 --steps 6 --warmup_steps 2 --decay_steps 2 --linear_steps 20"
    schedule = "--log_every 1 --save_every 3 --statistics_batches 4 --ema 0.5"
    return [
        *("--data", IMAGES, "--output", str(output), *settings.split(), *schedule.split()),
        *("--config", json.dumps(CONFIG), *map(str, more)),
    ]


def run(output, *more):
    forget_processes()
    assert train_tokenizer.main(arguments(output, *more)) == 0
    return records(output)


def weights_of(folder):
    return AutoencoderHieraTok.from_pretrained(folder).state_dict()


def all_losses(vision_model):
    """Every part that needs no further package."""
    weights = "--perceptual_weight 0.1 --alignment_weight 0.1 --adversarial_weight 0.5 --adversarial_start 4"
    noise = "--latent_noise 1.0 --coarse_weight 0.1 --coarse_start 3"
    return [*weights.split(), *noise.split(), "--vision_model", str(vision_model)]


def test_training_ends_in_a_folder_for_both_libraries(tmp_path):
    steps = run(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    vae, model = AutoencoderHieraTok.from_pretrained(tmp_path), HieraTokModel.from_pretrained(tmp_path)
    assert vae.config.scale_factors == (4, 2, 1)
    plan = BatchPlan(8, (32, 64), 4, seed=1)
    batches = list(map(to_pixel_values, training_loader(load_images(IMAGES), plan)))
    mean, std = latent_statistics(vae.core, batches)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=1e-4)
    assert torch.equal(vae(batches[0]).sample, model(batches[0]).reconstruction)
    assert (vae(batches[0]).sample - batches[0]).square().mean() < 0.02
    sheet = Image.open(tmp_path / "samples" / "step-000000006.png")
    # The image and three scales side by side; eight images of 32 pixels below each other, or two of 64.
    assert sheet.size in {(4 * 32 + 6, 8 * 32 + 14), (4 * 64 + 6, 2 * 64 + 2)} and np.asarray(sheet).std() > 10


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, vision_model):
    everything = [*all_losses(vision_model), "--border_weight", 1, "--latent_jitter", 0.2]
    whole = run(tmp_path / "whole", *everything)
    assert {"discriminator", "adversarial", "alignment", "perceptual", "coarse", "border"} <= set(whole[-1])
    save, saves = train_tokenizer.TrainingState.save, []

    def save_and_stop(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tokenizer.TrainingState, "save", save_and_stop)
        train_tokenizer.main(arguments(tmp_path / "parts", *everything))
    assert len(records(tmp_path / "parts")) == 3
    assert run(tmp_path / "parts", *everything, "--resume") == whole
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(tmp_path):
    more = ["--steps", "40", "--save_every", "4", "--crop_sizes", "32"]
    whole = run(tmp_path / "whole", *more)
    command = [sys.executable, str(ROOT / "tests" / "kill_and_resume.py"), str(SCRIPT)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [*command, *arguments(tmp_path / "parts", *more)], capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    assert told["finished"] and told["killed"] >= 3, told
    assert records(tmp_path / "parts") == whole
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_train_as_one(tmp_path, vision_model):
    everything = all_losses(vision_model)
    one = run(tmp_path / "one", *everything, "--validation_data", IMAGES, "--validation_every", "3")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    more = arguments(tmp_path / "two", *everything, "--validation_data", IMAGES, "--validation_every", "3")
    finished = subprocess.run([*command, str(SCRIPT), *more], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    two = records(tmp_path / "two")
    for ours, theirs in zip(two, one, strict=True):
        # A norm of gradients has the jumps of L1 and ReLU in it, and Adam's first step of the discriminator is a sign,
        # also of gradients that are all rounding.
        for name, value in ours.items():
            exact = ours["step"] <= 5 and name not in ("norm", "adaptive_weight")
            assert value == pytest.approx(theirs[name], rel=1e-5 if exact else 1e-3, abs=1e-5 if exact else 1e-3), name
    ours, theirs = (records(tmp_path / name, "validation.jsonl") for name in ("two", "one"))
    assert [record["images"] for record in ours] == [2, 2]
    for key in ("psnr", "FD-MobileNetV2"):
        assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-3)
    a, b = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


def test_accumulated_parts_are_one_step(tmp_path):
    more = ["--steps", 3, "--border_weight", 1, "--latent_jitter", 0.2]
    whole = run(tmp_path / "whole", *more)
    parts = run(tmp_path / "parts", *more, "--crop_sizes", 32, 64, "--accumulate", 2)
    wide = [record["step"] for record in whole]
    assert [record["step"] for record in parts] == wide
    for name in ("loss", "border"):
        assert parts[0][name] == pytest.approx(whole[0][name], rel=1e-5)


def test_fine_tuning_starts_from_the_weights_it_is_given(tmp_path):
    run(tmp_path / "first")
    run(tmp_path / "second", "--model", tmp_path / "first", "--steps", 1, "--lr", 0)
    a, b = (AutoencoderHieraTok.from_pretrained(tmp_path / name) for name in ("first", "second"))
    pixel_values = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(a(pixel_values).sample, b(pixel_values).sample, rtol=0, atol=1e-4)


def test_a_frozen_encoder_stays_as_it_is(tmp_path):
    run(tmp_path / "first")
    run(tmp_path / "second", "--model", tmp_path / "first", "--freeze_encoder", "--lr", 0.01)
    a, b = (AutoencoderHieraTok.from_pretrained(tmp_path / name).core for name in ("first", "second"))
    changed = {name for name, x in b.named_parameters() if not torch.equal(x, a.get_parameter(name))}
    # Not even by the statistics of the new images: what generates its latents must fit the new decoder.
    assert not {name for name in changed if name.startswith("encoder.")}
    assert "decoder.blocks.0.mlp.linear_in.weight" in changed


def trained(output, *more):
    run(output, *more)
    return AutoencoderHieraTok.from_pretrained(output)


def test_other_scales_can_be_asked_for(tmp_path):
    assert trained(tmp_path / "single", "--scale_factors", 1).config.scale_factors == (1,)
    more = ["--model", tmp_path / "single", "--scale_factors", 2, 1, "--steps", 1]
    assert trained(tmp_path / "multi", *more).config.scale_factors == (2, 1)


def test_averages_can_be_trained_and_become_learned(tmp_path, capsys):
    mean = trained(tmp_path / "mean", "--downsampling", "mean", "--steps", 2, "--save_every", 1)
    assert mean.config.downsampling == "mean" and not len(mean.core.decoder.coarse_embed)
    more = ["--model", tmp_path / "mean", "--steps", 1, "--lr", 0, "--freeze_encoder"]
    assert trained(tmp_path / "again", *more).config.downsampling == "mean"
    assert trained(tmp_path / "fewer", *more, "--scale_factors", 2, 1).config.downsampling == "mean"
    learned = trained(tmp_path / "learned", *more, "--downsampling", "learned")
    assert (learned.config.downsampling, learned.config.scale_factors) == ("learned", (4, 2, 1))
    pixel_values = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(learned(pixel_values).sample, mean(pixel_values).sample, rtol=0, atol=1e-4)
    message = failure(capsys, tmp_path / "back", "--model", tmp_path / "learned", "--downsampling", "mean")
    assert "`downsampling` must be one of 'learned', as the model has it" in message


def test_the_tracker_gets_losses_and_samples(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "--report_to", "tensorboard")
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Tags()["images"] == ["samples"]


def failure(capsys, output, *more):
    capsys.readouterr()
    assert train_tokenizer.main(arguments(output, *more)) == 2
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert not any("Traceback" in line for line in lines)
    return next(line for line in lines if line.startswith("error: "))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, capsys, monkeypatch):
    objective, calls = train_tokenizer.TrainingLoss.__call__, []

    def poisoned(*args):
        losses = objective(*args)
        calls.append(args)
        if len(calls) == 5:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    monkeypatch.setattr(train_tokenizer.TrainingLoss, "__call__", poisoned)
    message = failure(capsys, tmp_path, "--log_every", 10)
    assert message.startswith("error: The loss or its gradient was not finite at step 5.")
    assert [path.name for path in states_in(tmp_path)] == ["state-000000003.pt"]
    assert all(torch.isfinite(x).all() for x in latest_state(tmp_path)["average"].values())


def test_bad_data_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "output"
    assert "No images found in" in failure(capsys, output, "--data", tmp_path / "empty")
    assert "no such file" in failure(capsys, output, "--data", tmp_path / "missing" / "train-*.tar")
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no image")
    assert "3 images in a row cannot be decoded" in failure(capsys, output, "--data", tmp_path / "broken")


def test_a_full_or_unwritable_output_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert "file" in failure(capsys, tmp_path / "file" / "output")

    def full(state, file):
        file.write(b"part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device" in failure(capsys, tmp_path / "output")
    assert not list((tmp_path / "output").glob("*.tmp")) and not list((tmp_path / "output").glob("*.pt"))


def test_states_of_other_runs_are_refused(tmp_path, capsys):
    run(tmp_path, "--steps", 3)
    assert "holds a training state" in failure(capsys, tmp_path)
    for other in (("--scale_factors", 2, 1), ("--downsampling", "mean")):
        assert "of another configuration" in failure(capsys, tmp_path, "--resume", *other)
    state = states_in(tmp_path)[-1]
    state.write_bytes(state.read_bytes()[:1000])
    assert f"{state.name}' cannot be read as a training state" in failure(capsys, tmp_path, "--resume")


def test_arguments_that_cannot_be_are_named(tmp_path, capsys):
    assert "--crop_sizes must be multiples of the patch size 4, got 30" in failure(
        capsys, tmp_path, "--crop_sizes", 30
    )
    assert "`batch_size` must be a multiple" in failure(capsys, tmp_path, "--accumulate", 3)
    assert "`size` must be one of" in failure(capsys, tmp_path, "--size", "hieratok-xl")
    assert "must be finite and not negative, got -1" in failure(capsys, tmp_path, "--perceptual_weight", -1)
    assert "`border` must be finite and not negative, got -1" in failure(capsys, tmp_path, "--border_weight", -1)
    assert "no argument 'patches'" in failure(capsys, tmp_path, "--config", '{"patches": 4}')


def test_lower_precision_and_streaming_train_as_well(tmp_path):
    exact = run(tmp_path / "exact", "--steps", 4, "--streaming")
    rounded = run(tmp_path / "rounded", "--steps", 4, "--streaming", "--mixed_precision", "bf16")
    assert exact != rounded
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
    assert all(x.dtype == torch.float32 for x in weights_of(tmp_path / "rounded").values())


def test_sharded_over_two_processes_it_trains_as_one(tmp_path):
    one = run(tmp_path / "one", "--steps", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29518"]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    fsdp |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    environment = {**os.environ, **fsdp, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    more = arguments(tmp_path / "two", "--steps", 3)
    finished = subprocess.run([*command, str(SCRIPT), *more], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for ours, theirs in zip(records(tmp_path / "two"), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    # What sharded processes saved, a single one goes on from.
    assert run(tmp_path / "two", "--steps", 4, "--resume")[-1]["step"] == 4
    a, b = latest_state(tmp_path / "two")["average"], weights_of(tmp_path / "one")
    assert {name.removeprefix("core.") for name in a} == {name.removeprefix("core.") for name in b}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_trains_compiled_and_in_bfloat16(tmp_path, vision_model):
    plain = run(tmp_path / "plain", *all_losses(vision_model))
    fast = run(tmp_path / "fast", *all_losses(vision_model), "--mixed_precision", "bf16", "--compile")
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours["l1"] == pytest.approx(theirs["l1"], rel=0.1)
