"""Tests of `places`: nothing of a machine is told but the last name."""

import pytest

from hieratok_hf.utils.places import line, place


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/name", "org/name"),
        ("runs/mine", "runs/mine"),
        ("hieratok-tiny", "hieratok-tiny"),
        ("/home/me/runs/mine/", "mine"),
        ("../shared/kodak", "kodak"),
        ("~/kodak", "kodak"),
        (r"C:\Users\me\kodak", "kodak"),
        ("/data/clothes/train-0.tar", "clothes/train-0.tar"),
    ],
)
def test_a_path_of_a_machine_is_cut(name, told):
    assert place(name) == told


def test_text_is_one_line_of_what_can_be_seen():
    assert line("a\x00\n b\u202e\t c ") == "a b c"
