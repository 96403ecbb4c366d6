"""Names and shapes of a checkpoint to those of the model and back, bit for bit: a table of rules, checked whole."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KeyMap", "KeyMapError", "Rule", "core_key_map"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 8


class KeyMapError(ValueError):
    """List by kind everything in which a checkpoint and a model do not fit together; `count` says how much it is."""

    def __init__(self, problems: Mapping[str, Sequence[str]]):
        self.count = sum(map(len, problems.values()))
        lines = []
        for kind, entries in problems.items():
            lines += [f"{kind} ({len(entries)}):", *(f"  {entry}" for entry in entries[:_SHOWN])]
            if len(entries) > _SHOWN:
                lines.append(f"  ... and {len(entries) - _SHOWN} more")
        super().__init__("\n".join(lines))


class _Misfit(Exception):
    """Say of a tensor that does not fit what kind of problem it is, and what was found and expected."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True)
class Rule:
    """
    Name one tensor of a checkpoint and what the model makes of it.

    Args:
        raw (`str`): Name in the checkpoint; each `{}` stands for a whole number, such as that of a block.
        names (`tuple[str, ...]`): Names in the model, with as many `{}`, which stand for the same numbers. Several
            are equal parts of the tensor along dimension 0, as those of a fused projection.
        to_model (callable, *optional*): Reshapes or permutes the checkpoint's tensor, before it is cut.
        to_raw (callable, *optional*): Its inverse, after the parts were joined.
    """

    raw: str
    names: tuple[str, ...]
    to_model: Callable[[Tensor], Tensor] | None = None
    to_raw: Callable[[Tensor], Tensor] | None = None


