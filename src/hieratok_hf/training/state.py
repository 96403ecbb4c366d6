"""States of an interrupted training: one file a step, written whole or not at all, the last few kept."""

import math
import pickle
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

from ..utils.files import remove_leftovers, write_whole

__all__ = ["TrainingState", "latest_state", "learning_rate_factor", "state_to_resume", "states_in"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)

_PATTERN = "state-{:09d}.pt"
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
        except RuntimeError as error:
            raise ValueError(f"The state does not fit this model: {str(error).splitlines()[-1].strip()}") from error


def latest_state(folder: Path) -> dict[str, Any]:
    """Read the newest state of a folder; `FileNotFoundError` without one, `ValueError` where it is damaged."""
    states = states_in(folder)
    if not states:
        raise FileNotFoundError(f"{str(folder)!r} holds no training state to go on from ({_PATTERN.format(0)} or so).")
    try:
        state = torch.load(states[-1], map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(states[-1])!r} cannot be read as a training state: {reason}") from error
    if not isinstance(state, dict) or not {"step", "parts", "average", "updates"} <= state.keys():
        raise ValueError(f"{str(states[-1])!r} is no training state of this package.")
    return state


def state_to_resume(folder: Path, resume: bool, config: dict[str, Any]) -> dict[str, Any] | None:
    """
    Read the newest state of a script's `--output`, `None` where there is none. `ValueError` without `--resume`, for
    another `config`, or where the state is damaged.
    """
    if not states_in(folder):
        return None
    if not resume:
        raise ValueError(f"--output {str(folder)!r} holds a training state: add --resume, or take another folder.")
    state = latest_state(folder)
    # A state from before there was a choice does not say what it has.
    saved = {**({"downsampling": "mean"} if "downsampling" in config else {}), **state["config"]}
    if saved != config:
        differing = sorted(name for name in {*saved, *config} if saved.get(name) != config.get(name))
        raise ValueError(f"The state in {str(folder)!r} is that of a model of another configuration: {differing}.")
    return state


def states_in(folder: Path) -> list[Path]:
    """List the states in a folder, the newest last."""
    return sorted(folder.glob(_GLOB))


def learning_rate_factor(step: int, steps: int, warmup: int, decay: int) -> float:
    """Compute a step's factor of the learning rate, in (0, 1]: linear warm-up, constant, half a cosine at the end."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = min(1.0, (steps - step) / max(1, decay))
    return rising * 0.5 * (1 - math.cos(math.pi * falling))
