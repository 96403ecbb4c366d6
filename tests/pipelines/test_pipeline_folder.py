"""A pipeline's folder that brings code of its own: the installed package has no need of it."""

import json

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from helpers import tree
from tiny_pipelines import make_pipeline

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline
from hieratok_hf.hub.remote_code import add_remote_code


def made(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(["tench"], num_inference_steps=2, generator=generator, output_type="pt").images


def test_its_class_loads_it_without_running_the_folder_s_code(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "model_index.json").read_text())
    add_remote_code(tmp_path)
    for path in tmp_path.rglob("*.py"):
        path.write_text("raise RuntimeError('this code was run')")
    loaded = HieraTokDiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is AutoencoderHieraTok
    assert torch.equal(made(loaded), made(pipe))
    loaded.save_pretrained(tmp_path / "again")  # an ordinary folder
    saved = json.loads((tmp_path / "again" / "model_index.json").read_text())
    saved.pop("_name_or_path")  # diffusers keeps it
    assert saved == plain
    assert not list((tmp_path / "again").rglob("*.py"))
    other = make_pipeline(seed=1).vae
    assert HieraTokDiTPipeline.from_pretrained(tmp_path, vae=other).vae is other


def test_the_class_of_diffusers_loads_it_where_it_finds_ours(tmp_path, monkeypatch):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="HieraTokDiTPipeline"):  # or docs/generation.md may do without the line
        DiffusionPipeline.from_pretrained(tmp_path)
    monkeypatch.setattr(diffusers, "HieraTokDiTPipeline", HieraTokDiTPipeline, raising=False)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert (type(loaded), type(loaded.vae)) == (HieraTokDiTPipeline, AutoencoderHieraTok)
    assert torch.equal(made(loaded), made(pipe))


def test_a_pipeline_of_the_folder_s_code_keeps_it(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    add_remote_code(tmp_path / "pipeline")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    assert type(loaded) is not HieraTokDiTPipeline
    loaded.save_pretrained(tmp_path / "again")
    first, second = (tree(tmp_path / name) for name in ("pipeline", "again"))
    assert second.keys() >= first.keys()  # the tokenizer alone loads by its code too
    for name in ("pipeline_hieratok_dit.py", "vae/autoencoder_hieratok.py"):
        assert second[name] == first[name]
    first, second = (json.loads(files["model_index.json"]) for files in (first, second))
    assert second == {**first, "_name_or_path": str(tmp_path / "pipeline")}  # which diffusers adds
    again = type(loaded).from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again.vae) is not AutoencoderHieraTok
    assert torch.equal(made(again), made(loaded))


def test_a_pipeline_can_be_made_of_another():
    ours = make_pipeline()
    theirs = DiTPipeline(ours.transformer, ours.vae, ours.scheduler)
    for pipe in (ours, theirs):
        made_of_it = HieraTokDiTPipeline.from_pipe(pipe)
        assert made_of_it.vae is ours.vae and made_of_it.transformer is ours.transformer
    other = make_pipeline(seed=1).vae
    assert HieraTokDiTPipeline.from_pipe(ours, vae=other).vae is other
    assert HieraTokDiTPipeline.from_pipe(ours).config.id2label == ours.config.id2label


def test_a_pipeline_made_of_another_leaves_its_dtypes():
    ours = make_pipeline()
    ours.transformer.to(torch.bfloat16)
    made_of_it = HieraTokDiTPipeline.from_pipe(ours)
    for pipe in (ours, made_of_it):
        assert (pipe.vae.dtype, pipe.transformer.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(made(made_of_it), made(ours))
    for name in ("dtype", "torch_dtype"):
        cast = HieraTokDiTPipeline.from_pipe(ours, **{name: torch.float64})
        assert cast.vae.dtype == cast.transformer.dtype == torch.float64
        ours = make_pipeline()
