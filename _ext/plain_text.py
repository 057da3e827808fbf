"""Every page as Markdown beside it, `llms.txt` with the list, `llms-full.txt` with all.

For readers that take text: prose, formulas as LaTeX with their numbers, code, and what it
printed. The list is as https://llmstxt.org describes it.
"""

import re
from pathlib import Path
from urllib.parse import urljoin

from bs4 import BeautifulSoup, Tag
from markdownify import MarkdownConverter
from sphinx import addnodes
from sphinx.application import Sphinx

# Buttons, words that unfold code, documents and stills of charts.
LEFT_OUT = "a.headerlink, summary .admonition-title, script, noscript, style, button"
HEAD = """# {title}

> {description}.

A book and a library, made from the same notebooks. [All of it in one text]({base}llms-full.txt)."""

LANGUAGES = dict.fromkeys(["none", "default", "myst-ansi"], "text") | {"ipython3": "python"}
# Empty lines, but not those of code.
EMPTY = re.compile(r"(?P<code>^ *```.*?^ *```$)|\n{3,}", re.M | re.S)


class Page(MarkdownConverter):
    "Markdown of an article, as MyST writes it."

    class Options(MarkdownConverter.DefaultOptions):
        heading_style = "ATX"
        bullets = "-"
        escape_misc = escape_asterisks = escape_underscores = False

    def convert_span(self, el: Tag, text: str, parent_tags: set) -> str:
        if "math" in el.get("class", []):
            return "$" + el.text.strip().removeprefix(r"\(").removesuffix(r"\)") + "$"
        return text

    def convert_div(self, el: Tag, text: str, parent_tags: set) -> str:
        if "math" not in el.get("class", []):
            return f"\n\n{text}\n\n"
        number = el.find(class_="eqno")
        said = f" {number.extract().text}" if number else ""
        formula = el.text.strip().removeprefix(r"\[").removesuffix(r"\]").strip()
        return f"\n\n$$\n{formula}\n$${said}\n\n"

    def convert_pre(self, el: Tag, text: str, parent_tags: set) -> str:
        "Code and what it printed, in a fence that names the language."
        boxes = [c for p in el.parents for c in p.get("class", []) if c.startswith("highlight-")]
        language = boxes[0].removeprefix("highlight-") if boxes else "text"
        language = LANGUAGES.get(language, language)
        return f"\n\n```{language}\n{el.text.rstrip()}\n```\n\n"


def markdown(body: str, address: str) -> str:
    "The article of the page at `address`, with links that lead from anywhere."
    article = BeautifulSoup(body, "html.parser")
    for element in article.select(LEFT_OUT):
        element.decompose()
    for element in article.select("[title]"):
        del element["title"]
    for name in "href", "src":
        for element in article.select(f"[{name}]"):
            element[name] = urljoin(address, element[name])
    text = re.sub(r"(?m)[ \t]+$", "", Page().convert_soup(article))
    return EMPTY.sub(lambda found: found["code"] or "\n\n", text).strip() + "\n"


def write_page(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    if doctree and app.builder.name == "html":
        text = markdown(context["body"], f"{app.config.html_baseurl}{pagename}.html")
        path = Path(app.outdir, f"{pagename}.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def entry(app: Sphinx, page: str, text: str) -> str:
    "A line of the list: title, address, and the first paragraph below the title."
    title, *paragraphs = re.split(r"\n\n+", text)
    said = " ".join(re.sub(r"(?m)^> ?", "", "".join(paragraphs[:1])).split())
    return f"- [{title.removeprefix('# ')}]({app.config.html_baseurl}{page}.md): {said}"


def parts(app: Sphinx) -> dict[str, list[str]]:
    "Pages in the order of the contents, by the name of their part."
    root = app.config.root_doc
    trees = app.env.get_doctree(root).findall(addnodes.toctree)
    return {"Start": [root]} | {tree["caption"] or "Chapters": tree["includefiles"] for tree in trees}


def write_lists(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.name != "html":
        return
    config, folder, texts = app.config, Path(app.outdir), []
    description = config.html_context["book_description"]
    lines = [HEAD.format(title=config.html_title, description=description, base=config.html_baseurl)]
    for part, pages in parts(app).items():
        texts += [(folder / f"{page}.md").read_text(encoding="utf-8") for page in pages]
        entries = [entry(app, *found) for found in zip(pages, texts[-len(pages) :])]
        lines += [f"## {part}", "\n".join(entries)]
    (folder / "llms.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (folder / "llms-full.txt").write_text("\n\n".join(texts), encoding="utf-8")


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", write_page)
    app.connect("build-finished", write_lists)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
