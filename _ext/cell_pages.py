"""How a page shows the code cells that `nbdev_bridge` announces by `{cell}` directives.

After a chapter has run: code is folded under words that say what it is, a picture
becomes a numbered figure with caption and alternative text, a cell that was not run says
so, and the cells that follow a solution move into it.
"""

import json

from html import escape

from docutils import nodes
from docutils.statemachine import StringList
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxTranslator
from sphinx_exercise.nodes import solution_node

logger = logging.getLogger(__name__)


class cell_page(nodes.General, nodes.Element):
    "How the next cell is shown; `ArrangeCells` takes it out again."


class CellDirective(SphinxDirective):
    "One JSON object: the number and first line of a cell, and what its page shows."

    has_content = True

    def run(self) -> list[nodes.Node]:
        page = cell_page("", **json.loads("\n".join(self.content)))
        if "caption" in page and "skipped" not in page:
            figure = nodes.figure(classes=["align-default"])
            parsed = nodes.container()
            self.state.nested_parse(StringList([page["caption"]], ""), 0, parsed)
            figure += nodes.caption("", "", *parsed[0].children)
            self.set_source_info(figure)
            if "label" in page:
                self.options["name"] = page["label"]
                self.add_name(figure)
            page += figure
        return [page]


def is_cell(node: nodes.Node | None) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code"


def next_sibling(node: nodes.Element) -> nodes.Node | None:
    index = node.parent.index(node) + 1
    return node.parent[index] if index < len(node.parent) else None


def fold(cell: nodes.container, what: str) -> None:
    "Have MyST-NB fold the code of a cell under words of its own."
    if cell.children and cell[0].get("nb_element") == "cell_code_source":
        cell["hide_mode"] = "input"
        cell["prompt_show"], cell["prompt_hide"] = f"show {what}", f"hide {what}"


def pictures(cell: nodes.container) -> list[nodes.container]:
    "The outputs of a cell that are pictures, each in all its formats."

    def is_picture(node: nodes.Node) -> bool:
        bundle = isinstance(node, nodes.container) and node.get("nb_element") == "mime_bundle"
        return bundle and any(kind["mime_type"].startswith("image/") for kind in node)

    return list(cell.findall(is_picture))


def make_figure(cell: nodes.container, figure: nodes.figure) -> None:
    "Move the pictures of a cell into `figure`, above its caption."
    found = pictures(cell)
    found[0].parent.insert(found[0].parent.index(found[0]), figure)
    for picture in reversed(found):
        picture.parent.remove(picture)
        figure.insert(0, picture)


def complaint(cell: nodes.container, page: cell_page) -> str | None:
    "What the figure of a cell lacks."
    found = pictures(cell)
    if found and not page.get("alt"):
        return "its picture has no alternative text: add a line `#| fig-alt:`"
    if found and "label" in page and "caption" not in page:
        return "its figure has a label and no caption: add a line `#| fig-cap:`"
    if not found and "caption" in page and "skipped" not in page:
        return "it has a caption and draws no picture"
    return None


def arrange(cell: nodes.container, page: cell_page) -> None:
    if "defines" in page:
        # The API reference leads here.
        cell["names"].append(f"cell-{page['defines']}")
        cell.document.note_explicit_target(cell, cell)
    if "fold" in page:
        fold(cell, page["fold"])
    if "skipped" in page:
        why = page["skipped"]
        text = f"Not run here: {why}." if why else "Not run here."
        cell += nodes.paragraph("", text, classes=["po-not-run"])
        cell["not_run"] = why
    for image in cell.findall(nodes.image):
        image["alt"] = page.get("alt", image.get("alt", ""))


def is_comment(node: nodes.Node | None) -> bool:
    html = isinstance(node, nodes.raw) and node.astext().startswith("<!--")
    return html or isinstance(node, nodes.comment)


def fill_solution(solution: solution_node) -> None:
    "Move the cells that directly follow a solution to its end, with their code open."
    while True:
        ahead, passed = next_sibling(solution), []
        while is_comment(ahead):
            passed.append(ahead)
            ahead = next_sibling(ahead)
        if not is_cell(ahead):
            return
        ahead.attributes.pop("hide_mode", None)
        for node in [*passed, ahead]:
            node.parent.remove(node)
            solution[-1].append(node)


class ArrangeCells(SphinxTransform):
    default_priority = 200

    def apply(self, **kwargs) -> None:
        not_run = []
        for page in list(self.document.findall(cell_page)):
            cell = next_sibling(page)
            page.parent.remove(page)
            if not is_cell(cell):
                continue
            arrange(cell, page)
            if page.children and pictures(cell):
                make_figure(cell, page[0])
            if self.config.figures_need_texts and (what := complaint(cell, page)):
                where = f"cell {page['cell']} (`{page['line']}`)"
                logger.warning("%s: %s", where, what, location=self.env.docname)
            if "skipped" in page:
                not_run.append(page["skipped"])
        for image in self.document.findall(nodes.image):
            # Pictures of cells have been looked at above.
            if "mime_type" not in image.parent and not image.get("alt", "").strip():
                logger.warning("a picture has no alternative text", location=image)
        for solution in list(self.document.findall(solution_node)):
            fill_solution(solution)
        self.env.metadata[self.env.docname]["not_run"] = not_run
        if self.env.docname == self.config.root_doc:
            # On a narrow screen the rows of these tables are blocks (po_book.css).
            for table in self.document.findall(nodes.table):
                table["classes"].append("po-stack")


def count_not_run(app: Sphinx, error: Exception | None) -> None:
    "Say in one line, in a quiet build too, which pages show cells that were not run."
    pages = {name: data["not_run"] for name, data in app.env.metadata.items() if data.get("not_run")}
    listed = ", ".join(f"{name} ({len(pages[name])})" for name in sorted(pages))
    if error is None and pages:
        print(f"Cells that were not run: {sum(map(len, pages.values()))}, on {listed}.")


def visit_fold(self: SphinxTranslator, node: HideCodeCellNode) -> None:
    "As MyST-NB does it, but the words that are seen are those that are read out."
    self.body.append(f'<details class="admonition hide {" ".join(node["classes"])}"><summary>')
    for state, prompt in ("collapsed", "prompt_show"), ("expanded", "prompt_hide"):
        self.body.append(f'<p class="{state} admonition-title">{escape(node[prompt])}</p>')
    self.body.append("</summary>\n")


def depart_fold(self: SphinxTranslator, node: HideCodeCellNode) -> None:
    self.body.append("</details>\n")


def setup(app: Sphinx) -> dict:
    app.add_config_value("figures_need_texts", True, "env")
    app.add_node(cell_page)
    app.add_node(HideCodeCellNode, override=True, html=(visit_fold, depart_fold))
    app.add_directive("cell", CellDirective)
    app.add_transform(ArrangeCells)
    app.connect("build-finished", count_not_run)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
