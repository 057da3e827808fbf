"The ledger lists what checks and sentences say of every item, and misses none."

import json
import sys

import nbformat
import pytest
from bs4 import BeautifulSoup
from test_build import build, notebook

from conftest import ROOT

sys.path.insert(0, str(ROOT / "_ext"))
import ledger

KNOWN = {"S0.1": "OK", "S0.2": "WRONG", "S3.16a": "OK", "S3.16b": "OK", "S1.7": "OK", "S1.8": "OK"}


@pytest.mark.parametrize(
    "text, found",
    [
        ("S0.1, S0.2 corrected", ["S0.1", "S0.2"]),
        ("S3.16 (b)", ["S3.16b"]),
        ("S3.16b", ["S3.16b"]),
        ("S3.16", ["S3.16a", "S3.16b"]),
        ("system 48, S1.7 to S1.8", ["S1.7", "S1.8"]),
        ("S9.9 and nothing", []),
    ],
)
def test_items_that_a_text_names(text, found):
    assert ledger.items(text, KNOWN) == found


def checked(verdict, claim, evidence, source):
    kept = {"verdict": verdict, "claim": claim, "evidence": evidence, "source": source}
    return {"output_type": "display_data", "data": {}, "metadata": {"po_book": kept}}


def test_findings_are_checks_and_sentences_under_their_heading():
    page = nbformat.from_dict({"cells": [
        {"cell_type": "markdown", "source": "# T\n\nA. <!-- S1.7 -->\n\n## Part\n\nB. <!-- S0.1, S0.2 -->"},
        {"cell_type": "code", "outputs": [checked("refuted", "c", "gives\n 1", "S0.2")]},
        {"cell_type": "code", "outputs": [checked("holds", "d", "e", None)]},
    ]})  # fmt: skip
    found = dict[str, list]()
    for item, finding in ledger.findings("page", page, KNOWN):
        found.setdefault(item, []).append(finding)
    words = ledger.Finding("page", "Part", "", "", "")
    check = ledger.Finding("page", "Part", "refuted", "c", "gives 1")
    assert found == {
        "S1.7": [words._replace(section="T")], "S0.1": [words], "S0.2": [words, check],
    }  # fmt: skip
    assert ledger.told(found["S0.2"]) == [check]  # the sentence is beside its check
    assert ledger.told(found["S0.1"] * 2) == [words]


def test_a_page_lists_them_and_names_the_homeless(tmp_path):
    code = "from IPython.display import display\nkept = " + json.dumps(
        checked("refuted", "$x$ is | two", "gives `2`, right is `1`", "S0.2")["metadata"]
    )
    code += '\ndisplay({"text/plain": "."}, raw=True, metadata=kept)'
    chapter = notebook("%%markdown\n## A part\n\nSaid. <!-- S0.1 -->", code)
    counted = "# Index\n\n{checks}`refuted` and {checks}`holds`\n\n```{ledger} S0\n```\n"
    pages = {"index.md": counted, "chapter.ipynb": chapter,
             "errata.md": "# Errata\n\n```{ledger} S0\n:refuted:\n```\n"}  # fmt: skip
    result = build(tmp_path, pages)
    said = result.stdout + result.stderr
    homeless = {line.split()[-6] for line in said.splitlines() if "is named on no page" in line}
    assert result.returncode and {"S0.3", "S0.74"} <= homeless and not {"S0.1", "S0.2"} & homeless

    def rows(name):
        page = (tmp_path / "_build/html" / name).read_text("utf-8")
        table = BeautifulSoup(page, "html.parser").select_one(".po-ledger table")
        return [[cell.get_text(" ", strip=True) for cell in row.select("td")] for row in table.select("tr")]

    first, second = rows("index.html")[1:3]
    assert first == ["1", "imprecise", "in words", "Title : A part"]
    assert second[:2] == ["2", "right"] and second[2].startswith("refuted: ")
    assert "is | two · gives 2 , right is 1" in second[2]
    assert "<p>1 and 0</p>" in (tmp_path / "_build/html/index.html").read_text("utf-8")
    (only,) = rows("errata.html")[1:]
    assert only[0] == "2" and only[2] == "gives 2 , right is 1"
