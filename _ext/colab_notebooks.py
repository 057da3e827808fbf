"""The notebooks that readers open in Colab: `make colab` writes them.

Each is a page of the book with its outputs, as plain Markdown and every code cell, hidden
ones too. Its first cell installs the library where it is missing. Colab scrolls to cells
and to nothing else, so all that can be referred to begins a cell, or stands in one.
"""

import re
from pathlib import Path
from textwrap import indent

import nbformat.v4 as nbf
import vl_convert
from cell_pages import is_cell
from chapter_numbers import number_equations
from demo_pages import MIME, demo
from docutils import nodes
from jupyter_cache import get_cache
from nbdev_bridge import OWN_CELLS, REASONS
from nbformat import NotebookNode, write
from parallel_execution import bridged
from plain_markdown import PlainMarkdown
from project_links import COLAB, read_settings
from sphinx.application import Sphinx
from sphinx.builders import Builder
from sphinx.util import logging

logger = logging.getLogger(__name__)

# The extra that a chapter needs, by what its code names.
EXTRAS = {
    "agents": r"mpe2|pettingzoo",
    "demos": r"\baltair\b|po_book\.(lm_)?demos",
    "grade": r"po_book\.(grade|exercise|\w+_exercises)\b",
    "math": r"math_verify",
    "peft": r"(from|import) peft\b",
    "video": r"rgb_array|--video",
}
FIRST = """\
# Installs the library of the book where it is missing, as on Colab.
from importlib.util import find_spec

if find_spec("po_book") is None:
    %pip install -q "{requirement}"

import torch

print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
print("{needs}")"""
GUARD = "import torch\n\nif torch.cuda.is_available():\n"


def requirement(settings: dict, extras: list[str]) -> str:
    "What pip is asked for: a version that ends in `.dev0` is on no index yet."
    name = settings["lib_name"] + (f"[{','.join(extras)}]" if extras else "")
    if ".dev" not in settings["version"]:
        return f"{name}=={settings['version']}"
    home = f"https://github.com/{settings['user']}/{settings['repo']}"
    return f"{name} @ git+{home}@{settings['branch']}"


def needs(executed: NotebookNode, seconds: float, gpu: bool) -> str:
    "What a chapter took when the book was made, and whether it asks for a GPU."
    memory = re.findall(r"HWM.*?(\d+) kB", str(executed.cells[-1].outputs))
    took = f"{seconds:.0f} s" + (f" and {int(memory[0]) / 2**20:.1f} GiB" if memory else "")
    last = "Some of its cells need a GPU." if gpu else "It needs no GPU."
    return f"On two CPU cores this chapter took {took}. {last}"


def shown(output: NotebookNode) -> NotebookNode:
    "An output with a picture in place of a chart that only the site draws."
    if "execution_count" in output:
        output.execution_count = None
    if "data" in output:
        output.metadata = {}
        if chart := output.data.pop(MIME, None):
            output.data["image/svg+xml"] = vl_convert.vegalite_to_svg(chart)
    return output


class ReaderNotebook:
    "The cells of one page, and in which of them each of its ids is."

    def __init__(self, executed: NotebookNode, writer: PlainMarkdown):
        self.cells: list[NotebookNode] = []
        self.home: dict[str, str] = {}
        self.writer = writer
        self.left = {
            index: cell
            for index, cell in enumerate(executed.cells)
            if cell.cell_type == "code" and cell.id not in OWN_CELLS
        }
        self.gpu = False

    def add(self, node: nodes.Node) -> None:
        "One block of the page, with all that it holds."
        if isinstance(node, nodes.section | nodes.document):
            self.writer.level += 1
            for child in node.children:
                self.add(child)
            self.writer.level -= 1
        elif is_cell(node):
            self.add_code(node)
        elif isinstance(node, demo):
            self.add_demo(node)
        else:
            self.add_prose(node)

    def add_cell(self, cell: NotebookNode, name: str) -> None:
        cell.id = cell.metadata["id"] = name[:64]
        self.cells.append(cell)

    def add_text(self, text: str, names: list[str]) -> None:
        "A text that can be referred to begins a cell; any other joins the text before it."
        if names or not self.cells or self.cells[-1].cell_type == "code":
            self.add_cell(nbf.new_markdown_cell(text), [*names, f"text-{len(self.cells)}"][0])
        else:
            self.cells[-1].source += f"\n\n{text}"
        self.home |= dict.fromkeys(names, self.cells[-1].id)

    def add_prose(self, node: nodes.Element) -> None:
        cells = list(node.findall(is_cell))
        for cell in cells:
            cell.parent.remove(cell)
        named = [node.parent] if isinstance(node, nodes.title) else node.findall(nodes.Element)
        names = [name for part in named for name in part["ids"]]
        if text := self.writer.write(node):
            self.add_text(text, [name for name in names if not re.fullmatch(r"id\d+", name)])
        for cell in cells:
            self.add_code(cell, folded=node[0].astext())

    def add_code(self, node: nodes.container, folded: str = "") -> None:
        "The code cell of a page, after those before it that the page does not show."
        for index in [index for index in self.left if index < node["cell_index"]]:
            self.add_run(self.left.pop(index))
        cell = self.left.pop(node["cell_index"])
        if "not_run" in node:
            self.add_not_run(cell, node["not_run"])
        self.add_run(cell)
        if folded:
            self.fold(folded)
        for figure in node.findall(nodes.figure):
            self.add_text(self.writer.write(figure.next_node(nodes.caption)), figure["ids"])

    def add_run(self, cell: NotebookNode) -> None:
        # A failing cell stops the build, so what stands in stderr are progress bars.
        outputs = [shown(x) for x in cell.outputs if x.get("name") != "stderr"]
        self.add_cell(nbf.new_code_cell(cell.source, outputs=outputs), cell.id)

    def add_not_run(self, cell: NotebookNode, why: str) -> None:
        text = f"*The next cell was not run for the book: {why}.*"
        if REASONS["cuda"] in why:
            self.gpu = True
            cell.source = GUARD + indent(cell.source, "    ")
            text = "*The next cell needs a GPU. Without one it does nothing.*"
        self.add_text(text, [])

    def fold(self, title: str) -> None:
        "Fold the last cell, as Colab and Jupyter do it."
        self.cells[-1].source = f"# @title {title}\n{self.cells[-1].source}"
        hidden = {"source_hidden": True, "outputs_hidden": True}
        self.cells[-1].metadata |= {"cellView": "form", "collapsed": True, "jupyter": hidden}

    def add_demo(self, node: demo) -> None:
        module, maker = node["maker"].rsplit(".", 1)
        outputs = [nbf.new_output("display_data", {MIME: node["chart"]})]
        code = f"from {module} import {maker}\n\n{maker}()"
        self.add_run(nbf.new_code_cell(code, id=f"demo-{len(self.cells)}", outputs=outputs))

    def finish(self, first: str, name: str) -> NotebookNode:
        "The notebook, with the rest of its code and the cell that installs."
        for cell in self.left.values():
            self.add_run(cell)
        start = nbf.new_code_cell(first, id="setup", metadata={"id": "setup"})
        self.cells.insert(1, start)
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        colab = {"name": name, "provenance": [], "toc_visible": True}
        metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "colab": colab}
        if self.gpu:
            metadata["accelerator"], colab["gpuType"] = "GPU", "T4"
        return nbf.new_notebook(cells=self.cells, metadata=metadata)


