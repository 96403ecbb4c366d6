"""MkDocs' hook for Markdown that GitHub reads too: pages outside of docs/ that those in it link to, blocks of code."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = ("CHANGELOG.md", "model_card.md", "benchmarks/README.md")
IMAGES = "benchmarks/results/*.png"


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the pages and their images, at their places in the repository."""
    root = Path(config.config_file_path).parent
    for path in [*(root / page for page in PAGES), *sorted(root.glob(IMAGES))]:
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Let links from a page of docs/ to one of those begin in docs/, the site's root; plain names of languages."""
    pages = "|".join([*map(re.escape, PAGES), r"benchmarks/results/[\w-]+\.png"])
    markdown = re.sub(rf"\]\(\.\./(?=(?:{pages})[)#])", "](", markdown)
    # GitHub takes the first word for the language, here more of them make it no block of code.
    return re.sub(r"^(```\w+) no-run$", r"\1", markdown, flags=re.MULTILINE)
