"""Pages outside ``docs`` in the site: what a page links to is part of it, and links are as they are on disk.

Pages are read on disk and on GitHub too, so links are relative to the file. ``docs`` is the root of the site, and a
file that a page links to outside of it, with what that links to in turn, stands there under its path in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#:\s]+)(#[^)]*)?(?=\))")


def linked(source: str, target: str) -> str:
    """The path in the repository of what a page of the repository links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    return path.removeprefix("docs/")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        source = waiting.pop()
        for _, target, _ in LINK.findall((ROOT / source).read_text()):
            path = linked(source, target)
            if not path.startswith("docs/") and files.get_file_from_path(path) is None and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
                waiting += [path] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead from where the page is in the site to where its targets are."""
    here = page.file.src_uri
    source = f"docs/{here}" if (ROOT / "docs" / here).is_file() else here

    def moved(link: re.Match[str]) -> str:
        there = in_site(linked(source, link[2]))
        return f"{link[1]}{posixpath.relpath(there, posixpath.dirname(here) or '.')}{link[3] or ''}"

    return LINK.sub(moved, markdown)
