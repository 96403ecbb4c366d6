"""The export: its programs compute what the model computes at every size and batch, and without this package."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import DETOK, images, noise, random_core
from safetensors.torch import save_file

from hieratok_hf import HieraTokModel
from hieratok_hf.models.autoencoder_adapter import load_codec

SCRIPT = Path(__file__).parents[2] / "conversion" / "export.py"
SPEC = importlib.util.spec_from_file_location("export", SCRIPT)
export = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(export)

# All layers are alike, and export takes seconds a layer.
SMALL = {"encoder_num_layers": 1, "decoder_num_layers": 1}
ONE_SCALE = {"patch_size": 8, "scale_factors": (1,), "learned_positions": 3, "qk_norm": False, "linear_path": 0}
# Arguments of the script beside the model and the folder, and the model's configuration.
EXPORTED = {
    "scales": ([], {"patch_size": 2, "scale_factors": (8, 4, 2, 1)}),
    "one scale": (["--format", "onnx"], {**ONE_SCALE, "output_conv": False}),
    "detok": (
        ["--format", "onnx", "--num_scales", "2", "--parts", "decoder"],
        {**DETOK, "linear_path": 3, "patch_size": 4, "scale_factors": (4, 2, 1)},
    ),
}
# Batch, rows and columns of tokens: those that no factor divides, fewer than a coarse cell has, and long ones.
SIZES = [(2, 3, 11), (1, 13, 6), (5, 7, 3), (1, 16, 24)]
LEAST = [(1, 2, 2), (3, 2, 9), (1, 6, 2)]


def save_model(folder, **overrides):
    core = random_core(**SMALL | overrides)
    model = HieraTokModel(core.config)
    model.core.load_state_dict(core.state_dict())
    model.save_pretrained(folder)
    return core.requires_grad_(False)


@pytest.fixture(autouse=True)
def no_records_of_tracing(monkeypatch):
    # pytest would keep one for each node of a graph, which takes as long as the export.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, the folder of its programs, and the facts beside them; made once for all tests."""
    pytest.importorskip("onnxruntime", reason="ONNX programs need onnxruntime")
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("exported")
            if name == "hieratok-tiny":
                model, options, core = name, ["--format", "onnx", "--parts", "decoder"], load_codec(name).core
            else:
                options, overrides = EXPORTED[name]
                model, core = str(folder / "model"), save_model(folder / "model", **overrides)
            assert export.main([model, str(folder / "programs"), *options]) == 0
            made[name] = core, folder / "programs", json.loads((folder / "programs" / "export.json").read_text())
        return made[name]

    return get


@pytest.fixture
def small_model(tmp_path):
    save_model(tmp_path / "model", **ONE_SCALE)
    return str(tmp_path / "model")


@torch.no_grad()
def differences(run, core, part, num_scales=None, sizes=()):
    """The largest distance of a program from the model at each size."""
    size, found = core.config.patch_size, []
    for batch, rows, columns in sizes:
        if part == "encoder":
            x = images(batch, 3, rows * size, columns * size)
            expected = core.encode_moments(x)[0]
        else:
            x = noise(batch, core.config.latent_channels, rows, columns)
            expected = core.decode(x, num_scales=num_scales)
        output = run(x)
        assert output.shape == expected.shape
        found.append((output - expected).abs().max().item())
    return found


@pytest.mark.parametrize("name", [*EXPORTED, "hieratok-tiny"])
def test_onnx_programs_compute_what_the_model_computes(exported, name):
    core, folder, facts = exported(name)
    num_scales = facts["num_scales"]
    assert num_scales == (2 if name == "detok" else len(core.config.scale_factors))
    sizes = SIZES if name == "detok" else [*SIZES, *LEAST]  # its second scale of three makes a row of two
    parts = [program["part"] for program in facts["programs"] if program["format"] == "onnx"]
    assert "decoder" in parts
    for part in parts:
        run = export.opened(folder / f"{part}.onnx")
        assert max(differences(run, core, part, num_scales, sizes)) < 1e-4


