"""The ledger: every item of the five documents, and where the book settles it.

A check keeps verdict, claim, evidence and source beside its output, and a comment in the
prose names the items that the sentence before it settles. The directive `{ledger} S1` lists
both for one document, item by item; with `:refuted:` only what is wrong as printed. An item
that is named nowhere is a warning, which fails the build. The role `{checks}` counts.
"""

import csv
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from jupyter_cache import get_cache
from nbformat import NotebookNode, from_dict
from parallel_execution import bridged
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)

ITEM = re.compile(r"(S\d\.)(\d+)(?: ?\(([a-z])\)|([a-z]))?(?: to S\d\.(\d+))?( corrected)?")
COMMENT = re.compile(r"<!--(.*?)-->", re.S)
HEADING = re.compile(r"^#+ (.*)$", re.M)
PRINTED = {
    "OK": "right", "OK-with-convention": "right, with its convention",
    "IMPRECISE": "imprecise", "WRONG": "wrong", "OPEN QUESTION": "open",
}


TABLE = ":::{list-table}", ":header-rows: 1", ":class: po-stack", ""


class Finding(NamedTuple):
    "What one cell or sentence of a chapter says of an item."

    docname: str
    section: str
    verdict: str   # that of a check; empty for a sentence
    claim: str
    evidence: str


def items(text: str, known: dict[str, str]) -> list[str]:
    "Ids in a source or comment; one without a letter is all of its parts."
    found = []
    for document, first, bracket, letter, last, _ in ITEM.findall(text):
        for number in range(int(first), int(last or first) + 1):
            name = f"{document}{number}{bracket or letter}"
            parts = [x for x in known if re.fullmatch(rf"{re.escape(name)}[a-z]", x)]
            found += [name] if name in known else parts
    return found


def findings(docname: str, notebook: NotebookNode, known: dict[str, str]):
    "All of one chapter that has run: pairs of an item and what is said of it."
    section = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for part in re.split(r"(?m)(?=^#+ )", cell.source):
                section = (HEADING.findall(part) or [section])[-1]
                for comment in COMMENT.findall(part):
                    for item in items(comment, known):
                        yield item, Finding(docname, section, "", "", "")
        for output in cell.get("outputs", []):
            kept = output.get("metadata", {}).get("po_book", {})
            for item in items(kept.get("source") or "", known):
                said = (" ".join(kept[x].split()) for x in ("verdict", "claim", "evidence"))
                yield item, Finding(docname, section, *said)


def told(found: list[Finding]) -> list[Finding]:
    "Its checks; where there are none, the sections that settle it in words."
    return [x for x in found if x.verdict] or list(dict.fromkeys(found))


def row(*columns: str) -> list[str]:
    return [f"{'  ' if i else '* '}- {text}" for i, text in enumerate(columns)]


def executed(env: BuildEnvironment, docname: str) -> NotebookNode | None:
    "A chapter with its outputs, or a page of prose; nothing where a chapter failed."
    env.note_dependency(env.doc2path(docname))
    path = Path(env.doc2path(docname))
    if path.suffix != ".ipynb":
        prose = {"cell_type": "markdown", "source": path.read_text(encoding="utf-8")}
        return from_dict({"cells": [prose]})
    cache = get_cache(env.mystnb_config.execution_cache_path or ".jupyter_cache")
    try:
        return cache.merge_match_into_notebook(bridged(env.app, docname))[1]
    except KeyError:
        return None


class Checks(SphinxRole):
    "How many checks of the book end with this verdict."

    def run(self) -> tuple[list[nodes.Node], list]:
        books = filter(None, (executed(self.env, name) for name in sorted(self.env.found_docs)))
        outputs = (x for book in books for cell in book.cells for x in cell.get("outputs", []))
        verdicts = [x.get("metadata", {}).get("po_book", {}).get("verdict") for x in outputs]
        return [nodes.Text(f"{verdicts.count(self.text):,}")], []


class Ledger(SphinxDirective):
    required_arguments = 1  # the document, as in `S1`
    option_spec = {"refuted": directives.flag}

    def known(self) -> dict[str, str]:
        with open(Path(__file__).with_name("verdicts.csv"), encoding="utf-8") as file:
            return dict(csv.reader(file))

    def run(self) -> list[nodes.Node]:
        known, found = self.known(), defaultdict(list)
        for docname in sorted(self.env.found_docs):
            if notebook := executed(self.env, docname):
                for item, finding in findings(docname, notebook, known):
                    found[item].append(finding)
        document = [x for x in known if x.startswith(f"{self.arguments[0]}.")]
        table = self.refuted if "refuted" in self.options else self.whole
        lines = table(document, known, found)
        parsed = nodes.container(classes=["po-ledger"])
        self.state.nested_parse(StringList(lines, self.env.docname), self.lineno, parsed)
        return [parsed]

    def link(self, finding: Finding) -> str:
        return f"[](/{finding.docname})" + (f": {finding.section}" if finding.section else "")

    def whole(self, document: list[str], known: dict, found: dict) -> list[str]:
        "Every item with every check of it."
        rows, checks = row("item", "as printed", "what the book found", "where"), 0
        for item in document:
            if item not in found:
                logger.warning("%s is named on no page", item, location=self.env.docname)
            start = item.partition(".")[2], PRINTED[known[item]]
            for finding in told(found[item]):
                checks += bool(finding.verdict)
                said = f"{finding.verdict}: {finding.claim} · {finding.evidence}"
                rows += row(*start, said if finding.verdict else "in words", self.link(finding))
                start = "", ""
        return [f"{len(document)} items, {checks} checks.", "", *TABLE, *rows, ":::"]

    def refuted(self, document: list[str], known: dict, found: dict) -> list[str]:
        "What is wrong as printed, with the number that says so."
        rows = []
        for item in document:
            for x in found[item]:
                if x.verdict == "refuted":
                    rows += row(item.partition(".")[2], x.claim, x.evidence, self.link(x))
        return [*TABLE, *row("item", "as printed", "the number", "where"), *rows, ":::"]


def setup(app) -> dict:
    app.add_directive("ledger", Ledger)
    app.add_role("checks", Checks())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
