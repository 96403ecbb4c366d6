"""The training example: it learns, resumes bit for bit, and leaves a folder that both libraries load."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import TINY

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokCore, HieraTokModel

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "examples" / "train_tokenizer.py")
train_tokenizer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(train_tokenizer)
PICTURES = str(ROOT / "examples" / "pictures")


def arguments(output, *more):
    settings = "--crop_sizes 32 64 --batch_size 4 --steps 6 --warmup_steps 2 --decay_steps 2 --linear_steps 20"
    schedule = "--log_every 2 --save_every 3 --pca_batches 4 --ema 0.5"
    config = ["--config", json.dumps({**TINY, "scale_factors": [4, 2, 1]})]
    return ["--data", PICTURES, "--output", str(output), *settings.split(), *schedule.split(), *config, *more]


def records(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"step"')]


def test_training_ends_in_a_folder_for_both_libraries(tmp_path, capsys):
    train_tokenizer.main(arguments(tmp_path))
    steps = records(capsys.readouterr().out)
    assert [record["step"] for record in steps] == [2, 4, 6]
    vae, model = AutoencoderHieraTok.from_pretrained(tmp_path), HieraTokModel.from_pretrained(tmp_path)
    assert vae.config.scale_factors == (4, 2, 1)
    args = train_tokenizer.parse_args(arguments(tmp_path))
    encoded = train_tokenizer.read_pictures(args.data)
    mean, std = train_tokenizer.latent_statistics(vae.core, encoded, args)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=1e-4)
    batch = train_tokenizer.make_batch(encoded, args, 0)
    assert torch.equal(vae(batch).sample, model(batch).reconstruction)
    assert (vae(batch).sample - batch).square().mean() < 0.02


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, capsys):
    train_tokenizer.main(arguments(tmp_path / "whole"))
    whole = records(capsys.readouterr().out)
    with pytest.MonkeyPatch.context() as patch:
        save, saves = train_tokenizer.save_state, []

        def save_and_die(path, state):
            save(path, state)
            saves.append(path)
            raise KeyboardInterrupt

        patch.setattr(train_tokenizer, "save_state", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer.main(arguments(tmp_path / "parts"))
    capsys.readouterr()
    train_tokenizer.main(arguments(tmp_path / "parts", "--resume"))
    resumed = records(capsys.readouterr().out)
    assert [record["step"] for record in resumed] == [4, 6]
    for ours, theirs in zip(resumed, whole[1:], strict=True):
        ours.pop("steps/s"), theirs.pop("steps/s")
        assert ours == theirs
    a, b = (AutoencoderHieraTok.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_start_is_a_principal_component_analysis(tmp_path):
    args = train_tokenizer.parse_args(arguments(tmp_path))
    encoded = train_tokenizer.read_pictures(args.data)
    core = HieraTokCore(HieraTokConfig(**TINY)).init_weights()
    batch = train_tokenizer.make_batch(encoded, args, 0)
    before = (core.decode(core.encode(batch).mode()) - batch).square().mean()
    train_tokenizer.start_from_principal_components(core, encoded, args)
    started = (core.decode(core.encode(batch).mode()) - batch).square().mean()
    train_tokenizer.fit_linear_path(core, encoded, args)
    fitted = (core.decode(core.encode(batch).mode()) - batch).square().mean()
    assert started < 0.2 * before and fitted < started
    assert len(core.encoder.blocks) == 2 and all(parameter.grad is None for parameter in core.parameters())


def test_crops_are_a_function_of_seed_and_step(tmp_path):
    args = train_tokenizer.parse_args(arguments(tmp_path))
    encoded = train_tokenizer.read_pictures(args.data)
    batches = [train_tokenizer.make_batch(encoded, args, step) for step in (3, 3, 4)]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert batches[0].min() >= -1 and batches[0].max() <= 1
    assert {train_tokenizer.make_batch(encoded, args, step).numel() for step in range(8)} == {4 * 3 * 32 * 32}
    large = train_tokenizer.random_crop(encoded, 512, __import__("random").Random(0))
    assert large.shape == (512, 512, 3)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="No pictures found in --data"):
        train_tokenizer.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])
