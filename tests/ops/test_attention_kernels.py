"""Tests of `attention_kernels`: which rows each program takes, and that NVIDIA's chips get tensor cores and fit."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4")
import triton
import triton.language as tl

from hieratok_hf.ops import attention_triton
from hieratok_hf.ops.attention_triton import _locate


@triton.jit
def places_kernel(places, ends, BLOCK: tl.constexpr, FINEST_FIRST: tl.constexpr):
    """Where each program stands, `(programs, 4)`."""
    batch_head, first_row, start, end = _locate(tl.program_id(0), ends, BLOCK, FINEST_FIRST)
    place = places + 4 * tl.program_id(0)
    tl.store(place, batch_head)
    tl.store(place + 1, first_row)
    tl.store(place + 2, start)
    tl.store(place + 3, end)


def places_of(ends, block, finest_first, batch_heads):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.zeros(1, ends[-1], batch_heads, 16, device=device)
    programs = attention_triton._programs(query, ends, "M")({"M": block})
    places = torch.full((*programs, 4), -1, dtype=torch.int32, device=device)
    told = attention_triton._arguments(query, ends, 1.0)["ends"]
    places_kernel[programs](places, told, BLOCK=block, FINEST_FIRST=finest_first)
    return places.tolist()


@pytest.mark.parametrize("finest_first", [False, True])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("ends", [(1,), (32,), (33,), (1, 5, 21, 85), (16, 80, 336), (128, 256), tuple(range(1, 11))])
def test_every_row_of_every_head_is_taken_once_by_a_tile_of_its_own_scale(ends, block, finest_first):
    places = places_of(ends, block, finest_first, batch_heads=2)
    taken = []
    for batch_head, first_row, start, end in places:
        assert (start, end) in set(zip((0, *ends), ends)) and start <= first_row < end
        assert (first_row - start) % block == 0
        taken += [(batch_head, row) for row in range(first_row, min(first_row + block, end))]
    assert sorted(taken) == list(itertools.product(range(2), range(ends[-1])))


@pytest.mark.parametrize("finest_first", [False, True])
def test_the_tiles_of_a_head_with_the_most_work_start_first(finest_first):
    places = places_of((1, 5, 21, 85), 16, finest_first, batch_heads=2)
    for batch_head in range(2):
        ends = [place[3] for place in places if place[0] == batch_head]
        # A query of a finer scale sees more keys; a key of a coarser scale is seen by more queries.
        assert ends == sorted(ends, reverse=finest_first) and len(set(ends)) == 4


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hieratok_hf.ops import attention_triton

def compiled(kernel, dtype, head_dim, tile, capability, num_scales, alignment):
    function = getattr(attention_triton, kernel)
    m, k, warps, stages = tile
    constants = {"HEAD_DIM": head_dim, "D": max(16, triton.next_power_of_2(head_dim)), "M": m, "K": k}
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("strides"):
            signature[name] = ("i32",) * 3
            attributes |= {(i, j): [["tt.divisibility", alignment]] for j in range(3)}
        elif name == "ends":
            signature[name] = ("i32",) * num_scales
        elif name in ("num_tokens", "heads", "length_class"):
            signature[name] = "i32"
        elif name in ("scale", "softmax_scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "*fp32" if name in ("log_sum", "delta") else dtype
            attributes[(i,)] = [["tt.divisibility", alignment]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, places, attributes if alignment > 1 else {})
    options = {"num_warps": warps, "num_stages": stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": result.metadata.shared, "cores": [x for x in ("wgmma", "mma.sync") if x in result.asm["ptx"]]}

print(json.dumps([compiled(*case) for case in json.load(sys.stdin)]))
"""
TILES = {
    "attention_kernel": attention_triton.ATTENTION_TILES,
    "query_gradient_kernel": attention_triton.QUERY_GRADIENT_TILES,
    "key_gradient_kernel": attention_triton.KEY_GRADIENT_TILES,
}
ON_HOPPER = [(name, "*bf16", 64, tile, 90, 4, 16) for name, choice in TILES.items() for tile in choice]
# The largest heads and numbers on a chip of the smallest shared memory.
LAST_TILES = [(name, "*fp32", 128, choice[-1], 86, 4, 16) for name, choice in TILES.items()]
ODD_CALLS = [(name, "*fp16", 40, choice[0], 90, 10, 1) for name, choice in TILES.items()]


def id_of(case):
    name, dtype, head_dim, tile, capability, *_ = case
    return f"{name}-{dtype[1:]}-{head_dim}-{'x'.join(map(str, tile))}-sm_{capability}"


def every(cases):
    return pytest.mark.parametrize("case", cases, ids=id_of)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """What became of each case; a process of its own compiles them, as this one may interpret."""
    try:
        assert "nvidia" in triton.backends.backends and triton.knobs.nvidia.ptxas
    except (AssertionError, RuntimeError):
        pytest.skip("needs a Triton with NVIDIA's compiler")
    cases = [*ON_HOPPER, *LAST_TILES, *ODD_CALLS]
    cache = str(tmp_path_factory.mktemp("compiled"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert any(name.endswith(".cubin") for _, _, names in os.walk(cache) for name in names)
    return dict(zip(cases, json.loads(result.stdout)))


@every(ON_HOPPER)
def test_a_tile_uses_tensor_cores_on_hopper(case, compilations):
    # Hopper's own instruction takes 64 rows of four warps.
    rows = case[3][1] if case[0] == "key_gradient_kernel" else case[3][0]
    assert compilations[case]["cores"] == (["wgmma"] if rows >= 64 else ["mma.sync"])


@every(LAST_TILES)
def test_the_last_tile_fits_every_chip(case, compilations):
    assert compilations[case]["cores"] == ["mma.sync"]
    assert 0 < compilations[case]["shared"] <= 99 * 1024


@every(ODD_CALLS)
def test_many_scales_odd_heads_and_unaligned_rows_compile(case, compilations):
    assert compilations[case]["cores"]
