"""Folders made to do harm: no code in them is run, and nothing outside of them is opened."""

import json
import struct

import pytest
import torch
from helpers import Bomb, random_core
from transformers import AutoModel

from hieratok_hf import AutoencoderHieraTok, HieraTokModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = [HieraTokModel, AutoencoderHieraTok, AutoModel]


@pytest.fixture
def folder(tmp_path):
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("place", ["../outside.safetensors", "absolute", "sub/../../outside.safetensors", "number"])
def test_an_index_cannot_name_files_outside_its_folder(kind, place, folder, tmp_path):
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder, max_shard_size="40KB")
    outside, shard = tmp_path / "outside.safetensors", sorted(folder.glob("*-of-*.safetensors"))[0]
    shard.rename(outside)
    (folder / "sub").mkdir()
    name = {"absolute": str(outside), "number": 5}.get(place, place)
    texts = {index: index.read_text() for index in folder.glob("*.index.json")}
    for index, text in texts.items():
        index.write_text(text.replace(json.dumps(shard.name), json.dumps(name)))
    # diffusers sorts the names before it looks at them.
    with pytest.raises((ValueError, TypeError), match=r"must name files beside it|path separator|not supported"):
        kind.from_pretrained(folder)
    outside.rename(shard)
    for index, text in texts.items():
        index.write_text(text)
    assert kind.from_pretrained(folder) is not None  # it was the place alone


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("lie", ["end beyond the file", "overlap", "shape", "endless header"])
def test_a_header_that_lies_is_refused(kind, lie, folder):
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [key for key in header if key != "__metadata__"]
    if lie == "end beyond the file":
        header[names[0]]["data_offsets"][1] = 10**12
    elif lie == "overlap":
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    elif lie == "shape":
        header[names[0]]["shape"] = [2**40, 2**40]
    text = json.dumps(header).encode()
    stated = 2**62 if lie == "endless header" else len(text)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", stated) + text + rest)
    with pytest.raises(Exception, match=r"header|offset|Unable to load|shape"):  # safetensors has a type of its own
        kind.from_pretrained(folder)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin"])
def test_code_in_a_pickle_is_not_run(kind, name, folder, tmp_path):
    made = tmp_path / "made"
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    state = HieraTokModel.from_core(random_core()).state_dict()
    torch.save({**state, "core.more": Bomb(made)}, folder / name)
    with pytest.raises(Exception):  # noqa: B017 - which type, depends on the library and on who looks for the name
        kind.from_pretrained(folder)
    assert not made.exists()
    torch.load(folder / name, weights_only=False)
    assert made.exists()  # it would have been
