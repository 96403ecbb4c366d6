"""The generator's training example: it ends in a pipeline, resumes bit for bit, is divided, says what is wrong."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import TINY, random_core
from latent_data import make_mixed_images, tiny_vision_features
from PIL import Image
from processes import FSDP, kill_and_go_on
from scripts import (
    assert_close,
    error_of,
    forget_processes,
    interrupted,
    load_script,
    names_in,
    records,
    run_training,
    usage_error,
)

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_cache import LatentCache
from hieratok_hf.data.latent_writer import write_latents

train_dit = load_script("cli", "train_dit")
CONFIG = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
NAMES = ["blue", "green", "red"]
PIXELS = 16

pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with a tokenizer, images about of one colour in a folder a class, and their latents."""
    folder, rng = tmp_path_factory.mktemp("space"), np.random.default_rng(0)
    model = AutoencoderHieraTok.from_core(random_core())
    model.save_pretrained(folder / "vae")
    for channel, name in enumerate(reversed(NAMES)):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(7):
            levels = rng.integers(0, 60, (PIXELS, PIXELS, 3), dtype=np.uint8)
            levels[..., channel] += 180
            Image.fromarray(levels).save(folder / "data" / name / f"{i}.png")
    vision = tiny_vision_features()
    features = {"vision": vision, "vision_layers": [2, 8]}
    write_latents(model, load_images(str(folder / "data")), folder / "latents", size=PIXELS, shard_size=8, **features)
    return folder


@pytest.fixture
def arguments(space):
    def make(output, *more):
        settings = "--batch_size 6 --steps 6 --warmup_steps 2 --decay_steps 2 --lr 1e-3 --ema 0.5"
        schedule = "--log_every 1 --save_every 3 --sample_every 6 --sample_steps 2"
        source = [] if "--data" in more else ["--latents", space / "latents"]
        scratch = [] if "--transformer" in more else ["--size", "dit-tiny", "--config", json.dumps(CONFIG)]
        given = ["--vae", space / "vae", "--output", output, *scratch, *source]
        return list(map(str, [*given, *settings.split(), *schedule.split(), *more]))

    return make


@pytest.fixture
def run(arguments):
    return lambda output, *more: run_training(train_dit, arguments(output, *more))


def weights_of(folder):
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()


def test_training_ends_in_a_pipeline_that_training_goes_on_from(tmp_path, run, space, capsys):
    steps = run(tmp_path / "first")
    told = f"The model is in {str(tmp_path / 'first')!r}: hieratok generate --model {tmp_path / 'first'}\n"
    assert capsys.readouterr().out.endswith(told)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    pipe = HieraTokDiTPipeline.from_pretrained(tmp_path / "first")
    assert pipe.config.id2label == dict(enumerate(NAMES)) and pipe.config.prediction_type == "flow_prediction"
    assert pipe.transformer.config.sample_size == PIXELS // TINY["patch_size"]
    expected = AutoencoderHieraTok.from_pretrained(space / "vae").state_dict()
    torch.testing.assert_close(pipe.vae.state_dict(), expected, rtol=0, atol=0)
    sheet = Image.open(tmp_path / "first" / "samples" / "step-000000006.png")
    assert sheet.size == (3 * PIXELS + 4, 4 * PIXELS + 6) and np.asarray(sheet).std() > 10
    record = json.loads((tmp_path / "first" / "training.json").read_text())
    assert (record["command"], record["parents"], record["steps"]) == ("hieratok train-dit", {"vae": "vae"}, 6)
    assert record["data"] == {
        "names": ["latents"],
        "images": 21,
        "fingerprint": LatentCache(space / "latents").fingerprint,
    }
    run(tmp_path / "second", "--transformer", tmp_path / "first", "--steps", 1, "--lr", 0)
    torch.testing.assert_close(weights_of(tmp_path / "second"), weights_of(tmp_path / "first"), rtol=0, atol=0)


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(tmp_path, run, arguments, space):
    sources = {"latents": ["--steps", 40], "images": ["--steps", 18, "--data", space / "data", "--image_size", PIXELS]}
    sources = {name: [*more, "--save_every", 6, "--sample_every", more[1]] for name, more in sources.items()}
    runs = []
    for name, more in sources.items():
        go_on = {"arguments": arguments(tmp_path / f"{name} in parts", *more, "--resume")}
        runs += [{**go_on, "kill": 0.1}, {**go_on, "cut": 2}, go_on]
    told = kill_and_go_on(train_dit, "losses.jsonl", runs, tmp_path / "cache")
    assert [ended["ended"] for ended in told] == [False, False, True] * 2, told
    for name, more in sources.items():
        folders = parts, whole = [tmp_path / f"{name} in parts", tmp_path / name]
        assert run(whole, *more) == records(parts)
        assert names_in(parts) == names_in(whole)
        torch.testing.assert_close(*map(weights_of, folders), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["latents", "images"])
