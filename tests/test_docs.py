"""The documentation: examples that run, docstrings with shapes and errors, a reference of every public name, links."""

import ast
import doctest
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import hieratok_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hieratok_hf"
# What commands share; each tells of itself by --help.
OF_COMMANDS = ("main", "parsing", "terminal", "outputs", "command_line")
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not path.stem.startswith("__") and (path.parts[-2] not in ("cli", "arguments") or path.stem in OF_COMMANDS)
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")])
FOREIGN = {"ModelMixin"}  # what the package passes on of other libraries


class Public(NamedTuple):
    """A public function or class, or a public method of one, and what its class says."""

    name: str
    node: ast.FunctionDef | ast.ClassDef
    class_docstring: str

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


def exported(tree: ast.Module) -> list[str]:
    (names,) = (x.value for x in tree.body if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__")
    return ast.literal_eval(names)


def own_members(classes: dict[str, ast.ClassDef], name: str) -> Iterator[ast.FunctionDef]:
    """Public methods of a class, with those of bases that are not public themselves."""
    for node in classes[name].body:
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__call__"):
            yield node
    for base in map(ast.unparse, classes[name].bases):
        if base in classes:
            yield from own_members(classes, base)


def public_of(module: str) -> list[Public]:
    """What a module defines and names in `__all__`; names of other modules are left to those."""
    tree = TREES[module]
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported(tree):
            own = ast.get_docstring(node) or ""
            found.append(Public(f"{module}.{node.name}", node, own))
            if isinstance(node, ast.ClassDef):
                members = own_members(classes, node.name)
                found += [Public(f"{module}.{node.name}.{member.name}", member, own) for member in members]
    return found


def constants_of(module: str) -> list[tuple[str, ast.stmt | None]]:
    """Values that a module names in `__all__`, each with the statement after it."""
    tree = TREES[module]
    found = []
    for node, after in zip(tree.body, [*tree.body[1:], None]):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        found += [(name, after) for name in names if name in exported(tree)]
    return found


PUBLIC = [public for module in SOURCES for public in public_of(module)]
PUBLIC_FUNCTIONS = [public for public in PUBLIC if isinstance(public.node, ast.FunctionDef)]
EXAMPLES = {
    f"{module}.{getattr(node, 'name', '')}": text
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    and ">>> " in (text := ast.get_docstring(node) or "")
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(doctest.DocTestParser().get_doctest(EXAMPLES[name], {}, name, None, None))
    assert runner.tries and not runner.failures


def test_the_main_names_have_examples():
    wanted = {
        *("AutoencoderHieraTok", "HieraTokConfig", "HieraTokDiTPipeline", "HieraTokImageProcessorPil"),
        *("HieraTokModel", "PyramidLayout", "pretrained", "scale_causal_attention"),
    }
    assert wanted <= {name.rpartition(".")[2] for name in EXAMPLES} & set(hieratok_hf.__all__)


def test_every_public_name_has_a_docstring():
    bare = [public.name for public in PUBLIC if not public.docstring]
    for module, tree in TREES.items():
        bare += [module] if not ast.get_docstring(tree) else []
        for name, after in constants_of(module):
            is_docstring = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            bare += [] if is_docstring else [f"{module}.{name}"]
    assert not bare


def test_docstrings_read_alone():
    fragments = re.compile(r"\s*(As|Of|That|Those|What)\b")
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "conversion").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                assert not fragments.match(ast.get_docstring(node) or ""), (path.name, getattr(node, "name", "module"))


def raised_by(function: ast.FunctionDef) -> set[str]:
    """Classes of the exceptions that a function makes itself; one that it caught and raises again is none."""
    raised = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc is not None]
    names = [ast.unparse(error.func if isinstance(error, ast.Call) else error).rpartition(".")[2] for error in raised]
    return {name for name in names if name[0].isupper()}


