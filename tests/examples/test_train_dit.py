"""The generator's training example: it learns, resumes bit for bit, runs on several processes, says what is wrong."""

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
from diffusers import DiTTransformer2DModel
from helpers import TINY, random_core
from PIL import Image
from scripts import forget_processes, records

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_writer import write_latents
from hieratok_hf.training.state import states_in

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_dit.py"
SPEC = importlib.util.spec_from_file_location("train_dit", SCRIPT)
train_dit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(train_dit)
CONFIG = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
NAMES = ["blue", "green", "red"]
PIXELS = 16

pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder a class, its images about of one colour."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for channel, name in enumerate(reversed(NAMES)):
        (folder / name).mkdir()
        for i in range(7):
            levels = rng.integers(0, 60, (PIXELS, PIXELS, 3), dtype=np.uint8)
            levels[..., channel] += 180
            Image.fromarray(levels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory, vae, data):
    folder = tmp_path_factory.mktemp("latents")
    model = AutoencoderHieraTok.from_pretrained(vae)
    write_latents(model, load_images(str(data)), folder, size=PIXELS, shard_size=8)
    return folder


@pytest.fixture
def arguments(vae, latents):
    def make(output, *more):
        settings = "--size dit-tiny --batch_size 6 --steps 6 --warmup_steps 2 --decay_steps 2 --lr 1e-3 --ema 0.5"
        schedule = "--log_every 1 --save_every 3 --sample_every 6 --sample_steps 2"
        source = [] if "--data" in more else ["--latents", str(latents)]
        given = ["--vae", str(vae), "--output", str(output), "--config", json.dumps(CONFIG), *source]
        return [*given, *settings.split(), *schedule.split(), *map(str, more)]

    return make


@pytest.fixture
def run(arguments):
    def train(output, *more):
        forget_processes()
        assert train_dit.main(arguments(output, *more)) == 0
        return records(output)

    return train


def weights_of(folder):
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_ends_in_a_pipeline(tmp_path, run, vae):
    steps = run(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    pipe = HieraTokDiTPipeline.from_pretrained(tmp_path)
    assert pipe.config.id2label == dict(enumerate(NAMES)) and pipe.config.prediction_type == "flow_prediction"
    assert pipe.transformer.config.sample_size == PIXELS // TINY["patch_size"]
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red", 2).images[0].size == (PIXELS, PIXELS)
    expected = AutoencoderHieraTok.from_pretrained(vae).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in pipe.vae.state_dict().items())
    sheet = Image.open(tmp_path / "samples" / "step-000000006.png")
    assert sheet.size == (3 * PIXELS + 4, 4 * PIXELS + 6) and np.asarray(sheet).std() > 10


