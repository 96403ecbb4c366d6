"""Tests of `lora_adapters`: an adapter of peft or of diffusers' own format acts, is mixed, fused and taken off."""

import copy

import pytest
import torch
from helpers import Bomb, tree
from tiny_pipelines import make_pipeline

from hieratok_hf import HieraTokDiTPipeline

peft = pytest.importorskip("peft", reason="adapters are peft's")
CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "ff.net.2", "norm1.linear"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def base():
    return make_pipeline()


@pytest.fixture(scope="module")
def trained(base):
    """A transformer with an adapter of random weights, as peft holds it."""
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(base.transformer), peft.LoraConfig(**CONFIG))


@pytest.fixture
def pipe(base):
    return HieraTokDiTPipeline(base.vae, copy.deepcopy(base.transformer), base.scheduler, base.id2label)


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1], num_inference_steps=2, generator=generator, output_type="latent").images


@pytest.fixture
def expected(base, trained):
    return generate(HieraTokDiTPipeline(base.vae, trained.base_model.model, base.scheduler, base.id2label))


def save_as(form, trained, folder):
    config = trained.peft_config["default"].to_dict()
    if form == "peft":
        trained.save_pretrained(folder)
    else:
        layers = peft.get_peft_model_state_dict(trained)
        if form == "diffusers":
            layers = {name.removeprefix("base_model.model."): x for name, x in layers.items()}
        HieraTokDiTPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=config)
    return folder


@pytest.mark.parametrize("form", ["peft", "diffusers", "peft's names in diffusers' file"])
def test_a_saved_adapter_acts_as_it_did_in_training(form, pipe, base, trained, expected, tmp_path):
    pipe.load_lora_weights(save_as(form, trained, tmp_path), adapter_name="mine")
    assert (expected - generate(base)).abs().max() > 0.01
    torch.testing.assert_close(generate(pipe), expected)
    assert pipe.get_list_adapters() == {"transformer": ["mine"]} and pipe.get_active_adapters() == ["mine"]


def test_adapters_are_scaled_fused_and_taken_off(pipe, base, trained, expected, tmp_path):
    untouched = generate(base)
    pipe.unload_lora_weights()  # of none
    pipe.load_lora_weights(save_as("diffusers", trained, tmp_path), adapter_name="mine")
    pipe.set_adapters("mine", 0.0)
    torch.testing.assert_close(generate(pipe), untouched)
    pipe.set_adapters("mine", 1.0)
    pipe.fuse_lora()
    torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(pipe), untouched, atol=1e-4, rtol=1e-4)
    pipe.save_pretrained(tmp_path / "saved")
    assert tree(tmp_path / "saved").keys() == tree_of(base, tmp_path / "base").keys()


def tree_of(pipe, folder):
    pipe.save_pretrained(folder)
    return tree(folder)


def test_a_pipeline_with_adapters_is_saved_once_they_are_in_its_weights(pipe, trained, expected, tmp_path):
    pipe.load_lora_weights(save_as("diffusers", trained, tmp_path / "lora"))
    for merge in (lambda: None, pipe.fuse_lora):
        merge()
        with pytest.raises(ValueError, match="`transformer` has adapters"):
            pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(generate(HieraTokDiTPipeline.from_pretrained(tmp_path / "saved")), expected)


def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, base, trained, tmp_path):
    layers = peft.get_peft_model_state_dict(trained)
    wrong = {name: x[:, :3] if "lora_A" in name else x for name, x in layers.items()}
    named = {f"transformer.{name.removeprefix('base_model.model.')}": x for name, x in layers.items()}
    first, *others = named
    half = {name: named[name] for name in others}
    torch.save(layers, tmp_path / "adapter.bin")
    torch.save(Bomb(tmp_path / "sprung"), tmp_path / "pytorch_lora_weights.bin")
    for weights, kind, told in (
        (wrong, ValueError, "cannot be loaded into this `transformer`"),
        ({"vae.weight": torch.zeros(2, 2)}, ValueError, "'vae.weight'"),
        ({}, ValueError, "got none"),
        (half, ValueError, r"two matrices .*lacks lora_A"),
        ({**named, first: named[first] * torch.nan}, ValueError, "finite"),
        ({name.replace(".to_q", ".to_z"): x for name, x in named.items()}, ValueError, r"to_z', which is no layer"),
        ({name.replace("A.weight", "A.default.weight"): x for name, x in layers.items()}, ValueError, "default"),
        (tmp_path, OSError, "pytorch_lora_weights.safetensors"),
        (tmp_path / "none", (OSError, ValueError), "weight_name|none"),
    ):
        with pytest.raises(kind, match=told):
            pipe.load_lora_weights(weights)
    for options, told in (
        ({"weight_name": "adapter.bin"}, "`weight_name`"),
        ({"adapter_name": "a.b"}, "`adapter_name`"),
    ):
        with pytest.raises(ValueError, match=told):
            pipe.load_lora_weights(tmp_path, **options)
    with pytest.raises(ValueError, match="`safe_serialization`"):
        pipe.save_lora_weights(tmp_path / "saved", layers, safe_serialization=False)
    assert not (tmp_path / "sprung").exists()
    assert torch.equal(generate(pipe), generate(base))


def test_a_transformer_in_a_wrapper_is_refused_and_one_that_is_compiled_in_place_follows(
    pipe, trained, expected, tmp_path
):
    folder, transformer = save_as("diffusers", trained, tmp_path), pipe.transformer
    pipe.transformer = torch.compile(transformer, backend="eager")
    for act in (lambda: pipe.load_lora_weights(folder), pipe.unload_lora_weights, pipe.disable_lora):
        with pytest.raises(ValueError, match=r"`transformer` .*pipe.transformer.compile"):
            act()
    pipe.transformer = transformer
    untouched = generate(pipe)
    transformer.compile(backend="eager")
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(pipe), untouched, atol=1e-4, rtol=1e-4)
