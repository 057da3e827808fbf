"What a reader gets: every page, nothing leaked, nothing broken, nobody else asked."

import ast
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import part_cards
import pytest
import yaml
from bs4 import BeautifulSoup
from cell_rules import CHECKS
from conftest import ROOT, toc_pages

# The last two are made by sphinx-notfound-page and by Sphinx.
PAGES = [*toc_pages(), "404", "search"]
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src"}


class Page(HTMLParser):
    "Ids, links and loaded resources of a page, and its text without scripts."

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loaded, self.text = set(), [], [], []
        self._silent = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._silent += tag in ("script", "style")
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if attrs.get(LOADING.get(tag, "")):
            self.loaded.append(attrs[LOADING[tag]])
        if tag == "link" and attrs.get("rel") not in ("canonical", "search", "next", "prev"):
            self.loaded.append(attrs.get("href", ""))

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._silent:
            self.text.append(data)


@cache
def page(path: Path) -> Page:
    return Page(path)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_exists(site, name):
    assert (site / f"{name}.html").stat().st_size > 2000


@pytest.mark.parametrize("name", PAGES)
def test_no_directive_leaks(site, name):
    text = "".join(page(site / f"{name}.html").text)
    assert not re.search(r"#\s*\|\s*(export|hide|default_exp|echo|code-fold|slow|cuda)", text)
    assert not re.search(r"^:::|\{(eq|ref|cite:?\w*|prf:\w+)\}`", text.replace("{eq}`eq-", ""), re.M)
    assert "google.colab" not in text


@pytest.mark.parametrize("name", [p for p in toc_pages() if p != "sources"])
def test_no_id_of_a_source_shows(site, name):
    "Ids stand in `source=` and in comments; the page of the sources explains them."
    prose = "".join(page(site / f"{name}.html").text)
    # Code names them in strings, which are arguments of a check.
    shown = re.sub(r"[\"“](S\d\.|system )[^\"”]*[\"”]", "", prose)
    assert not re.findall(r"\bS\d\.\d+\w?|\bsystem \d+", shown)


@pytest.mark.parametrize("name", toc_pages())
def test_code_is_coloured(site, name):
    assert '<pre class="literal-block">' not in (site / f"{name}.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_loaded_from_elsewhere(site, name):
    for url in page(site / f"{name}.html").loaded:
        assert not urlsplit(url).netloc, url


CHARTS = {
    "14_advantage": 1, "21_natural_gradient": 1, "22_ppo": 2, "44_kl": 1, "46_grpo": 1,
    "47_dapo": 1, "52_charts": 2, "52a_demos": 4, "52b_lm_demos": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_vega_is_loaded_where_a_chart_computes_and_nowhere_else(site, name):
    html = (site / f"{name}.html").read_text(encoding="utf-8")
    charts = html.count('<div class="po-demo"')
    assert charts == CHARTS.get(name, 0)
    assert ("demos/vega.js" in html) == (charts > 0)
    stills = re.findall(r'<noscript><img src="(_static/demos/\w+.svg)" alt="[^"]{10,}"', html)
    assert len(stills) == charts and all((site / still).exists() for still in stills)


@pytest.mark.parametrize("name", [p for p in PAGES if p != "404"])
def test_internal_links_lead_somewhere(site, name):
    path = site / f"{name}.html"
    for link in page(path).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)) if parts.path else path
        assert target.exists(), link
        if parts.fragment and target.suffix == ".html":
            assert unquote(parts.fragment) in page(target.resolve()).ids, link


def test_the_landing_page_has_a_card_of_each_part_with_its_chapters(site):
    html = BeautifulSoup((site / "index.html").read_text(encoding="utf-8"), "html.parser")
    cards = {x.select_one(".sd-card-title").text.strip(): x for x in html.select(".sd-card:has(.sd-card-footer)")}
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = {part["caption"]: part["chapters"] for part in toc["parts"][:-1]}
    assert cards.keys() == parts.keys()
    for name, chapters in parts.items():
        links = [a["href"] for a in cards[name].select("li a")]
        assert links == [f"{x['file']}.html" for x in chapters]
        assert re.fullmatch(r"about \d+(\.5)? h to read", cards[name].select_one(".sd-card-footer").text.strip())


