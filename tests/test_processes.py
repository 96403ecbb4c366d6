"""The processes that tests start: none outlives its test, and the failure of one is not waited for."""

import time
from types import ModuleType

import processes
import pytest

COMMAND = """
import os, time

def main(arguments):
    if os.environ["RANK"] == arguments[0]:
        return 3
    open(os.path.join(arguments[1], "begun"), "w").close()
    time.sleep(100)
"""


@pytest.fixture
def command(tmp_path, monkeypatch) -> ModuleType:
    (tmp_path / "slow_command.py").write_text(COMMAND)
    monkeypatch.syspath_prepend(tmp_path)
    return pytest.importorskip("slow_command")


def test_where_one_process_fails_the_others_are_not_waited_for(command, tmp_path):
    started = time.perf_counter()
    with processes.running(command, [1, tmp_path], tmp_path, world=2) as begun:
        pass
    assert [process.exitcode for process in begun] == [-9, 3] and time.perf_counter() - started < 60


def test_a_test_that_fails_meanwhile_leaves_none(command, tmp_path):
    with pytest.raises(KeyboardInterrupt), processes.running(command, [-1, tmp_path], tmp_path, world=2) as begun:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert [process.exitcode for process in begun] == [-9, -9]
