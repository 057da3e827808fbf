"""Charts of Altair that compute in the reader's browser.

A chart comes out of a cell as a Vega-Lite document; or a page asks for one of the library's
by `{demo}`, so that a chapter shows what a later one defines. Here it becomes the numbers
to move, the reading and the place of the chart; `demos.js` draws it there with Vega, which
stands in the same file and is loaded only by pages with a chart. Without JavaScript there
is a still picture.
"""

import json
from hashlib import sha256
from html import escape
from importlib import import_module
from pathlib import Path

import vl_convert
from docutils import nodes
from myst_nb.core import render
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

MIME = "application/x-po-demo+json"
# A notebook with demos begins with this, while the book is built.
SHOW = f"""\
import altair
altair.renderers.register("book", lambda chart, **options: {{{MIME!r}: chart}})
altair.renderers.enable("book")"""

FOLDER = "demos"  # in _static
BUNDLE = f"{FOLDER}/vega.js"
HTML = """\
<div class="po-demo" role="group" aria-label="{description}">
<script type="application/json">{chart}</script>
<noscript><img src="{picture}" alt="{description}"></noscript>
<div class="po-demo-numbers"></div>
<p class="po-demo-reading" role="status"></p>
<div class="po-demo-chart" aria-hidden="true"></div>
</div>
"""


class demo(nodes.General, nodes.Element):
    "A chart; its attribute `chart` is the document."


class Demos(render.MimeRenderPlugin):
    "What MyST-NB makes of a chart."

    mime_priority_overrides = [("*", MIME, 1)]

    @staticmethod
    def handle_mime(renderer, data: render.MimeData, inline: bool) -> list[nodes.Element] | None:
        return [demo("", chart=data.content)] if data.mime_type == MIME else None


class DemoDirective(SphinxDirective):
    """A chart of the library, as `{demo} po_book.demos.clip_demo`, before its content.

    The content is prose: a notebook shows nothing else of it.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module, maker = self.arguments[0].rsplit(".", 1)
        chart = getattr(import_module(module), maker)()
        return [demo("", chart=chart.to_dict(), maker=self.arguments[0]), *self.parse_content_to_nodes()]


def visit_demo(self, node: demo) -> None:
    chart = node["chart"]
    # A text that holds `</script>` would end the element.
    text = json.dumps(chart, ensure_ascii=False).replace("<", "\\u003c")
    picture = f"_static/{FOLDER}/{sha256(text.encode()).hexdigest()[:16]}.svg"
    path = Path(self.builder.outdir, picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(vl_convert.vegalite_to_svg(chart), encoding="utf-8")
    description = escape(chart["description"])
    self.body.append(HTML.format(chart=text, picture=picture, description=description))
    raise nodes.SkipNode


def vega(folder: Path) -> str:
    "Vega and what draws charts with it; bundling takes seconds, so it is kept in `folder`."
    path = folder / f"vega-{vl_convert.__version__}.js"
    if not path.exists():
        path.write_text(vl_convert.javascript_bundle(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def note_demos(app: Sphinx, doctree: nodes.document) -> None:
    app.env.metadata[app.env.docname]["demos"] = any(doctree.findall(demo))


def has_demos(app: Sphinx, page: str) -> bool:
    return app.env.metadata[page].get("demos", False)


def write_bundle(app: Sphinx, env: BuildEnvironment) -> None:
    "Vega and `demos.js` in one file, before pages are written side by side."
    if app.builder.format != "html" or not any(has_demos(app, page) for page in env.found_docs):
        return
    path = Path(app.outdir, "_static", BUNDLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    loader = Path(__file__).with_name("demos.js").read_text(encoding="utf-8")
    # In a function of its own, so that no name of Vega's meets one of another script.
    text = f"(() => {{\n{vega(Path(app.outdir).parent)}\n{loader}}})();\n"
    path.write_text(text, encoding="utf-8")


def load_bundle(app: Sphinx, pagename: str, *_) -> None:
    "Load it where there is something to draw."
    if has_demos(app, pagename):
        app.add_js_file(BUNDLE, loading_method="defer")


def setup(app: Sphinx) -> dict:
    app.add_node(demo, html=(visit_demo, None))
    # MyST-NB asks installed packages for such classes; this one comes with the book.
    render.load_mime_renders = lambda: [Demos]
    app.add_directive("demo", DemoDirective)
    app.connect("doctree-read", note_demos)
    app.connect("env-updated", write_bundle)
    app.connect("html-page-context", load_bundle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