def test_the_time_to_read_is_that_of_prose_and_open_code(tmp_path):
    hidden, folded = "#| hide\nx = 1\n", "import os\n"
    cells = [("markdown", "word " * 400 + "<!-- not read -->"), ("code", hidden), ("code", folded),
             ("code", "#| export\ndef f(x):\n" + "    x += 1\n" * 29)]  # fmt: skip
    cells = [{"cell_type": kind, "source": text} for kind, text in cells]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    assert part_cards.minutes(tmp_path / "x.ipynb") == 2 + 2
    assert part_cards.length(4) == "about 0.5 h to read" and "1.5 h" in part_cards.length(100)


@pytest.mark.parametrize("name", [p for p in toc_pages() if p[0] in "0123456789i"])
def test_a_chapter_can_be_opened_in_colab_and_edited(site, name):
    links = page(site / f"{name}.html").links
    assert any("colab.research.google.com/github/" in link for link in links)
    assert any(f"/edit/main/nbs/{name}.ipynb" in link for link in links)


@pytest.mark.parametrize("name", toc_pages())
def test_every_check_has_left_its_badge(site, name):
    "As many badges as checks stand at the top level of a cell, or more."
    notebook = ROOT / "nbs" / f"{name}.ipynb"
    if not notebook.exists():
        return
    checks = 0
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            calls = [n.value for n in ast.parse(source).body if isinstance(n, ast.Expr)]
            names = [getattr(getattr(c, "func", None), "id", None) for c in calls]
            checks += sum(map(names.count, CHECKS))
    html = (site / f"{name}.html").read_text(encoding="utf-8")
    assert html.count('class="po-verdict') >= checks


def test_figures_are_vector_graphics(site):
    "All but the frames of a video, which two chapters record."
    images = {p.name for p in (site / "_images").iterdir() if p.suffix in (".png", ".svg")}
    pages = [(site / f"{p}.html").read_text(encoding="utf-8") for p in ("60a_runs", "61_command_line")]
    frames = {p for p in images if any(p in page for page in pages)}
    assert len(images) > 10 and all(p.endswith(".svg") for p in images - frames)


@pytest.mark.parametrize("name", [p for p in toc_pages() if p[:2].isdigit()])
def test_a_chapter_shows_its_number(site, name):
    number = name.split("_")[0]
    html = (site / f"{name}.html").read_text(encoding="utf-8")
    assert f'<h1><span class="section-number">{number}' in html
    for kind in "eqno", "caption-number":
        shown = re.findall(rf'class="{kind}">[^<]*?([\w.]*\d)\)?\s*<', html)
        assert all(re.fullmatch(rf"{number}\.\d+", one) for one in shown), shown


@pytest.mark.parametrize("name", toc_pages())
def test_a_chapter_that_is_named_is_linked(site, name):
    "Outside code; a chapter of another book is cited with its author or year."
    article = BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    numbers = {page[:2] for page in toc_pages() if page[:2].isdigit()} - {name[:2]}
    plain = article.find("article")
    for part in plain.find_all(["a", "pre", "code", "h1", "h2", "h3"]):
        part.extract()
    mentions = re.findall(r"(.{20})\bchapter (\d\d)\b(?!\.\d)", plain.text, re.I)
    assert not [m for m in mentions if m[1] in numbers and not re.search(r"\d{4}", m[0])]


@pytest.mark.parametrize("name", toc_pages())
def test_nothing_of_a_solution_stands_outside_it(site, name):
    page = BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    for solution in page.find_all("div", class_="solution"):
        after = solution.find_next_sibling()
        assert after is None or "cell" not in after.get("class", [])


@pytest.mark.parametrize("name", toc_pages())
def test_a_link_to_a_page_shows_what_it_is(site, name):
    "Its title, a description in words, and a picture that is there."
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    head = BeautifulSoup(text, "html.parser").head
    said = {tag.get("property") or tag.get("name"): tag["content"] for tag in head.select("meta[content]")}
    assert said["og:title"] and len(said["description"]) > 40
    assert not re.search(r"\{(eq|ref|cite:?\w*|prf:\w+)\}|:::", said["description"])
    base, url = said["og:url"].split(f"{name}.html")[0], said["og:image"]
    assert url.startswith(base) and (site / url.removeprefix(base)).exists()


def test_the_sitemap_has_every_page(site):
    listed = re.findall(r"<loc>[^<]*/([^/<]+)\.html</loc>", (site / "sitemap.xml").read_text("utf-8"))
    assert {*toc_pages()} <= {*listed}
