"""What the source of the library says of its public names.

Read from the modules as text, so that the book can be read without importing them: the
signature, the comment beside each parameter, the docstring, the place, and which names a
training run reaches.
"""

import ast
import io
import re
import tokenize
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

CELL = re.compile(r"# %% \.\./nbs/(\w+)\.ipynb #(\w+)")
QUOTED = re.compile(r"(?<=: |> )\"(\w+)\"")  # a type that is imported for checkers only
DOOR = "cli"  # the command line: what it reaches is for use


@dataclass(frozen=True)
class Argument:
    "A parameter of a function, or a field of a class."

    name: str            # with its stars
    type: str            # as it is written; empty if it is not
    default: str | None  # as it is written; None: it has none
    meaning: str         # the comment beside it; may be empty


@dataclass(frozen=True)
class Entry:
    "A public name, or a public member of one."

    module: str
    name: str
    kind: str            # function, class, data, method or property
    signature: str       # what follows the name
    arguments: list[Argument]
    docstring: str
    lines: tuple[int, int]
    bases: list[str] = field(default_factory=list)
    members: list["Entry"] = field(default_factory=list)


def is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__call__"


def written(node: ast.AST | None) -> str:
    "As code; a type that stands in quotes is written without them."
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        return node.value
    return ast.unparse(node).replace("'", '"') if node else ""


def defined(node: ast.stmt) -> list[str]:
    "Names that a statement defines."
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [x.id for target in targets if target for x in ast.walk(target) if isinstance(x, ast.Name)]


class Module:
    "One module of the library, as text."

    def __init__(self, path: Path):
        self.name, self.text = path.stem, path.read_text(encoding="utf-8")
        self.tree, self.lines = ast.parse(self.text), self.text.splitlines()
        self.docstring = ast.get_docstring(self.tree) or ""
        found = list(CELL.finditer(self.text))
        self.page = found[0][1] if found else ""
        self.cells = {self.text.count("\n", 0, x.start()) + 1: x[2] for x in found}
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.comments = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokens if token.type == tokenize.COMMENT
        }
        self.definitions = {name: node for node in self.tree.body for name in defined(node)}

    @cached_property
    def public(self) -> list[str]:
        node = self.definitions.get("__all__")
        return ast.literal_eval(node.value) if node else []

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        "Names of other modules of the library that this one takes, anywhere in it."
        found = [node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)]
        own = [x for x in found if x.level or (x.module or "").startswith("po_book.")]
        return {
            alias.asname or alias.name: ((node.module or "").removeprefix("po_book."), alias.name)
            for node in own for alias in node.names
        }

    def cell(self, name: str) -> str:
        "Id of the notebook cell that defines a name."
        line = self.definitions[name].lineno
        return self.cells[max(x for x in self.cells if x < line)]

    def comment(self, node: ast.AST) -> str:
        "What stands beside a parameter, or alone in the line above."
        above = self.lines[node.lineno - 2].strip()
        alone = self.comments.get(node.lineno - 1, "") if above.startswith("#") else ""
        return self.comments.get(node.end_lineno, "") or alone

    def arguments(self, node: ast.FunctionDef) -> list[Argument]:
        "Its parameters, without `self`."
        spec = node.args
        plain = spec.posonlyargs + spec.args
        values = [None] * (len(plain) - len(spec.defaults)) + spec.defaults + spec.kw_defaults
        stars = {id(spec.vararg): "*", id(spec.kwarg): "**"}
        every = list(zip(plain + spec.kwonlyargs, values))
        every += [(x, None) for x in (spec.vararg, spec.kwarg) if x]
        return [
            Argument(stars.get(id(x), "") + x.arg, written(x.annotation),
                     written(value) if value else None, self.comment(value or x))
            for x, value in every if x.arg != "self"
        ]

    def function(self, node: ast.FunctionDef, kind: str = "function") -> Entry:
        spec = deepcopy(node.args)
        spec.args = [x for x in spec.args if x.arg != "self"]
        result = f" -> {written(node.returns)}" if node.returns else ""
        decorators = {written(x) for x in node.decorator_list}
        if "property" in decorators:
            kind, signature = "property", written(node.returns)
        else:
            signature = QUOTED.sub(r"\1", f"({written(spec)}){result}")
        return Entry(self.name, node.name, kind, signature, self.arguments(node),
                     ast.get_docstring(node) or "", (node.lineno, node.end_lineno))

    def fields(self, node: ast.ClassDef) -> list[Argument]:
        "Its own public fields, and what its constructor takes."
        found = []
        for x in node.body:
            if isinstance(x, ast.AnnAssign) and is_public(x.target.id):
                value = written(x.value) if x.value else None
                found.append(Argument(x.target.id, written(x.annotation), value, self.comment(x)))
            if isinstance(x, ast.FunctionDef) and x.name == "__init__":
                found += self.arguments(x)
        return found

    def cls(self, node: ast.ClassDef) -> Entry:
        methods = [x for x in node.body if isinstance(x, ast.FunctionDef)]
        start = next((self.function(x, "method") for x in methods if x.name == "__init__"), None)
        bases = [written(x) for x in node.bases]
        public = [x for x in methods if is_public(x.name)]
        members = [replace(self.function(x, "method"), bases=bases) for x in public]
        return Entry(self.name, node.name, "class", start.signature if start else "",
                     self.fields(node), ast.get_docstring(node) or "",
                     (node.lineno, node.end_lineno), bases, members)

    def value(self, name: str, node: ast.stmt) -> Entry:
        "A constant or an alias; its comment is the docstring, or what an exercise asks for."
        kind = written(getattr(node, "annotation", None))
        said = self.comments.get(node.lineno) or self.comment(node)
        if not said or said.startswith("%%"):  # the line above begins the cell
            asked = [x.value for x in getattr(node.value, "keywords", ()) if x.arg == "asks"]
            said = ast.literal_eval(asked[0]) if asked else ""
        return Entry(self.name, name, "data", kind, [], said, (node.lineno, node.end_lineno))

    def entry(self, name: str) -> Entry:
        node = self.definitions[name]
        if isinstance(node, ast.FunctionDef):
            return self.function(node)
        return self.cls(node) if isinstance(node, ast.ClassDef) else self.value(name, node)


def mentioned(module: Module, node: ast.AST) -> set[tuple[str, str]]:
    "Names of the library that a piece of code uses."
    names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    own = {(module.name, x) for x in names & module.definitions.keys()}
    return own | {module.imports[x] for x in names & module.imports.keys()}


def reached(library: dict[str, Module]) -> set[tuple[str, str]]:
    """What the command line reaches: names that it uses, names that those use, and so on.

    What a module registers when it is loaded (a statement that defines nothing) counts.
    """
    todo = {(DOOR, name) for name in library[DOOR].definitions}
    for module in library.values():
        for node in module.tree.body:
            if isinstance(node, ast.Expr):
                todo |= mentioned(module, node)
    seen = set()
    while todo:
        place, name = todo.pop()
        node = library[place].definitions.get(name) if place in library else None
        if node and (place, name) not in seen:
            seen.add((place, name))
            todo |= mentioned(library[place], node)
    return seen


def read_library(folder: Path) -> dict[str, Module]:
    "Every module that has public names, in the order of the chapters."
    modules = [Module(path) for path in folder.glob("[a-z]*.py")]
    return {x.name: x for x in sorted(modules, key=lambda x: x.page) if x.public}