class ColabBuilder(Builder):
    name = format = "colab"
    epilog = "The reader notebooks are in %(outdir)s."
    allow_parallel = False

    def init(self) -> None:
        self.settings = read_settings()
        self.notebooks: dict[str, NotebookNode] = {}
        self.homes: dict[str, dict[str, str]] = {}

    def prepare_writing(self, docnames: set[str]) -> None:
        self.cache = get_cache(self.env.mystnb_config.execution_cache_path)

    def is_notebook(self, docname: str) -> bool:
        return self.env.doc2path(docname).endswith(".ipynb")

    def get_outdated_docs(self) -> set[str]:
        return self.env.found_docs

    def get_target_uri(self, docname: str, typ: str | None = None) -> str:
        "The notebook of a chapter, in Colab; the page of the site, where it has none."
        if self.is_notebook(docname):
            return f"{COLAB.format(**self.settings)}{docname}.ipynb"
        return f"{self.config.html_baseurl}{docname}.html"

    def get_relative_uri(self, from_: str, to: str, typ: str | None = None) -> str:
        return self.get_target_uri(to)

    def picture(self, path: str) -> str:
        return f"{self.config.html_baseurl}_images/{Path(path).name}"

    def write_doc(self, docname: str, doctree: nodes.document) -> None:
        if not self.is_notebook(docname):
            return
        key, executed = self.cache.merge_match_into_notebook(bridged(self.app, docname))
        seconds = self.cache.get_cache_record(key).data["execution_seconds"]
        numbers = self.env.toc_fignumbers.get(docname, {})
        notebook = ReaderNotebook(executed, PlainMarkdown(numbers, self.picture))
        notebook.writer.level -= 1
        notebook.add(doctree)
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        extras = [extra for extra, named in EXTRAS.items() if re.search(named, code)]
        asked, said = requirement(self.settings, extras), needs(executed, seconds, notebook.gpu)
        first = FIRST.format(requirement=asked, needs=said)
        self.homes[docname] = notebook.home
        self.notebooks[docname] = notebook.finish(first, f"{docname}.ipynb")

    def scroll_to(self, docname: str, text: str) -> str:
        "Links to an id lead to the cell that holds it."
        start = re.escape(COLAB.format(**self.settings))

        def link(found: re.Match) -> str:
            page = found["page"] or docname
            cell = self.homes[page].get(found["id"])
            if not cell:
                logger.warning("no cell of %s holds %s", page, found["id"], location=docname)
            start = "" if page == docname else f"{self.get_target_uri(page)}"
            return f"]({start}#scrollTo={cell})"

        return re.sub(rf"\]\((?:{start}(?P<page>\w+)\.ipynb)?#(?P<id>[^)]+)\)", link, text)

    def finish(self) -> None:
        for docname, notebook in self.notebooks.items():
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = self.scroll_to(docname, cell.source)
                else:
                    cell.source = number_equations(self.env, cell.source)
            write(notebook, Path(self.outdir, f"{docname}.ipynb"))


def setup(app: Sphinx) -> dict:
    app.add_builder(ColabBuilder)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
