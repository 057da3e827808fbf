"""Which code a page folds, decided from the code itself.

A reader meets definitions and small examples open; imports, helpers, the code of checks
and of figures are one click away, so that nobody has to mark them by hand.
"""

import ast
import re

CHECKS = {"holds", "refuted", "exceeds", "at_most", "beware"}
CANVAS = {"plt", "ax", "axes", "fig"}
DRAWING = {"spread_curves", "book_style"}

# The last name of what a set-up statement calls: `torch.set_default_dtype`, `book_style`.
SET_UP = re.compile(
    "set_.*|use|seed|manual_seed|default_rng|Generator|Random|filterwarnings|simplefilter"
    "|disable_.*|book_style"
)


def parse(code: str) -> ast.Module | None:
    "The tree of a cell; None for what is not plain Python, such as `%pip`."
    try:
        return ast.parse(code)
    except SyntaxError:
        return None


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _last_name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _first_name(function: ast.expr) -> str:
    "The `axes` of `axes[0].plot`, and of `axes.flat[0].plot`."
    while isinstance(function, ast.Attribute | ast.Subscript | ast.Call):
        function = function.func if isinstance(function, ast.Call) else function.value
    return getattr(function, "id", "")


def _is_import(statement: ast.stmt) -> bool:
    "An import, or imports for type checkers only."
    if isinstance(statement, ast.If) and _last_name(statement.test) == "TYPE_CHECKING":
        return all(map(_is_import, statement.body))
    return isinstance(statement, ast.Import | ast.ImportFrom)


def only_imports(tree: ast.Module) -> bool:
    return bool(tree.body) and all(map(_is_import, tree.body))


def only_set_up(tree: ast.Module) -> bool:
    "Whether a cell imports, seeds and sets options, beside naming constants."

    def sets_up(value: ast.expr | None) -> bool:
        if not isinstance(value, ast.Call) or _first_name(value.func) in CANVAS:
            return False
        return bool(SET_UP.fullmatch(_last_name(value.func)))

    def allowed(statement: ast.stmt) -> bool:
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            return isinstance(value, ast.Constant) or sets_up(value)
        return _is_import(statement) or isinstance(statement, ast.Expr) and sets_up(value)

    def decides(statement: ast.stmt) -> bool:
        return _is_import(statement) or sets_up(getattr(statement, "value", None))

    return all(map(allowed, tree.body)) and any(map(decides, tree.body))


def checks(tree: ast.Module) -> bool:
    "Whether a cell calls one of the checks of `verify`."
    return any(_last_name(call.func) in CHECKS for call in _calls(tree))


def draws(tree: ast.Module) -> bool:
    "Whether a cell calls something of `plt`, of a figure or of its axes."
    functions = [call.func for call in _calls(tree)]
    on_canvas = any(_first_name(f) in CANVAS for f in functions if not isinstance(f, ast.Name))
    return on_canvas or any(_last_name(function) in DRAWING for function in functions)


def folded(directives: dict[str, str], code: str) -> str | None:
    """What the code of a cell is called while it is folded; None if it stays open.

    `code-fold: true` and `code-fold: false` decide against the rules.
    """
    by_hand = directives.get("code-fold:")
    tree = parse(code)
    not_run = {"slow", "cuda"} & directives.keys() or directives.get("eval:") == "false"
    if by_hand == "false" or tree is None or not_run and by_hand is None:
        return "the code" if by_hand == "true" else None
    if only_imports(tree):
        return "the imports"
    if not {"export", "exports"} & directives.keys():
        if only_set_up(tree):
            return "the set-up"
        if "exporti" in directives:
            return "the helper"
        if {"label:", "fig-cap:", "fig-alt:"} & directives.keys() or draws(tree):
            return "the code of the figure"
        if checks(tree):
            return "the check"
    return "the code" if by_hand == "true" else None
