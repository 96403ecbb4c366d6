"""What a user gets: a light import, registered Auto classes, and pages whose code runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hieratok_hf import HieraTokDiTPipeline
from hieratok_hf.hub.remote_code import remote_code

ROOT = Path(__file__).parents[1]
OPTIONAL = ("torchvision", "triton", "datasets", "matplotlib", "torchmetrics", "diffusers")
EXTRAS = ("datasets", "gradio", "matplotlib", "onnx", "onnxruntime", "peft", "sklearn", "tensorboard", "torchmetrics")


def run(code, cwd=None, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def test_a_model_of_transformers_loads_no_diffusers_which_can_follow():
    code = """
import sys
import torch, hieratok_hf
model = hieratok_hf.HieraTokModel.from_pretrained("hieratok-tiny")
output = model(torch.zeros(1, 3, 16, 24))
print(tuple(model.decode(model.encode(torch.zeros(1, 3, 16, 24)).latents).reconstruction.shape))
print("diffusers" in sys.modules)
before = output.reconstruction.detach()
vae = hieratok_hf.AutoencoderHieraTok.from_core(model.core)
vae.fuse_qkv_projections()
vae.set_attention_backend("native")
processors = [processor._attention_backend for processor in vae.attn_processors.values()]
print(processors == ["native"] * 6, torch.allclose(vae(torch.zeros(1, 3, 16, 24)).sample, before, atol=1e-5))
"""
    assert run(code) == ["(1, 3, 16, 24)", "False", "True True"]


def test_the_core_needs_no_package_of_an_extra(tmp_path):
    code = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_other(name, *rest, **options):
    return None if name.partition(".")[0] in {EXTRAS!r} else find(name, *rest, **options)
PathFinder.find_spec = staticmethod(find_other)
import torch, hieratok_hf
from PIL import Image
processor = hieratok_hf.HieraTokImageProcessor.from_pretrained("hieratok-tiny")
pixel_values = processor(hieratok_hf.example_image(), return_tensors="pt").pixel_values[..., :64, :64]
for loader in (hieratok_hf.HieraTokModel, hieratok_hf.AutoencoderHieraTok):
    model = loader.from_pretrained("hieratok-tiny")
    print(tuple(model(pixel_values)[0].shape))
    model.save_pretrained({str(tmp_path)!r})
pipe = hieratok_hf.HieraTokDiTPipeline.from_pretrained("hieratok-dit-tiny")
pipe.set_progress_bar_config(disable=True)
print(pipe("church", num_inference_steps=1).images[0].size)
from hieratok_hf.cli.reconstruct import main
print(main([hieratok_hf.example_image(), "--size", "64", "--device", "cpu", "--output", {str(tmp_path / "sheets")!r}]))
"""
    *_, size, header, figures, _, note, status = run(code, HF_HUB_OFFLINE="1")
    assert size == "(128, 128)" and status == "0"
    assert dict(zip(re.split("  +", header), re.split("  +", figures)))["SSIM"] == "-" and "[eval]" in note
    assert list((tmp_path / "sheets").glob("*.png"))


def test_import_is_light_and_registers():
    # Modules of transformers that every model and image processor loads.
    bases = "import torch, transformers.modeling_utils, transformers.modeling_layers, transformers.processing_utils"
    bases += ", transformers.image_processing_backends"
    code = f"""
import sys, time
{bases}
before, start = set(sys.modules), time.process_time()
import hieratok_hf
print(time.process_time() - start)
print(*{{*{OPTIONAL!r}, "hieratok_hf.models.autoencoder_hieratok"}} & set(sys.modules) - before)
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
print(AutoConfig.for_model("hieratok").model_type, hieratok_hf.HieraTokConfig in AutoModel._model_mapping.keys())
print(hieratok_hf.HieraTokConfig in IMAGE_PROCESSOR_MAPPING.keys())
"""
    # The best of three: the first on a machine compiles modules, of other packages as well.
    for _ in range(3):
        seconds, *told = run(code)
        assert told == ["", "hieratok True", "True"]
        if float(seconds) < 0.3:
            break
    assert float(seconds) < 0.3


