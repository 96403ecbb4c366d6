"""Checkpoints of every making become one folder and themselves again; broken and hostile ones become one message."""

import argparse
import copy
import json
import os
from functools import partial

import pytest
import torch
from helpers import DETOK, TINY, Bomb, images, noise, random_core
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokImageProcessorPil, HieraTokModel
from hieratok_hf.training.state import TrainingState

WEIGHTS = "diffusion_pytorch_model.safetensors"
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


class Conversion:
    """The script, with a checkpoint `raw` and a configuration in a folder."""

    def __init__(self, main, folder, capsys):
        self.main, self.folder, self.capsys = main, folder, capsys
        self.raw, self.out, self.config = folder / "raw.pt", folder / "out", folder / "given.json"
        self.configure()

    def configure(self, **overrides):
        self.config.write_text(json.dumps({**TINY, **overrides}))

    def run(self, *more, source=None, out=None, config=True):
        options = ["--config", self.config] if config else []
        status = self.main([*map(str, [source or self.raw, out or self.out, *options, *more])])
        return status, *self.capsys.readouterr()

    def convert(self, *more, **places):
        """What the script prints, which must end well."""
        status, out, err = self.run(*more, **places)
        assert status == 0, err
        return out

    def refuse(self, *more, **places):
        """The error of a script that must fail, say so, and leave nothing."""
        before = set(self.folder.rglob("*"))
        status, out, err = self.run(*more, **places)
        assert status == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err
        assert set(self.folder.rglob("*")) == before
        return err

    def assert_holds(self, core, out=None):
        assert_same(load_file((out or self.out) / WEIGHTS), prefixed(core, "core."))


@pytest.fixture
def script(load_conversion, tmp_path, capsys):
    return Conversion(load_conversion("convert_checkpoint").main, tmp_path, capsys)


def prefixed(core, prefix):
    return {prefix + name: x for name, x in core.state_dict().items()}


def assert_folder_is(folder, core, dtype=torch.float32):
    """Both libraries load a core's weights from it, in their dtype, and compute what the core does."""
    expected = {name: x.to(dtype) for name, x in prefixed(core, "core.").items()}
    model = HieraTokModel.from_pretrained(folder).eval()
    vae = AutoencoderHieraTok.from_pretrained(folder, torch_dtype=dtype).eval()
    for loaded in (model, vae):
        assert_same(dict(loaded.state_dict()), expected)
    x = images(2, 3, 32, 64, seed=3)
    core = copy.deepcopy(core).to(dtype)
    with torch.no_grad():
        moments, _ = core.encode_moments(x.to(dtype))
        assert torch.equal(model.encode(x).moments, moments)
        assert torch.equal(vae.decode(moments[:, :4]).sample, core.decode(moments[:, :4]))


# With the largest size of a file of weights.
CONFIGS = {
    "all parts": ({}, "40KB"),
    "l-DeTok's": (DETOK, "10GB"),
    "one scale": ({"scale_factors": (1,), "linear_path": 0, "output_conv": False}, "10GB"),
    "averages, and all see all": ({"downsampling": "mean", "scale_causal": False, "decoder_num_layers": 3}, "10GB"),
}


@pytest.mark.parametrize(("overrides", "shard_size"), CONFIGS.values(), ids=CONFIGS)
def test_there_and_back_is_the_same_to_the_bit(script, tmp_path, overrides, shard_size):
    core, folder = random_core(**overrides), script.out
    torch.save(core.state_dict(), script.raw)
    script.configure(**overrides)
    assert "both libraries load" in script.convert("--shard_size", shard_size)
    assert (len(list(folder.glob("diffusion_pytorch_model*.safetensors"))) > 1) == (shard_size == "40KB")
    assert_folder_is(folder, core)
    assert HieraTokImageProcessorPil.from_pretrained(folder).size_divisor == core.config.patch_size
    assert HieraTokConfig.from_pretrained(folder).model_fields == core.config.model_fields
    back, fused = tmp_path / "back.safetensors", tmp_path / "fused.safetensors"
    script.convert("--to_raw", source=folder, out=back, config=False)
    assert_same(load_file(back), core.state_dict())
    script.convert("--to_raw", "--fused", source=folder, out=fused, config=False)
    assert "encoder.blocks.0.attn.to_qkv.weight" in load_file(fused)
    script.convert(source=fused, out=tmp_path / "again")
    assert_folder_is(tmp_path / "again", core)