def test_programs_of_pytorch_compute_what_the_model_computes(exported):
    core, folder, _ = exported("scales")
    encode, decode = (export.opened(folder / f"{part}.pt2") for part in ("encoder", "decoder"))
    assert max(differences(encode, core, "encoder", sizes=[*SIZES, *LEAST])) < 1e-5
    assert max(differences(decode, core, "decoder", sizes=[*SIZES, *LEAST])) < 1e-5


def test_programs_run_without_this_package(exported, tmp_path):
    core, folder, _ = exported("scales")
    x = images(1, 3, 10, 14)
    with torch.no_grad():
        expected = core.decode(core.encode_moments(x)[0].chunk(2, dim=1)[0])
    save_file({"x": x, "expected": expected}, tmp_path / "tensors.safetensors")
    code = f"""
import sys, torch, onnxruntime
from safetensors.torch import load_file
x, expected = (load_file({str(tmp_path / "tensors.safetensors")!r})[name] for name in ("x", "expected"))
encode, decode = (torch.export.load({str(folder)!r} + name).module() for name in ("/encoder.pt2", "/decoder.pt2"))
print((decode(encode(x)[:, :4]) - expected).abs().max().item())
encode, decode = (onnxruntime.InferenceSession({str(folder)!r} + name) for name in ("/encoder.onnx", "/decoder.onnx"))
moments = encode.run(["moments"], {{"pixel_values": x.numpy()}})[0]
print((torch.from_numpy(decode.run(["image"], {{"latents": moments[:, :4]}})[0]) - expected).abs().max().item())
print(any(name.startswith(("hieratok_hf", "transformers", "diffusers")) for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *found, imported = done.stdout.split()
    assert max(map(float, found)) < 1e-4
    assert imported == "False"


def test_mode_and_sample_follow_from_the_moments_as_the_facts_say(exported):
    core, folder, facts = exported("scales")
    channels = facts["latent_channels"]
    x = images(2, 3, 8, 12)
    moments = export.opened(folder / "encoder.onnx")(x)
    mean, logvar = moments[:, :channels], moments[:, channels:]
    with torch.no_grad():
        posterior = core.encode(x)
    sample = posterior.sample(torch.Generator().manual_seed(1))
    standard = noise(*mean.shape, seed=1)
    torch.testing.assert_close(mean, posterior.mode(), rtol=0, atol=1e-4)
    drawn = mean + (0.5 * logvar.clamp(-30, 20)).exp() * standard
    torch.testing.assert_close(drawn, sample, rtol=1e-4, atol=1e-4)
    assert "exp(0.5 * clip(logvar, -30, 20))" in facts["programs"][0]["output"]["values"]


def test_facts_are_those_of_the_files(exported):
    onnx = pytest.importorskip("onnx", reason="reads ONNX programs")
    core, folder, facts = exported("scales")
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["decoder.onnx", "decoder.pt2", "encoder.onnx", "encoder.pt2", "export.json"]
    assert sorted(name for program in facts["programs"] for name in program["files"]) == written[:-1]
    for program in facts["programs"]:
        assert 0 <= program["largest_difference"] < 1e-4
        if program["format"] == "onnx":
            model = onnx.load(folder / program["files"][0])
            assert {entry.domain: entry.version for entry in model.opset_import}[""] == program["opset"]
            for end, value in (("input", model.graph.input[0]), ("output", model.graph.output[0])):
                shape = [entry.dim_param or entry.dim_value for entry in value.type.tensor_type.shape.dim]
                assert (value.name, shape) == (program[end]["name"], program[end]["shape"])
    for key in ("patch_size", "latent_channels", "scaling_factor", "shift_factor"):
        assert facts[key] == getattr(core.config, key)
    assert facts["scale_factors"] == [8, 4, 2, 1]
    assert facts["versions"]["torch"] == torch.__version__
    for part in ("encoder", "decoder"):
        weights = torch.export.load(folder / f"{part}.pt2").state_dict
        assert weights and all(name.startswith(f"core.{part}.") for name in weights)


def test_shapes_of_fewer_scales_are_said(exported):
    _, _, facts = exported("detok")
    decoder = next(program for program in facts["programs"] if program["part"] == "decoder")
    assert decoder["output"]["shape"] == ["batch", 3, "4*ceil(rows/2)", "4*ceil(columns/2)"]


def test_half_precision_and_weights_in_a_second_file(small_model, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX programs need onnxruntime")
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    monkeypatch.setattr(export, "ONE_FILE_BYTES", 0)
    options = ["--format", "onnx", "--parts", "encoder", "--dtype", "float16"]
    assert export.main([small_model, str(tmp_path / "made"), *options]) == 0
    shutil.move(tmp_path / "made", tmp_path / "moved")
    facts = json.loads((tmp_path / "moved" / "export.json").read_text())
    assert facts["dtype"] == "float16"
    assert facts["programs"][0]["files"] == ["encoder.onnx", "encoder.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "moved" / "encoder.onnx")
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float16)"
    assert session.run(None, {"pixel_values": images(1, 3, 24, 16).half().numpy()})[0].shape == (1, 8, 3, 2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda y: y + 1e-3, "differs from the model by 0.001, more than 0.0001"),
        (lambda y: y * torch.nan, "differs from the model by nan"),
        (lambda y: y[:1], "gives (1, 8, 2, 5), the model (3, 8, 2, 5)"),
    ],
)
def test_a_program_that_is_wrong_is_not_kept(small_model, tmp_path, monkeypatch, capsys, wrong, message):
    reference = export.Encoder(load_codec(small_model).core)
    monkeypatch.setattr(export, "trace", lambda part, module, *_: module)
    monkeypatch.setattr(export.torch.export, "save", lambda program, path: path.write_bytes(b""))
    monkeypatch.setattr(export, "opened", lambda path: lambda x: wrong(reference(x)))
    assert export.main([small_model, str(tmp_path / "made"), "--format", "torch", "--parts", "encoder"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_an_error_of_an_exporter_is_said_in_one_line(small_model, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(export, "trace", fail)
    (tmp_path / "made").mkdir()
    capsys.readouterr()  # saving shows its progress
    assert export.main([small_model, str(tmp_path / "made"), "--format", "torch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("no room\n") and error.count("\n") == 1
    assert list((tmp_path / "made").iterdir()) == []


def test_a_dry_run_writes_nothing(small_model, tmp_path, capsys):
    assert export.main([small_model, str(tmp_path / "made"), "--format", "torch", "--dry_run"]) == 0
    assert "encoder.pt2, decoder.pt2, export.json" in capsys.readouterr().out
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "torch", "--num_scales", "2"], "--num_scales 2: `num_scales` must be an integer from 1 to 1"),
        (["--format", "onnx"], "needs onnxruntime (pip install 'hieratok_hf[export]')"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(small_model, tmp_path, monkeypatch, capsys, options, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    monkeypatch.setattr(export, "trace", None)
    assert export.main([small_model, str(tmp_path / "made"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_bad_models_and_folders_are_named(small_model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "encoder.onnx").write_text("mine")
    (tmp_path / "empty").mkdir()
    AutoencoderKL(norm_num_groups=1, block_out_channels=(4,)).save_pretrained(tmp_path / "kl")
    save_model(tmp_path / "two-way", scale_factors=(2, 1), scale_causal=False)
    new = str(tmp_path / "new")
    capsys.readouterr()  # saving shows its progress
    for arguments, message in [
        ([small_model, str(tmp_path / "file")], "must be a folder, got a file"),
        ([small_model, str(tmp_path / "full")], "must be a new or an empty folder"),
        ([str(tmp_path / "empty"), new], "cannot be loaded"),
        ([str(tmp_path / "absent"), new], "cannot be loaded"),
        ([str(tmp_path / "kl"), new], "is no HieraTok tokenizer"),
        ([str(tmp_path / "two-way"), new, "--num_scales", "1"], "Without `scale_causal` no scale"),
    ]:
        assert export.main([*arguments, "--format", "torch"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "encoder.onnx").read_text() == "mine"


@pytest.mark.parametrize(
    "options", [["--format", "tflite"], ["--parts", "encoder", "--num_scales", "1"], ["--num_scales", "0"]]
)
def test_bad_options_are_refused(options, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        export.main(["hieratok-tiny", str(tmp_path / "made"), *options])
    assert stopped.value.code == 2
