"""The built site as one PDF, `_build/po_book.pdf`: `make pdf`, after `make book`.

Chromium prints page after page, each from the number at which it begins. pypdf joins them
and gives them an outline; a link to another chapter becomes a link within the file.
"""

import sys
from configparser import ConfigParser
from html import escape
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import browsers
import yaml
from playwright.sync_api import Browser, Page, sync_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, FloatObject, NameObject, NullObject, TextStringObject

ROOT = Path(__file__).parent.parent

# The browser keeps the places of those ids that a link of the same page leads to.
KEEP_PLACES = """() => {
  const article = document.querySelector("article"), links = document.createElement("nav");
  links.hidden = true;
  for (const { id } of article.querySelectorAll("[id]"))
    links.append(Object.assign(document.createElement("a"), { href: "#" + id }));
  article.append(links);
  const words = title => [...title.childNodes]
    .filter(node => !node.matches?.(".headerlink")).map(node => node.textContent).join("");
  return {
    title: words(article.querySelector("h1")),
    sections: [...article.querySelectorAll("section > h2")]
      .map(title => [title.parentElement.id, words(title)]),
  };
}"""

DEMOS_DRAWN = """() =>
  [...document.querySelectorAll(".po-demo")].every(({ dataset }) => "ready" in dataset)"""

FRONT = """<!doctype html><html lang="en"><meta charset="utf-8"><style>
@page {{ size: A4; margin: 18mm 16mm 20mm; }}
@page {{ @bottom-center {{ content: counter(page, lower-roman); }} }}
@page :first {{ @bottom-center {{ content: none; }} }}
html {{ font: 13px/1.5 sans-serif; }}
h1 {{ margin: 70mm 0 8mm; font-size: 40px; }}
h2 {{ break-before: page; }}
h3 {{ margin: 1.2em 0 0.2em; break-after: avoid; }}
a {{ display: flex; justify-content: space-between; color: inherit; text-decoration: none; }}
</style>
<h1>{title}</h1><p>{description}.</p>
<p>Version {version}. On the site, {address}, code can be unfolded and demos be moved.</p>
<h2>Contents</h2>
{contents}
</html>"""


class Chapter(NamedTuple):
    "A printed page of the site."

    name: str
    title: str
    sections: list[list[str]]  # id and title
    pdf: PdfReader


class Part(NamedTuple):
    caption: str
    chapters: list[Chapter]


def to_pdf(tab: Page) -> PdfReader:
    return PdfReader(BytesIO(tab.pdf(prefer_css_page_size=True, print_background=True)))


def print_chapter(tab: Page, path: Path, before: int) -> Chapter:
    "A page of the site on paper, behind `before` pages."
    tab.goto(path.as_uri(), wait_until="networkidle")
    tab.add_style_tag(content=f"html {{ counter-reset: page {before}; }}")
    found = tab.evaluate(KEEP_PLACES)
    tab.evaluate("typesetPage()")
    tab.wait_for_function(DEMOS_DRAWN)
    return Chapter(path.stem, found["title"], found["sections"], to_pdf(tab))


def print_parts(tab: Page, site: Path, toc: dict) -> list[Part]:
    pages = {"": [toc["root"]]}
    pages |= {part["caption"]: [c["file"] for c in part["chapters"]] for part in toc["parts"]}
    parts, before = [], 0
    for caption, names in pages.items():
        parts.append(Part(caption, []))
        for name in names:
            parts[-1].chapters.append(print_chapter(tab, site / f"{name}.html", before))
            before += len(parts[-1].chapters[-1].pdf.pages)
            print(f"{name}: {before} pages", flush=True)
    return parts


def print_front(tab: Page, site: Path, parts: list[Part], settings: dict) -> PdfReader:
    "Title and contents, whose links lead to the pages of the site as those of a chapter do."
    lines, number = [], 1
    for part in parts:
        lines.append(f"<h3>{escape(part.caption)}</h3>")
        for chapter in part.chapters:
            address = (site / f"{chapter.name}.html").as_uri()
            title = escape(chapter.title)
            lines.append(f'<a href="{address}"><span>{title}</span><span>{number}</span></a>')
            number += len(chapter.pdf.pages)
    tab.goto("about:blank")
    tab.set_content(FRONT.format(contents="\n".join(lines), **settings))
    return to_pdf(tab)


