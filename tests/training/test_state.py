"""Tests of `state`: what is saved comes back bit for bit, and no failure costs the earlier states."""

import copy
import math
import os
import re
import signal
import time

import pytest
import torch
from full_disk import full_disk
from helpers import Bomb, images, noise, random_core, temporary_of
from torch import nn
from torch.utils._pytree import tree_leaves

from hieratok_hf import HieraTokCore
from hieratok_hf.training.discriminator import PatchDiscriminator
from hieratok_hf.training.state import (
    TrainingState,
    hold_folder,
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
        pairs = [(self.model, self.optimizer), (self.judge, self.judge_optimizer)]
        self.state = TrainingState(self.core, pairs, decay)

    def train(self, first, last, adversarial_start=2):
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * group["factor"] / (step + 1)
            pixel_values = images(2, 3, 8, 8, seed=step)
            made, moments, *_ = self.model(pixel_values, noise(2, 2, 4, 2, 2, seed=step), torch.zeros(2, 1, 1, 1))
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
        """Everything that training changes."""
        weights = [module.state_dict() for module in (self.core, self.judge)]
        moments = [optimizer.state_dict()["state"] for optimizer in (self.optimizer, self.judge_optimizer)]
        return copy.deepcopy([*weights, *moments, [x.detach() for x in self.state.average.shadow_params]])


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


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
    same(*(one.state.load_average(HieraTokCore(one.core.config)).state_dict() for one in (saved, restored)))


def test_the_averaged_core_is_the_average_by_hand():
    training = Training(decay=0.6)
    averages = [p.detach().clone() for p in training.core.parameters()]
    for step in range(5):
        training.train(step, step + 1)
        decay = min(0.6, (1 + step) / (10 + step)) if step else 0.0  # slower as the average grows older
        for average, parameter in zip(averages, training.core.parameters()):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    before = training.numbers()
    core = training.state.load_average(HieraTokCore(training.core.config))
    assert not core.training
    for ours, theirs in zip(core.parameters(), averages, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(core.parameters(), training.core.parameters()))
    with torch.no_grad():
        next(core.parameters()).zero_()
    same(training.numbers(), before)


def test_the_newest_states_remain_and_what_a_killed_save_leaves_does_no_harm(tmp_path):
    temporary_of(tmp_path / "state-000000030.pt").write_bytes(b"half a state")
    with pytest.raises(FileNotFoundError, match="training state to go on from"):
        latest_state(tmp_path)
    training = Training()
    for step in (5, 10, 100, 1000):
        training.state.save(tmp_path, step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["state-000000100.pt", "state-000001000.pt"]
    training.state.save(tmp_path, 2000, keep=5, write=False)
    assert latest_state(tmp_path)["step"] == 1000


def test_a_save_to_a_full_disk_is_an_os_error_and_leaves_the_earlier_states(tmp_path):
    training = Training().train(0, 1)
    training.state.save(tmp_path, 1, keep=1)
    before, contents = training.numbers(), states_in(tmp_path)[0].read_bytes()
    with full_disk(free=len(contents) - 1), pytest.raises(OSError, match="state-000000002"):
        training.state.save(tmp_path, 2, keep=1)
    assert os.listdir(tmp_path) == ["state-000000001.pt"] and states_in(tmp_path)[0].read_bytes() == contents
    same(training.numbers(), before)


HOSTILE = {"step": 1, "parts": [Bomb()], "average": {}, "updates": 0}


UNREADABLE, OTHER = "cannot be read as a training state: ", "is no training state"


@pytest.mark.parametrize(
    ("state", "old", "share", "message"),
    [
        *((HOSTILE, old, 1, UNREADABLE) for old in (False, True)),
        *(({**HOSTILE, "parts": []}, False, share, UNREADABLE) for share in (0, 0.99)),
        *((other, False, 1, OTHER) for other in (torch.zeros(2), [1], {"step": 1, "parts": []})),
    ],
)
def test_a_broken_file_is_named_and_nothing_is_run_that_it_asks_for(tmp_path, monkeypatch, state, old, share, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state-000000001.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"state-000000001\.pt' {message}") as caught:
        latest_state(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "victim").exists()


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    core = nn.Linear(3, 2)
    module = nn.ModuleDict({"core": core})
    optimizer = torch.optim.AdamW(module.parameters())
    core(torch.ones(3)).sum().backward()
    optimizer.step()
    state = TrainingState(core, [(module, optimizer)], 0.9)
    state.save(tmp_path, 1, keep=1, config={"patch_size": 4})
    (path,) = states_in(tmp_path)
    before, whole = copy.deepcopy(latest_state(tmp_path)), path.read_bytes()
    path.unlink()  # of which a map into memory is left
    noticed = 0
    for place in range(0, len(whole), 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            found = latest_state(tmp_path)
        except ValueError as error:
            assert re.search(r"state-000000001\.pt' (is no|cannot)", str(error)) and "\n" not in str(error)
            noticed += 1
        else:  # what is not content, such as times in the file's table
            pairs = zip(tree_leaves(found), tree_leaves(before), strict=True)
            assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    assert noticed > len(whole) // 92


def test_a_damaged_state_names_the_one_before(tmp_path):
    Training().state.save(tmp_path, 1, keep=2)
    Training().state.save(tmp_path, 2, keep=2)
    path = states_in(tmp_path)[-1]
    place = path.stat().st_size // 2
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"state-000000002\.pt' cannot .*if it is removed, state-000000001\.pt is"):
        latest_state(tmp_path)
    path.unlink()
    assert latest_state(tmp_path)["step"] == 1


def test_a_folder_is_held_by_one_process_as_long_as_it_lives(tmp_path):
    folder, (told, tell) = tmp_path / "runs" / "new", os.pipe()
    with hold_folder(folder):
        pass
    assert not folder.exists()
    if (holder := os.fork()) == 0:
        with hold_folder(folder):
            if worker := os.fork():
                os.write(tell, f"{worker}".encode())
            time.sleep(60)
            os._exit(1)
    worker = int(os.read(told, 20))
    try:
        with pytest.raises(ValueError, match=r"going on in '.*runs/new'"), hold_folder(folder):
            pass
        assert os.listdir(folder) == [".training.lock"]
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        # What it started lives on, as workers that read images do for some seconds.
        with pytest.raises(KeyError), hold_folder(folder):
            (folder / "x").touch()
            raise KeyError
        assert os.listdir(folder) == ["x"]
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_state_of_another_model_is_refused(tmp_path):
    training = Training()
    training.state.save(tmp_path, 1, keep=1)
    state = latest_state(tmp_path)
    for overrides in ({"decoder_num_layers": 1}, {"linear_path": 0}, {"latent_channels": 8}, {"scale_factors": (1,)}):
        with pytest.raises(ValueError, match=r"^The state does not fit this model: .*core\.") as caught:
            Training(**overrides).state.restore(state)
        assert "\n" not in str(caught.value)
    alone = TrainingState(training.core, training.state.pairs[:1], 0.9)
    with pytest.raises(ValueError, match="The state is of 2 trained modules, these are 1"):
        alone.restore(state)
    with pytest.raises(ValueError, match="does not fit this model"):
        training.state.restore({**state, "parts": state["parts"][::-1]})


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
        ({"new_weight": 0.5}, ["new_weight"]),  # a state from before there was one
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


def test_an_option_that_a_state_is_older_than_changes_nothing_where_it_is_off(tmp_path):
    Training().state.save(tmp_path, 5, keep=1, config={}, options=options_of(OPTIONS))
    said: list[str] = []
    options = options_of({**OPTIONS, "new_weight": 0.0, "new_place": None, "new_switch": False})
    assert state_to_resume(tmp_path, True, {}, options, say=said.append)["step"] == 5 and not said


def test_another_name_of_the_same_folder_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "link").symlink_to("weights")
    names = ["weights", "weights/", "./weights", str(tmp_path / "weights"), "link"]
    monkeypatch.chdir(tmp_path)
    for options in (options_of({**OPTIONS, "model": "weights"}), {**OPTIONS, "model": "weights"}):  # and one of before
        Training().state.save(tmp_path, 5, keep=1, config={}, options=options)
        said = []
        for name in names:
            state_to_resume(tmp_path, True, {}, options_of({**OPTIONS, "model": name}), say=said.append)
        assert not said
    with pytest.raises(ValueError, match="--model changed"):
        state_to_resume(tmp_path, True, {}, options_of({**OPTIONS, "model": str(tmp_path)}))


def test_a_finished_training_is_said_to_be_one(tmp_path):
    said = []
    for step in (9, 10):
        Training().state.save(tmp_path, step, keep=1, config={}, options=options_of(OPTIONS))
        state_to_resume(tmp_path, True, {}, options_of(OPTIONS), say=said.append)
    (line,) = said
    assert "all 10 steps" in line and repr(str(tmp_path)) in line


def test_a_state_from_before_there_was_learned_downsampling_goes_on_as_it_was(tmp_path):
    config = random_core(downsampling="mean").config.model_fields
    old = {name: value for name, value in config.items() if name != "downsampling"}
    Training(downsampling="mean").state.save(tmp_path, 1, keep=1, config=old)
    assert state_to_resume(tmp_path, True, config)["step"] == 1
    with pytest.raises(ValueError, match=r"another configuration: \['downsampling'\]"):
        state_to_resume(tmp_path, True, {**config, "downsampling": "learned"})
