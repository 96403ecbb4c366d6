"""Tests of `distributed`: what processes have, in their order."""

import torch.multiprocessing as mp
from torch import distributed as dist

from hieratok_hf.utils.distributed import gather, process_place


def test_one_process_has_what_it_gives():
    assert process_place() == (0, 1) and gather({"a": 1}) == [{"a": 1}]


def of_one(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results[rank] = (process_place(), gather("ab"[rank]))
    dist.destroy_process_group()


def test_two_processes_have_both(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(of_one, args=(tmp_path / "store", results), nprocs=2)
        assert dict(results) == {rank: ((rank, 2), ["a", "b"]) for rank in (0, 1)}
