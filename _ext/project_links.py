"Make every link to the project from settings.ini, where owner and name stand once."

import os
from configparser import ConfigParser, SectionProxy
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config


NOT_FOUND = """<h1>Page not found</h1>
<p>Chapters may have been renamed. <a href="/{0}/">The book starts here</a>,
and <a href="/{0}/search.html">the search</a> knows every page.</p>"""

# `make pdf` and plain_text.py put them beside the pages.
FORMATS = """The book <a href="{0}po_book.pdf">as a PDF</a>, and
<a href="{0}llms.txt">as text</a>"""
# Once there are releases, whose tags the workflows know; each has a folder of the site.
VERSIONS = """.<br>This is version {0}; see <a href="{1}">the newest</a>, {2}"""
RELEASED = """<a href="{0}{1}/">{1}</a>"""

SITEMAP = """<?xml version="1.0" encoding="utf-8"?>
<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">
{}
</urlset>
"""


# Where the reader notebooks are (colab_notebooks.py), on a branch that the workflow writes.
COLAB = "https://colab.research.google.com/github/{user}/{repo}/blob/{colab_branch}/"


def read_settings() -> SectionProxy:
    parser = ConfigParser(delimiters=["="])
    parser.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def footer(base: str, version: str, releases: list[str]) -> str:
    "Other forms of the book, and its other versions."
    listed = ", ".join(RELEASED.format(base, tag) for tag in releases)
    return FORMATS.format(base) + (VERSIONS.format(version, base, listed) if listed else "")


def set_links(app: Sphinx, config: Config) -> None:
    settings = read_settings()
    user, repo = settings["user"], settings["repo"]
    releases = os.environ.get("RELEASES", "").split()
    config.html_baseurl = f"https://{user}.github.io/{repo}/"
    config.ogp_site_url = config.html_baseurl
    config.ogp_site_name = settings["title"]
    config.notfound_urls_prefix = f"/{repo}/"
    config.notfound_context = {"title": "Page not found", "body": NOT_FOUND.format(repo)}
    config.release = config.version = settings["version"]
    config.copyright = settings["copyright"]
    config.html_context |= {"book_description": settings["description"]}
    config.html_theme_options |= {
        "repository_url": f"https://github.com/{user}/{repo}",
        "repository_branch": settings["branch"],
        "path_to_docs": settings["nbs_path"],
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
        "extra_footer": footer(config.html_baseurl, settings["version"], releases),
    }


def point_to_colab(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    "The theme would open the notebook that the page is written in."
    for group in context.get("header_buttons", []):
        if group.get("label") == "launch-buttons":
            (button,) = group["buttons"]
            button["url"] = f"{COLAB.format(**read_settings())}{pagename}.ipynb"


def write_sitemap(app: Sphinx, error: Exception | None) -> None:
    "The address of every page, also of those that this build did not write anew."
    if error or app.builder.format != "html":
        return
    pages = [f"{app.config.html_baseurl}{name}.html" for name in sorted(app.env.found_docs)]
    listed = "\n".join(f"<url><loc>{page}</loc></url>" for page in pages)
    Path(app.outdir, "sitemap.xml").write_text(SITEMAP.format(listed), encoding="utf-8")


def setup(app: Sphinx) -> dict:
    # Before the theme and sphinx-notfound-page look at the configuration.
    app.connect("config-inited", set_links, priority=1)
    # After the theme has made its buttons.
    app.connect("html-page-context", point_to_colab, priority=502)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
