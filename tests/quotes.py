"""Numbers that prose quotes from `results/`, each with what it is beside it, in a comment:

    DAPO is ahead by .03<!-- = mean(last("lm_methods", "DAPO") - last("lm_methods", "GRPO")) -->

A mark stands right behind a number, and holds an expression of the functions below. With
commas in it, it says what the last numbers before it are, in their order. A reader sees
no comment, and a number that is moved takes its mark along.
"""

import ast
import csv
import json
import re
from functools import cache
from itertools import pairwise

import numpy as np

from conftest import ROOT
from po_book.intervals import interval, probability_of_improvement

GRADES = "mean_return", "success"
WORDS = {
    word: str(n)
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
} | {"none": "0", "no": "0", "once": "1", "twice": "2", "both": "2", "twenty": "20"}
PARTS = {"half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}

BLANK = lambda part: " " * len(part[0])  # so that all else stays in its place
CODE = re.compile(r"`[^`]*`")
COMMENT = re.compile(r"<!--(.*?)-->", re.S)
NUMBER = re.compile(
    r"((?<![\w.,])[-+−])?(?<![\w.,])(\d[\d,]*(?:\.\d+)?|\.\d+)(\s?\\?%)?"
    rf"|\b({'|'.join([*WORDS, *PARTS])})\b",
    re.I,
)
CLOSES = "$*_ "  # what may stand between a number and its mark


@cache
def rows(record: str) -> list[dict[str, str]]:
    with open(ROOT / "results" / f"{record}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curves(record: str, variant: str, column: str | None) -> list[np.ndarray]:
    "What a column has, a seed after the other; without a column, its grade."
    column = column or next(name for name in GRADES if name in rows(record)[0])
    found: dict[str, list] = {}
    for row in rows(record):
        if row["variant"] == variant and row[column]:
            found.setdefault(row["seed"], []).append(float(row[column]))
    # Differences between two variants are within a seed, so all have the same.
    if not found or [*found] != [str(i) for i in range(len(found))]:
        raise ValueError(f"{variant} of {record} has seeds {[*found]} in {column}")
    return [np.array(x) for x in found.values()]


def each(of):
    "A function of a curve as one of a variant: an array, with a number for each seed."

    def function(record, variant, column=None, **how):
        return np.array([of(x, **how) for x in curves(record, variant, column)])

    return function


def scores(record, variant, column=None):
    "All of them, of all seeds."
    return np.concatenate(curves(record, variant, column))


def reached(record, variant, line, column=None, at="steps"):
    "For each seed, `at` of its first score of at least `line`; infinity without one."
    found = curves(record, variant, column), curves(record, variant, at)
    hits = [(x[y >= line], np.inf) for y, x in zip(*found, strict=True)]
    return np.array([[*x, never][0] for x, never in hits])


def below(record, variant, line, column=None):
    "For each seed, share of scores under the line, from the first that is not, or of all."
    found = curves(record, variant, column)
    return np.array([(x[np.argmax(x >= line) :] < line).mean() for x in found])


def seeds(record, variant):
    "How many."
    return len(curves(record, variant, None))


def cell(record, column, *row, n=0):
    "Number `n` in a column of a table, in the one row that has all of `row` in it."
    (found,) = [x for x in rows(record) if {*row} <= {*x.values()}]
    return float(re.findall(r"-?\d[\d.]*", found[column])[n])


def variants(record):
    "Their names."
    return list(dict.fromkeys(row["variant"] for row in rows(record)))


def setting(record, variant, name):
    "What its runs were made with."
    note = json.loads((ROOT / "results" / f"{record}.json").read_text("utf-8"))
    parts = [note["settings"][variant]]
    for part in parts:
        if name in part:
            return part[name]
        parts += [x for x in part.values() if isinstance(x, dict)]
    raise KeyError(name)


OF_RECORDS = {
    "first": each(lambda x: x[0]),
    "last": each(lambda x, k=1: x[-k:].mean()),  # mean of the last k scores
    "highest": each(np.max),
    "lowest": each(np.min),
    "whole": each(np.mean),  # mean of the curve
    "fall": each(lambda x: max(a - b for a, b in pairwise(x))),  # largest to the next
} | {f.__name__: f for f in (scores, reached, below, seeds, variants, cell, setting)}
VOCABULARY = (
    OF_RECORDS
    | {f.__name__: f for f in (interval, probability_of_improvement)}
    | {f.__name__: f for f in (min, max, abs, sum, len)}
    | {"mean": np.mean, "median": np.median, "round": np.round, "log": np.log, "exp": np.exp}
    | {"count": np.count_nonzero}  # in how many seeds it is so
)


def value(mark: str) -> object:
    "What the expression of a mark says of the records."
    names = {node.id for node in ast.walk(ast.parse(mark)) if isinstance(node, ast.Name)}
    if not names & OF_RECORDS.keys():
        raise ValueError("it names no record")
    return eval(mark, VOCABULARY | {"__builtins__": {}})


def fits(number: re.Match, x: float) -> bool:
    "Whether `x` is the number, at the digits that are shown."
    sign, digits, percent, word = number.groups()
    if (word or "").lower() in PARTS:
        return x > 0 and round(1 / x) == PARTS[word.lower()]
    digits = digits.replace(",", "") if digits else WORDS[word.lower()]
    shown = float(digits) * (-1 if sign in ("-", "−") else 1)
    places = len(digits.partition(".")[2])
    return abs((100 * x if percent else x) - shown) <= 0.5 * 10**-places + 1e-9


def comments(prose: str) -> list[tuple[str, list[re.Match]]]:
    "Each comment, and the numbers up to it; none if it stands right behind no number."
    found, plain = [], COMMENT.sub(BLANK, prose)
    for comment in COMMENT.finditer(prose):
        end = len(plain[: comment.start()].rstrip(CLOSES))
        numbers = [*NUMBER.finditer(plain, plain.rfind("\n\n", 0, end) + 1, end)]
        behind = numbers and numbers[-1].end() == end
        found.append((comment[1].strip(), numbers if behind else []))
    return found


def marks(prose: str) -> list[tuple[str, list[re.Match]]]:
    return [(text[1:].strip(), numbers) for text, numbers in comments(prose) if text[:1] == "="]


def complaint(mark: str, numbers: list[re.Match]) -> str:
    "What is wrong with a mark; empty if its numbers are what it says."
    try:
        found = value(mark)
        found = [float(x) for x in (found if isinstance(found, tuple) else (found,))]
    except Exception as error:  # of whatever kind, it is the mark's
        return f"{mark}: {error!r}"
    if len(numbers) < len(found):
        return f"{mark}: stands behind {len(numbers)} numbers, and has {len(found)}"
    wrong = [(n[0], x) for n, x in zip(numbers[-len(found) :], found) if not fits(n, x)]
    return "; ".join(f"{mark}: prose says {n}, the record {x:.6g}" for n, x in wrong)


SHOWS = re.compile(r"\b(?:recorded|recorded_table|recorded_finals|columns)\(")
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?!\.?\d)")


def beside(cells: list[dict]) -> list[str]:
    "Prose after a cell that shows a record, up to the next heading."
    found, near = [], False
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            near = near or bool(SHOWS.search(source)) and "def " not in source
        elif near:
            text, *heading = re.split(r"^#+ ", source, maxsplit=1, flags=re.M)
            found.append(text)
            near = not heading
    return found


def known(cells: list[dict]) -> set[float]:
    "Numbers in the code of a page, and in the settings of the records that it names."
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    notes = [ROOT / "results" / f"{name}.json" for name in set(re.findall(r'"(\w+)"', code))]
    texts = [code, *(note.read_text("utf-8") for note in notes if note.exists())]
    return {float(x) for x in re.findall(r"(?<![\w.])(?:\d+\.?\d*|\.\d+)", " ".join(texts))}


def unmarked(prose: str, known: set[float]) -> list[str]:
    "Decimals that no comment says anything of, and that are neither code nor known."
    said = set()
    for text, numbers in comments(prose):
        covers = ast.parse(text[1:].strip()).body[0].value if text[:1] == "=" else None
        n = len(covers.elts) if isinstance(covers, ast.Tuple) else 1
        said |= {number.start(2) for number in numbers[-n:]}
    plain = CODE.sub(BLANK, COMMENT.sub(BLANK, prose))
    found = [number for number in DECIMAL.finditer(plain) if number.start() not in said]
    return [number[0] for number in found if float(number[0]) not in known]
