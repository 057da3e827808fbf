"Looking things up: the API reference, names and terms that link, notation, the cheat sheet."

import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT, toc_pages

import api
import api_source
import terms

CHAPTERS = [name for name in toc_pages() if name[:2].isdigit()]
MODULES = [x for x in api.library().values()]
EVERY = [entry for found in api.entries().values() for entry in found]


@cache
def soup(path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def text_of(path) -> str:
    return path.read_text(encoding="utf-8")


def terms_on(path) -> list[str]:
    "Where the terms of a page lead, in their order."
    return re.findall(r'<a class="po-term[^"]*" href="glossary.html#([^"]*)"', text_of(path))


def prose(name: str) -> str:
    "The Markdown of a chapter."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")


def part_of(module: api_source.Module) -> str:
    return next(name for name, digit in api.PARTS.items() if module.page.startswith(digit))


LIBRARY = {
    "cli": "from po_book.train import train\n__all__ = ['main']\ndef main(): train(Base)\n"
           "from po_book.train import Base\n",
    "train": "from po_book.loss import loss\n__all__ = ['train', 'Base', 'alone']\n"
             "class Base:\n    size: int = 3  # of it\n    lam: float  # decay\n"
             "def train(kind): return loss\ndef alone(): return alone\n",
    "loss": "__all__ = ['loss', 'Heir', 'shown', 'Kept', 'STORE']\nfrom .train import Base\n"
            "# All of them.\nSTORE = {}\n"
            "# %% ../nbs/20_loss.ipynb #c0ffee\ndef _part(): return 1\n"
            "def loss(x: 'Base',\n *rest,\n eps: float = 1e-8,  # added\n): return _part()\n"
            "class Heir(Base):\n    size: int = 4\n"
            "    def __call__(self, x): 'Called.'\n    def _hidden(self): pass\n"
            "def shown(): return loss\nclass Kept: pass\nSTORE.update(kept=Kept)\n",
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    for name, text in LIBRARY.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return api_source.read_library(tmp_path)


def test_an_entry_is_what_the_source_says(small):
    entry = small["loss"].entry("loss")
    assert entry.signature.startswith("(x: Base, *rest, eps: float=1e-08)")
    assert [(x.name, x.type, x.default, x.meaning) for x in entry.arguments] == [
        ("x", "Base", None, ""), ("eps", "float", "1e-08", "added"), ("*rest", "", None, ""),
    ]  # fmt: skip
    heir = small["loss"].entry("Heir")
    assert heir.bases == ["Base"] and [x.name for x in heir.members] == ["__call__"]
    assert small["loss"].entry("STORE").docstring == "All of them."
    assert small["loss"].cell("loss") == "c0ffee"


def test_for_use_is_what_the_command_line_reaches(small):
    found = api_source.reached(small)
    assert {("cli", "main"), ("train", "train"), ("train", "Base"), ("loss", "loss"),
            ("loss", "_part"), ("loss", "Kept")} <= found  # fmt: skip
    assert not {("train", "alone"), ("loss", "shown"), ("loss", "Heir")} & found
    of_the_book = api.in_use()
    assert ("advantage", "gae") in of_the_book and ("train", "train") in of_the_book
    assert ("value_based", "td_control") not in of_the_book


def test_a_parameter_is_described_by_its_type_its_base_or_the_convention(small, monkeypatch):
    found = {"Base": [small["train"].entry("Base")]}
    monkeypatch.setattr(api, "entries", lambda: found)
    heir, loss = small["loss"].entry("Heir"), small["loss"].entry("loss")
    assert api.meaning(heir.arguments[0], heir) == "of it"
    assert api.meaning(loss.arguments[0], loss) == "`Base`"
    seed = api_source.Argument("seed", "int", None, "")
    assert "same random numbers" in api.meaning(seed, loss)


@pytest.mark.parametrize("entry", EVERY, ids=lambda x: f"{x.module}.{x.name}")
def test_every_name_and_every_parameter_is_described(entry):
    assert entry.docstring
    assert [x.name for x in entry.arguments if not api.meaning(x, entry)] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda x: x.name)
def test_every_public_name_has_an_entry_that_leads_to_its_cell(site, module):
    page = soup(site / f"{part_of(module)}.html")
    for name in module.public:
        entry, start = module.entry(name), page.find(id=f"po_book.{module.name}.{name}")
        body = start.find_next_sibling("dd")
        shown = start.get_text() + body.get_text()
        assert all(re.search(rf"\b{x.name.strip('*')}\b", shown) for x in entry.arguments)
        use = "for use" if (module.name, name) in api.in_use() else "for study"
        facts = body.select_one(".po-api-facts")
        assert facts.get_text().strip().startswith(use)
        chapter, source = (x["href"] for x in facts.select("a")[:2])
        file, anchor = chapter.split("#")
        assert file == f"{module.page}.html"
        _, cell = text_of(site / file).split(f'id="{anchor}"')
        code = re.sub(r"<[^>]*>", "", cell.split("</pre>")[0])
        assert re.search(rf"(?m)^((def|class) )?([A-Z]+, )*{name}\b", code)
        assert f"/po_book/{module.name}.py#L{entry.lines[0]}-" in source


def object_at(*names):
    return SimpleNamespace(objects={name: name for name in names})


def test_a_word_links_only_where_it_means_the_name(monkeypatch):
    every = {"a": [("one", "a")], "both": [("one", "both"), ("two", "both")], "kl": [("one", "kl")]}
    made = {name: [SimpleNamespace(module=m) for m, _ in found] for name, found in every.items()}
    monkeypatch.setattr(api, "entries", lambda: made)
    monkeypatch.setattr(api, "words", lambda: {"kl"})
    domain = object_at("po_book.one", "po_book.one.a", "po_book.one.both", "po_book.two.both",
                       "po_book.one.kl")  # fmt: skip

    def found(name, module="", **imports):
        place = api.resolve(domain, name, module, imports)
        return place and place[0]

    assert found("a") == "po_book.one.a" and found("po_book.one") == "po_book.one"
    assert found("one.a") == "po_book.one.a" and found("one") is None
    assert found("both") is None and found("both", "po_book.two") == "po_book.two.both"
    assert found("both", both="one") == "po_book.one.both"
    assert found("kl") is None and found("kl", kl="one") == "po_book.one.kl"
    assert found("unknown") is None


def test_names_in_backticks_link_to_their_entries(site):
    page = soup(site / "14_advantage.html").article
    links = [x for x in page.select("a[href^='api_']") if x.get_text() == "gae"]
    assert {x["href"] for x in links} == {"api_foundations.html#po_book.advantage.gae"}
    assert not page.select("h1 a[href^='api_'], h2 a[href^='api_'], h3 a[href^='api_'], a a")
    entry = soup(site / "api_foundations.html").find(id="po_book.advantage.gae")
    own = entry.find_next_sibling("dd").select("a[href$='#po_book.advantage.gae']")
    assert own == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_term_is_linked_once(site, name):
    found = terms_on(site / f"{name}.html")
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", ["14_advantage", "46_grpo"])
def test_a_term_is_linked_in_prose(site, name):
    links = soup(site / f"{name}.html").select("a.po-term")
    assert len(links) == len(terms_on(site / f"{name}.html")) > 10
    for link in links:
        assert link.find_parent("article") and link.find_parent("p")
        assert not link.find_parent(["h1", "h2", "h3", "h4", "code", "pre", "a"])
        assert not link.find_parent(class_="cell_output")


def test_every_term_is_met_in_the_chapter_that_its_definition_names(site):
    used = {name: set(terms_on(site / f"{name}.html")) for name in CHAPTERS}
    names = []
    for x in soup(site / "glossary.html").select("dl.glossary > *"):
        if x.name == "dt":
            names.append(x["id"])
            continue
        chapters = [link["href"].removesuffix(".html") for link in x.select("a")]
        assert chapters and all(set(names) & used[chapter] for chapter in chapters), names
        assert all(any(name in found for found in used.values()) for name in names), names
        names = []


def test_a_term_is_found_in_both_numbers_and_across_lines():
    found = re.compile(terms.pattern("trust policy"), re.I)
    assert found.fullmatch("Trust\npolicies") and not found.fullmatch("trust policing")


def rows_of_notation():
    text = (ROOT / "nbs" / "notation.md").read_text(encoding="utf-8").split("## One letter")[0]
    cells = re.findall(r"(?m)^\* - \$(.+?)\$\n  - .*\n  - .*\n  - (.*)\n  - \[\w+\]\((\w+)\.ipynb\)", text)
    assert len(cells) > 50
    return cells


@pytest.mark.parametrize("symbol, code, chapter", rows_of_notation())
def test_a_symbol_stands_in_its_chapter_and_its_name_in_the_library(symbol, code, chapter):
    text = re.sub(r"(?ms)^```.*?^```|`[^`]*`", "", prose(chapter))
    formulas = re.sub(r"\s", "", " ".join(a or b for a, b in re.findall(r"(?s)\$\$(.*?)\$\$|\$([^$]+)\$", text)))
    assert re.sub(r"\s", "", symbol) in formulas
    known = {x.name for entry in EVERY for x in entry.arguments} | {entry.name for entry in EVERY}
    known |= {f"{entry.name}.{x.name}" for entry in EVERY for x in [*entry.members, *entry.arguments]}
    assert [name for name in re.findall(r"`([^`]+)`", code) if name not in known] == []


def test_the_defaults_of_the_cheat_sheet_are_those_of_the_library():
    text = (ROOT / "nbs" / "cheat_sheet.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (`[A-Z].*?) \| (.*) \|$", text)
    found = 0
    for owners, settings in rows:
        for name, value in re.findall(r"`(\w+)=([^`]+)`", settings):
            defaults = [defaults_of(x).get(name) for x in re.findall(r"`(\w+)`", owners)]
            assert value in [str(float(x)) if "e" in x else x for x in defaults if x], name
            found += 1
    assert found > 12


def defaults_of(name: str) -> dict[str, str]:
    "Defaults of the fields of a class, inherited ones too."
    found = {}
    for entry in api.entries().get(name, []):
        for base in entry.bases:
            found |= defaults_of(base)
        found |= {x.name: x.default for x in entry.arguments if x.default}
    return found
