"""Tests of `state`: what is saved comes back bit for bit, and no failure costs the earlier states."""

import copy
import math
import os

import pytest
import torch
from helpers import images, noise, random_core

from hieratok_hf import HieraTokCore
from hieratok_hf.training import state as training_state
from hieratok_hf.training.discriminator import PatchDiscriminator
from hieratok_hf.training.state import (
    TrainingState,
    latest_state,
    learning_rate_factor,
    options_of,
    state_to_resume,
    states_in,
)
from hieratok_hf.training.tokenizer_loss import TokenizerTraining


class Training:
    """A small real training: the tokenizer with two groups of parameters, and a discriminator that begins later."""

    def __init__(self, seed=0, compiled=False, decay=0.9, **overrides):
        torch.manual_seed(seed)
        self.core = random_core(seed, std=0.05, **overrides).train()
        model = TokenizerTraining(self.core)
        self.model = torch.compile(model, backend="eager") if compiled else model
        linear = [p for name, p in model.named_parameters() if "linear_path" in name]
        others = [p for name, p in model.named_parameters() if "linear_path" not in name]
        groups = [{"params": others, "factor": 1.0}, {"params": linear, "factor": 0.1}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], 1e-3)
        self.judge = PatchDiscriminator(channels=8, num_layers=1)
        self.judge_optimizer = torch.optim.Adam(self.judge.parameters(), 1e-3)
        self.pairs = [(self.model, self.optimizer), (self.judge, self.judge_optimizer)]
        self.state = TrainingState(self.core, self.pairs, decay)

    def train(self, first, last, adversarial_start=2):
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * group["factor"] / (step + 1)
            pixel_values = images(2, 3, 8, 8, seed=step)
            made, moments, _ = self.model(pixel_values, noise(2, 2, 4, 2, 2, seed=step), torch.zeros(2, 1, 1, 1))
            (sum(image.square().mean() for image in made) + moments.square().mean()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step >= adversarial_start:
                self.judge(made[-1].detach()).square().mean().backward()
                self.judge_optimizer.step()
                self.judge_optimizer.zero_grad()
            self.state.average.step(self.core.parameters())
        return self

    def numbers(self):
        """Everything that training changes, by name."""
        tensors = {f"core.{name}": x for name, x in self.core.state_dict().items()}
        tensors |= {f"judge.{name}": x for name, x in self.judge.state_dict().items()}
        tensors |= {f"average.{i}": x for i, x in enumerate(self.state.average.shadow_params)}
        for name, optimizer in (("optimizer", self.optimizer), ("judge_optimizer", self.judge_optimizer)):
            for i, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{key}": torch.as_tensor(value) for key, value in values.items()}
        return {name: x.detach().clone() for name, x in tensors.items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("saved_at", [1, 3])  # before and after the discriminator begins
def test_a_restored_training_goes_on_bit_for_bit(tmp_path, saved_at):
    whole = Training().train(0, saved_at)
    before = whole.numbers()
    whole.state.save(tmp_path, saved_at, keep=2, config={"patch_size": 4})
    same(whole.numbers(), before)  # saving changes nothing
    restored = Training(seed=1)
    state = latest_state(tmp_path)
    assert state["step"] == saved_at and state["config"] == {"patch_size": 4}
    restored.state.restore(state)
    same(restored.numbers(), before)
    assert restored.state.average.optimization_step == whole.state.average.optimization_step == saved_at
    assert [group["factor"] for group in restored.optimizer.param_groups] == [1.0, 0.1]
    same(restored.train(saved_at, 5).numbers(), whole.train(saved_at, 5).numbers())


@pytest.mark.parametrize("compiled", [True, False], ids=["to plain", "from plain"])
def test_compiled_and_plain_modules_share_their_states(tmp_path, compiled):
    layers = {"encoder_num_layers": 1, "decoder_num_layers": 1}
    saved = Training(compiled=compiled, **layers).train(0, 1)
    saved.state.save(tmp_path, 1, keep=1)
    assert not [name for name in latest_state(tmp_path)["parts"][0]["model"] if "_orig_mod" in name]
    restored = Training(seed=1, compiled=not compiled, **layers)
    restored.state.restore(latest_state(tmp_path))
    same(restored.numbers(), saved.numbers())
    averaged = [one.state.load_average(HieraTokCore(one.core.config)).state_dict() for one in (saved, restored)]
    same(*averaged)


def test_the_averaged_core_is_the_average_by_hand():
    training = Training(decay=0.6)
    averages = [p.detach().clone() for p in training.core.parameters()]
    for step in range(5):
        training.train(step, step + 1)
        decay = min(0.6, (1 + step) / (10 + step)) if step else 0.0  # slower as the average grows older
        for average, parameter in zip(averages, training.core.parameters()):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    before = training.numbers()
    core = training.state.load_average(type(training.core)(training.core.config))
    assert type(core) is HieraTokCore and not core.training
    for ours, theirs in zip(core.parameters(), averages, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(core.parameters(), training.core.parameters()))
    with torch.no_grad():
        next(core.parameters()).zero_()
    same(training.numbers(), before)


def test_the_newest_states_remain_and_what_a_killed_save_leaves_does_no_harm(tmp_path):
    (tmp_path / ".state-000000100.pt.tmp").write_bytes(b"half a state")
    with pytest.raises(FileNotFoundError, match="training state to go on from"):
        latest_state(tmp_path)
    training = Training()
    for step in (5, 10, 100, 1000):
        training.state.save(tmp_path, step, keep=2)
    assert [path.name for path in states_in(tmp_path)] == ["state-000000100.pt", "state-000001000.pt"]
    assert sorted(os.listdir(tmp_path)) == ["state-000000100.pt", "state-000001000.pt"]
    training.state.save(tmp_path, 2000, keep=5, write=False)
    assert latest_state(tmp_path)["step"] == 1000


@pytest.mark.parametrize("error", [RuntimeError("write failed"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_earlier_states(tmp_path, monkeypatch, error):
    training = Training().train(0, 1)
    training.state.save(tmp_path, 1, keep=1)
    contents = (tmp_path / "state-000000001.pt").read_bytes()

    def half(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(training_state.torch, "save", half)
    before = training.numbers()
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        training.state.save(tmp_path, 2, keep=1)
    assert os.listdir(tmp_path) == ["state-000000001.pt"]
    assert (tmp_path / "state-000000001.pt").read_bytes() == contents
    same(training.numbers(), before)


def test_torchs_own_writer_on_a_full_device_is_an_os_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    (tmp_path / ".state-000000001.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError):
        Training().state.save(tmp_path, 1, keep=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_state_is_named(tmp_path, share):
    Training().state.save(tmp_path, 2, keep=2)
    path = tmp_path / "state-000000002.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"\A[^\n]*state-000000002\.pt' cannot be read as a training state: [^\n]+\Z"):
        latest_state(tmp_path)


class Bomb:
    """What a hostile file may hold: unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run_that_a_file_asks_for(tmp_path, zipped):
    victim = tmp_path / "victim"
    state = {"step": 1, "parts": [Bomb(victim)], "average": {}, "updates": 0}
    torch.save(state, tmp_path / "state-000000001.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"state-000000001\.pt' cannot be read as a training state"):
        latest_state(tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize("other", [torch.zeros(2), [1], {"step": 1}, {"model": {}, "optimizer": {}}])
def test_a_file_of_something_else_is_no_state(tmp_path, other):
    torch.save(other, tmp_path / "state-000000001.pt")
    with pytest.raises(ValueError, match=r"state-000000001\.pt' is no training state"):
        latest_state(tmp_path)


def test_a_state_of_another_model_is_refused(tmp_path):
    training = Training()
    training.state.save(tmp_path, 1, keep=1)
    state = latest_state(tmp_path)
    for overrides in ({"decoder_num_layers": 1}, {"linear_path": 0}, {"latent_channels": 8}, {"scale_factors": (1,)}):
        with pytest.raises(ValueError, match=r"^The state does not fit this model: .*core\.") as caught:
            Training(**overrides).state.restore(state)
        assert "\n" not in str(caught.value)
    alone = TrainingState(training.core, training.pairs[:1], 0.9)
    with pytest.raises(ValueError, match="The state is of 2 trained modules, these are 1"):
        alone.restore(state)
    missing = copy.copy(state)
    missing["parts"] = [state["parts"][1], state["parts"][0]]
    with pytest.raises(ValueError, match="does not fit this model"):
        training.state.restore(missing)


def test_the_learning_rate_rises_stays_and_falls_along_a_cosine():
    factors = [learning_rate_factor(step, 100, 10, 40) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:61] == pytest.approx([1.0] * 51)
    for i in range(60, 100):
        assert factors[i] == pytest.approx(0.5 * (1 + math.cos(math.pi * (i - 60) / 40)))
    assert 0 < factors[-1] < 0.01 and learning_rate_factor(100, 100, 10, 40) == pytest.approx(0)
    assert [learning_rate_factor(step, 3, 0, 0) for step in range(3)] == [1, 1, 1]
    whole = [learning_rate_factor(step, 10, 0, 10) for step in range(10)]
    assert whole[0] == 1 and whole == sorted(whole, reverse=True) and len(set(whole)) == 10


OPTIONS = {"lr": 0.1, "steps": 10, "warmup_steps": 2, "decay_steps": 4, "seed": 0, "data": ["a"], "output": "x"}


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"output": "y", "keep": 3}, []),
        ({"seed": 1}, ["seed"]),
        ({"lr": 0.2, "data": ["a", "b"]}, ["lr", "data"]),
        ({"steps": 20}, []),  # no step was taken in which the rate fell
        ({"warmup_steps": 3}, ["warmup_steps"]),
        ({"decay_steps": 10, "keep": 5}, ["decay_steps"]),
        ({"new_weight": 0.5}, ["new_weight"]),
    ],
)
def test_what_changed_since_a_training_was_begun_is_said_and_refused_where_it_changes_the_training(
    tmp_path, changed, refused
):
    Training().state.save(tmp_path, 5, keep=1, config={}, options=options_of(OPTIONS))
    said = []
    assert state_to_resume(tmp_path, True, {}, options_of(OPTIONS), say=said.append)["step"] == 5 and not said
    options = options_of({**OPTIONS, **changed})
    if refused:
        with pytest.raises(ValueError, match="--allow_changes") as caught:
            state_to_resume(tmp_path, True, {}, options, say=said.append)
        assert str(caught.value).startswith(", ".join(f"--{name}" for name in refused) + " changed")
    assert state_to_resume(tmp_path, True, {}, options, allow_changes=True, say=said.append)["step"] == 5
    assert all(f"--{name}" in said[-1] for name in changed)


def test_a_state_from_before_there_was_learned_downsampling_goes_on_as_it_was(tmp_path):
    config = random_core(downsampling="mean").config.model_fields
    Training(downsampling="mean").state.save(
        tmp_path, 1, keep=1, config={name: value for name, value in config.items() if name != "downsampling"}
    )
    assert state_to_resume(tmp_path, True, config)["step"] == 1
    with pytest.raises(ValueError, match=r"another configuration: \['downsampling'\]"):
        state_to_resume(tmp_path, True, {**config, "downsampling": "learned"})