def test_parts_import_only_those_below_them():
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("needs import-linter")
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_code_from_the_hub_asks_for_no_package_that_is_optional(tmp_path):
    # transformers refuses code whose imports are missing, also inside `if` or a function; torch has typing_extensions,
    # and huggingface_hub filelock and httpx.
    needed = {"diffusers", "huggingface_hub", "numpy", "PIL", "safetensors", "torch", "transformers"}
    needed |= {"filelock", "httpx", "typing_extensions"}
    (tmp_path / "modeling_hieratok.py").write_text(remote_code())
    assert set(get_imports(tmp_path / "modeling_hieratok.py")) - set(sys.stdlib_module_names) <= needed
    assert not get_relative_import_files(tmp_path / "modeling_hieratok.py")


def test_every_module_has_its_tests():
    package = ROOT / "src" / "hieratok_hf"
    for path in package.rglob("*.py"):
        test = ROOT / "tests" / path.relative_to(package).with_name(f"test_{path.name}")
        assert path.stem in ("__init__", "__main__") or path.parent.name == "arguments" or test.exists(), path.name


def test_the_python_of_the_pages_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers, "HieraTokDiTPipeline", None, raising=False)  # which a page sets
    names = ("models", "generation", "attention", "latents", "training")
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in names)]
    blocks = [re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in pages]
    (start, *load_and_generate), of_models, of_generation, of_attention, of_latents, of_training = blocks

    def run_blocks(*blocks):
        names = {}
        exec("\n".join(blocks).replace("num_inference_steps=25", "num_inference_steps=4"), names)
        return names

    names = run_blocks(start)
    assert [tuple(scale.shape[-2:]) for scale in names["scales"]] == [(16, 16), (32, 32), (64, 64), (128, 128)]
    assert (tmp_path / "church.png").stat().st_size > 1_000
    names = run_blocks(*load_and_generate)
    assert names["output"].latents.shape == (1, 16, 32, 32)
    assert (tmp_path / "hat.png").stat().st_size > 10_000
    assert [image.size for image in names["images"]] == [(128, 128)] * 2

    (tmp_path / "hat.png").unlink()
    names = run_blocks(*of_models)
    assert names["output"].latents.shape == (1, 16, 32, 32) and names["features"].shape == (1, 1024, 128)
    assert (tmp_path / "hat.png").stat().st_size > 10_000
    assert names["latents"].shape == (1, 16, 32, 48) and names["image"].shape == (1, 3, 256, 384)
    assert names["preview"].shape == (1, 3, 64, 96)
    assert names["tokens"].shape == (1, 1024, 128)
    assert [maps.shape for maps in names["maps"]] == [(1, 128, 32, 48)] * 2
    names = run_blocks(*of_generation)
    assert [image.size for image in names["images"]] == [(128, 128)] * 2
    assert [len(names[name]) for name in ("shown", "edited", "between")] == [1, 1, 5]
    assert type(names["pipe"]) is HieraTokDiTPipeline
    names = run_blocks(*of_attention)
    assert names["model"].config._attn_implementation == "hieratok_sdpa"
    assert {processor.backend for processor in names["vae"].attn_processors.values()} == {"sdpa"}
    pixel_values = torch.linspace(-1, 1, 3 * 24 * 32).view(1, 3, 24, 32)
    ours, theirs = (names[name](pixel_values).reconstruction for name in ("mine", "model"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    names = run_blocks(*of_training)
    distance, weight = names["objective"].distances["edges"]
    assert weight == 0.5 and distance(pixel_values, pixel_values) == 0 < distance(-pixel_values, pixel_values)
    names = run_blocks(*of_latents)
    assert {path.name for path in Path(names["folder"]).glob("*.png")} == {"hat.png", "jacket.png"}
