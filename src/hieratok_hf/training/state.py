"""States of an interrupted training: one file a step, written whole or not at all, the last few kept."""

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..utils.files import fcntl, remove_leftovers, write_whole

__all__ = [
    "TrainingState",
    "check_archive",
    "hold_folder",
    "latest_state",
    "learning_rate_factor",
    "options_of",
    "state_to_resume",
    "states_in",
]

ModuleType = TypeVar("ModuleType", bound=nn.Module)

# Options of the scripts that leave what is trained as it is, but for rounding.
_HARMLESS = {"output", "resume", "allow_changes", "overwrite", "keep", "num_workers", "compile", "accumulate"}
_HARMLESS |= {"gradient_checkpointing", "log_every", "sample_every", "save_every", "report_to", "export_every"}
_HARMLESS |= {"sample_steps", "guidance_scale", "export_dtype", "validation_data", "validation_split"}
_HARMLESS |= {"validation_every", "validation_size", "validation_fid", "fid_size"}
# These may be folders, which have several names.
_PLACES = ("model", "vae", "teacher", "transformer", "vision_model")
# These count where they change the learning rate of a step that was taken.
_SCHEDULE = ("steps", "warmup_steps", "decay_steps")

_PATTERN = "state-{:09d}.pt"
_SCHEMA = {"step": int, "parts": list, "average": dict, "updates": int}
# What a report of the training goes on with; a state from before it was kept has none.
_PROGRESS = {"seconds": float, "sums": dict, "counts": dict, "crop_sizes": list}
_LOCK = ".training.lock"
_GLOB = "state-" + "[0-9]" * 9 + ".pt"

# Names without what DDP, FSDP and `torch.compile` put before them: a state goes on under any of them.
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingState:
    """
    Save and restore everything that a training changes, and average the weights that it exports.

    Args:
        core (`nn.Module`): The module whose weights are averaged.
        pairs (`list[tuple[nn.Module, torch.optim.Optimizer]]`): Modules, wrapped or not, with their optimizers; `core`
            lies in the first.
        decay (`float`): Decay of the average, which follows faster at first.
        name (`str`, defaults to `"core"`): Name of `core` in the first module.
    """

    def __init__(
        self, core: nn.Module, pairs: list[tuple[nn.Module, torch.optim.Optimizer]], decay: float, name: str = "core"
    ):
        self.core, self.pairs, self.prefix = core, pairs, f"{name}."
        self.average = EMAModel(core.parameters(), decay=decay, foreach=True)

    def average_weights(self) -> dict[str, Any]:
        """Gather the first module's weights, whole, on the CPU, with the average in place of those of `core`."""
        self.average.store(self.core.parameters())
        self.average.copy_to(self.core.parameters())
        try:
            weights = get_model_state_dict(self.pairs[0][0], options=StateDictOptions(full_state_dict=True))
            return {name: x.detach().clone().cpu() for name, x in weights.items()}
        finally:
            self.average.restore(self.core.parameters())

    def load_average(self, model: ModuleType) -> ModuleType:
        """Give a model of the kind of `core` the averaged weights; all processes call it, each with its own."""
        weights = self.average_weights()
        own = {name.removeprefix(self.prefix): x for name, x in weights.items() if name.startswith(self.prefix)}
        model.load_state_dict(own)
        return model.eval()

    def save(self, folder: Path, step: int, keep: int, write: bool = True, **facts: Any) -> None:
        """
        Write the state after `step` steps, then remove all but the newest `keep`; `facts` are written along. All
        processes call it, the one with `write` writes. `OSError` for a folder that is full; earlier states stay.
        """
        parts = [
            {
                "model": get_model_state_dict(module, options=_GATHER),
                # One that has not begun would be made to take a step, to have something to tell.
                "optimizer": get_optimizer_state_dict(module, optimizer, options=_GATHER) if optimizer.state else {},
            }
            for module, optimizer in self.pairs
        ]
        average = self.average_weights()
        if not write:
            return
        state = {"step": step, "parts": parts, "average": average, "updates": self.average.optimization_step}
        path = folder / _PATTERN.format(step)
        with write_whole(path) as file:
            torch.save({**state, **facts}, file)
        remove_leftovers(folder)
        for old in states_in(folder)[:-keep]:
            old.unlink()

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `latest_state` read; all processes call it. `ValueError` for a state of other modules."""
        distributed = torch.distributed.is_initialized()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)
        if len(state["parts"]) != len(self.pairs):
            raise ValueError(f"The state is of {len(state['parts'])} trained modules, these are {len(self.pairs)}.")
        try:
            # The average passes through the model, whatever wraps it.
            set_model_state_dict(self.pairs[0][0], state["average"], options=options)
            with torch.no_grad():
                for shadow, parameter in zip(self.average.shadow_params, self.core.parameters()):
                    shadow.copy_(parameter)
            self.average.optimization_step = state["updates"]
            for (module, optimizer), part in zip(self.pairs, state["parts"]):
                set_model_state_dict(module, part["model"], options=options)
                if part["optimizer"]:
                    set_optimizer_state_dict(module, optimizer, part["optimizer"], options=options)
        except Exception as error:  # torch's functions raise many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise ValueError(f"The state does not fit this model: {reason}") from error


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """
    Hold a training's folder, made if it is not there, as long as one process writes to it.

    The lock ends with its process however that ends, and the workers that a killed one leaves do not inherit it.

    Raises:
        OSError: The folder cannot be written.
        ValueError: Another process holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {str(folder)!r} must be a folder, it is a file.")
    path, is_new = folder / _LOCK, not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "ab")  # noqa: SIM115 (closed below, after its name is gone)
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise ValueError(
                f"Another training is going on in {str(folder)!r}: wait, or take another folder."
            ) from error
        except FileNotFoundError:  # who held it has just ended
            pass
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if is_new:
            with suppress(OSError):  # unless something was written
                folder.rmdir()