def places(pdf: PdfReader) -> dict[str, tuple[int, float]]:
    "Page and height of every id that is kept, and of the top."
    found = {name.lstrip("/"): at for name, at in pdf.named_destinations.items()}
    places = {name: (pdf.get_destination_page_number(at), at.top) for name, at in found.items()}
    return {"": (0, float(pdf.pages[0].mediabox.top))} | places


class Book:
    "What has been printed, joined."

    def __init__(self, site: Path, address: str):
        self.site, self.address = site.as_uri(), address
        self.writer, self.spans, self.places = PdfWriter(), {}, {}

    def add(self, name: str, pdf: PdfReader) -> None:
        start = len(self.writer.pages)
        self.spans[name], self.places[name] = range(start, start + len(pdf.pages)), places(pdf)
        for page in pdf.pages:
            self.writer.add_page(page)

    def mark(self, title: str, name: str, place: str = "", above=None):
        "A line of the outline, below `above`; only parts begin unfolded."
        page = self.spans[name][self.places[name].get(place, (0, 0))[0]]
        return self.writer.add_outline_item(
            title=title, page_number=page, parent=above, is_open=above is None
        )

    def outline(self, part: Part) -> None:
        above = self.mark(part.caption, part.chapters[0].name) if part.caption else None
        for chapter in part.chapters:
            item = self.mark(chapter.title, chapter.name, above=above)
            for place, title in chapter.sections:
                self.mark(title, chapter.name, place, item)

    def mend_links(self) -> None:
        for name, span in self.spans.items():
            for page in self.writer.pages[span.start : span.stop]:
                for annotation in page.get("/Annots", ()):
                    self.mend(annotation.get_object(), name)

    def mend(self, link: dict, name: str) -> None:
        "A link within the book leads to its page here, another one into the site."
        place = str(link.get("/Dest", "")).lstrip("/")
        if "/A" in link:
            if not (uri := str(link["/A"]["/URI"])).startswith(self.site):
                return
            parts = urlsplit(uri)
            name, place = Path(unquote(parts.path)).stem, unquote(parts.fragment)
            if name not in self.places:
                inside = TextStringObject(uri.replace(self.site, self.address, 1))
                link["/A"][NameObject("/URI")] = inside
                return
            del link["/A"]
        page, top = self.places[name].get(place, self.places[name][""])
        there = self.writer.pages[self.spans[name][page]].indirect_reference
        where = [there, NameObject("/XYZ"), FloatObject(0), FloatObject(top), NullObject()]
        link[NameObject("/Dest")] = ArrayObject(where)

    def save(self, path: Path, settings: dict) -> None:
        self.writer.add_metadata({"/Title": settings["title"], "/Author": settings["author"]})
        self.writer.compress_identical_objects()
        self.writer.write(path)


def make_pdf(browser: Browser, site: Path, toc: dict, path: Path) -> None:
    "Print those pages of `site` that `toc` lists."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = dict(parser["DEFAULT"])
    settings["address"] = f"https://{settings['user']}.github.io/{settings['repo']}"
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(browsers.PATIENCE)
    parts = print_parts(tab, site, toc)
    front = print_front(tab, site, parts, settings)
    tab.close()
    book = Book(site, settings["address"])
    book.add("", front)
    for chapter in [chapter for part in parts for chapter in part.chapters]:
        book.add(chapter.name, chapter.pdf)
    for part in parts:
        book.outline(part)
    book.mend_links()
    book.writer.set_page_label(0, len(front.pages) - 1, style="/r")
    book.writer.set_page_label(len(front.pages), len(book.writer.pages) - 1, style="/D", start=1)
    book.save(path, settings)


if __name__ == "__main__":
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browsers.find(), args=browsers.FLAGS)
        make_pdf(browser, ROOT / "_build/html", toc, Path(sys.argv[1]))
