"""The package in one file: the same models, in processes that have no package."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel as DiffusersAutoModel
from diffusers import DDIMScheduler, DiTPipeline
from helpers import images, random_core, tree
from scripts import load_script
from tiny_pipelines import make_pipeline
from transformers import AutoImageProcessor, AutoModel

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline, HieraTokImageProcessorPil, HieraTokModel
from hieratok_hf.hub.remote_code import add_remote_code, remote_code

MEAN_MODEL = Path(__file__).parents[1] / "data" / "mean_model"


def load_copy(tmp_path: Path, name: str):
    (tmp_path / f"{name}.py").write_text(remote_code())
    return load_script(str(tmp_path), name)


def test_it_is_one_file_of_the_package_s_own_words():
    tree = ast.parse(remote_code())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level and not node.module.startswith("hieratok_hf")
        elif isinstance(node, ast.Import):
            assert "hieratok_hf" not in {alias.name for alias in node.names}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    public = {"HieraTokConfig", "HieraTokModel", "AutoencoderHieraTok", "HieraTokDiTPipeline", "HieraTokAutoModel"}
    assert public | {"HieraTokImageProcessor", "HieraTokImageProcessorPil"} <= classes
    assert "scale and every coarser one" in remote_code()  # docstrings stay, for those who read what they trust


def test_a_copy_computes_the_same_bit_for_bit(tmp_path):
    copy = load_copy(tmp_path, "copy_of_the_package")
    if importlib.util.find_spec("triton") is not None:
        assert "prefix_attention" in vars(copy) and "norm_rotary" in vars(copy)
    core = random_core()
    vae = AutoencoderHieraTok.from_core(core)
    other = copy.AutoencoderHieraTok(**core.config.model_fields).eval()
    other.load_state_dict(vae.state_dict())
    found = []
    for model in (vae, other):
        latents = model.encode(images(2, 3, 20, 28)).latent_dist.mode()
        made = [model.decode(latents, num_scales=count).sample for count in (2, 4)]
        made[1].mean().backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        found.append({**gradients, "coarse": made[0], "fine": made[1]})
    assert len(gradients) > 40
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_without_triton_and_the_package_it_says_so_when_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    copy = load_copy(tmp_path, "copy_without_triton")
    assert copy.why_not("triton", torch.zeros(1, 2, 5, 16), 1.0, False) == "Triton is not installed"
    vae = copy.AutoencoderHieraTok(**random_core().config.model_fields)
    assert vae(images(1, 3, 8, 8)).sample.isfinite().all()
    with pytest.raises(ImportError, match="needs the package hieratok_hf"):
        vae.push_to_hub("org/name")


def bound_by(statement: ast.stmt) -> dict[str, Any]:
    """What a statement binds at the top of a module, and to what: an import to an object, all else to itself."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        found: dict[str, Any] = {}
        exec(ast.unparse(statement), found)
        return {name: value for name, value in found.items() if name != "__builtins__"}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name: statement}
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
    names = [x for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
    return {name.id: statement for name in names if isinstance(name.ctx, ast.Store)}


def test_every_name_of_the_file_has_one_meaning():
    meanings = {}
    for statement in ast.parse(remote_code()).body:
        for inner in statement.body if isinstance(statement, ast.Try) else [statement]:
            for name, meaning in bound_by(inner).items():
                assert name == "_" or meanings.setdefault(name, meaning) is meaning, name
    assert "HieraTokModel" in meanings and "prefix_attention" in meanings


def test_a_tokenizer_s_folder_loads_in_both_libraries(saved, tmp_path):
    before = tree(saved)
    written = add_remote_code(saved)
    assert written == ["modeling_hieratok.py", "preprocessor_config.json", "config.json"]
    after = tree(saved)
    assert {name for name in before if after[name] != before[name]} == {"preprocessor_config.json", "config.json"}
    add_remote_code(saved)
    assert tree(saved) == after

    sample = images(1, 3, 16, 24)
    expected = AutoencoderHieraTok.from_pretrained(saved)
    with torch.no_grad():
        expected = expected(sample).sample
        # With the package imported no trust is needed, and its own classes are used.
        model = AutoModel.from_pretrained(saved)
        assert type(model) is HieraTokModel and torch.equal(model(sample).reconstruction, expected)
        assert type(AutoImageProcessor.from_pretrained(saved)) is HieraTokImageProcessorPil
        vae = DiffusersAutoModel.from_pretrained(str(saved), trust_remote_code=True)
        assert torch.equal(vae(sample).sample, expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusersAutoModel.from_pretrained(str(saved))
    for kind in (HieraTokModel, AutoencoderHieraTok):  # what the package saves again names no code
        kind.from_pretrained(saved).save_pretrained(tmp_path / "plain")
        assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_pipeline_s_folder_gets_code_beside_its_tokenizer(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    written = add_remote_code(tmp_path)
    assert written == ["vae/autoencoder_hieratok.py", "pipeline_hieratok_dit.py", "model_index.json"]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_hieratok_dit", "HieraTokDiTPipeline"]
    assert index["vae"] == ["autoencoder_hieratok", "AutoencoderHieraTok"]
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert add_remote_code(tmp_path) == written and json.loads((tmp_path / "model_index.json").read_text()) == index


def test_other_pipelines_keep_their_class_and_load_the_code_beside_the_tokenizer(tmp_path):
    ours = make_pipeline()
    DiTPipeline(ours.transformer, ours.vae, DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["hieratok_hf", "AutoencoderHieraTok"]
    assert add_remote_code(tmp_path) == ["vae/autoencoder_hieratok.py", "model_index.json"]
    found = json.loads((tmp_path / "model_index.json").read_text())
    assert found == {**index, "vae": ["autoencoder_hieratok", "AutoencoderHieraTok"]}
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiTPipeline.from_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is DiTPipeline and type(loaded.vae) is not AutoencoderHieraTok
    sample = images(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.vae(sample).sample, ours.vae(sample).sample)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": '{"_class_name": "AutoencoderKL"}'},
        {"model_index.json": '{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}'},
    ],
)
def test_other_folders_are_refused_and_left_as_they_are(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="folder"):
        add_remote_code(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


IN_A_CLEAN_PROCESS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"hieratok_hf", *sys.argv[3:]}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import diffusers
import huggingface_hub
import torch
import transformers

tokenizer, pipeline = by_diffusers = sys.argv[1:3]
if tokenizer.startswith("org/"):
    folders = [huggingface_hub.snapshot_download(name) for name in by_diffusers]
    if huggingface_hub.is_offline_mode():  # diffusers asks the Hub for the commit even of code that it has
        by_diffusers = folders
sample = torch.load("sample.pt", weights_only=True)
trust = {"trust_remote_code": True}
with torch.no_grad():
    model = transformers.AutoModel.from_pretrained(tokenizer, **trust)
    vae = diffusers.AutoModel.from_pretrained(by_diffusers[0], **trust)
    results = {"transformers": model(sample).reconstruction, "diffusers": vae(sample).sample}
    # What is saved keeps its code, whoever saves it.
    model.save_pretrained("again")
    again = diffusers.AutoModel.from_pretrained("again", **trust)
    again.save_pretrained("and again")
    results["again"] = transformers.AutoModel.from_pretrained("and again", **trust)(sample).reconstruction
    processor = transformers.AutoImageProcessor.from_pretrained(tokenizer, **trust)
    image = torch.arange(8 * 12 * 3, dtype=torch.uint8).reshape(8, 12, 3).numpy()
    results["processor"] = processor(image, return_tensors="pt").pixel_values
pipe = diffusers.DiffusionPipeline.from_pretrained(by_diffusers[1], **trust)
generator = torch.Generator().manual_seed(0)
results["pipeline"] = pipe(["tench"], num_inference_steps=2, generator=generator, output_type="pt").images
pipe.save_pretrained("pipeline again")
again = diffusers.DiffusionPipeline.from_pretrained("pipeline again", **trust)
generator.manual_seed(0)
results["pipeline again"] = again(["tench"], num_inference_steps=2, generator=generator, output_type="pt").images
diffusers.DiTPipeline(again.transformer, vae, diffusers.DDIMScheduler()).save_pretrained("other pipeline")
other = diffusers.DiffusionPipeline.from_pretrained("other pipeline", **trust)
with torch.no_grad():  # on processors of AMD, gradients are for another library's products
    results["other pipeline"] = other.vae(sample).sample
torch.save(results, "results.pt")
assert "hieratok_hf" not in sys.modules
"""


def in_a_clean_process(tmp_path: Path, tokenizer: str, pipeline: str, environment: dict, *absent: str) -> dict:
    """What both libraries make of two folders or repositories where the package cannot be imported."""
    torch.save(images(1, 3, 16, 24), tmp_path / "sample.pt")
    code = [sys.executable, "-c", IN_A_CLEAN_PROCESS, tokenizer, pipeline, *absent]
    done = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "results.pt", weights_only=True)


def expected_results(tokenizer: Path, pipeline: Path) -> dict:
    with torch.no_grad():
        image = AutoencoderHieraTok.from_pretrained(tokenizer)(images(1, 3, 16, 24)).sample
    pipe = HieraTokDiTPipeline.from_pretrained(pipeline)
    generator = torch.Generator().manual_seed(0)
    made = pipe(["tench"], num_inference_steps=2, generator=generator, output_type="pt").images
    array = torch.arange(8 * 12 * 3, dtype=torch.uint8).reshape(8, 12, 3).numpy()
    processed = HieraTokImageProcessorPil(size_divisor=4)(array, return_tensors="pt").pixel_values
    of_tokenizer = dict.fromkeys(("transformers", "diffusers", "again", "other pipeline"), image)
    return {**of_tokenizer, "processor": processed, "pipeline": made, "pipeline again": made}


def test_folders_load_without_the_package_and_without_triton(saved, tmp_path):
    shutil.copytree(MEAN_MODEL, saved, dirs_exist_ok=True)  # saved before there was a choice
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    expected = expected_results(saved, tmp_path / "pipeline")
    add_remote_code(saved)
    add_remote_code(tmp_path / "pipeline")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    found = in_a_clean_process(tmp_path, str(saved), str(tmp_path / "pipeline"), environment, "triton")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
