"""The export: its programs compute what the model computes at every size and batch, and without this package."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL
from full_disk import full_disk
from helpers import DETOK, images, noise, random_core
from local_data import write_folder
from safetensors.torch import save_file
from scripts import error_of, load_script, usage_error

from hieratok_hf import HieraTokModel
from hieratok_hf.models.autoencoder_adapter import load_codec

export = load_script("cli", "export")
# All layers are alike, and export takes seconds a layer.
SMALL = {"encoder_num_layers": 1, "decoder_num_layers": 1, "patch_size": 2}
ONE_SCALE = {"scale_factors": (1,), "qk_norm": False, "linear_path": 0, "output_conv": False}
# Everything that makes a graph awkward: learned positions are resampled, and sides are no multiple of a cell.
SCALES = {**DETOK, "scale_factors": (4, 1), "qk_norm": True, "linear_path": 3}
# Batch, rows and columns of tokens: those that no factor divides, fewer than a coarse cell has, and long ones.
SIZES = [(2, 3, 11), (1, 2, 2), (1, 16, 24)]


def save_model(folder, **overrides):
    core = random_core(**SMALL | overrides)
    HieraTokModel.from_core(core).save_pretrained(folder)
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
    folder = tmp_path_factory.mktemp("exported")
    core = save_model(folder / "model", **SCALES)
    assert export.main([str(folder / "model"), str(folder / "programs")]) == 0
    return core, folder / "programs", json.loads((folder / "programs" / "export.json").read_text())


@pytest.fixture
def small_model(tmp_path):
    save_model(tmp_path / "model", **ONE_SCALE)
    return str(tmp_path / "model")


@torch.no_grad()
def differences(path, core, num_scales=None, sizes=SIZES):
    """The largest distance of a program from the model at each size."""
    run, size, found = export.open_program(path), core.config.patch_size, []
    for batch, rows, columns in sizes:
        if path.stem == "encoder":
            x = images(batch, 3, rows * size, columns * size)
            expected = core.encode_moments(x)[0]
        else:
            x = noise(batch, core.config.latent_channels, rows, columns)
            expected = core.decode(x, num_scales=num_scales)
        output = run(x)
        assert output.shape == expected.shape
        found.append((output - expected).abs().max().item())
    return found


@pytest.mark.parametrize(("suffix", "tolerance"), [(".onnx", 1e-4), (".pt2", 1e-5)])
def test_programs_compute_what_the_model_computes(exported, suffix, tolerance):
    core, folder, _ = exported
    for part in ("encoder", "decoder"):
        assert max(differences(folder / f"{part}{suffix}", core)) < tolerance


@pytest.mark.parametrize(
    ("num_scales", "shape"), [(1, ["2*ceil(rows/2)", "2*ceil(columns/2)"]), (2, ["2*rows", "2*columns"])]
)
def test_programs_of_two_scales(tmp_path, num_scales, shape):
    core = save_model(tmp_path / "model", **{**ONE_SCALE, "scale_factors": (2, 1)})
    options = ["--format", "torch", "--num_scales", str(num_scales), "--parts", "decoder"]
    assert export.main([str(tmp_path / "model"), str(tmp_path / "programs"), *options]) == 0
    facts = json.loads((tmp_path / "programs" / "export.json").read_text())
    least = facts["programs"][0]["input"]["least_rows_and_columns"]
    # The scale to make must have two rows, so of the coarse one two tokens are too few.
    assert least == {1: 3, 2: 2}[num_scales]
    sizes = [(1, least, least), SIZES[0], SIZES[2]]
    name = {1: "decoder-1.pt2", 2: "decoder.pt2"}[num_scales]
    assert facts["programs"][0]["files"] == [name]
    assert max(differences(tmp_path / "programs" / name, core, num_scales, sizes)) < 1e-5
    assert facts["programs"][0]["num_scales"] == num_scales
    assert facts["programs"][0]["output"]["shape"] == ["batch", 3, *shape]


def test_programs_run_without_this_package(exported, tmp_path):
    core, folder, _ = exported
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
    core, folder, facts = exported
    channels = facts["latent_channels"]
    x = images(2, 3, 8, 12)
    moments = export.open_program(folder / "encoder.onnx")(x)
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
    core, folder, facts = exported
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["decoder.onnx", "decoder.pt2", "encoder.onnx", "encoder.pt2", "export.json"]
    assert sorted(name for program in facts["programs"] for name in program["files"]) == written[:-1]
    for program in facts["programs"]:
        assert 0 <= program["largest_difference"] < 1e-4
        assert abs(program["psnr_lost"]) < 1e-3
        if program["format"] == "onnx":
            model = onnx.load(folder / program["files"][0])
            assert program["operators"] == {"ai.onnx": sorted({node.op_type for node in model.graph.node})}
            assert {entry.domain: entry.version for entry in model.opset_import}[""] == program["opset"]
            for end, value in (("input", model.graph.input[0]), ("output", model.graph.output[0])):
                shape = [entry.dim_param or entry.dim_value for entry in value.type.tensor_type.shape.dim]
                assert (value.name, shape) == (program[end]["name"], program[end]["shape"])
    assert facts["psnr_images"] == 2
    for key in ("patch_size", "latent_channels", "scaling_factor", "shift_factor"):
        assert facts[key] == getattr(core.config, key)
    assert facts["scale_factors"] == [4, 1]
    assert facts["versions"]["torch"] == torch.__version__
    assert not any(str(Path(export.__file__).parents[1]).encode() in path.read_bytes() for path in folder.iterdir())
    weights = torch.export.load(folder / "encoder.pt2").state_dict
    assert weights and all(name.startswith("core.encoder.") for name in weights)


def test_half_precision_newer_operators_and_weights_in_a_second_file(small_model, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX programs need onnxruntime")
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    monkeypatch.setattr(export, "ONE_FILE_BYTES", 0)
    options = ["--format", "onnx", "--parts", "encoder", "--dtype", "float16", "--opset", "23"]
    assert export.main([small_model, str(tmp_path / "made"), *options]) == 0
    shutil.move(tmp_path / "made", tmp_path / "moved")
    facts = json.loads((tmp_path / "moved" / "export.json").read_text())
    assert facts["dtype"] == "float16"
    assert facts["programs"][0]["opset"] == 23
    assert "Attention" in facts["programs"][0]["operators"]["ai.onnx"]  # as one operator
    assert facts["programs"][0]["files"] == ["encoder.onnx", "encoder.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "moved" / "encoder.onnx")
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float16)"
    assert session.run(None, {"pixel_values": images(1, 3, 6, 4).half().numpy()})[0].shape == (1, 8, 3, 2)


def test_integers_lose_little_and_all_scales_can_be_asked_for_in_one_call(tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="reads ONNX programs")
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    save_model(tmp_path / "model", **{**ONE_SCALE, "scale_factors": (2, 1), "sample_size": 32})
    made = tmp_path / "made"
    write_folder(tmp_path / "data", cat=[1, 2, 3])
    (tmp_path / "data" / "cat" / "0.png").write_bytes(b"broken")
    options = [
        "--dtype",
        "int8",
        "--parts",
        "decoder",
        "--num_scales",
        "2",
        "1",
        "2",
        "--data",
        str(tmp_path / "data"),
    ]
    assert export.main([str(tmp_path / "model"), str(made), *options, "--max_images", "3"]) == 1
    printed, failed = capsys.readouterr()
    assert "0.png" in failed and "WARNING" not in failed
    facts = json.loads((made / "export.json").read_text())
    names = ["decoder.onnx", "decoder-1.onnx"]
    assert [program["files"] for program in facts["programs"]] == [[name] for name in names]
    assert [program.get("num_scales") for program in facts["programs"]] == [2, 1]
    assert facts["dtype"] == "int8" and facts["psnr_images"] == 2
    for name, program in zip(names, facts["programs"]):
        weights = {x.name: x.data_type for x in onnx.load(made / name).graph.initializer if len(x.dims) == 2}
        assert onnx.TensorProto.INT8 in weights.values()
        assert program["largest_difference"] > 1e-4  # it was rounded
        assert abs(program["psnr_lost"]) < 0.3
        assert f"{name}: within" in printed


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda y: y + 1e-3, "differs from the model by 0.001, more than 0.0001"),
        (lambda y: y * torch.nan, "differs from the model by nan"),
        (lambda y: y[:1], "gives (1, 8, 2, 2), the model (3, 8, 2, 2)"),
    ],
)
def test_a_program_that_is_wrong_is_not_kept(small_model, tmp_path, monkeypatch, capsys, wrong, message):
    reference = export.Encoder(load_codec(small_model).core)
    monkeypatch.setattr(export, "trace", lambda part, module, *_: module)
    monkeypatch.setattr(export.torch.export, "save", lambda program, file: None)
    monkeypatch.setattr(export, "open_program", lambda path: lambda x: wrong(reference(x)))
    assert export.main([small_model, str(tmp_path / "made"), "--format", "torch", "--parts", "encoder"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_an_error_of_an_exporter_is_said_in_one_line(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "trace", Mock(side_effect=RuntimeError("no\nroom")))
    (tmp_path / "made").mkdir()
    capsys.readouterr()  # saving shows its progress
    assert export.main([small_model, str(tmp_path / "made"), "--format", "torch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("no room\n") and error.count("\n") == 1
    assert list((tmp_path / "made").iterdir()) == []


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(small_model, tmp_path, monkeypatch, capsys):
    program = torch.export.export(torch.nn.Linear(64, 64), (torch.zeros(1, 64),))
    monkeypatch.setattr(export, "trace", lambda *_: program)
    with full_disk(free=3000):
        assert export.main([str(small_model), str(tmp_path / "made"), "--format", "torch"]) == 2
    assert "made" in error_of(capsys) and not (tmp_path / "made").exists()


def test_what_cannot_be_done_is_said_before_the_work(small_model, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    monkeypatch.setattr(export, "trace", None)
    for name in ("file", "full/encoder.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    AutoencoderKL(norm_num_groups=1, block_out_channels=(4,)).save_pretrained(tmp_path / "kl")
    save_model(tmp_path / "two-way", scale_factors=(2, 1), scale_causal=False)
    torch_only, new = ["--format", "torch"], str(tmp_path / "new")
    capsys.readouterr()  # saving shows its progress
    assert export.main([small_model, new, *torch_only, "--dry_run"]) == 0
    assert "encoder.pt2, decoder.pt2, export.json" in capsys.readouterr().out
    for arguments, message in [
        ([small_model, new], "onnxruntime"),
        ([small_model, new, *torch_only, "--num_scales", "2"], "--num_scales 2"),
        ([str(tmp_path / "two-way"), new, *torch_only, "--num_scales", "1"], "`scale_causal`"),
        ([small_model, str(tmp_path / "file"), *torch_only], "OUTPUT"),
        ([small_model, str(tmp_path / "full"), *torch_only], "OUTPUT"),
        ([str(tmp_path / "absent"), new, *torch_only], "cannot be loaded"),
        ([str(tmp_path / "kl"), new, *torch_only], "is no HieraTok tokenizer"),
    ]:
        assert export.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "encoder.onnx").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--parts", "encoder", "--num_scales", 1], "--num_scales"),
        (["--dtype", "int8", "--format", "onnx", "torch"], "--format onnx"),
        (["--max_images", 3], "--data"),
    ],
)
def test_options_that_contradict_are_refused(capsys, options, named):
    assert named in usage_error(capsys, export.main, "hieratok-tiny", "made", *options)
