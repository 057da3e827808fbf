"""Cards of the parts of the book, from its table of contents.

`{parts}` holds a line a part, `Name: what it is about`. A card lists the chapters of the
part, and says how long it takes to read, from the prose and the code that a page shows.
"""

import json
import re
from pathlib import Path

import yaml
from cell_rules import folded
from chapter_numbers import number_of
from docutils import nodes
from docutils.statemachine import StringList
from nbdev_bridge import read_directives
from sphinx.util.docutils import SphinxDirective

WORDS, LINES = 200, 15  # a minute, of prose and of code
CARD = """::::{{grid-item-card}} {name}
{about}

{chapters}

:::{{card-footer}}
{shown}
:::
::::
"""


def minutes(notebook: Path) -> float:
    "Time to read a page with a word a third of a second, and a line of open code four."
    words = lines = 0
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).split())
            continue
        directives, source = read_directives(text)
        if not ({"hide", "echo:"} & directives.keys() or folded(directives, source)):
            lines += len(source.splitlines())
    return words / WORDS + lines / LINES


def length(total: float) -> str:
    "In hours, to a half."
    return f"about {max(1, round(total / 30)) / 2:g} h to read"


class PartsDirective(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        toc = yaml.safe_load(Path(self.config.external_toc_path).read_text(encoding="utf-8"))
        files = {part["caption"]: [x["file"] for x in part["chapters"]] for part in toc["parts"]}
        lines = [line.partition(": ") for line in self.content]
        if unknown := {name for name, *_ in lines} - files.keys():
            raise self.error(f"no such parts: {sorted(unknown)}, there are {list(files)}")
        cards = "\n".join(self.card(name, about, files[name]) for name, _, about in lines)
        text = f":::::{{grid}} 1 1 2 2\n:gutter: 2\n\n{cards}\n:::::"
        where = nodes.Element()
        self.state.nested_parse(StringList(text.splitlines(), "parts"), 0, where)
        return where.children

    def card(self, name: str, about: str, files: list[str]) -> str:
        paths = [Path(self.env.doc2path(file)) for file in files]
        chapters = "\n".join(f"- {number_of(path.stem)} [](<{path.name}>)" for path in paths)
        shown = length(sum(map(minutes, paths)))
        return CARD.format(name=name, about=about, chapters=chapters, shown=shown)


def setup(app) -> dict:
    app.add_directive("parts", PartsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