def test_docstrings_name_the_errors_that_are_raised():
    unnamed = []
    for public in PUBLIC_FUNCTIONS:
        told = public.docstring + public.class_docstring
        unnamed += [f"{public.name}: {error}" for error in raised_by(public.node) if error not in told]
    # What makes an object is told of by its class.
    for public in PUBLIC:
        for node in public.node.body if isinstance(public.node, ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__"):
                unnamed += [f"{public.name}: {error}" for error in raised_by(node) if error not in public.docstring]
    assert not unnamed


def test_docstrings_give_the_shape_of_every_tensor():
    tensors, shapeless = 0, []
    for public in PUBLIC_FUNCTIONS:
        arguments = public.node.args
        for argument in (*arguments.args, *arguments.kwonlyargs):
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            if "[" in annotation or "Tensor" not in annotation:
                continue
            tensors += 1
            # As an entry of the arguments, or in a sentence.
            entry = rf"\b{argument.arg}\b[^:\n]* of (any )?shape\b|\b{argument.arg}\b(`|:) `\("
            shapeless += [f"{public.name}: {argument.arg}"] if not re.search(entry, public.docstring) else []
    assert tensors > 80 and not shapeless


def test_every_module_and_top_level_name_stands_in_the_reference():
    pages = {path.name: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")}
    directives = Counter(name for text in pages.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert directives == Counter(f"hieratok_hf.{module}" for module in SOURCES)
    listed = Counter(re.findall(r"\[hieratok_hf\.(\w+)\]", pages["index.md"]))
    assert listed == Counter(set(hieratok_hf.__all__) - FOREIGN)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the reference needs the extra `docs`")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: path.read_text() for path in site.rglob("*.html")}


def test_the_built_reference_has_every_public_name(site):
    content = (site / "objects.inv").read_bytes()
    listed = zlib.decompress(content.split(b"zlib.\n", 1)[1]).decode().splitlines()
    found = {line.split(" ")[0] for line in listed}
    wanted = {f"hieratok_hf.{public.name}" for public in PUBLIC}
    wanted |= {f"hieratok_hf.{module}.{name}" for module in SOURCES for name, _ in constants_of(module)}
    wanted |= {f"hieratok_hf.{name}" for name in set(hieratok_hf.__all__) - FOREIGN}
    assert len(wanted) > 300 and sorted(wanted - found) == []


def test_sections_of_docstrings_are_rendered(pages, site):
    html = (site / "api" / "models.html").read_text()
    assert not re.search(r">(Args|Returns|Raises|Attributes|Example):\s", html)
    assert html.count(">Parameters:<") > 10 and html.count(">Raises:<") > 10
    assert not re.search(r"<p>[^<]*```|<code>python no-run", "".join(pages.values()))


def test_the_site_loads_nothing_from_other_hosts(pages, site):
    loaded = re.compile(r"<(?!a\b)[a-z]+\s[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*")
    assert len(pages) > 10 and not [found for html in pages.values() for found in loaded.findall(html)]
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert styles and not [text for text in styles if re.search(r"url\([\"']?(https?:)?//|@import", text)]
    # For a diagram, the theme's script would fetch a library.
    assert not [path for path, html in pages.items() if 'class="mermaid"' in html]


def without_code(text: str) -> str:
    return re.sub(r"^( *)(```+).*?^ *\2$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_on_github(text: str) -> set[str]:
    """Those that GitHub makes of headings: lower case, no punctuation, a number where one comes again."""
    seen: Counter[str] = Counter()
    anchors = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#+ +(.*?) *#*$", without_code(text), re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


@pytest.mark.parametrize("path", MARKDOWN, ids=[str(path.relative_to(ROOT)) for path in MARKDOWN])
def test_links_of_markdown_files_resolve(path):
    text = re.sub(r"`[^`\n]*`", "", without_code(path.read_text()))
    links = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)|<(?:img|a) [^>]*(?:src|href)=\"([^\"]+)\"", text)
    broken = []
    for link in (first or second for first, second in links):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = path.parent / unquote(parts.path) if parts.path else path
        is_anchor = not parts.fragment or parts.fragment in anchors_on_github(target.read_text())
        broken += [link] if not (target.exists() and is_anchor) else []
    assert not broken