def test_with_buckets_it_goes_on_as_if_nothing_had_happened(tmp_path, run, arguments, space, source, monkeypatch):
    data = make_mixed_images(tmp_path / "data", broken=None)
    more = ["--data", data, "--image_size", 32, "--aspect_buckets", 2, "--bucket_step", 8]
    if source == "latents":
        vae = AutoencoderHieraTok.from_pretrained(space / "vae")
        write_latents(vae, load_images(str(data)), tmp_path / "latents", size=32, max_aspect=2.0, multiple=8)
        more = ["--latents", tmp_path / "latents"]
    more += ["--patch_size", 2, "--steps", 12, "--save_every", 1, "--sample_every", 12]
    seen, forward = set(), train_dit.VelocityTraining.forward

    def watched(self, latents, *others):
        seen.add(tuple(latents.shape[1:]))
        return forward(self, latents, *others)

    monkeypatch.setattr(train_dit.VelocityTraining, "forward", watched)
    whole = run(tmp_path / "whole", *more)
    assert seen == {(4, 6, 10), (4, 8, 8), (4, 10, 6)}
    with interrupted(train_dit.VelocityTraining, "forward", 8):
        forget_processes()
        assert train_dit.main(arguments(tmp_path / "parts", *more)) == 130
    assert run(tmp_path / "parts", *more, "--resume") == whole
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"), rtol=0, atol=0)
    pipe = HieraTokDiTPipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0], 2, height=24, width=40).images[0].size == (40, 24)


def test_sharded_over_two_processes_it_trains_as_one(tmp_path, run, arguments):
    more = ["--steps", 3, "--alignment_weight", 0.5]
    one = run(tmp_path / "one", *more)
    given = arguments(tmp_path / "two", *more, "--export_every", 3)
    runs = [{"arguments": given, "world": 2, "environment": FSDP}]
    assert kill_and_go_on(train_dit, "losses.jsonl", runs, tmp_path / "cache")[0]["ended"]
    assert_close(records(tmp_path / "two"), one, rel=1e-4, abs=1e-5)
    weights = weights_of(tmp_path / "two")
    torch.testing.assert_close(weights, weights_of(tmp_path / "one"), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights_of(tmp_path / "two" / "pipeline-000000003"), weights, rtol=0, atol=0)


def test_aligned_it_goes_on_as_if_nothing_had_happened_and_gives_the_same_kind_of_pipeline(
    tmp_path, run, arguments, capsys
):
    more = ["--alignment_weight", 0.5, "--alignment_block", 2, "--steps", 8]
    steps = run(tmp_path / "whole", *more)
    for record in steps:
        assert record["loss"] == pytest.approx(record["velocity"] + 0.5 * record["alignment"], rel=1e-5)
    with interrupted(train_dit.VelocityTraining, "forward", 6):
        forget_processes()
        assert train_dit.main(arguments(tmp_path / "parts", *more)) == 130
    assert run(tmp_path / "parts", *more, "--resume") == steps
    weights = weights_of(tmp_path / "whole")
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights, rtol=0, atol=0)
    plain = run(tmp_path / "plain", "--steps", 8)
    assert plain[0]["loss"] == steps[0]["velocity"] and plain[-1]["loss"] != steps[-1]["velocity"]
    assert names_in(tmp_path / "plain") == names_in(tmp_path / "whole")
    assert weights_of(tmp_path / "plain").keys() == weights.keys()
    again = run(tmp_path / "again", *more, "--gradient_checkpointing", "--accumulate", 2)
    assert_close(again, steps, rel=1e-4)
    first = run(tmp_path / "first", "--alignment_weight", 0.5, "--steps", 1)  # by the middle block, of two the first
    assert first[0]["norm"] != steps[0]["norm"]
    for folder, options in (("first", []), ("plain", more)):
        given = arguments(tmp_path / folder, *options, "--steps", 9, "--resume", "--allow_changes")
        assert train_dit.main(given) == 2
        assert "--alignment_weight cannot be switched on or off" in error_of(capsys)


def test_all_labels_are_dropped_at_the_rate(tmp_path, run, monkeypatch):
    seen, forward = [], train_dit.VelocityTraining.forward

    def watched(self, latents, noise, times, labels):  # and no features
        seen.extend(labels.tolist())
        return forward(self, latents, noise, times, labels)

    monkeypatch.setattr(train_dit.VelocityTraining, "forward", watched)
    run(tmp_path, "--steps", 40, "--class_dropout", 0.3, "--batch_size", 12)
    assert set(seen) == {0, 1, 2, 3}  # the last is no class
    assert np.mean(np.array(seen) == 3) == pytest.approx(0.3, abs=0.07)


