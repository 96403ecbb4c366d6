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
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

chip = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", int(sys.argv[1]), 32))
chip.get_current_device, chip.get_current_stream = lambda: 0, lambda device: 0
driver.set_active(chip)
launches, run = [], JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=None, warmup=True, **kwargs)
    launches.append({
        "kernel": self.__name__,
        "programs": (grid(kwargs) if callable(grid) else grid)[0],
        "tile": [kwargs.get("M"), kwargs.get("K")],
        "shared": kernel.metadata.shared,
        "hash": kernel.hash,
        "cores": [name for name in ("wgmma", "mma.sync") if name in kernel.asm["ptx"]],
    })
    return kernel

def without_a_clock(self, *args, config, **kwargs):
    self.fn.run(*args, **kwargs, **config.all_kwargs())
    return [1.0, 1.0, 1.0]

JITFunction.run = compile_only
Autotuner._bench = without_a_clock

from hieratok_hf.ops import attention_triton
from hieratok_hf.ops.rotary_triton import norm_rotary

dtype, head_dim, tiles, offset = getattr(torch, sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
for kernel in (attention_triton._attend, attention_triton._query_gradient, attention_triton._key_gradient):
    kernel.configs = {"all": kernel.configs, "first": kernel.configs[:1], "last": kernel.configs[-1:]}[tiles]
for ends in json.loads(sys.argv[6]):
    wider = [torch.randn(2, ends[-1], 3, head_dim + offset, dtype=dtype) for _ in range(3)]
    projected = [x[..., offset:].requires_grad_() for x in wider]
    attention_triton.prefix_attention(*projected, ends, 0.1)[0].backward(wider[0][..., offset:].detach())
    tables = torch.randn(ends[-1], 1, head_dim), torch.randn(ends[-1], 1, head_dim)
    norm_rotary(projected[0], torch.ones(head_dim, requires_grad=True), *tables, 1e-6).sum().backward()
print(json.dumps(launches))
"""
KERNELS = ("attention_kernel", "query_gradient_kernel", "key_gradient_kernel")


def launches(tmp_path, capability, dtype, head_dim, layouts, tiles="all", offset=0):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])
    arguments = [capability, dtype, head_dim, tiles, offset, json.dumps(layouts)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], env=environment, capture_output=True, text=True
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
            # Hopper's own instruction takes 64 rows of four warps.
            assert row["cores"] == (["wgmma"] if row["tile"][block] >= 64 else ["mma.sync"])
            assert row["shared"] <= 227 * 1024
            assert row["programs"] == 2 * 3 * sum(-(-length // row["tile"][block]) for length in lengths)
    assert {row["kernel"] for row in rows} == {*KERNELS, "rotary_kernel", "rotary_gradient_kernel"}


def test_the_choice_of_a_tile_is_kept_and_serves_all_layouts_of_so_many_scales(tuned_and_later):
    for name in KERNELS:
        tuned, later = ({row["hash"] for row in rows if row["kernel"] == name} for rows in tuned_and_later)
        assert len(tuned) >= 3 and len(later) == 1 and later <= tuned


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "ends", "tiles", "offset", "shared"),
    [
        # The largest heads and numbers where shared memory is the smallest.
        (86, "float32", 128, [4, 20, 84, 340], "last", 0, 99 * 1024),
        # Many scales, odd heads and unaligned rows.
        (90, "float16", 40, [*range(1, 101, 11)], "first", 1, 227 * 1024),
    ],
)
def test_the_first_and_the_last_tile_compile(tmp_path, capability, dtype, head_dim, ends, tiles, offset, shared):
    rows = launches(tmp_path, capability, dtype, head_dim, [ends], tiles, offset)
    rows = [row for row in rows if row["kernel"] in KERNELS]
    assert all(row["cores"] and 0 < row["shared"] <= shared for row in rows)
    assert capability == 90 or all(row["cores"] == ["mma.sync"] for row in rows)
    assert {row["kernel"] for row in rows} == {*KERNELS}
