"""Tests of finding tensors by name in what a training has written."""

import pytest
import torch
from safetensors.torch import save_file

from hieratok_hf.cli.raw_checkpoint import find_weights, read_checkpoint, without_wrappers
from hieratok_hf.cli.terminal import Problem

WEIGHTS = {"encoder.head.weight": torch.ones(2), "decoder.head.weight": torch.zeros(2)}


def test_weights_are_found_wherever_they_lie(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors").keys() == WEIGHTS.keys()
    tree = {"epoch": 3, "model": {"state_dict": WEIGHTS}, "model_ema": {"averaged": torch.ones(1)}}
    assert find_weights(tree, averaged=False) == (WEIGHTS, ("model", "state_dict"))
    assert find_weights(tree, averaged=True)[1] == ("model_ema",)
    with pytest.raises(Problem, match="--ema"):
        find_weights({"model": WEIGHTS}, averaged=True)


def test_names_lose_their_wrappers_but_not_each_other():
    wrapped = {f"module._orig_mod.core.{name}": x for name, x in WEIGHTS.items()}
    assert without_wrappers(wrapped).keys() == WEIGHTS.keys()
    with pytest.raises(Problem, match=r"both 'encoder\.head\.weight'"):
        without_wrappers({**WEIGHTS, **wrapped})
