"""What tests of several scripts share: the scripts as modules, calls of them, and their records."""

import importlib
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import leave_something
from transformers import MobileNetV2Config, MobileNetV2Model

ROOT = Path(__file__).parents[1]


def load_script(folder: str, name: str) -> ModuleType:
    """A command of the package, or a script of a folder of the repository with the scripts beside it to import."""
    if folder == "cli":
        return importlib.import_module(f"hieratok_hf.cli.{name}")
    path = ROOT / folder / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget_processes() -> None:
    """accelerate keeps what the first script of a process asked for."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run_training(script: ModuleType, arguments: list[str]) -> list[dict[str, Any]]:
    """The records of a training script, which must end well."""
    forget_processes()
    assert script.main(arguments) == 0
    return records(Path(arguments[arguments.index("--output") + 1]))


@contextmanager
def interrupted(owner: type, name: str, call: int) -> Iterator[None]:
    """Within it, a call of a method is interrupted as by Ctrl-C: the first, the second ..."""
    plain, calls = getattr(owner, name), itertools.count(1)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


def records(output: Path, name: str = "losses.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], *names: str, **tolerance: float) -> None:
    """The records of two trainings are alike, in all or in some numbers, and the same in words."""
    for mine, other in zip(ours, theirs, strict=True):
        chosen = set(names or mine.keys() | other.keys())
        words = {x for x in chosen if isinstance(mine[x], str)}
        assert {x: mine[x] for x in words} == {x: other[x] for x in words}
        chosen -= words
        assert {x: mine[x] for x in chosen} == pytest.approx({x: other[x] for x in chosen}, **tolerance)


def names_in(folder: Path) -> list[str]:
    """The relative names of all that lies in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def report_in(folder: Path) -> dict[str, Any]:
    """The only report in the folder of a benchmark's results."""
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def with_defaults(given: list[Any], defaults: dict[str, Any]) -> list[str]:
    """Arguments, and those of `defaults` that are not given."""
    return [str(x) for x in [*given, *(x for pair in defaults.items() if pair[0] not in given for x in pair)]]


def error_of(capsys: Any) -> str:
    """The one line of error that a script printed, beside its progress bar."""
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert not any("Traceback" in line for line in lines)
    (error,) = (line for line in lines if line.startswith("error: "))
    return error


def usage_error(capsys: Any, main: Callable[[list[str]], Any], *given: Any) -> str:
    """What a script says of a command line that it refuses."""
    with pytest.raises(SystemExit, match="2"):
        main(list(map(str, given)))
    return capsys.readouterr().err


def tables_in(output: str) -> list[list[dict[str, str]]]:
    """The tables that a script prints below its first line, a dictionary for each row."""
    blocks = [block.splitlines() for block in output.split("\n\n")]
    blocks[0] = blocks[0][1:]
    rows = [[re.split(r"\s{2,}", x.strip()) for x in block if not re.match("(note|skipped): ", x)] for block in blocks]
    return [[dict(zip(header, row, strict=True)) for row in table] for header, *table in rows]


def save_vision_model(folder: Path, kind: type = MobileNetV2Model, **config: Any) -> Path:
    """A MobileNetV2 with weights that leave something of an image, unlike those that it begins with."""
    torch.manual_seed(0)
    network = kind(MobileNetV2Config(depth_multiplier=0.1, min_depth=4, image_size=32, **config))
    leave_something(network)
    network.save_pretrained(folder)
    return folder
