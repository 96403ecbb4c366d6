"""Record what a training was, beside the model that it made."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..models.saved_code import to_json
from ..utils.choices import TRAINING_FILE
from ..utils.files import write_whole
from ..utils.places import place

__all__ = ["PARENTS", "write_record"]

PARENTS = ("model", "transformer", "teacher", "vae")
"""Options of the commands that train which name other models that the trained one comes from."""

_PACKAGES = ("hieratok_hf", "torch", "diffusers", "transformers")


def write_record(
    folder: Path,
    command: str,
    arguments: Mapping[str, Any],
    data: Mapping[str, Any],
    steps: int,
    seconds: float,
    machine: Mapping[str, Any],
) -> None:
    """
    Write `training.json`: the command with its arguments, data, machine and versions, hours, steps, seed and parents.

    Paths that tell of the machine are cut to their last name.

    Args:
        folder (`Path`): Where the model lies.
        command (`str`): The command, such as `"hieratok train"`.
        arguments (`Mapping`): Its arguments, as `options_of` gives them.
        data (`Mapping`): `names`, the number of `images`, `None` of a stream, and the `fingerprint`.
        steps (`int`): Steps that were taken.
        seconds (`float`): Time of the training, of all runs that it was resumed in.
        machine (`Mapping`): The machine of the last run, as the commands describe it.

    Raises:
        OSError: The file cannot be written.
    """
    told = _without_places(arguments)
    record = {
        "command": command,
        "arguments": told,
        "data": _without_places(data),
        "versions": {name: version(name) for name in _PACKAGES},
        "machine": machine,
        "hours": round(seconds / 3600, 4),
        "steps": steps,
        "seed": told["seed"],
        "parents": {name: told[name] for name in PARENTS if told.get(name) is not None},
    }
    with write_whole(folder / TRAINING_FILE) as file:
        file.write(to_json(record).encode())


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_places(entry) for entry in value]
    return place(value) if isinstance(value, str) else value
