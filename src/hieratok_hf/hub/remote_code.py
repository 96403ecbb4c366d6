"""
The package in one file, for `trust_remote_code=True` on machines without the package.

diffusers downloads one file of code a component and copies the direct imports of a local one alone, so code in several
files would reach neither a pipeline nor a folder on disk.
"""

import ast
import functools
import os
from pathlib import Path

from ..models.saved_code import add_code

__all__ = ["add_remote_code", "remote_code"]

_PACKAGE = Path(__file__).parents[1]
_ENTRIES = ("models.image_processing_hieratok", "hub.auto_model", "pipelines.pipeline_hieratok_dit")
# What only the installed package does.
_LEFT_OUT = {
    "hub.push": "Pushing to the Hub needs the package hieratok_hf, and a model that its own classes have loaded."
}

_HEAD = '''\
"""
HieraTok in one file, for `trust_remote_code=True`: made of the package hieratok_hf {version} by its `remote_code`.

Apache License 2.0.
"""

{imports}

_UNAVAILABLE: dict[str, str] = {left_out}


def _require(module: str) -> None:
    """Raise `ImportError` where a part of this file could not be had on this machine."""
    if module in _UNAVAILABLE:
        raise ImportError(_UNAVAILABLE[module])
'''


def add_remote_code(folder: str | os.PathLike[str]) -> list[str]:
    """
    Let a saved folder load without the package, by `trust_remote_code=True` in both libraries.

    A tokenizer gets the package in one file and an `auto_map` in its configurations, of which a machine that has
    imported the package takes no notice. A diffusers pipeline gets a file beside its HieraTok tokenizer, and one at
    the root if it is a `HieraTokDiTPipeline`; the names in `model_index.json` become those of the files, so other
    pipelines than `HieraTokDiTPipeline` then want `trust_remote_code=True` always.

    Returns:
        `list[str]`: The files that were written, relative to `folder`; those that had to change come last.

    Raises:
        ValueError: `folder` holds neither a saved tokenizer nor a pipeline with one.
    """
    return add_code(Path(folder), remote_code())


@functools.cache
def remote_code() -> str:
    """
    Join the models, the image processors and the pipeline, module after module, with one list of imports.

    Modules that the package imports on demand, such as the Triton kernels, stand in a `try`: what the machine lacks is
    told when it is asked for.
    """
    modules: dict[str, _Module] = {}

    def add(name: str) -> None:
        """Add a module after those that it imports."""
        if name not in modules and name not in _LEFT_OUT:
            module = _Module(name)
            for other in (*module.eager, *module.lazy):
                add(other)
            modules[name] = module

    for name in _ENTRIES:
        add(name)
    eager = set(_ENTRIES)
    for name in reversed(modules):
        if name in eager:
            eager.update(modules[name].eager)
    imports = {line for name in eager & modules.keys() for line in modules[name].imports}
    lines = "\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))
    from .. import __version__  # the package imports this module before it has one

    parts = [_HEAD.format(version=__version__, imports=lines, left_out=_LEFT_OUT)]
    for name, module in modules.items():
        title = f"# {name}: {module.purpose}\n\n"
        parts.append(title + (module.body if name in eager else module.optional_body))
    return "\n\n".join(part.rstrip("\n") + "\n" for part in parts)


class _Module:
    """Read a module's source, apart from what it imports."""

    def __init__(self, name: str):
        self.name = name
        source = (_PACKAGE / f"{name.replace('.', '/')}.py").read_text()
        tree = ast.parse(source)
        self.purpose = (ast.get_docstring(tree) or "").split("\n")[0].split(": ")[0].rstrip(".")
        self.eager: list[str] = []
        self.lazy: list[str] = []
        self.imports: list[str] = []
        replaced: dict[int, str | None] = {}  # line: what stands there instead

        def replace(node: ast.stmt, text: str | None = None) -> None:
            replaced.update(dict.fromkeys(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            replaced[node.lineno] = text

        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module is not None and all(alias.asname is None for alias in node.names)
                parents = name.split(".")[: -node.level]
                other = ".".join([*parents, node.module])
                (self.eager if id(node) in top else self.lazy).append(other)
                indent = " " * node.col_offset
                replace(node, None if id(node) in top else f'{indent}_require("{other}")')
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                where = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                self.imports += [f"{where}import {ast.unparse(alias)}" for alias in node.names]
                replace(node)
            elif node is tree.body[0] or ast.unparse(node).startswith("__all__ ="):  # the docstring is first
                replace(node)
        kept = [replaced.get(i, line) for i, line in enumerate(source.splitlines(), 1)]
        self.body = "\n".join(line for line in kept if line is not None).strip("\n") + "\n"

    @property
    def optional_body(self) -> str:
        """Put the body into a `try`, its imports with it."""
        body = "\n".join([*self.imports, "", self.body])
        indented = "\n".join(f"    {line}" if line.strip() else "" for line in body.splitlines())
        needs = "".join(f'    _require("{other}")\n' for other in self.eager)
        return (
            f"try:\n{needs}{indented.rstrip()}\n"
            f'except ImportError as error:\n    _UNAVAILABLE["{self.name}"] = str(error)\n'
        )
