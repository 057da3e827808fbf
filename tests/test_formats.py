"The site as it travels: its weight, for other senses, on paper, as a PDF and as plain text."

import gzip
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from book_pdf import make_pdf
from browsers import PATIENCE
from bs4 import BeautifulSoup
from conftest import ROOT, toc_pages
from fontTools.ttLib import TTFont
from nbformat import read
from playwright.sync_api import expect
from pypdf import PdfReader


@pytest.mark.parametrize("name", ["index", "22_ppo", "46_grpo", "ledger", "benchmarks"])
def test_a_first_visit_weighs_less_than_a_megabyte(browser, url, name):
    "Gzipped, all that a browser asks for; Vega comes with demos only."
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    tab, answers = context.new_page(), []
    tab.on("response", lambda answer: answers.append(answer))
    tab.goto(f"{url}/{name}.html", wait_until="networkidle")
    loaded = {a.url: a.body() for a in answers if a.url.startswith(url)}
    context.close()
    assert len(loaded) > 10
    weights = {at: len(gzip.compress(x)) for at, x in loaded.items() if "vega.js" not in at}
    assert sum(weights.values()) < 1e6, sorted(weights.items(), key=lambda x: -x[1])[:5]


# The signs of all icons on a page, as its styles name them.
SIGNS = """() => [...document.querySelectorAll(".fas, .fa-solid, .fab, .fa-brands")].map(icon => {
  const { content, fontFamily } = getComputedStyle(icon, "::before");
  return [fontFamily, content.charCodeAt(1)];
})"""


@pytest.mark.parametrize("name", ["index", "46_grpo", "search"])
def test_every_icon_is_in_the_small_fonts(opened, site, name):
    tab, _, _ = opened(name, "light")
    fonts = [TTFont(site / f"_static/icons/{kind}.woff") for kind in ("solid", "brands")]
    known = set().union(*(font.getBestCmap() for font in fonts))
    signs = tab.evaluate(SIGNS)
    assert len(signs) > 10
    assert {family for family, _ in signs} == {"po-icons"} and {sign for _, sign in signs} <= known
    for font in fonts:
        assert not any("Font Awesome" in font["name"].getDebugName(n) for n in (1, 4, 6))
    assert tab.evaluate("document.fonts.check('900 1em po-icons')")


ACCESSIBLE = [
    "index", "15_value_based", "52a_demos", "errata", "bibliography", "api_trust_regions", "cheat_sheet",
    "exercises", "glossary",
]  # fmt: skip