def check_archive(path: Path) -> None:
    """
    Compare all of a file that `torch.save` wrote with the checksums in it, which torch does not look at.

    Raises:
        ValueError: One differs, or it is no such file; `zipfile` raises further types.
    """
    if not path.is_file():
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} has another checksum")
        if any(member.compress_type for member in archive.infolist()):
            raise ValueError("it is compressed")  # which torch would map into memory as it is


def latest_state(folder: Path) -> dict[str, Any]:
    """
    Read the newest state of a folder and compare all of it with its checksums.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or none of this package; the message names it.
    """
    states = states_in(folder)
    if not states:
        raise FileNotFoundError(f"{str(folder)!r} holds no training state to go on from ({_PATTERN.format(0)} or so).")
    name = repr(str(states[-1]))
    try:
        check_archive(states[-1])
        state = torch.load(states[-1], map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, torch and pickle raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        before = f"; if it is removed, {states[-2].name} is the newest" if len(states) > 1 else ""
        raise ValueError(f"{name} cannot be read as a training state: {reason}{before}") from error
    if not isinstance(state, dict) or not all(type(state.get(key)) is kind for key, kind in _SCHEMA.items()):
        raise ValueError(f"{name} is no training state of this package.")
    options = state.get("options", dict.fromkeys(_SCHEDULE, 0))  # a state from before they were kept has none
    if (
        not all(isinstance(part, dict) and part.keys() >= {"model", "optimizer"} for part in state["parts"])
        or state["step"] < 0
        or not isinstance(state.setdefault("config", {}), dict)
        or not isinstance(progress := state.setdefault("report", {}), dict)
        or not all(type(progress.get(key, kind())) is kind for key, kind in _PROGRESS.items())
        or not isinstance(options, dict)
        or not all(type(options.get(key)) is int for key in _SCHEDULE)
    ):
        raise ValueError(f"{name} is no training state of this package: a part of it is none.")
    return state


def state_to_resume(
    folder: Path,
    resume: bool,
    config: dict[str, Any],
    options: dict[str, Any] | None = None,
    allow_changes: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """
    Read the newest state of a script's `--output`, `None` where there is none.

    `options` are those of the script, see `options_of`, with what the data is in place of where it lies. What differs
    from those of the state is said, as are a state that is missing and a training that is finished.

    Raises:
        ValueError: There is one and `--resume` was not given, its `config` is another, its options are others that
            change what is trained and `allow_changes` is not given, or as `latest_state`.
    """
    if not states_in(folder):
        if resume:
            say(f"There is no state in {str(folder)!r} yet: the training begins.")
        return None
    if not resume:
        raise ValueError(f"--output {str(folder)!r} holds a training state: add --resume, or take another folder.")
    state = latest_state(folder)
    # A state from before there was a choice does not say what it has.
    saved = {**({"downsampling": "mean"} if "downsampling" in config else {}), **state["config"]}
    if saved != config:
        differing = sorted(name for name in {*saved, *config} if saved.get(name) != config.get(name))
        raise ValueError(f"The state in {str(folder)!r} is that of a model of another configuration: {differing}.")
    before = state.get("options")  # a state from before they were kept has none
    if options is None or before is None:
        return state
    before = _with_real_places(before)
    changed = [name for name in {**before, **options} if before.get(name) != options.get(name)]
    # A state from before there was an option was trained with what it switches on switched off.
    changed = [name for name in changed if name in before or options[name]]
    shown = [name for name in changed if name not in ("resume", "allow_changes", "overwrite")]
    if shown:
        told = [f"--{name} {_told(options.get(name))} (was {_told(before.get(name))})" for name in shown]
        say(f"{str(folder)!r} was begun with other options: {', '.join(told)}")
    refused = [name for name in changed if name not in _HARMLESS and name not in _SCHEDULE]
    if any(_rate(before, step) != _rate(options, step) for step in range(state["step"])):
        refused += [name for name in changed if name in _SCHEDULE]
    if refused and not allow_changes:
        names = ", ".join(f"--{name}" for name in refused)
        raise ValueError(
            f"{names} changed since the training in {str(folder)!r} was begun, which would make it another one "
            "(--data: other images; --steps, --decay_steps: other learning rates of steps that were taken): give what "
            "it was begun with, or add --allow_changes."
        )
    if state["step"] >= options["steps"]:
        say(f"{str(folder)!r} has taken all {options['steps']} steps: its model is written anew")
    return state


def options_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Reduce a script's arguments to types that JSON has, for a state to keep, and folders of models to one name."""
    return _with_real_places(json.loads(json.dumps(arguments, default=str)))


def _with_real_places(options: dict[str, Any]) -> dict[str, Any]:
    folders = {name: options[name] for name in _PLACES if os.path.isdir(str(options.get(name)))}
    return {**options, **{name: os.path.realpath(folder) for name, folder in folders.items()}}


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rate(options: dict[str, Any], step: int) -> float:
    steps, warmup, decay = (options[name] for name in _SCHEDULE)
    return learning_rate_factor(step, steps, warmup, decay)


def states_in(folder: Path) -> list[Path]:
    """List the states in a folder, the newest last."""
    return sorted(folder.glob(_GLOB))


def learning_rate_factor(step: int, steps: int, warmup: int, decay: int) -> float:
    """Compute a step's factor of the learning rate, in (0, 1]: linear warm-up, constant, half a cosine at the end."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = min(1.0, (steps - step) / max(1, decay))
    return rising * 0.5 * (1 - math.cos(math.pi * falling))
