"""What the site has and its pages do not say: figures of speed, links to the rest of the repository, and in docstrings
links to what they name.

MkDocs calls the functions as it builds; mkdocstrings takes the class as an extension of Griffe.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import aefast.data
import aefast.functional
import aefast.models
import aefast.nn
import aefast.sampling
import aefast.stats
import aefast.train
from aefast.bench import document, readme

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

# Pages of the site that lie in the root of the repository.
OUTSIDE = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md"}

SPEED = re.compile(r"<!-- speed: (\w+) -->")
# Fenced blocks and code between backticks, which are left as they are, or the target of a link.
CODE_OR_LINK = re.compile(
    r"^ *(?P<fence>`{3,}).*?^ *(?P=fence)$"
    r"|(?P<ticks>`+).+?(?P=ticks)(?!`)"
    r"|\[(?P<text>[^][]*)\]\((?P<target>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    markdown = SPEED.sub(lambda found: speed(found[1], page.file.src_uri), markdown)
    return linked(markdown, page.file.src_uri)


def speed(op: str, where: str) -> str:
    """The rows about an op in the README's table.

    Raises:
        PluginError: nothing in bench/results is about it.
    """
    documents = []
    for path in sorted(RESULTS.glob("*.json")):
        results = document.load_results(path)
        cases = [case for case in results["cases"] if case["op"] == op]
        if cases:
            documents.append({**results, "cases": cases})
    if not documents:
        raise PluginError(f"{where}: speed: {op}: no results of it in {RESULTS}")
    return readme.joint_table(documents)


def linked(markdown: str, uri: str) -> str:
    """The text of a page with its links to files outside of docs/ as they are on the site.

    Those to README.md and CONTRIBUTING.md, and from there to pages, go to pages. What else is in the repository is
    named without a link. Links that lead nowhere stay, for MkDocs to find.
    """
    outside = {page: name for name, page in OUTSIDE.items()}
    # Where in the repository the text is from.
    folder = posixpath.dirname(outside.get(uri, f"docs/{uri}"))

    def one(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None or re.match(r"#|[a-z]+:", target):
            return found[0]
        path, hash_sign, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        page = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is not None:
            page = posixpath.relpath(page, posixpath.dirname(uri) or ".")
            return f"[{found['text']}]({page}{hash_sign}{anchor})"
        return found["text"] if (ROOT / path).exists() else found[0]

    return CODE_OR_LINK.sub(one, markdown)


def _documented() -> dict[str, str]:
    """What docstrings may call a thing that has a place in the reference → its full name."""
    names = {}
    for module in (
        *(aefast.functional, aefast.nn, aefast.models, aefast.train),
        *(aefast.data, aefast.sampling, aefast.stats, aefast),
    ):
        for name in module.__all__:
            full = f"{module.__name__}.{name}"
            # A function in a module of its own name, which hides it from Griffe, has its place under that.
            place = f"{full}.{name}" if getattr(getattr(module, name), "__module__", "") == full else full
            names.setdefault(name, place)
            names[full] = place
    return names


class Docstrings(griffe.Extension):
    """Names in docstrings become links, `::` before a block a colon or nothing, and the `*` of (*, D) no emphasis."""

    def __init__(self) -> None:
        self._full_names = _documented()

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"(?<![`\\])\*(?=[,)])", r"\\*", obj.docstring.value)
        text = re.sub(r"^::$", "", text, flags=re.MULTILINE)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        # What stands before the first colon would be a type; the signature has it.
        text = re.sub(r"^(Returns:\n +)", r"\1: ", text, flags=re.MULTILINE)

        def link(found: re.Match[str]) -> str:
            full = self._full_names.get(found[1])
            is_itself = full is None or full.rpartition(".")[2] == obj.name
            return found[0] if is_itself else f"[`{found[1]}`][{full}]"

        obj.docstring.value = re.sub(r"(?<!`)`([\w.]+)`(?!`)", link, text)