def test_a_dtype_of_less_precision_is_that_of_both_libraries_and_its_rounding_is_told(script, tmp_path):
    core = random_core()
    torch.save(core.state_dict(), script.raw)
    assert "rounding changes moments by up to" in script.convert("--dtype", "bfloat16")
    assert_folder_is(script.out, core, torch.bfloat16)
    torch.save(core.bfloat16().state_dict(), script.raw)
    told = script.convert(out=tmp_path / "again")
    assert "bfloat16" in told and "rounding" not in told
    script.assert_holds(core, tmp_path / "again")


def mid_block(core):
    wrapped = "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    return {name.replace("blocks.1.", wrapped): x for name, x in core.state_dict().items()}


MAKINGS = {
    "state_dict": lambda core: {"state_dict": prefixed(core, "tokenizer.core."), "global_step": 2},
    "model.module": lambda core: {"model": {"module": core.state_dict()}, "optimizer": {"state": {}}, "args": None},
    "arguments beside it": lambda core: {"model": core.state_dict(), "args": argparse.Namespace(lr=1e-3)},
    "compiled DDP of a training": lambda core: prefixed(core, "_orig_mod.module.core."),
    "an average by ema_pytorch": lambda core: prefixed(core, "ema_model."),
    "FSDP around all": lambda core: prefixed(core, "_fsdp_wrapped_module.core._fsdp_wrapped_module."),
    "FSDP and checkpointing in a block": mid_block,
    "torch's average": lambda core: {"n_averaged": torch.tensor(3), **prefixed(core, "module.")},
}


@pytest.mark.parametrize("make", MAKINGS.values(), ids=MAKINGS)
def test_every_nesting_and_wrapper_is_seen_through(script, make):
    core = random_core()
    torch.save(make(core), script.raw, _use_new_zipfile_serialization=make is not mid_block)
    script.convert()
    script.assert_holds(core)


@pytest.mark.parametrize("name", ["ema", "state_dict_ema"])
def test_the_average_is_taken_only_where_it_is_asked_for(script, tmp_path, name):
    plain, mean = random_core(), random_core(seed=1)
    torch.save({"model": plain.state_dict(), name: {"module": mean.state_dict()}}, script.raw)
    assert "'model'" in script.convert()
    script.assert_holds(plain)
    assert f"'{name}.module'" in script.convert("--ema", out=tmp_path / "mean")
    script.assert_holds(mean, tmp_path / "mean")
    torch.save({"model": plain.state_dict()}, script.raw)
    assert "--ema" in script.refuse("--ema", out=tmp_path / "x")
    torch.save({name: mean.state_dict()}, script.raw)
    assert "add --ema" in script.refuse(out=tmp_path / "x")


def test_states_of_this_package_know_their_configuration(script, tmp_path):
    core, mean = (random_core(seed, scale_factors=(4, 2, 1)) for seed in (0, 5))
    module = torch.nn.ModuleDict({"core": core, "alignment": torch.nn.Linear(3, 3)})
    state = TrainingState(core, [(module, torch.optim.SGD(module.parameters(), 0.1))], decay=0.5)
    for shadow, x in zip(state.average.shadow_params, mean.parameters()):
        shadow.copy_(x.detach())
    states = tmp_path / "states"
    states.mkdir()
    for step in (3, 11):
        state.save(states, step, keep=2, config=core.config.model_fields)
    told = script.convert(source=states / "state-000000003.pt", out=tmp_path / "plain", config=False)
    assert "the training's own" in told
    assert_folder_is(tmp_path / "plain", core)
    script.convert("--ema", source=states, config=False)
    assert_folder_is(script.out, mean)
    assert HieraTokConfig.from_pretrained(script.out).model_fields == core.config.model_fields
    newest = states / "state-000000011.pt"
    weights = next(core.parameters()).detach().numpy().tobytes()
    newest.write_bytes(newest.read_bytes().replace(weights, bytes([weights[0] ^ 1]) + weights[1:]))
    assert "another checksum" in script.refuse(source=states, out=tmp_path / "x", config=False)


