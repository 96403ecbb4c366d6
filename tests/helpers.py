"""Tiny configurations and models with weights that are random everywhere, shared by the tests."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2Model

from hieratok_hf import HieraTokConfig, HieraTokCore, PyramidLayout, scale_causal_attention
from hieratok_hf.ops.pyramid import flatten_pyramid
from hieratok_hf.utils.files import write_whole

LINEAR_PATH = 3
TINY: dict[str, Any] = {
    "patch_size": 4,
    "latent_channels": 4,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "decoder_hidden_size": 32,
    "decoder_num_layers": 2,
    "decoder_num_heads": 2,
    "qk_norm": True,
    "output_conv": True,
    "linear_path": LINEAR_PATH,
    "sample_size": 32,
}
DETOK = {
    "rotary_coordinates": "fraction",
    "rotary_pairing": "detok",
    "rotary_scale": 7 * 2 * torch.pi,
    "rotary_base": 10000.0,
    "learned_positions": 5,
    "norm_before_blocks": True,
    "qk_norm": False,
    "linear_path": 0,
}


def tiny(**overrides: Any) -> HieraTokConfig:
    return HieraTokConfig(**{**TINY, **overrides})


def random_core(seed: int = 0, std: float = 0.15, **overrides: Any) -> HieraTokCore:
    """A tiny core whose biases, norms and embeddings are random too, so that no term can go missing unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core = HieraTokCore(tiny(**overrides)).init_weights().eval()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return core


@contextmanager
def changed_tokens(decoder: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it, what a decoder's blocks are given of all scales, `(B, N, D)`, is first changed by a function."""
    handle = decoder.norm_before.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]),))
    try:
        yield
    finally:
        handle.remove()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that lies in a folder, by relative name; files with their contents."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


class Bomb:
    """What a hostile file may hold: unpickling it makes a folder."""

    def __init__(self, path: Path | str = "victim"):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def temporary_of(path: Path) -> Path:
    """Find the name under which `path` is written before it is whole; a process that is killed leaves it."""
    before = {*path.parent.iterdir()}
    with write_whole(path):
        (temporary,) = {*path.parent.iterdir()} - before
    path.unlink()
    return temporary


@contextmanager
def empty_memory_is_nan() -> Iterator[None]:
    """Within it, memory that was allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class AttendMaps(nn.Module):
    """Attention of two heads over a pyramid that follows the size of maps `(B, C, h, w)`."""

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layout = PyramidLayout.from_grid(*query.shape[2:], (2, 1))
        tokens = (flatten_pyramid(x, layout).unflatten(2, (2, -1)).transpose(1, 2) for x in (query, key, value))
        return scale_causal_attention(*tokens, layout, backend=self.backend)


def tiny_vision_model(seed: int = 0) -> MobileNetV2Model:
    """A vision model of the kind that the Fréchet and perceptual distances are taken over."""
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, finegrained_output=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MobileNetV2Model(config)


def leave_something(network: torch.nn.Module) -> None:
    """Draw weights of convolutions that leave something of an image, unlike those that MobileNetV2 begins with."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)


def recorded(name: str) -> dict[str, Any]:
    """
    A report of `benchmarks/results/`; in that of a fine-tuning, which is of earlier weights, the models have as many
    parameters as the shipped tokenizer.
    """
    report = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.json").read_text())
    if name == "fine_tune":
        for model in report["models"]:
            model["parameters"] = recorded("trade_off")["models"][0]["parameters"]
    return report
