"""Tests of `scratch`: temporary folders of pushes that live go on, those of dead ones are removed."""

import subprocess
import sys
import tempfile

import pytest

from hieratok_hf.hub.scratch import scratch_folder

KILLED = """
import os, signal, sys
from hieratok_hf.hub.scratch import scratch_folder
with scratch_folder():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of folders")
def test_only_the_folders_of_dead_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    (left,) = tmp_path.iterdir()
    with scratch_folder() as first, scratch_folder() as second:
        assert first != second and {*tmp_path.iterdir()} == {first, second} and left not in (first, second)
    assert not list(tmp_path.iterdir())
