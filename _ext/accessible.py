"A list of citations is a list of items; the role that docutils gives them is deprecated."

from sphinx.application import Sphinx


def mend_roles(app: Sphinx, pagename: str, templatename: str, context: dict, *_) -> None:
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", mend_roles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
