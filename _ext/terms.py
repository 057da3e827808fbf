"""The first use of a term in a chapter's prose leads to its definition in the glossary.

A term counts from the part on whose chapter its definition names: before, the word has its
everyday sense. Headings, code, links and outputs are passed over; a chapter is written
without a mark. `_static/previews.js` shows the definition beside the word.
"""

import re
from functools import cache
from pathlib import Path

from api import inside
from chapter_numbers import number_of
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode


GLOSSARY = "glossary"


def pattern(term: str) -> str:
    "A term in one number or the other, over the end of a line too."
    escaped = re.escape(term).replace(r"\ ", r"\s+")
    return re.sub("y$", "(?:y|ies)", escaped) + "s?"


@cache
def parts(path: str) -> dict[str, str]:
    "The part of the first chapter that the definition of each term names."
    found: dict[str, str] = {}
    terms: list[str] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if chapter := line.startswith("  ") and re.search(r"[Cc]hapters? (\d)", line):
            found |= dict.fromkeys(terms, chapter[1])
            terms = []
        elif line and not line.startswith(" "):
            terms.append(line)
    return found


class LinkTerms(SphinxPostTransform):
    default_priority = 30  # after names in backticks

    def run(self, **kwargs) -> None:
        objects = self.env.get_domain("std").objects.items()
        here = number_of(self.env.docname)
        if here is None or GLOSSARY not in self.env.found_docs:
            return
        first = parts(self.env.doc2path(GLOSSARY))
        terms = {name: place for (kind, name), place in objects
                 if kind == "term" and first[name] <= here[0]}
        longest = sorted(terms, key=len, reverse=True)
        groups = "|".join(f"(?P<t{i}>{pattern(term)})" for i, term in enumerate(longest))
        self.found = re.compile(rf"(?<![\w-])(?:{groups})(?![\w-])", re.IGNORECASE)
        self.left = {f"t{i}": terms[term] for i, term in enumerate(longest)}
        for paragraph in self.document.findall(nodes.paragraph):
            for text in list(paragraph.findall(nodes.Text)):
                if not inside(text, nodes.literal, nodes.math, nodes.reference, nodes.raw):
                    self.mark(text)

    def mark(self, text: nodes.Text) -> None:
        "Link what is met for the first time."
        parts, end, words = [], 0, text.astext()
        for found in self.found.finditer(words):
            if place := self.left.pop(found.lastgroup, None):
                link = make_refnode(self.app.builder, self.env.docname, *place, nodes.Text(found[0]))
                link["classes"].append("po-term")
                parts += [nodes.Text(words[end : found.start()]), link]
                end = found.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(words[end:])])


def setup(app: Sphinx) -> dict:
    app.add_post_transform(LinkTerms)
    app.add_js_file("previews.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
