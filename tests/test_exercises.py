"Every exercise has a kind, stars and a place in the index."

import json
import re
import sys

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from test_build import build, notebook

from po_book.grade import EXERCISES

sys.path.insert(0, str(ROOT / "_ext"))
import exercise_index

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
KINDS = {
    "Write it yourself", "Predict, then run", "Find the bug", "Derive", "Compute", "Think", "Run",
}  # fmt: skip


def listed(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return list(exercise_index.exercises(cells))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_exercise_says_its_kind_and_difficulty(path):
    for one in listed(path):
        parts = exercise_index.TITLE.fullmatch(one.title)
        assert parts and parts[1] in KINDS, one
        if one.graded and one.label.startswith("ex-write-"):
            assert parts[3] == "★" * EXERCISES[one.graded].stars, one


# The answers to exercises are no chapters to be exercised in.
CHAPTERS = [p for p in NOTEBOOKS if p.name[0].isdigit() and not p.stem.endswith("_exercises")]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_asks_to_write_to_predict_and_to_find(path):
    kinds = {exercise_index.TITLE.fullmatch(one.title)[1] for one in listed(path)}
    assert {"Write it yourself", "Predict, then run", "Find the bug"} <= kinds
    text = "\n".join("".join(x["source"]) for x in json.loads(path.read_text("utf-8"))["cells"])
    _, *asked = re.split(r"\{exercise\} (?=Write it yourself)", text)
    skeletons = [re.split(r"\{exercise\} |\{solution\} ", x)[0] for x in asked]
    assert any("..." in x and "{dropdown} Hint" in x for x in skeletons)


def test_every_exercise_that_is_graded_is_asked_for_in_a_chapter():
    text = "".join(p.read_text("utf-8") for p in CHAPTERS)
    assert not [name for name in EXERCISES if f'grade(\\"{name}\\"' not in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_skeleton_has_the_arguments_that_it_is_called_with(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "\n    ...\n" in source and "grade(" in source:
            (called, own), (defined, given) = (
                re.search(pattern, source, re.S).groups()
                for pattern in (r'grade\("(\w+)", (\w+)\)', r"def (\w+)\((.*?)\):")
            )
            assert own == defined
            wanted = re.findall(r"\w+", EXERCISES[called].signature)[1:]
            assert re.findall(r"\w+", given) == wanted


def test_every_label_is_given_once():
    labels = [one.label for path in NOTEBOOKS for one in listed(path)]
    assert len(labels) == len(set(labels)) >= 300


def test_the_index_lists_what_there_is_and_names_what_has_no_stars(tmp_path):
    first = "%%markdown\n:::{exercise} Find the bug: a sum ★★\n:label: ex-sum\nWhere?\n:::"
    second = "%%markdown\n:::{exercise} Nothing said\n:label: ex-none\nWhat?\n:::"
    chapter = notebook(first, 'grade = print\ngrade("gae", None)', second)
    index = "# Index\n\nA page.\n\n```{exercise-index}\n```\n"
    result = build(tmp_path, {"index.md": index, "14_advantage.ipynb": chapter})
    assert result.returncode
    said = "ex-none has no kind and difficulty in its title: 'Nothing said'"
    assert said in result.stdout + result.stderr
    page = (tmp_path / "_build/html/index.html").read_text("utf-8")
    shown = BeautifulSoup(page, "html.parser").select_one(".po-exercises")
    assert shown.p.text == "1 exercises: 1 Find the bug. 1 are graded."
    (row,) = shown.select("tbody tr")
    texts = [cell.get_text(" ", strip=True) for cell in row.select("td")]
    assert texts == ["14 Title", "a sum", "Find the bug", "★★", "gae"]
    assert row.select_one("a[href*='#ex-sum']")
