"Every cited work is in the bibliography, none is there for nothing, and each can be found."

import json
import re

import pytest
from conftest import ROOT
from pybtex.database import parse_file
from pybtex.plugin import find_plugin

ENTRIES = parse_file(ROOT / "references.bib").entries
ROLE = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")
# Proceedings, reports, theses, books and posts that have neither a DOI nor an arXiv id.
ONLY_AN_ADDRESS = {
    "blelloch1990", "greensmith2004", "huang2022", "kakade2001", "kakade2002", "kool2019",
    "liu2025collapse", "miles2026", "ng1999", "owen2013", "precup2000", "rummery1994",
    "schulman2020kl", "silver2014", "sutton2000", "vanhasselt2010", "watkins1989", "yao2025offpolicy",
}
ONLY_AN_ISBN = {"howard1960", "sutton2018"}


def pages():
    "Text of every page: all cells of the notebooks, and what is written in Markdown."
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield path.name, "".join(cell["source"])
    for path in sorted((ROOT / "nbs").glob("*.md")):
        yield path.name, path.read_text(encoding="utf-8")


def cited():
    "Each cited key and the first page that cites it."
    keys = {}
    for name, text in pages():
        for role in ROLE.findall(text):
            for key in role.split(","):
                keys.setdefault(key.strip(), name)
    return keys


def test_what_is_cited_is_there_and_what_is_there_is_cited():
    assert {key: page for key, page in cited().items() if key not in ENTRIES} == {}
    assert set(ENTRIES) - set(cited()) == set()


def where(fields):
    "The ways in which an entry says where its work is found."
    shown = {name: fields[name] for name in ("doi", "isbn", "url") if name in fields}
    if "eprint" in fields:
        assert fields["archiveprefix"] == "arXiv"
        shown["arXiv"] = fields["eprint"]
    address = re.search(r"\\url\{(.+)\}", fields.get("howpublished", ""))
    return shown | ({"url": address[1]} if address else {})


def is_isbn(text):
    "Thirteen digits with the right last one."
    weighted = sum(int(digit) * (1, 3)[i % 2] for i, digit in enumerate(text))
    return re.fullmatch(r"97[89]\d{10}", text) is not None and weighted % 10 == 0


FORMS = {
    "doi": re.compile(r"10\.\d{4,9}/\S+").fullmatch,
    "arXiv": re.compile(r"\d{2}(0[1-9]|1[0-2])\.\d{4,5}").fullmatch,
    "url": re.compile(r"https?://[^\s{}]+").fullmatch,
    "isbn": is_isbn,
}


@pytest.mark.parametrize("key", ENTRIES)
def test_an_entry_says_where_its_work_is_found(key):
    found = where(ENTRIES[key].fields)
    assert all(FORMS[kind](value) for kind, value in found.items()), found
    kinds = {"url"} if key in ONLY_AN_ADDRESS else {"isbn"} if key in ONLY_AN_ISBN else None
    assert set(found) == kinds if kinds else {"doi", "arXiv"} & set(found)


def test_the_year_of_an_arxiv_id_is_not_after_that_of_the_work():
    for key, entry in ENTRIES.items():
        if identifier := entry.fields.get("eprint"):
            assert 2000 + int(identifier[:2]) <= int(entry.fields["year"]), key


def test_no_two_entries_are_one_work():
    places = [where(entry.fields) for entry in ENTRIES.values()]
    everything = [(kind, x) for place in places for kind, x in place.items()]
    assert len(everything) == len(set(everything))
    titles = [re.sub(r"\W", "", entry.fields["title"]).lower() for entry in ENTRIES.values()]
    assert len(titles) == len(set(titles))


def test_a_reader_sees_where_a_work_is_found():
    "In the style in which nbs/bibliography.md asks for it."
    style = find_plugin("pybtex.style.formatting", "plain")()
    for formatted in style.format_entries(ENTRIES.values()):
        text = formatted.text.render(find_plugin("pybtex.backends", "plaintext")())
        for value in where(ENTRIES[formatted.key].fields).values():
            assert value in text, formatted.key
