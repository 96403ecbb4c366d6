"""Hostile and careless folders of trainings: states, records and options that are refused by name, unharmed."""

import copy
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from helpers import Bomb, tree
from torch import nn

from hieratok_hf.training.report import JsonLines
from hieratok_hf.training.state import TrainingState, hold_folder, options_of, state_to_resume

NAME = "state-000000002.pt"
CONFIG = {"patch_size": 4}
OPTIONS = options_of({"steps": 9, "warmup_steps": 1, "decay_steps": 3, "lr": 0.1, "data": "a", "keep": 2, "seed": 0})


def training():
    core = nn.Linear(3, 2)
    module = nn.ModuleDict({"core": core})
    optimizer = torch.optim.AdamW(module.parameters())
    core(torch.ones(3)).sum().backward()
    optimizer.step()
    return TrainingState(core, [(module, optimizer)], 0.9)


def resume(folder, **changes):
    """Go on as the scripts do."""
    with hold_folder(folder):
        state = state_to_resume(folder, True, CONFIG, {**OPTIONS, **changes})
        training().restore(state)
        for name in ("losses", "validation"):
            JsonLines(folder / f"{name}.jsonl", state["step"])
    return state


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    training().save(folder, 2, keep=2, config=CONFIG, options=OPTIONS)
    for name in ("losses", "validation"):
        (folder / f"{name}.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    return folder


def test_it_goes_on_as_it_is(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    assert resume(tmp_path, keep=7)["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["losses.jsonl", NAME, "validation.jsonl"]


def content(change):
    def make(folder):
        path = folder / NAME
        path.write_bytes(change(path.read_bytes()))

    return make


def state(**changes):
    """A whole file with other entries, `...` for one that is missing."""

    def make(folder):
        found = torch.load(folder / NAME, weights_only=True)
        found = {key: value for key, value in {**found, **changes}.items() if value is not ...}
        torch.save(found, folder / NAME)

    return make


def part(change):
    """A whole file whose first part is changed."""

    def make(folder):
        found = copy.deepcopy(torch.load(folder / NAME, weights_only=True))
        change(found["parts"][0])
        torch.save(found, folder / NAME)

    return make


def in_place_of(make, name=NAME):
    def replace(folder):
        (folder / name).unlink()
        make(folder / name)

    return replace


def compressed(folder):
    with zipfile.ZipFile(folder / NAME) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def records(text):
    return lambda folder: (folder / "losses.jsonl").write_bytes(text + b'\n{"step": 2}\n')


STATE, NONE, FIT = (
    rf"{NAME}' (cannot be read|is no)",
    rf"{NAME}' is no training state",
    "The state does not fit|modules",
)
CASES = {
    "more at its end": (content(lambda data: data + bytes(70000)), STATE),
    "text": (content(lambda data: b"no state"), STATE),
    "a pickle": (content(lambda data: pickle.dumps(Bomb())), STATE),
    "compressed": (compressed, STATE),
    "an empty archive": (in_place_of(lambda path: zipfile.ZipFile(path, "w").close()), STATE),
    "a folder": (in_place_of(lambda path: path.mkdir()), STATE),
    "a link to nothing": (in_place_of(lambda path: path.symlink_to("nothing")), STATE),
    "a pipe": (in_place_of(os.mkfifo), STATE),
    **{
        f"{key} {value!r}"[:40]: (state(**{key: value}), NONE)
        for key, value in [
            ("step", ...), ("step", "2"), ("step", True), ("step", -1), ("parts", {}), ("parts", [[]]),
            ("parts", [{}]), ("average", []), ("updates", "1"), ("config", []), ("options", []), ("options", {}),
            ("options", {**OPTIONS, "steps": "9"}), ("options", {**OPTIONS, "decay_steps": None}),
        ]
    },
    "no parts": (state(parts=[]), FIT),
    "no average": (state(average={}), FIT),
    "an average of others": (state(average={"core.weight": torch.zeros(9, 9), "core.bias": torch.zeros(2)}), FIT),
    "an average of text": (state(average={"core.weight": "x", "core.bias": "y"}), FIT),
    "no model": (part(lambda part: part["model"].clear()), FIT),
    "a model of text": (part(lambda part: part.update(model={"core.weight": "x"})), FIT),
    "a list for a model": (part(lambda part: part.update(model=[1])), FIT),
    "a list for an optimizer": (part(lambda part: part.update(optimizer=[1])), FIT),
    "an optimizer without groups": (part(lambda part: part["optimizer"].pop("param_groups")), FIT),
    "no configuration": (state(config=...), "another configuration.*patch_size"),
    "another schedule": (state(options={**OPTIONS, "steps": 3}), "--steps"),
    **{
        f"records {text!r}"[:40]: (records(text), r"Line 1 of '.*losses\.jsonl'")
        for text in (b'{"step": true}', b'{"step": 1.5}', b"\x00" * 99, b'{"step": ' + b"9" * 5000 + b"}")
    },
    "records in a folder": (in_place_of(lambda path: path.mkdir(), "losses.jsonl"), r"losses\.jsonl"),
    "records in a pipe": (in_place_of(os.mkfifo, "losses.jsonl"), r"losses\.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hostile_folders_of_trainings(case, begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(begun, tmp_path / "runs")
    make, message = CASES[case]
    make(tmp_path / "runs")

    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        resume(tmp_path / "runs")
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)
    assert tree(tmp_path) == before
