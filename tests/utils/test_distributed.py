"""Tests of `distributed`; tests of the scripts start several processes."""

from hieratok_hf.utils.distributed import gather, process_place


def test_one_process_has_what_it_gives():
    assert process_place() == (0, 1) and gather({"a": 1}) == [{"a": 1}]
