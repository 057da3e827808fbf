"""Charts of Altair that compute in the reader's browser.

While the book is built, a chart comes out of its cell as a Vega-Lite document. Here that
becomes the numbers to move, the reading and the place of the chart; `demos.js` draws it
there with Vega, which stands in the same file and is loaded only by pages with a chart.
Without JavaScript there is a still picture.
"""

import json
from hashlib import sha256
from html import escape
from pathlib import Path

import vl_convert
from docutils import nodes
from myst_nb.core import render
from sphinx.application import Sphinx

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
<div class="po-demo-chart"></div>
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


def add_bundle(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    "Load the bundle where there is something to draw."
    if doctree is None or not any(doctree.findall(demo)):
        return
    path = Path(app.outdir, "_static", BUNDLE)
    if not path.exists() or app.config.site_inputs not in path.read_text(encoding="utf-8"):
        loader = Path(__file__).with_name("demos.js").read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a function of its own, so that no name of Vega's meets one of another script.
        text = f"// {app.config.site_inputs}\n(() => {{\n{vega(Path(app.outdir).parent)}\n{loader}}})();\n"
        path.write_text(text, encoding="utf-8")
    app.add_js_file(BUNDLE, loading_method="defer")


def setup(app: Sphinx) -> dict:
    app.add_node(demo, html=(visit_demo, None))
    # MyST-NB asks installed packages for such classes; this one comes with the book.
    render.load_mime_renders = lambda: [Demos]
    app.connect("html-page-context", add_bundle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
