"""Checkpoints of every making become one folder and themselves again; broken and hostile ones become one message."""

import argparse
import importlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from helpers import DETOK, TINY, images, noise, random_core
from safetensors.torch import load_file, save_file

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokImageProcessorPil, HieraTokModel
from hieratok_hf.training.state import TrainingState

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[2] / "conversion"))
    script = importlib.import_module("convert_checkpoint")

WEIGHTS = "diffusion_pytorch_model.safetensors"
# With the largest size of a file of weights.
CONFIGS = {
    "all parts": ({}, "40KB"),
    "l-DeTok's": (DETOK, "10GB"),
    "one scale": ({"scale_factors": (1,), "linear_path": 0, "output_conv": False}, "10GB"),
    "averages, and all see all": ({"downsampling": "mean", "scale_causal": False, "decoder_num_layers": 3}, "10GB"),
}


@pytest.fixture
def config_file(tmp_path):
    return written_config(tmp_path)


def written_config(folder, **overrides):
    path = folder / "given.json"
    path.write_text(json.dumps({**TINY, **overrides}))
    return path


def convert(capsys, checkpoint, output, *more):
    """What the script prints, which must end well."""
    status = script.main([str(checkpoint), str(output), *map(str, more)])
    told = capsys.readouterr()
    assert status == 0, told.err
    return told.out


