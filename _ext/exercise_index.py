"""The index of exercises: every `{exercise}` of the book, with its kind and difficulty.

A title is a kind, a colon, a few words and one to three stars, as in
`Find the bug: the occupancy ★★`. The directive `{exercise-index}` lists all of them; one
without a kind or stars is a warning, which fails the build.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chapter_numbers import number_of
from docutils import nodes
from docutils.statemachine import StringList
from ledger import TABLE, row
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)

EXERCISE = re.compile(r"^::+\{exercise\}(.*)\n:label: (\S+)$", re.M)
TITLE = re.compile(r"([^:★]+)(?:: (.+))? (★{1,3})")
GRADED = re.compile(r"""\bgrade\(["'](\w+)["']""")


class Listed(NamedTuple):
    "What the index says of an exercise."

    label: str
    title: str
    graded: str  # the name that `grade` knows it by; empty if it knows none


def exercises(cells: list[dict]) -> Iterator[Listed]:
    "The exercises of a chapter, in order; the code below one says whether it is graded."
    held = None
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if held and not held.graded and (name := GRADED.search(source)):
                held = held._replace(graded=name[1])
            continue
        for title, label in EXERCISE.findall(source):
            if held:
                yield held
            held = Listed(label, title.strip(), "")
    if held:
        yield held


class ExerciseIndex(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        rows, kinds, graded = row("chapter", "exercise", "kind", "difficulty", "graded"), Counter(), 0
        for docname in sorted(self.env.found_docs):
            path = Path(self.env.doc2path(docname))
            if path.suffix != ".ipynb":
                continue
            self.env.note_dependency(str(path))
            link = f"{number_of(docname) or ''} [](/{docname})"
            for one in exercises(json.loads(path.read_text(encoding="utf-8"))["cells"]):
                if not (parts := TITLE.fullmatch(one.title)):
                    said = "%s has no kind and difficulty in its title: %r"
                    logger.warning(said, one.label, one.title, location=docname)
                    continue
                kind, topic, stars = parts.groups()
                name = f"`{one.graded}`" if one.graded else ""
                rows += row(link, f"{{ref}}`{topic or kind} <{one.label}>`", kind, stars, name)
                kinds[kind], graded, link = kinds[kind] + 1, graded + bool(name), ""
        listed = ", ".join(f"{count} *{kind}*" for kind, count in kinds.most_common())
        said = f"{kinds.total()} exercises: {listed}. {graded} are graded."
        parsed = nodes.container(classes=["po-exercises"])
        lines = [said, "", *TABLE, *rows, ":::"]
        self.state.nested_parse(StringList(lines, self.env.docname), self.lineno, parsed)
        return [parsed]


def setup(app) -> dict:
    app.add_directive("exercise-index", ExerciseIndex)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