def test_it_learns(tmp_path, run):
    losses = [record["loss"] for record in run(tmp_path, "--steps", 150, "--lr", 1e-2, "--batch_size", 12)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.parametrize("encoded", [False, True], ids=["latents", "images"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, run, arguments, data, encoded):
    source = ["--data", data, "--image_size", PIXELS] if encoded else []
    whole = run(tmp_path / "whole", *source)
    save = train_dit.TrainingState.save

    def save_and_stop(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_dit.TrainingState, "save", save_and_stop)
        train_dit.main(arguments(tmp_path / "parts", *source))
    assert len(records(tmp_path / "parts")) == 3
    assert run(tmp_path / "parts", *source, "--resume") == whole
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(tmp_path, run, arguments):
    more = ["--steps", "300", "--save_every", "12", "--sample_every", "300"]
    whole = run(tmp_path / "whole", *more)
    command = [sys.executable, str(ROOT / "tests" / "kill_and_resume.py"), str(SCRIPT)]
    finished = subprocess.run([*command, *arguments(tmp_path / "parts", *more)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    assert told["finished"] and told["killed"] >= 3, told
    assert records(tmp_path / "parts") == whole
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_train_as_one(tmp_path, run, arguments):
    one = run(tmp_path / "one", "--export_every", 6)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29527"]
    finished = subprocess.run(
        [*command, str(SCRIPT), *arguments(tmp_path / "two", "--export_every", 6)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for ours, theirs in zip(records(tmp_path / "two"), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    a, b = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
    assert same_weights(tmp_path / "two" / "pipeline-000000006", tmp_path / "two")


def test_accumulated_parts_are_one_step(tmp_path, run):
    whole = run(tmp_path / "whole", "--steps", 3)
    parts = run(tmp_path / "parts", "--steps", 3, "--accumulate", 2)
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_all_labels_are_dropped_at_the_rate(tmp_path, run, monkeypatch):
    seen = []
    forward = train_dit.VelocityTraining.forward

    def watched(self, latents, noise, times, labels):
        seen.extend(labels.tolist())
        return forward(self, latents, noise, times, labels)

    monkeypatch.setattr(train_dit.VelocityTraining, "forward", watched)
    run(tmp_path, "--steps", 40, "--class_dropout", 0.3, "--batch_size", 12)
    assert set(seen) == {0, 1, 2, 3}  # the last is no class
    assert np.mean(np.array(seen) == 3) == pytest.approx(0.3, abs=0.07)


def test_options_of_the_optimisation(tmp_path, run):
    plain = run(tmp_path / "plain", "--steps", 4)
    again = run(tmp_path / "again", "--steps", 4, "--gradient_checkpointing")
    for ours, theirs in zip(again, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    rounded = run(tmp_path / "rounded", "--steps", 4, "--mixed_precision", "bf16", "--export_dtype", "float16")
    assert rounded != plain
    for ours, theirs in zip(rounded, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
    assert {x.dtype for x in weights_of(tmp_path / "rounded").values()} <= {torch.float16, torch.float32}
    shifted = run(tmp_path / "shifted", "--steps", 4, "--time_shift", 3)
    assert shifted[-1]["loss"] != plain[-1]["loss"]
    assert HieraTokDiTPipeline.from_pretrained(tmp_path / "shifted").scheduler.config.shift == 3


def test_training_goes_on_from_a_finished_pipeline(tmp_path, run):
    run(tmp_path / "first")
    run(tmp_path / "second", "--transformer", tmp_path / "first", "--steps", 1, "--lr", 0)
    assert same_weights(tmp_path / "first", tmp_path / "second")


def failure(capsys, given):
    capsys.readouterr()
    forget_processes()
    assert train_dit.main(given) == 2
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert not any("Traceback" in line for line in lines)
    return next(line for line in lines if line.startswith("error: "))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, capsys, arguments, monkeypatch):
    forward, calls = train_dit.VelocityTraining.forward, []

    def poisoned(*args):
        calls.append(args)
        return forward(*args) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(train_dit.VelocityTraining, "forward", poisoned)
    message = failure(capsys, arguments(tmp_path, "--log_every", 10))
    assert message.startswith("error: The loss or its gradient was not finite at step 5.")
    assert [path.name for path in states_in(tmp_path)] == ["state-000000003.pt"]


def test_what_does_not_fit_is_named(tmp_path, capsys, arguments, run, data, latents):
    other = tmp_path / "other"
    AutoencoderHieraTok.from_core(random_core(seed=1)).save_pretrained(other)
    assert "was written with the encoder" in failure(capsys, arguments(tmp_path / "a", "--vae", other))
    run(tmp_path / "trained", "--steps", 1)
    assert "holds a training state" in failure(capsys, arguments(tmp_path / "trained"))
    changed = arguments(tmp_path / "trained", "--resume", "--config", json.dumps({**CONFIG, "num_layers": 1}))
    assert "of another configuration" in failure(capsys, changed)
    names = arguments(tmp_path / "b", "--class_names", "red", "green")
    assert "must be from 0 to 1" in failure(capsys, names)
    more_classes = ["--class_names", "a", "b", "c", "d", "--transformer", tmp_path / "trained"]
    assert "and 3 classes, these are 4, 4 and 4" in failure(capsys, arguments(tmp_path / "c", *more_classes))
    patches = arguments(tmp_path / "d", "--patch_size", 3)
    assert "must be a multiple of `patch_size`, got 3" in failure(capsys, patches)
    assert "`batch_size` must be a multiple" in failure(capsys, arguments(tmp_path / "e", "--accumulate", 4))
    assert "cache.json" in failure(capsys, arguments(tmp_path / "f", "--latents", tmp_path))
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (PIXELS, PIXELS)).save(flat / "a.png")
    unnamed = arguments(tmp_path / "g", "--data", flat, "--image_size", PIXELS)
    assert "--class_names is needed" in failure(capsys, unnamed)
    assert "one is none" in failure(capsys, [*unnamed, "--class_names", "a", "b"])
    (tmp_path / "file").write_text("in the way")
    assert "file" in failure(capsys, arguments(tmp_path / "file" / "output"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "x"], "one of --latents and --data is needed"),
        (["--class_dropout", "1"], "--class_dropout must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_arguments_that_cannot_be_are_named(tmp_path, capsys, latents, more, message):
    with pytest.raises(SystemExit) as error:
        train_dit.main(["--output", str(tmp_path), "--latents", str(latents), *more])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_sharded_over_two_processes_it_trains_as_one(tmp_path, run, arguments):
    one = run(tmp_path / "one", "--steps", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29528"]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    fsdp |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    environment = {**os.environ, **fsdp}
    more = arguments(tmp_path / "two", "--steps", 3)
    finished = subprocess.run([*command, str(SCRIPT), *more], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for ours, theirs in zip(records(tmp_path / "two"), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_trains_compiled_and_in_bfloat16(tmp_path, run):
    plain = run(tmp_path / "plain")
    fast = run(tmp_path / "fast", "--mixed_precision", "bf16", "--compile")
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)