def refused(capsys, checkpoint, output, *more):
    """The error of a script that must fail, say so, and leave nothing."""
    before = set(output.parent.rglob("*"))
    assert script.main([str(checkpoint), str(output), *map(str, more)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and "Traceback" not in told.err
    assert set(output.parent.rglob("*")) == before
    return told.err


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name


def assert_folder_is(folder, core, dtype=torch.float32):
    """Both libraries load a core's weights from it, in their dtype, and compute what the core does."""
    expected = {f"core.{name}": x.to(dtype) for name, x in core.state_dict().items()}
    model = HieraTokModel.from_pretrained(folder).eval()
    vae = AutoencoderHieraTok.from_pretrained(folder, torch_dtype=dtype).eval()
    for loaded in (model, vae):
        assert_same(dict(loaded.state_dict()), expected)
    x = images(2, 3, 32, 64, seed=3)
    with torch.no_grad():
        moments, _ = core.to(dtype).encode_moments(x.to(dtype))
        image = core.decode(moments[:, :4])
        assert torch.equal(model.encode(x).moments, moments)
        assert torch.equal(vae.decode(moments[:, :4]).sample, image)
    core.float()


@pytest.mark.parametrize(("overrides", "shard_size"), CONFIGS.values(), ids=CONFIGS)
def test_there_and_back_is_the_same_to_the_bit(tmp_path, capsys, overrides, shard_size):
    core = random_core(**overrides)
    raw, folder, back = tmp_path / "raw.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    save_file(core.state_dict(), raw)
    options = ["--config", written_config(tmp_path, **overrides), "--shard_size", shard_size]
    printed = convert(capsys, raw, folder, *options)
    assert printed.splitlines()[-1].startswith("done: both libraries load")
    assert (len(list(folder.glob("diffusion_pytorch_model*.safetensors"))) > 1) == (shard_size == "40KB")
    assert_folder_is(folder, core)
    assert HieraTokImageProcessorPil.from_pretrained(folder).size_divisor == core.config.patch_size
    assert HieraTokConfig.from_pretrained(folder).model_fields == core.config.model_fields
    convert(capsys, folder, back, "--to_raw")
    assert_same(load_file(back), core.state_dict())

    fused = tmp_path / "fused.safetensors"
    convert(capsys, folder, fused, "--to_raw", "--fused")
    assert {"encoder.blocks.0.attn.to_qkv.weight"} <= load_file(fused).keys()
    convert(capsys, fused, tmp_path / "again", "--config", folder / "config.json")
    assert_folder_is(tmp_path / "again", core)


def test_a_dtype_of_less_precision_is_that_of_both_libraries_and_its_rounding_is_told(tmp_path, capsys, config_file):
    raw, core = tmp_path / "raw.safetensors", random_core()
    save_file(core.state_dict(), raw)
    told = convert(capsys, raw, tmp_path / "folder", "--config", config_file, "--dtype", "bfloat16")
    assert "rounding changes moments by up to" in told
    assert_folder_is(tmp_path / "folder", core, torch.bfloat16)

    save_file(core.bfloat16().state_dict(), raw)
    told = convert(capsys, raw, tmp_path / "again", "--config", config_file)
    assert "bfloat16" in told and "rounding" not in told
    assert_same(load_file(tmp_path / "again" / WEIGHTS), prefixed(core, "core."))


def prefixed(core, prefix):
    return {prefix + name: x for name, x in core.state_dict().items()}


def mid_block(core):
    wrapped = "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    return {name.replace("blocks.1.", wrapped): x for name, x in core.state_dict().items()}


def averaged_by_torch(core):
    return {"n_averaged": torch.tensor(3), **prefixed(core, "module.")}


MAKINGS = {
    "state_dict": lambda core: {"state_dict": prefixed(core, "tokenizer.core."), "global_step": 2},
    "model.module": lambda core: {"model": {"module": core.state_dict()}, "optimizer": {"state": {}}, "args": None},
    "arguments beside it": lambda core: {"model": core.state_dict(), "args": argparse.Namespace(lr=1e-3)},
    "compiled DDP of a training": lambda core: prefixed(core, "_orig_mod.module.core."),
    "an average by ema_pytorch": lambda core: prefixed(core, "ema_model."),
    "FSDP around all": lambda core: prefixed(core, "_fsdp_wrapped_module.core._fsdp_wrapped_module."),
    "FSDP and checkpointing in a block": mid_block,
    "torch's average": averaged_by_torch,
}


@pytest.mark.parametrize("make", MAKINGS.values(), ids=MAKINGS)
def test_every_nesting_and_wrapper_is_seen_through(tmp_path, capsys, config_file, make):
    core = random_core()
    torch.save(make(core), tmp_path / "raw.pth")
    convert(capsys, tmp_path / "raw.pth", tmp_path / "folder", "--config", config_file)
    assert_same(load_file(tmp_path / "folder" / WEIGHTS), prefixed(core, "core."))


def test_files_of_torchs_earlier_format_are_read(tmp_path, capsys, config_file):
    core = random_core()
    torch.save({"model": core.state_dict()}, tmp_path / "raw.bin", _use_new_zipfile_serialization=False)
    convert(capsys, tmp_path / "raw.bin", tmp_path / "folder", "--config", config_file)
    assert_folder_is(tmp_path / "folder", core)


@pytest.mark.parametrize("name", ["ema", "state_dict_ema"])
def test_the_average_is_taken_only_where_it_is_asked_for(tmp_path, capsys, config_file, name):
    plain, mean = random_core(), random_core(seed=1)
    raw, config = tmp_path / "raw.pt", ("--config", config_file)
    torch.save({"model": plain.state_dict(), name: {"module": mean.state_dict()}}, raw)
    assert "'model'" in convert(capsys, raw, tmp_path / "plain", *config)
    assert_same(load_file(tmp_path / "plain" / WEIGHTS), prefixed(plain, "core."))
    assert f"'{name}.module'" in convert(capsys, raw, tmp_path / "mean", *config, "--ema")
    assert_same(load_file(tmp_path / "mean" / WEIGHTS), prefixed(mean, "core."))

    torch.save({"model": plain.state_dict()}, raw)
    assert "--ema" in refused(capsys, raw, tmp_path / "x", *config, "--ema")
    torch.save({name: mean.state_dict()}, raw)
    assert "add --ema" in refused(capsys, raw, tmp_path / "x", *config)


class Training(torch.nn.Module):
    """A tokenizer and something beside it that is trained along."""

    def __init__(self, core):
        super().__init__()
        self.core, self.alignment = core, torch.nn.Linear(3, 3)


def test_states_of_this_package_know_their_configuration(tmp_path, capsys):
    core = random_core(scale_factors=(4, 2, 1))
    module = Training(core)
    state = TrainingState(core, [(module, torch.optim.SGD(module.parameters(), 0.1))], decay=0.5)
    mean = random_core(seed=5, scale_factors=(4, 2, 1))
    for shadow, x in zip(state.average.shadow_params, mean.parameters()):
        shadow.copy_(x.detach())
    states = tmp_path / "states"
    states.mkdir()
    for step in (3, 11):
        state.save(states, step, keep=2, config=core.config.model_fields)
    assert "the training's own" in convert(capsys, states / "state-000000003.pt", tmp_path / "plain")
    assert_folder_is(tmp_path / "plain", core)
    convert(capsys, states, tmp_path / "mean", "--ema")
    assert_folder_is(tmp_path / "mean", mean)
    assert HieraTokConfig.from_pretrained(tmp_path / "mean").model_fields == core.config.model_fields


def sharded(folder, weights, parts=3):
    names = sorted(weights)
    folder.mkdir()
    weight_map = {}
    for i in range(parts):
        name = f"part-{i}.safetensors"
        save_file({key: weights[key].contiguous() for key in names[i::parts]}, folder / name)
        weight_map |= dict.fromkeys(names[i::parts], name)
    return weight_map


@pytest.mark.parametrize("with_index", [False, True])
def test_shards_are_put_together(tmp_path, capsys, config_file, with_index):
    core = random_core()
    weight_map = sharded(tmp_path / "raw", core.state_dict())
    if with_index:
        (tmp_path / "raw" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(capsys, tmp_path / "raw", tmp_path / "folder", "--config", config_file)
    assert_folder_is(tmp_path / "folder", core)


def test_a_folder_of_transformers_goes_back(tmp_path, capsys):
    core = random_core()
    HieraTokModel.from_core(core).save_pretrained(tmp_path / "folder")
    convert(capsys, tmp_path / "folder", tmp_path / "raw.safetensors", "--to_raw")
    assert_same(load_file(tmp_path / "raw.safetensors"), core.state_dict())


def test_the_named_size_that_fits_is_found(tmp_path, capsys):
    vae = AutoencoderHieraTok.from_size("hieratok-tiny", scale_factors=(4, 2, 1))
    save_file(vae.core.state_dict(), tmp_path / "raw.safetensors")
    told = convert(capsys, tmp_path / "raw.safetensors", tmp_path / "folder", "--scale_factors", 4, 2, 1)
    assert "hieratok-tiny, the size that fits" in told
    assert AutoencoderHieraTok.from_pretrained(tmp_path / "folder").config.scale_factors == (4, 2, 1)
    told = refused(capsys, tmp_path / "raw.safetensors", tmp_path / "x")
    assert "fits no named size" in told and "the nearest, hieratok-tiny" in told
    assert "decoder.scale_embedding: found (3, 128), expected (4, 128)" in told
    told = refused(capsys, tmp_path / "raw.safetensors", tmp_path / "x", "--size", "hieratok-s")
    assert "does not suit hieratok-s" in told


@pytest.mark.parametrize("known", ["size", "config", "state"])
def test_weights_from_before_there_was_learned_downsampling_are_known(tmp_path, capsys, known):
    if known == "size":
        core = AutoencoderHieraTok.from_size("hieratok-tiny", downsampling="mean").core
    else:
        core = random_core(downsampling="mean")
    fields = {name: value for name, value in core.config.model_fields.items() if name != "downsampling"}
    raw = tmp_path / "raw.pt"
    state = {"step": 1, "updates": 1, "average": {}, "parts": [{"model": prefixed(core, "core.")}], "config": fields}
    torch.save(state if known == "state" else core.state_dict(), raw)
    options = ["--config", written_config(tmp_path)] if known == "config" else []
    convert(capsys, raw, tmp_path / "folder", *options)
    model = AutoencoderHieraTok.from_pretrained(tmp_path / "folder")
    assert model.config.downsampling == "mean"
    assert_same(dict(model.core.state_dict()), core.state_dict())


@pytest.mark.parametrize("fault", ["weights", "image"])
def test_a_folder_that_is_not_what_it_should_be_does_not_stay(tmp_path, capsys, config_file, monkeypatch, fault):
    real = AutoencoderHieraTok.from_pretrained.__func__

    def load(cls, *args, **kwargs):
        model = real(cls, *args, **kwargs)
        if fault == "weights":
            model.core.decoder.head.weight.data[0, 0] += 1e-6
        else:
            plain = model.core.decode
            monkeypatch.setattr(model.core, "decode", lambda *args: plain(*args) + 1e-6)
        return model

    save_file(random_core().state_dict(), tmp_path / "raw.safetensors")
    monkeypatch.setattr(AutoencoderHieraTok, "from_pretrained", classmethod(load))
    told = refused(capsys, tmp_path / "raw.safetensors", tmp_path / "folder", "--config", config_file)
    assert "AutoencoderHieraTok" in told and ("weights" if fault == "weights" else "another image") in told


def test_nothing_that_is_there_is_overwritten(tmp_path, capsys, config_file):
    save_file(random_core().state_dict(), tmp_path / "raw.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("")
    assert "is there already" in refused(capsys, tmp_path / "raw.safetensors", folder, "--config", config_file)
    assert "is there already" in refused(capsys, folder, tmp_path / "raw.safetensors", "--to_raw")
    assert "needs a folder" in refused(capsys, tmp_path / "raw.safetensors", tmp_path / "b.safetensors", "--to_raw")


def holding(value):
    return lambda path: torch.save(value, path)


def half(path):
    holding(random_core().state_dict())(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def collision(path):
    core = random_core()
    torch.save({**core.state_dict(), "module.encoder.head.bias": torch.zeros(8)}, path)


def fused(path, parts_too):
    core = random_core()
    core.encoder.blocks[0].attn.fuse_projections()
    weights = core.state_dict()
    if parts_too:
        weights["encoder.blocks.0.attn.to_qkv.weight"] += 1
    else:
        weights = {name: x for name, x in weights.items() if "blocks.0.attn.to_v" not in name}
        weights = {name: x for name, x in weights.items() if "blocks.0.attn.to_qkv.bias" not in name}
        weights["encoder.blocks.0.attn.to_qkv.weight"] = weights["encoder.blocks.0.attn.to_qkv.weight"][:-1]
    torch.save(weights, path)


def holding_itself(path):
    tree = {}
    tree["model"] = tree
    torch.save(tree, path)


def other_core(**overrides):
    return lambda path: torch.save(random_core(**overrides).state_dict(), path)


BROKEN = {
    "other patches": (other_core(patch_size=8), "patch_embed.weight: found (32, 3, 8, 8), expected (32, 3, 4, 4)"),
    "more blocks": (other_core(encoder_num_layers=3), "no such part (16):\n  encoder.blocks.2."),
    "fewer blocks": (other_core(encoder_num_layers=1), "missing in the checkpoint (16):\n  encoder.blocks.1."),
    "other scales": (other_core(scale_factors=(2, 1)), "decoder.scale_embedding: found (2, 32), expected (4, 32)"),
    "fused and its parts differ": (lambda path: fused(path, True), "given twice, with other values (1)"),
    "fused in part": (lambda path: fused(path, False), "to_qkv.weight: found (95, 32), expected (96, 32)"),
    "two become one": (collision, "'encoder.head.bias' and 'module.encoder.head.bias', which are both"),
    "half a file": (half, "raw.pt' cannot be read"),
    "text": (lambda path: path.write_text("no checkpoint"), "raw.pt' cannot be read"),
    "an empty dict": (holding({}), "no tensors by name"),
    "a list": (holding([torch.zeros(2)]), "holds a list, expected tensors by name"),
    "numbers for names": (holding({3: torch.zeros(2)}), "expected tensors by name"),
    "an optimizer alone": (holding({"optimizer": {"state": {0: {"exp_avg": noise(2)}}}}), "found ['optimizer']"),
    "weights at two places": (holding({"model": {}, "state_dict": {}}), "several weights, under ['model', 'state_"),
    "one that holds itself": (holding_itself, "under 'model.model"),
    "a state of something else": (holding(dict.fromkeys(["step", "parts", "average", "updates"], 1)), "none of this"),
}


@pytest.mark.parametrize("make, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_message(tmp_path, capsys, config_file, make, message):
    make(tmp_path / "raw.pt")
    told = refused(capsys, tmp_path / "raw.pt", tmp_path / "out", "--config", config_file)
    assert message in told and "raw.pt'" in told


def test_a_safetensors_file_that_lies_is_refused(tmp_path, capsys, config_file):
    header = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    for content in (struct.pack("<Q", 1 << 40) + header, struct.pack("<Q", len(header)) + header, b"\x80\x04N."):
        (tmp_path / "raw.safetensors").write_bytes(content)
        told = refused(capsys, tmp_path / "raw.safetensors", tmp_path / "out", "--config", config_file)
        assert "raw.safetensors' cannot be read" in told


INDICES = {
    "names a file that is not there": (lambda x: {**x, "a": "gone.safetensors"}, "there is no"),
    "names a file outside": (lambda x: {**x, "a": "../raw.safetensors"}, "names '../raw.safetensors' for 'a'"),
    "names a pickle": (lambda x: {**x, "a": "part.bin"}, "names 'part.bin' for 'a'"),
    "names a number": (lambda x: {**x, "a": 3}, "names 3 for 'a'"),
    "names a tensor that is not there": (lambda x: {**x, "a": "part-0.safetensors"}, "missing ['a']"),
    "is empty": (lambda x: {}, "no `weight_map`"),
}


@pytest.mark.parametrize("change, message", INDICES.values(), ids=INDICES)
def test_an_index_is_held_to_its_folder_and_to_what_it_says(tmp_path, capsys, config_file, change, message):
    raw = tmp_path / "raw"
    weights = random_core().state_dict()
    weight_map = sharded(raw, weights)
    save_file({"a": noise(2)}, tmp_path / "raw.safetensors")
    (raw / "x.safetensors.index.json").write_text(json.dumps({"weight_map": change(weight_map)}))
    assert message in refused(capsys, raw, tmp_path / "out", "--config", config_file)


def test_shards_that_hold_the_same_tensor_are_refused(tmp_path, capsys, config_file):
    sharded(tmp_path / "raw", random_core().state_dict())
    save_file({"encoder.head.bias": noise(8)}, tmp_path / "raw" / "z.safetensors")
    told = refused(capsys, tmp_path / "raw", tmp_path / "out", "--config", config_file)
    assert "z.safetensors' holds 'encoder.head.bias', and so does another" in told


class Writes:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("suffix", "zipped"), [(".pt", True), (".ckpt", False)])
def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys, config_file, suffix, zipped):
    raw = tmp_path / f"raw{suffix}"
    hostile = {"model": random_core().state_dict(), "more": Writes(tmp_path / "written")}
    torch.save(hostile, raw, _use_new_zipfile_serialization=zipped)
    told = refused(capsys, raw, tmp_path / "out", "--config", config_file)
    assert "posix.mkdir, which is code" in told and "weights_only" not in told
    assert not (tmp_path / "written").exists()


CONFIGURATIONS = {
    "not there": (None, "cannot be read"),
    "another model's": ('{"model_type": "bert"}', "not that of a HieraTok tokenizer"),
    "misspelt": ('{"latent_chanels": 4}', "'latent_chanels', which is no value"),
    "of another type": ('{"patch_size": "4"}', "the configuration is wrong"),
}


@pytest.mark.parametrize("text, message", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_wrong_configuration_is_one_message(tmp_path, capsys, text, message):
    save_file(random_core().state_dict(), tmp_path / "raw.safetensors")
    if text is not None:
        (tmp_path / "given.json").write_text(text)
    assert message in refused(
        capsys, tmp_path / "raw.safetensors", tmp_path / "out", "--config", tmp_path / "given.json"
    )


def test_values_override_the_configuration(tmp_path, capsys, config_file):
    save_file(random_core(scale_factors=(2, 1)).state_dict(), tmp_path / "raw.safetensors")
    options = ["--config", config_file, "--scale_factors", 2, 1, "--override", '{"kl_weight": 0.5}']
    before = set(tmp_path.rglob("*"))
    told = convert(capsys, tmp_path / "raw.safetensors", tmp_path / "out", *options, "--dry_run")
    assert "nothing was written" in told and set(tmp_path.rglob("*")) == before
    convert(capsys, tmp_path / "raw.safetensors", tmp_path / "out", *options)
    config = HieraTokConfig.from_pretrained(tmp_path / "out")
    assert config.scale_factors == (2, 1) and config.kl_weight == 0.5


def test_weights_beyond_the_range_of_a_dtype_are_refused(tmp_path, capsys, config_file):
    weights = random_core().state_dict()
    weights["encoder.head.bias"][0] = 1e6
    save_file(weights, tmp_path / "raw.safetensors")
    told = refused(
        capsys, tmp_path / "raw.safetensors", tmp_path / "out", "--config", config_file, "--dtype", "float16"
    )
    assert "'core.encoder.head.bias' is beyond the range of torch.float16" in told


@pytest.mark.parametrize("config", [[1], {3: 4}, {"patch_size": "4"}], ids=str)
def test_a_state_with_a_damaged_configuration_is_one_message(tmp_path, capsys, config):
    weights = prefixed(random_core(), "core.")
    state = {"step": 1, "parts": [{"model": weights}], "average": weights, "updates": 1, "config": config}
    torch.save(state, tmp_path / "raw.pt")
    assert "configuration" in refused(capsys, tmp_path / "raw.pt", tmp_path / "out")


def test_a_folder_whose_weights_do_not_suit_its_configuration_does_not_go_back(tmp_path, capsys):
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "encoder_num_layers": 3}))
    told = refused(capsys, tmp_path / "folder", tmp_path / "raw.safetensors", "--to_raw")
    assert "folder' does not suit its config.json" in told and "encoder.blocks.2." in told


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, capsys):
    assert "there is no" in refused(capsys, tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "raw.txt").write_text("")
    assert "must end in .safetensors" in refused(capsys, tmp_path / "raw.txt", tmp_path / "out")
    (tmp_path / "folder").mkdir()
    assert "holds no .safetensors and no training state" in refused(capsys, tmp_path / "folder", tmp_path / "out")


@pytest.mark.parametrize("more", [["--to_raw", "--ema"], ["--fused"], ["--override", "[]"], ["--size", "big"]])
def test_options_that_do_not_go_together_are_refused(capsys, more):
    with pytest.raises(SystemExit) as ended:
        script.main(["a", "b", *more])
    assert ended.value.code == 2
