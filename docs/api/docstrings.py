"""Griffe's extension for the docstrings of this package: their sections become Markdown, public names become links."""

import re
from textwrap import dedent
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"([\w, ]+?)(?: \((.*?)\))?: (.*)", re.DOTALL)
_TITLES = {"Args": "Arguments"}
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)`(?![`\]])")


class Docstrings(griffe.Extension):
    """Google's sections with Hugging Face's types, several names an entry, and links from code to the reference."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite every docstring of a package that has been read."""
        objects = [pkg, *_below(pkg)]
        paths = _public_paths(pkg)
        for found in objects:
            if found.docstring is not None:
                own = {found.path, *(f"{found.path}.{name}" for name in found.members)}
                found.docstring.value = _linked(_sections(found.docstring.value), paths, own)


def _below(parent: griffe.Object) -> list[griffe.Object]:
    """All objects in another, but for names that it imports."""
    members = [member for member in parent.members.values() if not member.is_alias]
    return [found for member in members for found in (member, *_below(member))]


def _public_paths(pkg: griffe.Module) -> dict[str, str]:
    """Where the names that prose uses of public objects are documented."""
    paths: dict[str, str] = {}
    modules = [found for found in _below(pkg) if found.is_module]
    for module in modules:
        for name in module.exports or ():
            if (found := module.members[str(name)]).is_alias or not found.has_docstring:
                continue
            paths[f"{module.name}.{name}"] = paths[f"{module.path}.{name}".removeprefix("hieratok_hf.")] = found.path
            # A short name in lower case is as often that of an argument or of a figure.
            if re.search("[A-Z_]", str(name)):
                paths[str(name)] = found.path
            if found.is_class:
                members = (x for x in found.members.values() if x.has_docstring and x.is_public)
                paths |= {f"{name}.{member.name}": member.path for member in members}
    return paths


def _sections(text: str) -> str:
    def section(match: re.Match[str]) -> str:
        name, body = match[1], dedent(match[2]).strip("\n")
        if name in ("Args", "Attributes", "Raises"):
            body = "\n".join(_entry(entry) for entry in re.split(r"\n(?=\S)", body))
        return f"\n**{_TITLES.get(name, name)}**\n\n{body}\n\n"

    return _SECTION.sub(section, text + "\n").strip()


def _entry(text: str) -> str:
    """An item of a list from `names (type): meaning`, whose further lines are indented already."""
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise ValueError(f"An entry of a docstring must read 'name (type): meaning', got {text!r}.")
    names = ", ".join(f"`{name}`" for name in match[1].split(", "))
    return f"- **{names}**{f' ({match[2]})' if match[2] else ''}: {match[3]}"


def _linked(text: str, paths: dict[str, str], own: set[str]) -> str:
    def link(match: re.Match[str]) -> str:
        path = paths.get(match[1].removeprefix("hieratok_hf."))
        return match[0] if path is None or path in own else f"[{match[0]}][{path}]"

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _CODE.sub(link, part) for part in parts)