def test_options_of_the_optimisation(tmp_path, run):
    plain = run(tmp_path / "plain", "--steps", 3)
    again = run(tmp_path / "again", "--steps", 3, "--gradient_checkpointing", "--accumulate", 2)
    assert_close(again, plain, rel=1e-4)
    rounded = run(tmp_path / "rounded", "--steps", 3, "--mixed_precision", "bf16", "--export_dtype", "float16")
    assert rounded != plain
    assert_close(rounded, plain, "loss", rel=0.05)
    assert {x.dtype for x in weights_of(tmp_path / "rounded").values()} <= {torch.float16, torch.float32}
    shifted = run(tmp_path / "shifted", "--steps", 3, "--time_shift", 3)
    assert shifted[-1]["loss"] != plain[-1]["loss"]
    assert HieraTokDiTPipeline.from_pretrained(tmp_path / "shifted").scheduler.config.shift == 3


def test_what_does_not_fit_is_named(tmp_path, capsys, arguments, run, space):
    def failure(output, *more):
        assert train_dit.main(arguments(output, *more)) == 2
        return error_of(capsys)

    AutoencoderHieraTok.from_core(random_core(seed=1)).save_pretrained(tmp_path / "other")
    assert "was written with the encoder" in failure(tmp_path / "a", "--vae", tmp_path / "other")
    trained = tmp_path / "trained"
    run(trained, "--steps", 1)
    changed = json.dumps({**CONFIG, "num_layers": 1})
    assert "of another configuration" in failure(trained, "--resume", "--config", changed)
    assert "must be from 0 to 1" in failure(tmp_path / "b", "--class_names", "red", "green")
    more_classes = ["--class_names", "a", "b", "c", "d", "--transformer", trained]
    assert "and 3 classes, these are 4, 4 and 4" in failure(tmp_path / "c", *more_classes)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (PIXELS, PIXELS)).save(tmp_path / "flat" / "a.png")
    unnamed = ["--data", tmp_path / "flat", "--image_size", PIXELS]
    assert "--class_names is needed" in failure(tmp_path / "g", *unnamed)
    assert "one is none" in failure(tmp_path / "g", *unnamed, "--class_names", "a", "b")


def test_what_does_not_fit_an_alignment_is_named(tmp_path, capsys, arguments, space):
    def failure(*more):
        assert train_dit.main(arguments(tmp_path / "new", "--alignment_weight", 0.5, *more)) == 2
        assert not (tmp_path / "new").exists()
        return error_of(capsys)

    assert "--alignment_block must be from 1 to 2" in failure("--alignment_block", 3)
    vae = AutoencoderHieraTok.from_pretrained(space / "vae")
    write_latents(vae, load_images(str(space / "data")), tmp_path / "latents", size=PIXELS)
    assert "holds no features" in failure("--latents", tmp_path / "latents")


def test_buckets_that_do_not_fit_are_named(tmp_path, capsys, arguments, space):
    def failure(*more):
        assert train_dit.main(arguments(tmp_path / "new", *more)) == 2
        assert not (tmp_path / "new").exists()
        return error_of(capsys)

    data = make_mixed_images(tmp_path / "data", broken=None)
    given = ["--data", data, "--image_size", 32, "--aspect_buckets"]
    assert "--bucket_step must be a multiple of the patch size 8, got 4" in failure(
        *given, "--bucket_step", 4, "--patch_size", 2
    )
    assert "--image_size must be multiples of --bucket_step 24, got 32" in failure(*given, "--bucket_step", 24)
    vae = AutoencoderHieraTok.from_pretrained(space / "vae")
    write_latents(vae, load_images(str(data)), tmp_path / "latents", size=32, max_aspect=2.0, multiple=4)
    latents = ["--latents", tmp_path / "latents", "--patch_size", 4]
    assert "is no multiple of --patch_size 4" in failure(*latents)


def test_arguments_that_cannot_be_are_named(tmp_path, capsys):
    given = ["--output", tmp_path, "--latents", "x"]
    assert "one of --latents and --data" in usage_error(capsys, train_dit.main, *given, "--data", "x")
    assert "needs --alignment_weight" in usage_error(capsys, train_dit.main, *given, "--alignment_block", 1)
    given = ["--output", tmp_path, "--data", "x", "--alignment_weight", 0.5]
    assert "--alignment_weight needs --latents" in usage_error(capsys, train_dit.main, *given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_trains_compiled_and_in_bfloat16(tmp_path, run):
    plain = run(tmp_path / "plain")
    fast = run(tmp_path / "fast", "--mixed_precision", "bf16", "--compile")
    assert_close(fast, plain, "loss", rel=0.1)
