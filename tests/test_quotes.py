"Numbers in prose beside a record are still what the record says."

import json

import numpy as np
import pytest
import quotes
from quotes import NUMBER, beside, complaint, fits, known, marks, unmarked, value

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RECORD = """\
variant,seed,steps,seconds,mean_return,length
a,0,10,1.0,1,3.0
a,0,20,2.0,5,
a,0,30,3.0,4,5.0
a,1,12,1.5,2,4.0
a,1,24,2.5,3,
a,1,36,3.5,3,6.0
b,0,10,1.0,6,1.0
b,1,12,1.0,2,1.0
"""
TABLE = 'model,of,"ms, min"\nsmall,theirs,4.5 (2.1 to 9.0)\nsmall,ours,1.5\n'


@pytest.fixture
def records(tmp_path, monkeypatch):
    "A record of two variants, and a table."
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "some.csv").write_text(RECORD)
    (tmp_path / "results" / "table.csv").write_text(TABLE)
    settings = {"a": {"lr": 0.5, "config": {"steps": 30}}}
    (tmp_path / "results" / "some.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.setattr(quotes, "ROOT", tmp_path)
    quotes.rows.cache_clear()
    yield
    quotes.rows.cache_clear()


def cells(path):
    return json.loads(path.read_text("utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_number_that_is_marked_is_that_of_its_record(path):
    prose = ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown"]
    found = [complaint(*mark) for text in prose for mark in marks(text)]
    assert not [*filter(None, found)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_number_beside_a_record_is_marked(path):
    given = known(cells(path))
    assert not [x for text in beside(cells(path)) for x in unmarked(text, given)]


def test_prose_beside_a_record_ends_at_a_heading():
    kinds = {"m": "markdown", "c": "code"}
    texts = "m before", 'c recorded("some")', "m a", "c 1 + 1", "m b\n\n## New\n\nc", "m d"
    page = [{"cell_type": kinds[text[0]], "source": [text[2:]]} for text in texts]
    assert beside(page) == ["a", "b\n\n"]


@pytest.mark.parametrize(
    "prose, found",
    [
        ("It is .5, as set.", []),
        ("It is 0.50, and .7.", [".7"]),
        ("It is **.7**<!-- = 1 -->, not 8.1<!-- S1.2 --> or $9.1$<!-- theirs -->.", []),
        ("from .2 to .3 in .4<!-- = a, b --> and .6 of them <!-- S1.2 -->", [".2", ".6"]),
        ("at -.7<!-- = a -->, -8.1 and 9.1 %<!-- = (a, b)[0] -->", ["8.1"]),
        ("In `code 0.3` of version 1.2.3 there are 12.", []),
    ],
)
def test_what_is_not_marked_is_seen(prose, found):
    assert unmarked(prose, {0.5}) == found


@pytest.mark.parametrize(
    "expression, expected",
    [
        ('first("some", "a")', [1, 2]),
        ('last("some", "a")', [4, 3]),
        ('last("some", "a", k=2)', [4.5, 3]),
        ('last("some", "a", "length")', [5, 6]),
        ('highest("some", "a")', [5, 3]),
        ('lowest("some", "a")', [1, 2]),
        ('whole("some", "a")', [10 / 3, 8 / 3]),
        ('fall("some", "a")', [1, 0]),
        ('scores("some", "a")', [1, 5, 4, 2, 3, 3]),
        ('last("some", "b") - last("some", "a")', [2, -1]),
        ('reached("some", "a", 4)', [20, np.inf]),
        ('reached("some", "a", 3, at="seconds")', [2, 2.5]),
        ('below("some", "a", 5)', [0.5, 1]),
        ('below("some", "a", 2)', [0, 0]),
        ('count(reached("some", "a", 4) < 99), seeds("some", "a")', [1, 2]),
        ('probability_of_improvement(last("some", "a"), last("some", "b")).share', [0.5]),
        ('[min(last("some", x)) for x in variants("some")]', [3, 2]),
        ('interval(last("some", "b"), last("some", "a")).estimate', [0.5]),
        ('cell("table", "ms, min", "small", "theirs")', [4.5]),
        ('cell("table", "ms, min", "theirs", n=2)', [9]),
        ('setting("some", "a", "lr")', [0.5]),
        ('setting("some", "a", "steps")', [30]),
    ],
)
def test_what_a_mark_says(records, expression, expected):
    assert np.array_equal(np.ravel(value(expression)), expected)


@pytest.mark.parametrize(
    "text, x, right",
    [
        (".031", 0.0314, True),
        (".031", 0.0316, False),
        (".03", 0.0316, True),
        ("-.08", -0.08, True),
        (".08", -0.08, False),
        ("−2.5", -2.46, True),
        ("16,702", 16702, True),
        ("16,700", 16702, False),
        ("64 %", 0.638, True),
        ("64%", 64, False),
        ("Nine", 9, True),
        ("nine", 10, False),
        ("no", 0, True),
        ("third", 0.35, True),
        ("third", 0.45, False),
        ("3", np.inf, False),
        ("3", np.nan, False),
    ],
)
def test_a_number_is_compared_at_its_digits(text, x, right):
    assert fits(NUMBER.fullmatch(text), x) == right


@pytest.mark.parametrize(
    "prose",
    [
        'It ends at 4<!-- = last("some", "a")[0] -->.',
        'ahead by **.5**<!-- = mean(last("some", "b") - last("some", "a")) -->',
        'from $-1$<!-- = min(last("some", "b") - last("some", "a")) --> on',
        'one of two<!-- = count(first("some", "a") > 1), seeds("some", "a") --> seeds',
        'from 3 to 4<!-- = min(last("some", "a")), max(last("some", "a")) --> in it',
        'a 1, a 2<!-- S1.2 --><!-- = first("some", "a")[1] -->',
    ],
)
def test_a_mark_that_is_right_is_let_through(records, prose):
    (mark,) = marks(prose)
    assert complaint(*mark) == ""


@pytest.mark.parametrize(
    "prose, why",
    [
        ('at 5<!-- = last("some", "a")[0] -->', "prose says 5, the record 4"),
        ("at 4<!-- = 2 + 2 -->", "it names no record"),
        ('4 seeds<!-- = last("some", "a")[0] -->', "stands behind 0 numbers"),
        ('4\n\n<!-- = last("some", "a")[0] -->', "stands behind 0 numbers"),
        ('4<!-- = last("some", "a") -->', "TypeError"),
        ('4<!-- = last("some", "c")[0] -->', "has seeds []"),
        ('4<!-- = last("none", "a")[0] -->', "FileNotFoundError"),
        ('4<!-- = open(last("some", "a")) -->', "NameError"),
        ('4<!-- = 4 if ("some") else 0 -->', "it names no record"),
    ],
)
def test_a_mark_that_is_wrong_is_seen(records, prose, why):
    (mark,) = marks(prose)
    assert why in complaint(*mark)