def grave(tab) -> list:
    "Faults that axe calls serious or critical."
    faults = Axe().run(tab, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        (fault["id"], fault["nodes"][0]["html"])
        for fault in faults
        if fault["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", [*ACCESSIBLE, "404", "search"])
def test_nothing_shuts_a_reader_out(opened, name, mode):
    tab, _, _ = opened(name, mode)
    assert not grave(tab)


@pytest.mark.parametrize("name", ["14_advantage", "cheat_sheet"])
def test_nothing_shuts_a_reader_out_where_formulas_scroll(opened, name):
    tab, _, _ = opened(name, "light", viewport={"width": 375, "height": 700})
    tab.evaluate("typesetPage()")
    tab.wait_for_function("document.querySelector('article mjx-container[tabindex]')")
    assert not grave(tab)


CLIPPED = """() => [...document.querySelectorAll("article :is(pre, table, .math, img)")]
  .filter(node => node.offsetParent && node.getBoundingClientRect().right > innerWidth + 1)
  .map(node => node.textContent.slice(0, 60))"""


@pytest.mark.parametrize("name", ["15_value_based", "49_small_lm"])
def test_a_page_on_paper(opened, name):
    "Light, without buttons, open, and as wide as the paper."
    tab, _, _ = opened(name, "dark")
    tab.evaluate("typesetPage()")
    # The text of A4 between the margins, in CSS pixels.
    tab.set_viewport_size({"width": 672, "height": 980})
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    for gone in ".bd-header-article", "#pst-primary-sidebar", "button.copybtn", ".prev-next-footer":
        expect(tab.locator(gone).first).to_be_hidden()
    for proof in tab.locator("details.sd-dropdown").all():
        expect(proof.locator("p").last).to_be_visible()
    expect(tab.locator("div.solution p").last).to_be_visible()
    assert tab.evaluate(CLIPPED) == []
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


def test_printing_waits_for_formulas(browser, url):
    "Ctrl+P on a page that has just been opened."
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    tab.add_init_script("window.print = () => { late = !!document.querySelector('mjx-lazy'); }")
    tab.goto(f"{url}/15_value_based.html", wait_until="networkidle")
    assert tab.locator("mjx-lazy").count() > 0
    tab.keyboard.press("Control+p")
    tab.wait_for_function("'late' in window")
    assert tab.evaluate("late") is False
    context.close()


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.fixture(scope="module")
def pdf(site, browser, tmp_path_factory):
    "A book of two chapters."
    path = tmp_path_factory.mktemp("pdf") / "book.pdf"
    part = {"caption": "A part", "chapters": [{"file": "15_value_based"}]}
    make_pdf(browser, site, {"root": "14_advantage", "parts": [part]}, path)
    return PdfReader(path)


@pytest.fixture(scope="module")
def printed(pdf):
    "Its text, without what is between words."
    return squeezed("".join(page.extract_text() for page in pdf.pages))


def test_the_pdf_has_what_is_folded_and_no_raw_formula(pdf, printed):
    assert len(pdf.pages) > 40
    assert "Jensen’sinequality" in printed  # of a proof
    assert "Bythelawoftotalvariance" in printed  # of a solution
    assert not re.search(r"\\\(|\\\[|\\begin", printed)


def longest_line(name: str) -> str:
    "Of the code of definitions, which stands open."
    cells = read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells
    code = [c.source for c in cells if c.cell_type == "code" and c.source.startswith("#| export\n")]
    return max("\n".join(code).splitlines(), key=len)


def test_the_pdf_has_long_lines_of_code_to_their_end(printed):
    for name in "14_advantage", "15_value_based":
        line = longest_line(name)
        assert len(line) > 80 and squeezed(line) in printed


def test_the_pdf_has_numbers_and_ways_through_it(pdf):
    first, (part, chapter, *_) = pdf.outline[0], [pdf.outline[2], *pdf.outline[3]]
    assert first.title.startswith("14") and part.title == "A part"
    assert chapter.title.startswith("15")
    start = pdf.get_destination_page_number(chapter)
    label = pdf.page_labels[start]
    assert pdf.page_labels[:3] == ["i", "ii", "1"] and int(label) == start - 1
    assert pdf.pages[start].extract_text().strip().split()[0] == label
    assert f"Value-basedcontrol{label}" in squeezed(pdf.pages[1].extract_text())
    links = [note.get_object() for page in pdf.pages for note in page.get("/Annots", ())]
    assert not [link for link in links if "file:" in str(link.get("/A"))]
    crossing = [x for x in pdf.pages[start + 3]["/Annots"] if "/Dest" in x.get_object()]
    assert crossing


@pytest.mark.parametrize("name", ["10_verify", "15_value_based", "36_cartpole", "46_grpo", "ledger"])
def test_the_plain_text_of_a_page_is_whole(site, name):
    "All formulas with their numbers, all code and output."
    text = (site / f"{name}.md").read_text(encoding="utf-8")
    html = (site / f"{name}.html").read_text(encoding="utf-8")
    article = BeautifulSoup(html, "html.parser").find("article")
    formulas = re.findall(r"(?ms)^[ >]*\$\$\n.*?^[ >]*\$\$(?: \((.*?)\))?$", text)
    assert len(formulas) == len(article.select("div.math"))
    numbers = [number.text.rstrip("#") for number in article.select(".eqno")]
    assert numbers == [f"({number})" for number in formulas if number]
    blocks = [squeezed(block.text) for block in article.select("pre")]
    assert not [block for block in blocks if block not in squeezed(text)]


@pytest.mark.parametrize("name", toc_pages())
def test_the_plain_text_of_a_page_has_no_html(site, name):
    text = (site / f"{name}.md").read_text(encoding="utf-8")
    prose = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`\n]*`|\$[^$]*\$", "", text)
    assert text.startswith("# ")
    assert not re.search(r"</?(div|span|p|a|table|details|summary|img|svg)\b|\\\(", prose)
    assert text in (site / "llms-full.txt").read_text(encoding="utf-8")


def test_the_list_of_texts_has_every_page(site):
    lines = (site / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# po_book" and lines[2].startswith("> ")
    entry = re.compile(r"- \[.+\]\(https://\S+/(\w+)\.md\): \S.{20}")
    assert [entry.match(x)[1] for x in lines if x.startswith("- ")] == toc_pages()
    assert "## Foundations" in lines


RECORDS = {
    "12_mdp": [], "22_ppo": [], "45_rlhf": ["rlhf_beta", "rlhf_learnt"],
    "38_multi_agent": ["team_meeting", "team_spread"], "51_logs": ["broken_runs"],
}  # fmt: skip


@pytest.mark.parametrize("name, records", RECORDS.items())
def test_a_chapter_says_when_and_with_what_it_was_verified(site, name, records):
    page = BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    (line,) = page.select("article .po-verified")
    when, versions = r"20\d\d-\d\d-\d\d", r"po_book \S+, torch \S+, Python 3\.\d+\.\d+"
    assert re.match(rf"Last verified {when}: ran in [\d.]+ s with {versions} on \w", line.text)
    assert [link.text for link in line.find_all("a")] == records
    for record in records:
        assert re.search(rf"{record} \({when}\)", line.text)
    assert not line.find_next_sibling(["section", "p"])
