"""Tests of the lines that a command ends with."""

from hieratok_hf.cli.terminal import align_table, one_line


def test_errors_become_one_line():
    assert one_line(ValueError("several\n  lines of\ttext")) == "several lines of text"
    assert one_line(MemoryError()) == "MemoryError"


def test_rows_are_aligned():
    assert align_table([["name", "x"], ["a", "1.25"], ["longer", "-"]]) == "name       x\na       1.25\nlonger     -"