class KeyMap:
    """
    Turn a checkpoint into the model's weights and back, by a table of rules.

    Args:
        rules (`Sequence[Rule]`): Several may make the same names, as a fused projection and its parts do: a checkpoint
            has either, or both where they agree bit for bit; on the way back the first of them is taken.
        ignored (`Sequence[str]`): Names in the checkpoint, `{}` as in a rule, that the model has no use for.
    """

    def __init__(self, rules: Sequence[Rule], ignored: Sequence[str] = ()):
        self.rules = tuple(rules)
        self.ignored = [_pattern(name) for name in ignored]

    def to_model(self, raw: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """
        Make the weights of a model from those of a checkpoint.

        Args:
            raw (`Mapping[str, torch.Tensor]`): Every tensor of it is used, or its name is one of `ignored`.
            shapes (`Mapping[str, Sequence[int]]`): Name and shape of every tensor that the model needs.

        Returns:
            `dict[str, torch.Tensor]`: Exactly the names of `shapes`, in the dtype of the checkpoint. Tensors may share
            memory with those of `raw`.

        Raises:
            KeyMapError: A tensor is missing, left over, of another shape, not finite or not floating point, or two
                that stand for the same weights differ.
        """
        kept = {key: x for key, x in raw.items() if not any(pattern.fullmatch(key) for pattern in self.ignored)}
        made: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        used: set[str] = set()
        problems: dict[str, list[str]] = {}
        for rule, key, names in self._matches(kept):
            if not (needed := [name for name in names if name in shapes]):
                continue
            used.add(key)
            origin = {**dict.fromkeys(needed, key), **origin}
            try:
                for name, part in zip(names, _parts(rule, kept[key], names, shapes)):
                    other = made.setdefault(name, part)
                    if other is not part and (other.dtype != part.dtype or not torch.equal(other, part)):
                        raise _Misfit("given twice, with other values", f"{origin[name]} gives another {name}")
            except _Misfit as misfit:
                problems.setdefault(misfit.kind, []).append(f"{key}: {misfit}")
        if missing := [self._sought(name) for name in shapes if name not in origin]:
            problems = {"missing in the checkpoint": list(dict.fromkeys(missing)), **problems}
        if left := [key for key in kept if key not in used]:
            problems["in the checkpoint, and the model has no such part"] = left
        if problems:
            raise KeyMapError(problems)
        return {name: made[name] for name in shapes}

    def to_raw(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Make the tensors of a checkpoint from the weights of a model: what `to_model` was given, but what it ignored.

        Raises:
            KeyMapError: A name is one that no rule makes, or the parts of a tensor are not all there or do not fit.
        """
        raw: dict[str, Tensor] = {}
        used: set[str] = set()
        problems: dict[str, list[str]] = {}
        for rule in self.rules:
            pattern = _pattern(rule.names[0])
            for found in filter(None, map(pattern.fullmatch, state)):
                names = [_filled(name, found) for name in rule.names]
                if used.intersection(names):
                    continue
                used.update(names)
                if lacking := [name for name in names if name not in state]:
                    problems.setdefault("missing in the model", []).extend(lacking)
                    continue
                parts = [state[name] for name in names]
                if len({(part.shape, part.dtype) for part in parts}) > 1:
                    entry = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in zip(names, parts))
                    problems.setdefault("not parts of one tensor", []).append(entry)
                    continue
                joined = parts[0] if len(parts) == 1 else torch.cat(parts)
                raw[_filled(rule.raw, found)] = (rule.to_raw(joined) if rule.to_raw else joined).contiguous()
        if left := [name for name in state if name not in used]:
            problems["in the model, and no rule makes it"] = left
        if problems:
            raise KeyMapError(problems)
        return raw

    def _matches(self, raw: Mapping[str, Tensor]) -> Iterator[tuple[Rule, str, list[str]]]:
        """Give every rule that a checkpoint has a tensor for, that tensor's name, and the names of what it makes."""
        for rule in self.rules:
            pattern = _pattern(rule.raw)
            for found in filter(None, map(pattern.fullmatch, raw)):
                yield rule, found.group(), [_filled(name, found) for name in rule.names]

    def _sought(self, name: str) -> str:
        """Name what in a checkpoint would give one name of the model."""
        keys = [
            _filled(rule.raw, found)
            for rule in self.rules
            for found in filter(None, (_pattern(part).fullmatch(name) for part in rule.names))
        ]
        return " or ".join(keys) or f"{name}, which no rule makes"


def core_key_map(fused: bool = False) -> KeyMap:
    """
    Make the table for the names of `HieraTokCore`'s own state dict, which are those of the model without `core.`. With
    `fused`, the way back joins queries, keys and values to one `to_qkv`, as `fuse_qkv_projections` does.
    """
    plain = ["encoder.patch_embed.weight", "encoder.patch_embed.bias", "encoder.linear_path.weight"]
    plain += ["decoder.scale_embedding", "decoder.embed.weight", "decoder.embed.bias"]
    plain += [f"decoder.{part}.{{}}.{kind}" for part in ("coarse_embed", "linear_path") for kind in ("weight", "bias")]
    plain += ["decoder.output_conv.weight", "decoder.output_conv.bias"]
    projections = []
    for side in ("encoder", "decoder"):
        block = f"{side}.blocks.{{}}"
        plain += [f"{side}.{name}" for name in ("positions.grid", "norm_before.weight", "norm_after.weight")]
        plain += [f"{block}.{name}.weight" for name in ("norm1", "norm2", "attn.norm_q", "attn.norm_k")]
        for kind in ("weight", "bias"):
            linears = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "mlp.linear_in", "mlp.linear_out")
            plain += [f"{side}.head.{kind}", *(f"{block}.{linear}.{kind}" for linear in linears)]
            parts = tuple(f"core.{block}.attn.to_{part}.{kind}" for part in "qkv")
            projections.append(Rule(f"{block}.attn.to_qkv.{kind}", parts))
    own = [Rule(name, (f"core.{name}",)) for name in plain]
    # What torch's own averaging counts beside the weights.
    return KeyMap([*projections, *own] if fused else [*own, *projections], ignored=["n_averaged"])


def _pattern(name: str) -> re.Pattern[str]:
    """Compile what a name with `{}` matches."""
    return re.compile("([0-9]+)".join(map(re.escape, name.split("{}"))))


def _filled(name: str, found: re.Match[str]) -> str:
    return name.format(*found.groups())


def _parts(rule: Rule, tensor: Tensor, names: list[str], shapes: Mapping[str, Sequence[int]]) -> Sequence[Tensor]:
    """Make what a rule does of a tensor, one for each name; `_Misfit` unless it is what the model needs."""
    if not isinstance(tensor, Tensor):
        raise _Misfit("no tensors", f"found {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise _Misfit("no dense tensors", f"found {tensor.layout} on {tensor.device}")
    if tensor.dtype not in _DTYPES:
        raise _Misfit("not floating point", f"found {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    if strange := [name for name in names if name not in shapes]:
        raise _Misfit("only partly in the model", f"the model has no {', '.join(strange)}")
    wanted = [tuple(shapes[name]) for name in names]
    expected = wanted[0] if len(names) == 1 else (sum(shape[0] for shape in wanted), *wanted[0][1:])
    found = str(tuple(tensor.shape))
    try:
        whole = tensor.detach() if rule.to_model is None else rule.to_model(tensor.detach())
    except (IndexError, RuntimeError, ValueError) as error:
        raise _Misfit("of another shape", f"found {found}, expected what becomes {expected}") from error
    if rule.to_model is not None:
        found += f", which becomes {tuple(whole.shape)}"
    # Before any value is looked at: a small file can describe a tensor that is larger than the memory.
    if tuple(whole.shape) != expected or len(set(wanted)) > 1:
        raise _Misfit("of another shape", f"found {found}, expected {expected}")
    if not torch.isfinite(whole).all():
        raise _Misfit("not finite", "found NaN or infinity")
    return whole.contiguous().chunk(len(names)) if len(names) > 1 else [whole.contiguous()]