def save_shards(folder, core):
    """Save a core in several files; gives the path of their index."""
    folder.mkdir()
    save_torch_state_dict(core.state_dict(), folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("with_index", [False, True])
def test_shards_are_put_together(script, tmp_path, with_index):
    core = random_core()
    index = save_shards(tmp_path / "raw", core)
    if not with_index:
        index.unlink()
    script.convert(source=tmp_path / "raw")
    script.assert_holds(core)


def test_the_named_size_that_fits_is_found(script, tmp_path):
    vae = AutoencoderHieraTok.from_size("hieratok-tiny", scale_factors=(4, 2, 1))
    torch.save(vae.core.state_dict(), script.raw)
    assert "hieratok-tiny, the size that fits" in script.convert("--scale_factors", 4, 2, 1, config=False)
    assert AutoencoderHieraTok.from_pretrained(script.out).config.scale_factors == (4, 2, 1)
    told = script.refuse(out=tmp_path / "x", config=False)
    assert "fits no named size" in told and "the nearest, hieratok-tiny" in told
    assert "decoder.scale_embedding: found (3, 128), expected (4, 128)" in told
    assert "does not suit hieratok-s" in script.refuse("--size", "hieratok-s", out=tmp_path / "x", config=False)


@pytest.mark.parametrize("known", ["size", "config", "state"])
def test_weights_from_before_there_was_learned_downsampling_are_known(script, known):
    if known == "size":
        core = AutoencoderHieraTok.from_size("hieratok-tiny", downsampling="mean").core
    else:
        core = random_core(downsampling="mean")
    fields = {name: value for name, value in core.config.model_fields.items() if name != "downsampling"}
    state = {"step": 1, "updates": 1, "average": {}, "parts": [{"model": prefixed(core, "core.")}], "config": fields}
    torch.save(state if known == "state" else core.state_dict(), script.raw)
    script.convert(config=known == "config")
    assert HieraTokConfig.from_pretrained(script.out).downsampling == "mean"
    script.assert_holds(core)


def test_values_override_the_configuration(script):
    torch.save(random_core(scale_factors=(2, 1)).state_dict(), script.raw)
    options = ["--scale_factors", 2, 1, "--override", '{"kl_weight": 0.5}']
    assert "nothing was written" in script.convert(*options, "--dry_run") and not script.out.exists()
    script.convert(*options)
    config = HieraTokConfig.from_pretrained(script.out)
    assert config.scale_factors == (2, 1) and config.kl_weight == 0.5


@pytest.mark.parametrize("fault", ["weights", "image"])
def test_a_folder_that_is_not_what_it_should_be_does_not_stay(script, monkeypatch, fault):
    real = AutoencoderHieraTok.from_pretrained.__func__

    def load(cls, *args, **kwargs):
        model = real(cls, *args, **kwargs)
        if fault == "weights":
            model.core.decoder.head.weight.data[0, 0] += 1e-6
        else:
            plain = model.core.decode
            monkeypatch.setattr(model.core, "decode", lambda *args: plain(*args) + 1e-6)
        return model

    torch.save(random_core().state_dict(), script.raw)
    monkeypatch.setattr(AutoencoderHieraTok, "from_pretrained", classmethod(load))
    told = script.refuse()
    assert "AutoencoderHieraTok" in told and ("weights" if fault == "weights" else "another image") in told


def test_places_that_do_not_serve_are_told_and_nothing_is_overwritten(script, tmp_path):
    torch.save(random_core().state_dict(), script.raw)
    script.out.mkdir()
    source = {"source": script.out, "config": False}
    assert "holds no .safetensors" in script.refuse(**source, out=tmp_path / "x")
    (script.out / "mine").write_text("")
    assert "is there already" in script.refuse()
    assert "is there already" in script.refuse("--to_raw", **source, out=script.raw.rename(tmp_path / "a.safetensors"))
    assert "needs a folder" in script.refuse("--to_raw", out=tmp_path / "b.safetensors", config=False)
    script.config.rename(tmp_path / "raw.txt")
    assert "must end in" in script.refuse(source=tmp_path / "raw.txt", out=tmp_path / "x", config=False)
    assert "there is no" in script.refuse(source=tmp_path / "none.pt", out=tmp_path / "x", config=False)


def holding(value):
    return lambda path: torch.save(value, path)


def other_core(**overrides):
    return lambda path: torch.save(random_core(**overrides).state_dict(), path)


def half(path):
    other_core()(path)
    os.truncate(path, path.stat().st_size // 2)


def fused(path):
    core = random_core()
    core.encoder.blocks[0].attn.fuse_projections()
    weights = core.state_dict()
    weights["encoder.blocks.0.attn.to_qkv.weight"] += 1
    torch.save(weights, path)


def holding_itself(path):
    tree = {}
    tree["model"] = tree
    torch.save(tree, path)


COLLISION = {"encoder.head.bias": noise(8), "module.encoder.head.bias": noise(8)}
BROKEN = {
    "other patches": (other_core(patch_size=8), "patch_embed.weight: found (32, 3, 8, 8), expected (32, 3, 4, 4)"),
    "more blocks": (other_core(encoder_num_layers=3), "no such part (16):\n  encoder.blocks.2."),
    "fused and its parts differ": (fused, "given twice, with other values (1)"),
    "two become one": (holding(COLLISION), "'encoder.head.bias' and 'module.encoder.head.bias', which are both"),
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


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_message(script, make, message):
    make(script.raw)
    told = script.refuse()
    assert message in told and "raw.pt'" in told


def test_a_safetensors_file_that_lies_is_refused(script, tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    raw = tmp_path / "raw.safetensors"
    for size in (1 << 40, len(header)):  # longer than the file, and then without the values
        raw.write_bytes(size.to_bytes(8, "little") + header)
        assert "raw.safetensors' cannot be read" in script.refuse(source=raw)


INDICES = {
    "names a file that is not there": (lambda x: {**x, "a": "gone.safetensors"}, "there is no"),
    "names a file outside": (lambda x: {**x, "a": "../raw.safetensors"}, "names '../raw.safetensors' for 'a'"),
    "names a pickle": (lambda x: {**x, "a": "part.bin"}, "names 'part.bin' for 'a'"),
    "names a number": (lambda x: {**x, "a": 3}, "names 3 for 'a'"),
    "names a tensor that is not there": (lambda x: {**x, "a": min(x.values())}, "missing ['a']"),
    "is empty": (lambda x: {}, "no `weight_map`"),
}


@pytest.mark.parametrize(("change", "message"), INDICES.values(), ids=INDICES)
def test_an_index_is_held_to_its_folder_and_to_what_it_says(script, tmp_path, change, message):
    index = save_shards(tmp_path / "raw", random_core())
    save_file({"a": noise(2)}, tmp_path / "raw.safetensors")
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    assert message in script.refuse(source=tmp_path / "raw")


def test_shards_that_hold_the_same_tensor_are_refused(script, tmp_path):
    save_shards(tmp_path / "raw", random_core()).unlink()
    save_file({"encoder.head.bias": noise(8)}, tmp_path / "raw" / "z.safetensors")
    assert "z.safetensors' holds 'encoder.head.bias'" in script.refuse(source=tmp_path / "raw")


@pytest.mark.parametrize(("suffix", "zipped"), [(".pt", True), (".ckpt", False)])
def test_code_in_a_checkpoint_is_not_run(script, tmp_path, suffix, zipped):
    raw = script.raw.with_suffix(suffix)
    hostile = {"model": random_core().state_dict(), "more": Bomb(tmp_path / "written")}
    torch.save(hostile, raw, _use_new_zipfile_serialization=zipped)
    told = script.refuse(source=raw)
    assert "posix.mkdir, which is code" in told and "weights_only" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"model_type": "bert"}', "not that of a HieraTok tokenizer"),
        ('{"latent_chanels": 4}', "'latent_chanels', which is no value"),
        ('{"patch_size": "4"}', "the configuration is wrong"),
    ],
)
def test_a_wrong_configuration_is_one_message(script, text, message):
    torch.save(random_core().state_dict(), script.raw)
    script.config.write_text(text)
    assert message in script.refuse()


def test_weights_beyond_the_range_of_a_dtype_are_refused(script):
    weights = random_core().state_dict()
    weights["encoder.head.bias"][0] = 1e6
    torch.save(weights, script.raw)
    told = script.refuse("--dtype", "float16")
    assert "'core.encoder.head.bias' is beyond the range of torch.float16" in told


@pytest.mark.parametrize("config", [[1], {3: 4}, {"patch_size": "4"}], ids=str)
def test_a_state_with_a_damaged_configuration_is_one_message(script, config):
    weights = prefixed(random_core(), "core.")
    state = {"step": 1, "parts": [{"model": weights}], "average": weights, "updates": 1, "config": config}
    torch.save(state, script.raw)
    assert "configuration" in script.refuse(config=False)


def test_a_folder_whose_weights_do_not_suit_its_configuration_does_not_go_back(script, tmp_path):
    folder = tmp_path / "folder"
    HieraTokModel.from_core(random_core()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoder_num_layers": 3}))
    script.capsys.readouterr()
    told = script.refuse("--to_raw", source=folder, out=tmp_path / "raw.safetensors", config=False)
    assert "folder' does not suit its config.json" in told and "encoder.blocks.2." in told


@pytest.mark.parametrize("more", [["--to_raw", "--ema"], ["--fused"], ["--override", "[]"], ["--size", "big"]])
def test_options_that_do_not_go_together_are_refused(script, more):
    with pytest.raises(SystemExit) as ended:
        script.main(["a", "b", *more])
    assert ended.value.code == 2
