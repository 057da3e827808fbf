"""What Sphinx and docutils write, said in the way that a screen reader understands.

The citations are a list of items; the role that docutils gives them is deprecated. The lines
of a signature are no list of definitions, so they are plain lines.
"""

import re

from sphinx.application import Sphinx

PARAMETERS = re.compile(r'(<span class="sig-paren">\(</span>\s*)<dl>(.*?)</dl>', re.S)
LINES = {"<dd>": '<span class="po-parameter">', "</dd>": "</span>"}


def lines(found: re.Match) -> str:
    "The parameters of a signature, each on its line."
    return found[1] + re.sub("</?dd>", lambda tag: LINES[tag[0]], found[2])


def mend(app: Sphinx, pagename: str, templatename: str, context: dict, *_) -> None:
    if "body" in context:
        body = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
        context["body"] = PARAMETERS.sub(lines, body)


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
