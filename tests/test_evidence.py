"What the pages' checks compare, read from their code without running it."

import ast
import csv
import json
import re
from functools import cache
from typing import NamedTuple

import pytest
from cell_rules import CHECKS

from conftest import ROOT

NOTEBOOKS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))

# An item, with a letter where it has parts: "S1.18", "S3.16 (c)" or "S3.16c"; "corrected"
# says that the check shows what should stand there.
ITEM = re.compile(r"(S\d\.\d+)(?: \(([a-z])\)|([a-z]))?( corrected)?")


class Check(NamedTuple):
    kind: str    # "holds", "refuted", ...
    claim: str   # the claim as it is written in the code
    sides: list  # the two compared, as syntax trees
    source: str  # where the claim stands; empty if nowhere, or not written out


def read(call: ast.Call, kind: str) -> Check:
    source = {k.arg: k.value for k in call.keywords}.get("source")
    text = source.value if isinstance(source, ast.Constant) else ""
    return Check(kind, ast.unparse(call.args[0]), call.args[1:3], text or "")


@cache
def checks(name: str) -> list[Check]:
    found = []
    for cell in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
            kinds = [getattr(call.func, "id", "") for call in calls]
            found += [read(c, k) for c, k in zip(calls, kinds) if k in CHECKS and c.args]
    return found


@cache
def verdicts() -> dict[str, str]:
    with open(ROOT / "_ext" / "verdicts.csv", encoding="utf-8") as file:
        return dict(csv.reader(file))


def blames_rightly(kind: str, item: str, corrected: bool) -> bool:
    "Whether a check of this kind may name this item as its source."
    verdict = verdicts().get(item)
    wrong = verdict in ("WRONG", "IMPRECISE")
    if kind == "refuted":
        return wrong and not corrected
    return verdict is not None and wrong == corrected


def named(expression: ast.expr) -> str:
    "The last name of what is called."
    function = getattr(expression, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def literal(expression: ast.expr) -> bool:
    "Whether it is made of numbers alone."
    parts = ast.Constant, ast.List, ast.Tuple, ast.UnaryOp, ast.BinOp
    rest = ast.operator, ast.unaryop, ast.expr_context
    return all(isinstance(node, parts + rest) for node in ast.walk(expression))


def yes_or_no(expression: ast.expr) -> bool:
    asks = named(expression) in ("all", "any", "allclose", "equal", "isinstance")
    return asks or isinstance(expression, ast.Compare | ast.BoolOp)


def truth(expression: ast.expr) -> bool:
    "Whether it makes a number of a yes or no, which `holds` cannot see when it runs."
    if named(expression) not in ("float", "int", "double"):
        return False
    inner = expression.args or [getattr(expression.func, "value", expression.func)]
    return yes_or_no(inner[0])


def ordered(side: ast.expr, other: ast.expr) -> bool:
    "Whether it is a minimum or maximum of the other side, which makes an order of both."
    if named(side) not in ("minimum", "maximum", "min", "max", "clamp"):
        return False
    return ast.dump(other) in map(ast.dump, [*side.args, side.func])


def cannot_fail(check: Check) -> str:
    "Why a check shows nothing; empty if it may."
    if len(check.sides) < 2:  # handed over as one starred pair
        return ""
    a, b = check.sides
    if ast.dump(a) == ast.dump(b):
        return "two sides the same"
    if literal(a) and literal(b):
        return "two literals"
    if check.kind in ("holds", "refuted", "beware"):
        if ordered(a, b) or ordered(b, a):
            return "an order as an equality"
        if truth(a) or truth(b):
            return "a truth value"
    return ""


@pytest.mark.parametrize(
    "code, why",
    [
        ("holds('', x - y, x - y)", "two sides the same"),
        ("holds('', 2.0, [1 + 1])", "two literals"),
        ("refuted('', torch.minimum(f(0), f(1)), f(1))", "an order as an equality"),
        ("holds('', float(a < b), 1)", "a truth value"),
        ("holds('', (a < b).double(), 1)", "a truth value"),
        ("holds('', int((a < b).all()), 1)", "a truth value"),
        ("holds('', (a < b).sum(), 0)", ""),
        ("holds('', *pair)", ""),
        ("holds('', f(2), 3)", ""),
        ("exceeds('', x.max(), 3)", ""),
    ],
)
def test_what_cannot_fail_is_seen(code, why):
    call = ast.parse(code).body[0].value
    assert cannot_fail(read(call, named(call))) == why


@pytest.mark.parametrize(
    "kind, item, corrected, right",
    [
        ("refuted", "S0.13", False, True),
        ("refuted", "S1.53", False, True),  # imprecise
        ("refuted", "S4.34", False, False),
        ("refuted", "S0.13", True, False),
        ("holds", "S4.34", False, True),
        ("holds", "S0.61", False, True),  # right with a convention
        ("holds", "S0.13", False, False),
        ("holds", "S0.13", True, True),
        ("holds", "S4.34", True, False),
        ("at_most", "S0.13", False, False),
        ("holds", "S9.99", False, False),
    ],
)
def test_what_a_check_may_say_of_a_source(kind, item, corrected, right):
    assert blames_rightly(kind, item, corrected) == right


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_source_is_refuted_where_it_is_wrong_and_holds_where_it_is_right(name):
    found = set()
    for check in checks(name):
        for item, part, letter, corrected in ITEM.findall(check.source):
            if not blames_rightly(check.kind, item + (part or letter), bool(corrected)):
                found.add(f"{check.kind} {item}{part or letter}")
    assert not found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_check_can_fail(name):
    assert not {check.claim: why for check in checks(name) if (why := cannot_fail(check))}
