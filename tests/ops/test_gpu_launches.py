"""What a GPU would be asked to run: every launch of the operators bound and compiled for one, without having one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Runs where the kernels are compiled, not interpreted: a driver that names a chip, and launches that only compile.
SCRIPT = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

class NamedChip:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(NamedChip())
launches, run = [], JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=None, warmup=True, **kwargs)
    launches.append({
        "kernel": self.__name__,
        "programs": (grid(kwargs) if callable(grid) else grid)[0],
        "tile": [kwargs.get("M"), kwargs.get("K")],
        "shared": kernel.metadata.shared,
        "hash": kernel.hash,
        "tensor_cores": any(name in kernel.asm["ptx"] for name in ("wgmma", "mma.sync")),
    })
    return kernel

def without_a_clock(self, *args, config, **kwargs):
    self.fn.run(*args, **kwargs, **config.all_kwargs())
    return [1.0, 1.0, 1.0]

JITFunction.run = compile_only
Autotuner._bench = without_a_clock

from hieratok_hf.ops.attention_triton import prefix_attention
from hieratok_hf.ops.rotary_triton import norm_rotary

dtype, head_dim = getattr(torch, sys.argv[2]), int(sys.argv[3])
for ends in json.loads(sys.argv[4]):
    projected = [torch.randn(2, ends[-1], 3, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    prefix_attention(*projected, ends, 0.1)[0].sum().backward()
    tables = torch.randn(ends[-1], 1, head_dim), torch.randn(ends[-1], 1, head_dim)
    norm_rotary(projected[0], torch.ones(head_dim, requires_grad=True), *tables, 1e-6).sum().backward()
print(json.dumps(launches))
"""
KERNELS = ("attention_kernel", "query_gradient_kernel", "key_gradient_kernel")


def launches(tmp_path, capability, dtype, head_dim, layouts):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])
    arguments = [str(capability), dtype, str(head_dim), json.dumps(layouts)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tuned_and_later(tmp_path_factory):
    """The launches of one process for one layout, and of a second one for three."""
    cache = tmp_path_factory.mktemp("compiled")
    layouts = [[4, 20, 84, 340], [1, 5, 21, 261], [16, 32, 48, 400]]
    return [launches(cache, 90, "bfloat16", 64, some) for some in (layouts[:1], layouts)]


def test_all_launches_compile_for_hopper_with_its_tensor_cores(tuned_and_later):
    lengths = [4, 16, 64, 256]
    rows = tuned_and_later[0]
    for name in KERNELS:
        own = [row for row in rows if row["kernel"] == name]
        assert len({tuple(row["tile"]) for row in own}) >= 3  # several tiles to choose from
        block = 1 if name == "key_gradient_kernel" else 0
        for row in own:
            assert row["tensor_cores"] and row["shared"] <= 227 * 1024
            assert row["programs"] == 2 * 3 * sum(-(-length // row["tile"][block]) for length in lengths)
    assert {row["kernel"] for row in rows} == {*KERNELS, "rotary_kernel", "rotary_gradient_kernel"}


def test_the_choice_of_a_tile_is_kept_and_serves_all_layouts_of_so_many_scales(tuned_and_later):
    for name in KERNELS:
        tuned, later = ({row["hash"] for row in rows if row["kernel"] == name} for rows in tuned_and_later)
        assert len(tuned) >= 3 and len(later) == 1 and later <= tuned
